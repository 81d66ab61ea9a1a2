"""The peers, one row each: their modules answer `--serve` as child.py says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerRow:
    name: str
    module: str
    title: str  # in tables and plots


PEERS = {
    row.name: row
    for row in (
        PeerRow("diffusers_eager", "trt_wan.benchmarks.peers.diffusers_eager", "diffusers"),
        PeerRow("diffusers_compiled", "trt_wan.benchmarks.peers.diffusers_compiled", "diffusers compiled"),
        PeerRow("diffusers_fp8", "trt_wan.benchmarks.peers.diffusers_fp8", "diffusers FP8 compiled"),
        PeerRow("lightx2v", "trt_wan.benchmarks.peers.lightx2v", "LightX2V"),
    )
}
