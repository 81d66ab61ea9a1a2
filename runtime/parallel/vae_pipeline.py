"""The native VAE over several GPUs, a part of its layers on each, as a pipeline over the chunks of a clip.

Rank N-1 has the first layers and rank 0 the last ones, so decoded frames are on rank 0. A rank runs its part
for a chunk, copies what lives at the cut into the next rank's scratch, and goes on with the next chunk in its
other scratch. Caches stay with their layers. Kernels and their order are those of one GPU, so the bits are.

All ranks run the same chunks of the same clips in the same order. Runs are numbered from 1 over all of them;
run n uses scratch n % 2 everywhere, and its number is the value of three flags of each rank:

    DATA    the input of run n has arrived                      (set by rank + 1)
    DONE    run n has left the next rank's scratch              (set by rank - 1)
    RESULT  the latent of an encoded chunk is in its slot       (set by rank 0)

The host never waits, except for latents. A rank enqueues run n of encoding only when it has read latent
n - SLOTS, and a latent needs all ranks' parts, so slot n % SLOTS is free when rank 0 writes it.

Predicted for H200s and 20 chunks of 832x480, from 22.5 ms of decoding and 15.0 of encoding a chunk on one
(docs/log.md), divided by the convolutions' rates and the passes' bytes, and 350 GB/s between GPUs. 40 % of
decoding is at full size, in six convolutions of 1.3 ms each, so no layer limits eight parts.

    ranks                      1          2                  4                  8
    decode, longest part       22.5 ms    11.4               5.8                3.2
    handed over a chunk                   307 MB             77 to 613 MB       38 to 613 MB
    decode, a window           0.44 s     0.24               0.14               0.095
    encode, longest part       15.0 ms    7.9                4.3                2.5
    encode, a clip             0.29 s     0.16               0.10               0.072

Measured on one and two: decode 0.452 and 0.252 s, encode 0.293 and 0.163; parts of 10.3 and 9.9 ms to decode.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.contract import Network, Tensor
from trt_wan.errors import TrtWanError
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.checked import cuda, cuda_core
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.executors import Array
from trt_wan.runtime.parallel.peer_memory import PeerMemory
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.vae_parts import balanced, common_cuts, part_bounds, part_network
from trt_wan.runtime.segments.native.vae import Cut, Vae
from trt_wan.runtime.segments.segment import Segment

DATA, DONE, RESULT = FLAGS = range(3)
ROUNDS = 4  # each layer is timed so often
SLOTS = 32  # latents that a rank may leave unread: more than a window of 77 frames has

Connect = Callable[[int, int], PeerMemory]  # takes a size in bytes and a number of flags


@dataclass(frozen=True)
class Measured:
    """The seconds between a network's cuts, and the bytes a second that a rank copies to the next one."""

    seconds: Sequence[float]
    bandwidth: float


@dataclass(frozen=True)
class Divided:
    """How a half is divided among the ranks, in the order of its layers."""

    seconds: tuple[float, ...]  # each part's, for a chunk
    cuts: tuple[str, ...]
    handed: tuple[int, ...]  # bytes at each cut, a chunk
    bandwidth: float


