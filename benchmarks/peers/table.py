"""The peers, one row each. Their modules answer `--serve` as described in child.py."""

from dataclasses import dataclass

DIFFUSERS = "trt_wan.benchmarks.peers.diffusers_peers"


@dataclass(frozen=True)
class PeerRow:
    name: str
    title: str  # in tables and plots
    module: str
    arguments: tuple[str, ...] = ()


PEERS = {
    row.name: row
    for row in (
        PeerRow("diffusers_eager", "diffusers", DIFFUSERS, ("eager",)),
        PeerRow("diffusers_compiled", "diffusers compiled", DIFFUSERS, ("compiled",)),
        PeerRow("diffusers_fp8", "diffusers FP8 compiled", DIFFUSERS, ("fp8",)),
        PeerRow("lightx2v", "LightX2V", "trt_wan.benchmarks.peers.lightx2v"),
    )
}
