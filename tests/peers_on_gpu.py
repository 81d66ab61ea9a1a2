"""Ranks on the GPUs of this machine, a process each, and what tests let them compute."""

import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import ml_dtypes
import numpy as np

from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module
from trt_wan.runtime.parallel.peer_memory import PeerMemory
from trt_wan.runtime.parallel.peer_sequence import PeerSequence, block_bytes, flags_of
from trt_wan.runtime.parallel.ranks import Links, Ranks
from trt_wan.runtime.parallel.shards import Shards

BF16 = np.dtype(ml_dtypes.bfloat16)
SECONDS = 30.0

# `mix` stands for attention: every result needs tokens of all ranks, and numpy computes the same bits.
SOURCE = r"""
// With `places` tokens of the own rank are elsewhere (contracts/attention.py).
extern "C" __global__ void mix(bf16* out, const bf16* q, const bf16* k, const bf16* v, i64 heads, i64 tokens,
                               i64 channels, const bf16* own_q, const bf16* own_k, const bf16* own_v,
                               const i64* places) {
    EACH(i, heads * tokens * channels) {
        const i64 c = i % channels, h = i / channels % heads, t = i / channels / heads;
        auto at = [&](const bf16* all, const bf16* own, i64 t) {
            if (!places || t % places[0] / places[1] != places[2])
                return all + (h * tokens + t) * channels + c;
            const i64 row = t / places[0] * places[1] + t % places[0] % places[1];
            return own + (h * places[3] + row) * channels + c;
        };
        const float sum = __fadd_rn(load(at(q, own_q, t)), load(at(k, own_k, tokens - 1 - t)));
        bf16* to = out + i;
        if (places) {
            const i64 rank = t % places[0] / places[1], own = places[2];
            const i64 row = t / places[0] * places[1] + t % places[0] % places[1];
            to = rank == own ? (bf16*)places[6] + (row * places[4] + places[5] + h) * channels + c
                             : out + (((rank - (rank > own)) * places[3] + row) * heads + h) * channels + c;
        }
        store(to, __fadd_rn(sum, load(at(v, own_v, (t * 7 + 3) % tokens))));
    }
}
extern "C" __global__ void spin(i64 cycles) {
    const i64 start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def gpu_count() -> int:
    with suppress(Exception):  # without a driver: of many classes
        from cuda.bindings import runtime

        error, count = runtime.cudaGetDeviceCount()
        return 0 if int(error) else int(count)
    return 0


class PipeRanks(Ranks):
    """Without memory to share: `gather` is not for them."""

    def __init__(self, rank: int, count: int, sockets: dict[int, Connection]) -> None:
        super().__init__(rank, count, Links(sockets, ()) if sockets else None, SECONDS)
        self.sockets = sockets


class Processes:
    """A process for each rank. Functions get a Gpu, the ranks and the arguments."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = {pair: context.Pipe() for pair in itertools.combinations(range(count), 2)}
        self.controls: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(count):
            sockets = {
                sum(pair) - rank: ends[pair.index(rank)] for pair, ends in pairs.items() if rank in pair
            }
            control, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, other, sockets), daemon=True)
            process.start()
            other.close()
            self.controls.append(control)
            self.processes.append(process)
        for ends in pairs.values():
            for end in ends:
                end.close()

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        for control in self.controls:
            control.send((function, arguments))

    def result(self, rank: int, seconds: float = SECONDS) -> Any:
        """Raises RuntimeError with a rank's traceback, TimeoutError, or EOFError."""
        if not self.controls[rank].poll(seconds):
            raise TimeoutError(f"rank {rank} has no result in time")
        good, value = self.controls[rank].recv()
        if not good:
            raise RuntimeError(f"rank {rank}: {value}")
        return value

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """The results of all ranks. Raises as `result` does, and at once where a rank has failed."""
        self.send(function, *arguments)
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        while missing := [rank for rank in range(len(self.controls)) if rank not in found]:
            ready = wait([self.controls[rank] for rank in missing], max(0.0, end - time.monotonic()))
            here = [rank for rank in missing if self.controls[rank] in ready]
            found |= {rank: self.result(rank, 0.0) for rank in here or missing}
        return [found[rank] for rank in range(len(self.controls))]

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


