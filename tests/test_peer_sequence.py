"""Sequence parallelism over peer memory without GPUs: the numbers of plain attention, in every order in
which the streams of all ranks may run (late_peers.py).
"""

import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from late_peers import LateGpu, LateMemory, Peers, at
from peers_on_gpu import PipeRanks, Processes

from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.kernels import compile_source, read_source
from trt_wan.runtime.parallel import peer_memory
from trt_wan.runtime.parallel.peer_sequence import PeerSequence, block_bytes, flags_of
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.shards import Shards

ARENA = 1 << 20
HEAD = 4  # float32: 16 bytes


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    source = read_source("trt_wan.runtime.parallel", "beside.cu")
    return CpuKernels(source, tmp_path_factory.mktemp("kernels"))


def attention(q: Any, k: Any, v: Any) -> Any:
    """[heads, tokens, channels] to [tokens, heads·channels], head by head: the same bits in any group."""
    heads = []
    for one, other, values in zip(q, k, v, strict=True):
        scores = np.exp(one @ other.T - 4)
        heads.append(scores @ values / scores.sum(1, keepdims=True))
    return np.concatenate(heads, axis=1)


def attend_to_rows(shape: tuple[int, ...], places: list[int], out: Any) -> None:
    """As contracts/attention.py says, from the addresses of its inputs."""
    heads, tokens, channels = shape
    slot_tokens, share, own, rows, all_heads, first, address = (int(x) for x in at(places[6], (7,), np.int64))
    slots, inside = np.divmod(np.arange(tokens), slot_tokens)
    ranks, row = np.divmod(inside, share)
    row += slots * share
    mine = ranks == own
    whole = [at(place, shape, np.float32).copy() for place in places[:3]]
    for array, place in zip(whole, places[3:6], strict=True):
        assert not array[:, mine].any()
        array[:, mine] = at(place, (heads, rows, channels), np.float32)[:, row[mine]]
    attended = attention(*whole).reshape(tokens, heads, channels)
    at(address, (rows, all_heads, channels), np.float32)[row[mine], first : first + heads] = attended[mine]
    behind = (ranks - (ranks > own)) * rows + row
    out.reshape(-1, heads, channels)[behind[~mine]] = attended[~mine]