class VaePipeline:
    """The parts of one rank, at one size. Give `segments` to the executor, and `networks` to the model."""

    def __init__(
        self,
        gpu: Gpu,
        ranks: Ranks,
        vaes: Mapping[str, Vae],
        networks: Mapping[str, Network],
        connect: Connect,
        measured: Mapping[str, Measured] | None = None,
    ) -> None:
        """All ranks make theirs at the same time, from the VAE's four networks. `connect` makes this rank's
        PeerMemory. Rank 0 measures the layers for all, a tenth of a second, where nothing is given. Raises
        what `connect` raises, MemoryShort and RankLost.
        """
        self.rank, self.count, self._gpu = ranks.rank, ranks.count, gpu
        self.takes, self.makes = self.rank == self.count - 1, self.rank == 0
        self.runs = 0
        self.networks: dict[str, Network] = {}
        self.segments: dict[str, Segment] = {}
        self.divided: dict[str, Divided] = {}  # by half
        self._scratch = max(vae.scratch_bytes for vae in vaes.values())
        _, self._slot = laid_out({"": _nbytes(networks["vae_encode_next"].outputs[0])})
        self._memory = connect(2 * self._scratch + SLOTS * self._slot, len(FLAGS))
        self._own = self._memory.address(self.rank)
        self._stream = gpu.device.create_stream()  # copies to the next rank
        self._left: list[Any] = [None, None]  # events: each scratch's last contents are there
        for half in ("encode", "decode"):
            pair = vaes[f"vae_{half}_next"], vaes[f"vae_{half}_first"]
            cuts = common_cuts(*pair)
            row = networks[f"vae_{half}_next"]
            figures = measured[half] if measured else self._measured(ranks, pair[0], row, cuts)
            divided = self.divided[half] = _divided(cuts, figures, self.count)
            for chunk, vae in zip(("next", "first"), pair, strict=True):
                self._open(networks[f"vae_{half}_{chunk}"], vae, divided.cuts)

    @property
    def nbytes(self) -> int:
        """Bytes of this GPU."""
        return self._memory.size

    def abandon(self) -> None:
        """Ends all waits: another rank is lost."""
        self._memory.poison()

    def close(self) -> None:
        """Call when all ranks have enqueued all their parts, or after `abandon`. Waits for copies."""
        with suppress(TrtWanError), cuda_core():
            self._stream.sync()
        self._memory.close()
        with suppress(TrtWanError), cuda_core():
            self._stream.close()

    def latent(self, run: int, shape: tuple[int, ...]) -> Array:
        """The latent of an encoded chunk, by the number of its run. Waits for it."""
        self._memory.wait(RESULT, run, self._gpu.stream)
        return np.asarray(self._gpu.view(self._own + self._place(run), shape, np.float32))

    def run(self, part: "Part", addresses: Mapping[str, int]) -> None:
        """Enqueues a part for the next chunk."""
        self.runs += 1
        run, memory, compute = self.runs, self._memory, self._gpu.stream
        scratch = run % 2 * self._scratch
        if self._left[run % 2] is not None:
            compute.wait(self._left[run % 2])
        if not self.takes:
            memory.wait(DATA, run, compute)
        part.vae.enqueue_steps(part.steps, addresses, self._own + scratch)
        if self.makes and part.latent_bytes:
            self._tell(run, addresses["latent"], part.latent_bytes)
        self._stream.wait(compute.record())
        if not self.makes:
            if run > 2:
                memory.wait(DONE, run - 2, self._stream)
            to = memory.address(self.rank - 1)
            for offset, size in part.handed:
                at = scratch + offset
                self._gpu.copy(to + at, self._own + at, size, self._stream)
            memory.signal(self.rank - 1, DATA, run, self._stream)
        if not self.takes:
            memory.signal(self.rank + 1, DONE, run, self._stream)
        self._left[run % 2] = self._stream.record()

    def _tell(self, run: int, latent: int, size: int) -> None:
        """Copies a latent to all other ranks."""
        stream = self._gpu.stream
        for rank in range(1, self.count):
            self._gpu.copy(self._memory.address(rank) + self._place(run), latent, size, stream)
            self._memory.signal(rank, RESULT, run, stream)

    def _place(self, run: int) -> int:
        return 2 * self._scratch + run % SLOTS * self._slot

    def _open(self, network: Network, vae: Vae, names: Sequence[str]) -> None:
        """Opens this rank's part of a network that is cut at the cuts `names`."""
        place = self.count - 1 - self.rank  # in the order of the layers
        steps = part_bounds(vae, names)[place]
        handed: list[tuple[int, int]] = []
        if not self.makes:
            (cut,) = (cut for cut in vae.cuts if cut.name == names[place])
            handed = [(vae.offset(at), size) for at, size in cut.live]
        contract = part_network(network, vae, steps)
        latents = [_nbytes(tensor) for tensor in contract.outputs if tensor.name == "latent"]
        self.networks[contract.name] = contract
        self.segments[contract.name] = Part(self, vae, steps, handed, sum(latents))

    def _measured(self, ranks: Ranks, vae: Vae, network: Network, cuts: Sequence[Cut]) -> Measured:
        """Rank 0's figures, on all ranks."""
        figures = b""
        if self.makes:
            places = [0, *(cut.step for cut in cuts), len(vae.steps)]
            bounds = [range(*ends) for ends in pairwise(places)]
            largest = max(cut.nbytes for cut in cuts)
            addresses = self._own, self._memory.address(1)
            figures = json.dumps(_measure(self._gpu, vae, network, bounds, largest, *addresses)).encode()
        return Measured(*json.loads(ranks.exchange(figures)[0]))