def _serve(rank: int, count: int, control: Connection, sockets: dict[int, Connection]) -> None:
    gpu: Any = None
    while True:
        try:
            function, arguments = control.recv()
        except EOFError:
            os._exit(0)
        try:
            gpu = gpu or Gpu(rank)
            answer = True, function(gpu, PipeRanks(rank, count, sockets), *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        control.send(answer)


def kernels_of(gpu: Gpu) -> Module:
    return gpu.once(SOURCE, lambda: Module(gpu.device, SOURCE, ("mix", "spin")))


def spin(gpu: Gpu, cycles: int) -> None:
    kernels_of(gpu).launch(gpu.stream, "spin", 1, 1, np.int64(cycles))


def mix(gpu: Gpu, q: Any, k: Any, v: Any, *own: Any) -> DeviceArray:
    """`own` are the further inputs of attention to rows."""
    heads, tokens, channels = q.shape
    rows = 8 * own[0].shape[1] if own else tokens  # of up to 9 ranks
    out = gpu.empty((rows, heads * channels), BF16)
    addresses = out.address, q.address, k.address, v.address
    numbers = *map(np.int64, (heads, tokens, channels)), *([x.address for x in own] or [0] * 4)
    kernels_of(gpu).launch(gpu.stream, "mix", 512, THREADS, *addresses, *numbers)
    return out


def copied(gpu: Gpu, array: Any) -> DeviceArray:
    """Of one that is valid until the next call."""
    whole = gpu.empty(array.shape, array.dtype)
    gpu.copy(whole.address, array.address, whole.nbytes, gpu.stream)
    return whole


def mixed(q: Any, k: Any, v: Any) -> Any:
    tokens = q.shape[1]
    wide = [x.astype(np.float32) for x in (q, k, v)]
    sums = wide[0] + wide[1][:, ::-1] + wide[2][:, (np.arange(tokens) * 7 + 3) % tokens]
    return sums.astype(BF16).transpose(1, 0, 2).reshape(tokens, -1)


def check_numbers(gpu: Gpu, ranks: Any, shards: Shards, kernels: bool = False, calls: int = 6) -> None:
    """Calls of attend, split and join in a row, with ranks that are late by turns, against numpy."""
    tokens = shards.slots * shards.slot_tokens
    gpu.reserve(256 << 20)
    rng, late = np.random.default_rng(7), np.random.default_rng(ranks.rank)
    size = block_bytes(shards, BF16, tokens * 48 * 4)
    memory = PeerMemory(gpu, ranks, size, flags_of(shards), kernels=kernels)
    sequence = PeerSequence(gpu, ranks.rank, shards, memory, BF16)
    try:
        assert memory.by_kernels or not kernels
        got, want = [], []
        for call in range(calls):
            shape = 3, shards.heads, tokens, shards.head_dim
            q, k, v = rng.standard_normal(shape, np.float32).astype(BF16)
            x = rng.standard_normal((tokens, 48), np.float32)
            rows = [
                shards.split(each.transpose(1, 0, 2), ranks.rank).transpose(1, 0, 2) for each in (q, k, v)
            ]
            if late.random() < 0.5:
                spin(gpu, int(late.integers(5_000_000)))
            given: Any = [gpu.upload(np.ascontiguousarray(each)) for each in rows]
            attention: Any = lambda *qkv: mix(gpu, *qkv)  # noqa: E731
            got.append(copied(gpu, sequence.attend(attention, *given)))
            want.append(shards.split(mixed(q, k, v), ranks.rank))
            if call % 3 == 1:
                part: Any = sequence.split(gpu.upload(x))  # type: ignore[arg-type]
                got.append(part)
                want.append(shards.split(x, ranks.rank))
                for _ in range(2):
                    got.append(copied(gpu, sequence.join(part)))
                    want.append(x)
        for i, (array, expected) in enumerate(zip(got, want, strict=True)):
            bits = np.asarray(array).view(f"u{expected.dtype.itemsize}")
            wrong = np.flatnonzero(bits != np.ascontiguousarray(expected).view(bits.dtype))
            assert not wrong.size, f"result {i}: {wrong.size} of {bits.size} differ, the first at {wrong[0]}"
    finally:
        sequence.close()


_WAITING: dict[str, Any] = {}


def open_waiting(gpu: Gpu, ranks: Any, shards: Shards, kernels: bool) -> None:
    """`wait_for_lost` goes on with this."""
    gpu.reserve(64 << 20)
    memory = PeerMemory(gpu, ranks, block_bytes(shards, BF16), flags_of(shards), kernels=kernels)
    _WAITING["sequence"] = PeerSequence(gpu, ranks.rank, shards, memory, BF16)


def wait_for_lost(gpu: Gpu, ranks: Any, shards: Shards) -> tuple[float, str]:
    """Rank 0 attends with others that never do, and enqueues work until the queue is full. Returns the time
    when its wait has ended, and what went wrong. The others sleep until they are killed.
    """
    import threading
    import time

    if ranks.rank:
        time.sleep(600)
    sequence = _WAITING.pop("sequence")

    def watch() -> None:
        with suppress(EOFError, OSError):
            ranks.sockets[1].recv_bytes()
        sequence.memory.poison()

    threading.Thread(target=watch, daemon=True).start()
    shape = shards.heads, shards.slots * shards.share, shards.head_dim
    given: Any = [gpu.empty(shape, BF16) for _ in range(3)]
    attention: Any = lambda *qkv: mix(gpu, *qkv)  # noqa: E731
    problem = ""
    try:
        sequence.attend(attention, *given)
        for _ in range(3000):  # CUDA queues about a thousand
            spin(gpu, 10)
        sequence.attend(attention, *given)
        gpu.sync()
    except Exception as error:
        problem = repr(error)
    ended = time.monotonic()
    sequence.close()
    return ended, problem