class Job:
    """What all ranks compute: three calls of attend, with a join and a split behind the second."""

    def __init__(self, shards: Shards, seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens = shards.slots * shards.slot_tokens
        self.shards = shards
        self.whole = rng.uniform(-1, 1, (3, 3, shards.heads, tokens, shards.head_dim)).astype(np.float32)
        self.x = rng.uniform(-1, 1, (2, tokens, 3)).astype(np.float32)
        self.attended = [attention(*qkv) for qkv in self.whole]

    def enqueue(self, gpu: Any, rank: int, sequence: PeerSequence) -> dict[str, Any]:
        """Returns the results by name, which come when the streams run."""
        results: dict[str, Any] = {}

        def keep(name: str, array: Any) -> None:
            place, shape, kind = array.address, array.shape, array.dtype
            gpu.stream.enqueue(lambda: results.update({name: at(place, shape, kind).copy()}))

        def attend(*given: Any) -> Any:
            shape, places = given[0].shape, [array.address for array in given]
            heads, tokens, channels = shape
            others = (self.shards.ranks - 1) * self.shards.slots * self.shards.share
            out = gpu.empty((others if given[3:] else tokens, heads * channels), np.float32)
            place, out_shape = out.address, out.shape

            def work() -> None:
                result = at(place, out_shape, np.float32)
                if places[3:]:
                    return attend_to_rows(shape, places, result)
                np.copyto(result, attention(*(at(address, shape, np.float32) for address in places)))

            gpu.stream.enqueue(work)
            return out

        for call, qkv in enumerate(self.whole):
            rows = (self.shards.split(each.transpose(1, 0, 2), rank).transpose(1, 0, 2) for each in qkv)
            keep(f"attended {call}", sequence.attend(attend, *(gpu.upload(each) for each in rows)))
            gpu.upload(np.full(ARENA // 8, np.nan, np.float32))  # over all that is free again
            if call == 1:
                for i, x in enumerate(self.x):
                    joined: Any = sequence.join(sequence.split(gpu.upload(x)))
                    keep(f"joined {i}", joined)
        keep("split", sequence.split(gpu.upload(self.x[0])))
        return results

    def check(self, rank: int, results: dict[str, Any]) -> None:
        for call, whole in enumerate(self.attended):
            want = self.shards.split(whole, rank)
            np.testing.assert_array_equal(results[f"attended {call}"], want, f"rank {rank}, call {call}")
        for i, x in enumerate(self.x):
            np.testing.assert_array_equal(results[f"joined {i}"], x, f"rank {rank}, join {i}")
        np.testing.assert_array_equal(results["split"], self.shards.split(self.x[0], rank))


def compute(
    job: Job, kernels: CpuKernels, seed: int, *, one_queue: bool = False, blind: bool = False
) -> None:
    shards = job.shards
    size = block_bytes(shards, np.float32, shards.slots * shards.slot_tokens * 12)
    peers = Peers(kernels, shards.ranks, size, flags_of(shards), one_queue=one_queue, blind=blind)
    results, sequences = [], []  # the tables of a sequence live as long as it does
    for rank in range(shards.ranks):
        gpu: Any = LateGpu(peers, ARENA)
        memory: Any = LateMemory(peers, rank, gpu)
        sequences.append(PeerSequence(gpu, rank, shards, memory, np.float32))
        results.append(job.enqueue(gpu, rank, sequences[-1]))
    peers.run(seed)
    for rank, given in enumerate(results):
        job.check(rank, given)


# Ranks, slots, tokens of a slot, heads, channels, groups. The last five have ranks that lack tokens or heads.
CASES = [
    Shards(1, 2, 3, 2, HEAD, (1, 1)),
    Shards(2, 3, 4, 4, HEAD),
    Shards(2, 3, 5, 4, HEAD, (1, 1)),
    Shards(2, 2, 5, 8, HEAD, (1, 3)),
    Shards(2, 2, 4, 10, HEAD, (1, 3, 1)),
    Shards(4, 2, 6, 12, HEAD, (2, 1)),
    Shards(2, 2, 3, 3, HEAD, (1, 1)),
    Shards(2, 2, 3, 9, HEAD, (2, 3)),
    Shards(3, 2, 7, 4, HEAD, (1, 1)),
    Shards(3, 2, 7, 10, HEAD, (1, 3)),
    Shards(4, 3, 5, 2, HEAD),
]
CASES += [replace(shards, to_rows=True) for shards in CASES if shards.is_even]
CASES += [Shards(3, 2, 9, 9, HEAD, (1, 2), True), Shards(4, 2, 4, 12, HEAD, (1, 1, 1), True)]


@pytest.mark.parametrize("shards", CASES, ids=lambda shards: "-".join(map(str, vars(shards).values())))
def test_attention_is_that_of_one_gpu_in_any_order(kernels: CpuKernels, shards: Shards) -> None:
    job = Job(shards, seed=shards.ranks)
    for seed in range(40):
        compute(job, kernels, seed)


@pytest.mark.parametrize("to_rows", [False, True])
@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_streams_may_share_a_queue_of_the_hardware(kernels: CpuKernels, ranks: int, to_rows: bool) -> None:
    job = Job(Shards(ranks, 2, 12 if to_rows else 5, 12, HEAD, to_rows=to_rows), seed=0)
    for seed in range(10):
        compute(job, kernels, seed, one_queue=True)


@pytest.mark.parametrize("to_rows", [False, True])
def test_without_flags_the_numbers_are_wrong(kernels: CpuKernels, to_rows: bool) -> None:
    """So the orders that are tried find a missing wait."""
    job, wrong = Job(Shards(2, 3, 4, 4, HEAD, (1, 1), to_rows), seed=0), 0
    for seed in range(10):
        try:
            compute(job, kernels, seed, blind=True)
        except AssertionError:
            wrong += 1
    assert wrong >= 5


def test_pages_are_shared_and_their_file_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(peer_memory, "SHARED", tmp_path)
    barrier, given, maps = threading.Barrier(2), [b""] * 2, dict[int, Any]()

    class Ranks:
        count = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def exchange(self, payload: bytes) -> list[bytes]:
            given[self.rank] = payload
            barrier.wait(10)
            answer = list(given)
            barrier.wait(10)
            return answer

    def open_pages(rank: int) -> None:
        ranks: Any = Ranks(rank)
        maps[rank] = peer_memory._shared_pages(ranks, 5000)

    threads = [threading.Thread(target=open_pages, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    maps[0][4999] = 7
    assert maps[1][4999] == 7 and not maps[1][0] and not list(tmp_path.iterdir())


class LazyKernels:
    """Flags by kernels, each loaded when it is first launched. This waits for the whole GPU, so it never ends
    while a kernel waits for a flag that comes later: then `stuck` is set. `deaf`: no kernel sees a flag.
    """

    def __init__(self, deaf: bool) -> None:
        self.deaf, self.stuck = deaf, False
        self.loaded, self.waiting = set[str](), list[Any]()

    def launch(self, stream: Any, name: str, grid: int, threads: int, flag: int, value: Any) -> None:
        self.stuck |= name not in self.loaded and bool(self.waiting)
        self.loaded.add(name)
        now = at(flag, (1,), np.uint32)
        if name == "set_flag" and not self.stuck:
            now[0] = value
        if name == "wait_flag" and now[0] < value:
            self.waiting.append((now, value))

    def record(self) -> Any:
        return self

    @property
    def is_done(self) -> bool:
        return not self.deaf and not self.stuck and all(now[0] >= value for now, value in self.waiting)


@pytest.mark.parametrize("deaf", [False, True])
def test_kernels_are_loaded_before_one_waits(monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    """On an H200 the kernel that sets the flag was loaded while the other waited for it. Then closing raised
    BufferError, as an array of the shared pages was still in use.
    """
    monkeypatch.setattr(peer_memory, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(peer_memory, "_registered", lambda pages: pages.ctypes.data)
    monkeypatch.setattr(peer_memory.PeerMemory, "_take", lambda memory, ranks, size: None)
    kernels = LazyKernels(deaf)
    stream = SimpleNamespace(record=kernels.record, sync=lambda: None)
    gpu: Any = SimpleNamespace(once=lambda key, make: kernels, copies=stream, loads=stream, sync=lambda: None)
    ranks: Any = SimpleNamespace(rank=0, count=1, exchange=lambda payload: [payload])
    if deaf:
        with pytest.raises(EnvironmentBroken, match="no stream of a GPU sees"):
            peer_memory.PeerMemory(gpu, ranks, 1, 3, kernels=True)
        return
    memory = peer_memory.PeerMemory(gpu, ranks, 1, 3, kernels=True)
    assert memory.by_kernels and kernels.loaded == {"set_flag", "wait_flag"} and not kernels.stuck
    memory.close()


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_the_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    code = bytes(compile_source(peer_memory.SOURCE, capability).code)
    for name in peer_memory.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


def test_a_failed_rank_is_told_while_another_waits() -> None:
    """The processes of GPU tests hung, and told nothing, when a rank other than 0 failed."""
    processes = Processes.__new__(Processes)
    processes.controls, others = zip(*(Pipe() for _ in range(2)), strict=True)  # type: ignore[assignment]
    others[1].send((False, "no such attribute"))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1: no such attribute"):
        processes.call(print, seconds=30)
    assert time.monotonic() - start < 10
    others[0].send((True, "first"))
    others[1].send((True, "second"))
    assert processes.call(print) == ["first", "second"]
    with pytest.raises(TimeoutError):
        processes.call(print, seconds=0.1)
    assert isinstance(PipeRanks(0, 1, {}), Ranks)  # networks may use all functions of ranks