@dataclass(frozen=True)
class Part:
    """A segment for a part of a network. Its scratch is the pipeline's."""

    pipeline: VaePipeline
    vae: Vae
    steps: range
    handed: Sequence[tuple[int, int]]  # where in the scratch, and bytes
    latent_bytes: int  # that it makes

    scratch_bytes = 0

    def start(self, scratch: int) -> None:
        pass

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        self.pipeline.run(self, addresses)

    def settle(self) -> None:
        pass


def open_pipeline(
    gpu: Gpu,
    segments: Mapping[str, Segment],
    networks: Mapping[str, Network],
    ranks: Ranks,
    connect: Connect,
) -> VaePipeline | None:
    """A pipeline of the segments and contracts of one size. None, on all ranks, where a network of the VAE is
    not computed by our kernels.
    """
    vaes = {name: segment for name in VAE if isinstance(segment := segments[name], Vae)}
    return VaePipeline(gpu, ranks, vaes, networks, connect) if len(vaes) == len(VAE) else None


def _divided(cuts: Sequence[Cut], figures: Measured, count: int) -> Divided:
    _, _, chosen = balanced(figures.seconds, [cut.nbytes for cut in cuts], figures.bandwidth, count)
    ends = [0, *(i + 1 for i in chosen), len(figures.seconds)]
    seconds = tuple(sum(figures.seconds[start:stop]) for start, stop in pairwise(ends))
    names, handed = tuple(cuts[i].name for i in chosen), tuple(cuts[i].nbytes for i in chosen)
    return Divided(seconds, names, handed, figures.bandwidth)


def _measure(
    gpu: Gpu, vae: Vae, network: Network, bounds: Sequence[range], handed: int, scratch: int, other: int
) -> tuple[list[float], float]:
    """The seconds of some steps each, and the bytes a second of a copy of `handed` bytes to another rank.

    The shortest of some rounds counts, for weights may be loaded meanwhile. Times do not depend on numbers:
    all tensors are the same memory.
    """
    tensors = *network.inputs, *network.weights, *network.outputs
    memory = gpu.allocate(max(map(_nbytes, tensors)))
    addresses = {tensor.name: int(memory.handle) for tensor in tensors}
    rounds = []
    for _ in range(ROUNDS):  # the first loads kernels and waits for the host
        marks = [_mark(gpu)]
        for steps in bounds:
            vae.enqueue_steps(steps, addresses, scratch)
            marks.append(_mark(gpu))
        gpu.copy(other, scratch, handed, gpu.stream)
        marks.append(_mark(gpu))
        rounds.append(marks)
    gpu.sync()
    *seconds, copying = map(min, zip(*(map(_elapsed, marks, marks[1:]) for marks in rounds), strict=True))
    memory.close(gpu.stream)
    return seconds, handed / copying


def _mark(gpu: Gpu) -> Any:
    from cuda.bindings import runtime

    event = cuda(runtime.cudaEventCreate())
    cuda(runtime.cudaEventRecord(event, gpu.handle))
    return event


def _elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks that are reached; frees the first."""
    from cuda.bindings import runtime

    milliseconds = cuda(runtime.cudaEventElapsedTime(start, end))
    cuda(runtime.cudaEventDestroy(start))
    return float(milliseconds) / 1e3


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
