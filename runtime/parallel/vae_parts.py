"""The native VAE cut into parts, one for each rank of a pipeline.

A part is a range of a network's steps. Parts are cut where little lives (`Cut`), at the same places in the
networks of the first chunk and of later ones, so that a cache is written and read by one rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

from trt_wan.engines.contract import Network, Tensor
from trt_wan.runtime.segments.native.vae import At, Cut, Vae

Balance = tuple[float, int, tuple[int, ...]]  # seconds of the longest part, bytes handed over, cuts


def common_cuts(vae: Vae, other: Vae) -> list[Cut]:
    """The cuts of `vae` that `other` has too."""
    names = {cut.name for cut in other.cuts}
    return [cut for cut in vae.cuts if cut.name in names]


def balanced(seconds: Sequence[float], nbytes: Sequence[int], bandwidth: float, count: int) -> Balance:
    """The cuts whose longest part is the shortest; of equals, those with the fewest bytes. Cut i, where
    `nbytes[i]` are handed over, lies between pieces i and i + 1 of `seconds`. A part lasts no less than the
    copy to the next one.
    """
    assert count <= len(seconds), f"{len(seconds)} pieces in {count} parts"

    @cache
    def best(start: int, parts: int) -> Balance:
        if parts == 1:
            return sum(seconds[start:]), 0, ()
        found = []
        for i in range(start, len(seconds) - parts + 1):
            longest, handed, cuts = best(i + 1, parts - 1)
            own = max(sum(seconds[start : i + 1]), nbytes[i] / bandwidth)
            found.append((max(own, longest), handed + nbytes[i], (i, *cuts)))
        return min(found)

    return best(0, count)


def part_bounds(vae: Vae, names: Iterable[str]) -> list[range]:
    """The steps of each part, cut at the cuts with these names."""
    places = {cut.name: cut.step for cut in vae.cuts}
    return [range(*ends) for ends in pairwise([0, *(places[name] for name in names), len(vae.steps)])]


def part_network(network: Network, vae: Vae, steps: range) -> Network:
    """The contract of a part: it has the tensors of `network` that the part's steps read or write."""
    arguments = (a for step in vae.steps[steps.start : steps.stop] for a in step.arguments)
    used = {a.name for a in arguments if isinstance(a, At)}

    def kept(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in tensors if tensor.name in used)

    name = part_name(network.name)
    inputs, weights, outputs = map(kept, (network.inputs, network.weights, network.outputs))
    return replace(network, name=name, inputs=inputs, weights=weights, outputs=outputs)


def part_name(network: str) -> str:
    return f"{network}_part"
