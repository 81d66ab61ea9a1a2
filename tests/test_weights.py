"""Weights on a GPU that runs late: every byte that a network sees, order, memory, errors.

The kernels' arithmetic is numpy's here; tests/test_weights_on_gpu.py proves the kernels themselves.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from late_gpu import LateGpu, at
from quantised_weights import FORMS, QuantisedTensors, with_quantised_block
from safetensors.numpy import save_file
from weight_oracle import E4M3, contents, rotated

from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import QUANTISED, Network, Part, Tensor, scale_name
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import PRECISIONS, Precision
from trt_wan.engines.shape import Plan
from trt_wan.errors import MemoryShort, WeightsError
from trt_wan.runtime.device.arena import ALIGNMENT
from trt_wan.runtime.opening.residency import BLOCK
from trt_wan.runtime.weights import convert, sources
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.on_device import AHEAD, LEAVING, DeviceWeights
from trt_wan.runtime.weights.pack import Pack, nbytes
from trt_wan.runtime.weights.random import RandomWeights, random_moments
from trt_wan.runtime.weights.sources import FLOAT32_BYTES, Batch, FileSource, Piece, Place, RandomSource
from trt_wan.runtime.weights.stored import Stored, Tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
KINDS: dict[str, Any] = {"bf16": BF16, "fp16": np.float16, "fp32": np.float32, "e5m2": E5M2}
Parts = dict[Part, Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A scaled-FP8 transformer and the other parts in 16 bits."""
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_weights(folder, 3)
    return load_weights([folder], {})[1]


@pytest.fixture(scope="module")
def of_kind(tiny: Parts, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Parts]:
    """The same with a transformer whose matrices have another type, and channels of different sizes."""

    def made(kind: str) -> Parts:
        tensors = dict[str, Any]()
        for name in tiny["transformer"]:
            if "scale" in name:
                continue
            values = tiny["transformer"][name]
            if tiny["transformer"].entry(name).dtype == "F8_E4M3":
                values = values * np.linspace(0.1, 3, len(values), dtype=np.float32)[:, None]
                if kind == "e5m2":
                    tensors[f"{name.removesuffix('weight')}scale_weight"] = np.array(0.37, np.float32)
            tensors[name] = values.astype(KINDS[kind])
        tensors["blocks.1.ffn.0.weight"][5] = 0
        if kind == "e5m2":  # only matrices may be FP8 in a file with scales
            tensors = {
                name: values
                if values.ndim == 0 or f"{name.removesuffix('weight')}scale_weight" in tensors
                else tiny["transformer"][name]
                for name, values in tensors.items()
            }
        path = tmp_path_factory.mktemp(kind) / "transformer.safetensors"
        save_file(tensors, path)
        return {**tiny, "transformer": Checkpoint(path)}

    return made


@pytest.fixture(scope="module")
def quantised(tiny: Parts, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Parts]:
    """The same with the matrices of block 0 in a form that is decoded."""

    def made(kind: str) -> Parts:
        path = tmp_path_factory.mktemp("quantised") / "file"
        return {**tiny, "transformer": cast(Any, with_quantised_block(tiny["transformer"], path, kind))}

    return made


def packs_of(precision: Precision, *names: str) -> list[Pack]:
    table = networks(TINY, Plan(64, 48, 5, precision))
    chosen = [table[name] for name in names] if names else list(table.values())
    return [Pack.of(network, n) for network in chosen for n in range(network.repeats)]


def blocks(precision: Precision = "fp8") -> list[Pack]:
    """In the order of a step."""
    table = networks(TINY, Plan(64, 48, 5, precision))
    return [Pack.of(table[name], n) for n in range(TINY.transformer.layers) for name in BLOCK]


class Job:
    """Binds packs as an executor does, and compares the bytes that each kernel would see."""

    def __init__(self, gpu: LateGpu, weights: DeviceWeights, parts: Any = None) -> None:
        self.gpu, self.weights, self.parts = gpu, weights, parts
        self.seen = dict[tuple[str, int], bytes]()
        self.uses = self.checked = 0
        self._wanted = dict[tuple[str, int], dict[str, bytes]]()

    def use(self, pack: Pack, whole: bool = True) -> None:
        arrays = self.weights.bind(pack.network, pack.n)
        assert set(arrays) == {tensor.name for tensor in pack.network.weights}
        start = min((array.address for array in arrays.values()), default=0)
        assert {name: array.address - start for name, array in arrays.items()} == dict(pack.offsets)
        self.uses += 1
        self.gpu.stream.enqueue(lambda: self.check(pack, arrays))
        if whole:
            self.weights.used(pack.network, pack.n)

    def check(self, pack: Pack, arrays: Any) -> None:
        found = {name: at(array.address, array.nbytes).tobytes() for name, array in arrays.items()}
        if self.parts is not None:
            if pack.key not in self._wanted:
                self._wanted[pack.key] = contents(pack, self.parts[pack.network.part])
            for name, wanted in self._wanted[pack.key].items():
                assert found[name] == wanted, f"{pack.key} {name}"
        together = b"".join(found.values())
        assert self.seen.setdefault(pack.key, together) == together, f"{pack.key} changed"
        self.checked += 1

    def end(self) -> None:
        self.gpu.stream.sync()
        assert self.checked == self.uses
        self.weights.close()
        assert not self.gpu.live, "memory is left"
        assert not any(t.name.startswith(("weights", "reader", "page-lock")) for t in threading.enumerate())


def job(gpu: LateGpu, parts: Any, passing: set[str] | None = None) -> Job:
    weights = DeviceWeights(cast(Any, gpu), FileSource(parts))
    weights.plan([], passing or ())
    return Job(gpu, weights, parts)


restless = pytest.mark.parametrize(("seed", "chance"), [(0, 0.0), (1, 0.1), (2, 0.5), (3, 0.9)])


# ---- packs and sources ----


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_of_a_pack_are_aligned_and_apart(precision: Precision) -> None:
    for pack in packs_of(precision):
        end = 0
        for tensor in sorted(pack.network.weights, key=lambda tensor: pack.offsets[tensor.name]):
            assert pack.offsets[tensor.name] % 256 == 0
            assert pack.offsets[tensor.name] >= end
            end = pack.offsets[tensor.name] + nbytes(tensor)
        assert end <= pack.size < end + 256


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_network_gets_the_numbers_of_the_file(tiny: Parts, precision: Precision) -> None:
    """Scaled FP8 reaches an FP8 engine bit for bit, with the scale of the file for every row."""
    gpu = LateGpu()
    run = job(gpu, tiny)
    packs = packs_of(precision)
    run.weights.prefetch(packs)
    for pack in packs:
        run.use(pack)
    run.end()
    assert len(run.seen) == len(packs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_transformer_of_any_type_is_converted(
    of_kind: Callable[[str], Parts], kind: str, precision: Precision
) -> None:
    parts = of_kind(kind)
    run = job(LateGpu(), parts)
    for pack in blocks(precision):
        run.use(pack)
    run.end()


@pytest.mark.parametrize("kind", FORMS)
def test_a_quantised_transformer_is_decoded(quantised: Callable[[str], Parts], kind: str) -> None:
    """In pieces of 16 MB, and of 2 KB for 8 bits."""
    parts = quantised(kind)
    some = [("int8", 2048)] if kind in ("int8 convrot", "Q5_0") else []
    for precision, piece in (("bf16", 16 << 20), ("fp8", 2048), *some):
        gpu = LateGpu(0, 0.2)
        run = Job(gpu, DeviceWeights(cast(Any, gpu), FileSource(parts, piece)), parts)
        for pack in blocks(cast(Precision, precision))[:2]:
            run.use(pack)
        run.end()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", [BF16, E4M3])
def test_rotated_weights_are_never_copied_as_they_are(tiny: Parts, kind: Any, precision: Precision) -> None:
    """Not even into an engine that takes their type."""
    base, changed = tiny["transformer"], dict[str, Stored]()
    for name in [n for n in base if n.startswith("blocks.0.") and n.endswith("weight") and base[n].ndim == 2]:
        scales = np.full(len(base[name]), 0.5, np.float32) if kind == E4M3 else None
        changed[name] = Stored(base[name].astype(kind), scales, rotation=16)
    parts = {**tiny, "transformer": cast(Any, QuantisedTensors(base, changed))}
    run = job(LateGpu(), parts)
    for pack in blocks(precision)[:2]:
        run.use(pack)
    run.end()


def test_int8_convrot_is_used_bit_for_bit(quantised: Callable[[str], Parts]) -> None:
    """Codes and scales of the file; other layouts of int8 are made anew."""
    for kind, same in (("int8 convrot", True), ("int8 rows", False)):
        parts = quantised(kind)
        run = job(LateGpu(), parts)
        for pack in blocks("int8")[:2]:
            run.use(pack)
        run.end()
        for pack in blocks("int8")[:2]:
            for scale, tensor in pack.scaled.items():
                stored = parts["transformer"].stored(pack.network.weight_key(tensor.name, pack.n))
                assert stored.dtype == np.int8 and stored.scales is not None
                assert (stored.values.tobytes() in run.seen[pack.key]) == same, tensor.name
                assert (np.ascontiguousarray(stored.scales).tobytes() in run.seen[pack.key]) == same, scale


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_a_piece_that_is_decoded_fits_into_the_memory_for_it(dtype: str) -> None:
    """A piece of Q2_K has 3 bits a number: 16 MB of it are 200 MB of float32."""
    rows, inner = 8192, 2048
    stored = Stored(
        np.broadcast_to(np.uint8(0), (rows, inner // 256 * 84)), blocks="Q2_K", dims=(rows, inner)
    )
    weight = Tensor("w.weight", (rows, inner), dtype)
    scales = (Tensor(scale_name(weight.name), (rows,)),) if dtype in QUANTISED else ()
    network = Network("w", "transformer", (), (weight, *scales), (), "blocks.{n}.", 1)
    tensors = QuantisedTensors(cast(Any, None), {"blocks.0.w.weight": stored})
    numbers = 0
    for batch in FileSource({"transformer": tensors}).pieces(Pack.of(network, 0)):
        for piece in cast(Batch, batch).pieces:
            assert 4 * piece.count * piece.inner <= FLOAT32_BYTES and piece.first * piece.inner == numbers
            assert piece.inner == (inner if scales else 256)
            numbers += piece.count * piece.inner
    assert numbers == rows * inner


def test_quantised_rows_have_at_most_half_a_step_of_error(of_kind: Callable[[str], Parts]) -> None:
    """Checks the oracle: E4M3 has 3 bits of mantissa down to 2^-6, and steps of 2^-9 below."""
    tensors, seen = of_kind("bf16")["transformer"], 0
    for pack in packs_of("fp8"):
        if pack.network.part != "transformer":
            continue
        made = contents(pack, tensors)
        for scale_key, tensor in pack.scaled.items():
            weight = tensors[pack.network.weight_key(tensor.name, pack.n)]
            scale = np.frombuffer(made[scale_key], np.float32)
            np.testing.assert_allclose(scale, np.maximum(np.abs(weight).max(1) / 448, 1e-12), rtol=1e-6)
            got = np.frombuffer(made[tensor.name], E4M3).astype(np.float32).reshape(weight.shape)
            bound = np.maximum(np.abs(weight) / 16, scale[:, None] * 2.0**-10) * 1.0001
            assert (np.abs(got * scale[:, None] - weight) <= bound).all()
            seen += 1
    assert seen == 12 * TINY.transformer.layers


@pytest.mark.parametrize("kind", ["fp8", "fp32", "e5m2"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_large_tensors_are_cut_into_pieces_of_whole_rows(
    tiny: Parts, of_kind: Callable[[str], Parts], kind: str, precision: Precision
) -> None:
    """With pieces of 2 KB in place of 16 MB; a row has at most 2 KB."""
    parts = tiny if kind == "fp8" else of_kind(kind)
    source, gpu = FileSource(parts, 2048), LateGpu(0, 0.2)
    run = Job(gpu, DeviceWeights(cast(Any, gpu), source), parts)
    packs = packs_of(precision, *BLOCK, "motion_encoder", "context_kv")
    assert sum(1 for pack in packs for _ in source.pieces(pack)) > 50 * len(packs)
    for pack in packs:
        run.use(pack)
    run.end()


def test_values_that_are_computed_are_weights_too(tiny: Parts) -> None:
    run = job(LateGpu(), {part: RandomWeights(TINY, part, 5) for part in PARTS})
    for pack in packs_of("fp8", "motion_encoder", *BLOCK):
        run.use(pack)
    run.end()


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_random_weights_are_seeded_and_of_the_promised_moments(precision: Precision) -> None:
    def drawn(seed: int) -> Job:
        gpu = LateGpu()
        run = Job(gpu, DeviceWeights(cast(Any, gpu), RandomSource(seed)))
        for pack in packs_of(precision):
            run.use(pack)
        run.end()
        return run

    first, second, third = drawn(1), drawn(1), drawn(2)
    assert first.seen == second.seen and first.weights.loaded_bytes == 0
    for pack in packs_of(precision):
        data, start, values = first.seen[pack.key], 0, dict[str, Any]()
        for tensor in pack.network.weights:
            stop = start + nbytes(tensor)
            kind = np.dtype(tensor.dtype)
            values[tensor.name] = np.frombuffer(data[start:stop], kind).reshape(tensor.shape)
            start = stop
        if data:
            assert data != third.seen[pack.key]
        for tensor in pack.network.weights:
            if tensor.name in pack.scaled:
                continue
            got = values[tensor.name].astype(np.float32)
            if tensor.dtype in QUANTISED:
                got = got * values[tensor.name.removesuffix("weight") + "scale"][:, None]
            key = pack.network.weight_key(tensor.name, pack.n)
            mean, deviation = random_moments(key, tensor.shape)
            few = 6 / np.sqrt(got.size)
            assert abs(got.mean() - mean) <= deviation * few + 1e-6, key
            if got.size > 50:
                assert got.std() == pytest.approx(deviation, rel=0.01 + few), key


def test_random_int8_weights_are_those_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rotated basis, also if they are drawn a few rows at a time: qualities can be compared."""
    monkeypatch.setattr(sources, "FLOAT32_BYTES", 4 * 512 * 3)
    seen = {}
    for precision in ("bf16", "int8"):
        gpu = LateGpu()
        run = Job(gpu, DeviceWeights(cast(Any, gpu), RandomSource(1)))
        (pack,) = (pack for pack in packs_of(cast(Precision, precision), "ffn") if pack.n == 1)
        run.use(pack)
        run.end()
        start, seen[precision] = 0, dict[str, Any]()
        for tensor in pack.network.weights:
            stop = start + nbytes(tensor)
            data = np.frombuffer(run.seen[pack.key][start:stop], np.dtype(tensor.dtype))
            seen[precision][tensor.name] = data.reshape(tensor.shape)
            start = stop
    for name in (name for name in seen["bf16"] if name.endswith(".weight") and seen["bf16"][name].ndim == 2):
        drawn, scale = seen["bf16"][name].astype(np.float32), seen["int8"][scale_name(name)]
        made = rotated(seen["int8"][name] * scale[:, None], 256)
        assert np.linalg.norm(made - drawn) < 1e-2 * np.linalg.norm(drawn), name


def test_random_weights_do_not_depend_on_what_streams() -> None:
    seen = []
    for streamed in ([], blocks()[3:]):
        gpu = LateGpu()
        run = Job(gpu, DeviceWeights(cast(Any, gpu), RandomSource(1)))
        run.weights.plan(streamed)
        for pack in blocks() * 2:
            run.use(pack)
        run.end()
        seen.append(run.seen)
    assert seen[0] == seen[1]


# ---- kernels ----


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    from trt_wan.runtime.device.kernels import compile_source

    code = bytes(compile_source(convert.SOURCE, capability).code)
    assert code.startswith(b"\x7fELF")
    for name in convert.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


# ---- streaming ----


@restless
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_streamed_packs_are_finished_once_and_right_in_every_step(
    tiny: Parts, of_kind: Callable[[str], Parts], kind: str, seed: int, chance: float
) -> None:
    run = job(LateGpu(seed, chance), tiny if kind == "fp8" else of_kind(kind))
    order = blocks()
    run.weights.plan(order[3:])
    run.weights.prefetch(order)
    read = []
    for _ in range(4):
        for pack in order:
            run.use(pack)
        read.append(run.weights.loaded_bytes)
    assert len(set(read)) == 1
    assert run.weights.resident_bytes == sum(pack.size for pack in order[:3])
    assert run.weights.pinned_bytes == sum(pack.size for pack in order[3:])
    run.end()


def test_a_step_copies_each_streamed_pack_once_and_ahead_of_its_use(tiny: Parts) -> None:
    gpu = LateGpu()
    run, order = job(gpu, tiny), blocks()
    run.weights.plan(order)
    for pack in order:
        run.use(pack)
    gpu.stream.sync()
    made = {id(held): key for key, held in run.weights._made.items()}
    sources = {
        held.memory.result().address: made[id(held)] for held in run.weights._made.values() if held.memory
    }
    log = list[Any]()
    copy = gpu.copy

    def logged(target: int, source: int, size: int, stream: Any) -> None:
        assert stream is gpu.copies
        log.append(sources[source])
        copy(target, source, size, stream)

    gpu.copy = logged  # type: ignore[method-assign]
    for turn, pack in enumerate(order * 3):
        run.use(pack)
        assert len(log) == turn + 1
    keys = [pack.key for pack in order]
    assert log == (keys * 4)[2 : 2 + len(log)]  # two ahead: one in use, one on its way
    run.end()


@restless
def test_a_job_that_stops_in_mid_step_leaves_the_stream_usable(tiny: Parts, seed: int, chance: float) -> None:
    run, order = job(LateGpu(seed, chance), tiny), blocks()
    rng = random.Random(seed)
    run.weights.plan(order[2:])
    for _ in range(12):
        stop = rng.randrange(1, len(order))
        for pack in order[:stop]:
            run.use(pack)
        run.use(order[stop], whole=False)  # bound, enqueued, and never said to be used
    for pack in rng.sample(order, len(order)):
        run.use(pack)
    run.end()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_streamed_packs(tiny: Parts, count: int) -> None:
    run, order = job(LateGpu(), tiny), blocks()
    run.weights.plan(order[-count:])
    for pack in order * 3:
        run.use(pack)
    run.end()


# ---- moves ----


@restless
def test_packs_move_between_resident_and_streamed_without_being_read_again(
    tiny: Parts, seed: int, chance: float
) -> None:
    gpu = LateGpu(seed, chance)
    run, order = job(gpu, tiny), blocks()
    read = None
    for streamed in ([], order[4:], order[1:], order[6:], order, [], order[5:]):
        run.weights.plan(streamed)
        run.weights.prefetch(order)
        for pack in order * 2:
            run.use(pack)
        read = run.weights.loaded_bytes if read is None else read
        assert run.weights.loaded_bytes == read
        kept = [pack for pack in order if pack not in streamed]
        assert run.weights.resident_bytes == sum(pack.size for pack in kept)
        assert run.weights.pinned_bytes == sum(pack.size for pack in streamed)
    run.end()


def test_a_plan_while_packs_are_under_way(tiny: Parts) -> None:
    run, order = job(LateGpu(), tiny), blocks()
    for streamed in (order[3:], [], order[2:], order[7:]):
        run.weights.prefetch(order)
        run.weights.plan(streamed)
    for pack in order:
        run.use(pack)
    run.end()


def test_short_host_memory_is_told_before_anything_is_locked(tiny: Parts) -> None:
    gpu = LateGpu()
    run, order = job(gpu, tiny), blocks()
    run.weights.plan(order[6:])
    huge = Pack(order[0].network, 0, {}, 1 << 50)
    deadline = time.monotonic() + 30  # threads lock the memory
    while run.weights.pinned_bytes < sum(pack.size for pack in order[6:]) and time.monotonic() < deadline:
        time.sleep(0.001)
    live = len(gpu.live)
    with pytest.raises(MemoryShort, match=r"1125899\.\d GB of page-locked host memory; \d+\.\d GB are free"):
        run.weights.plan([huge, *order[1:]])
    assert len(gpu.live) == live
    for pack in order:
        run.use(pack)  # as planned before
    run.end()


def test_memory_that_cannot_be_locked_reaches_bind(tiny: Parts) -> None:
    gpu = LateGpu()
    run, order = job(gpu, tiny), blocks()
    gpu.broken["page_locked"] = MemoryShort("no more", "less")
    run.weights.plan(order)
    with pytest.raises(MemoryShort, match="no more"):
        run.weights.bind(order[0].network, 0)
    run.end()


# ---- ahead of use ----


def settled(weights: DeviceWeights, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_resident_packs_are_loaded_ahead_and_passing_ones_two_at_a_time(tiny: Parts) -> None:
    passing = packs_of("fp8", "text_encoder_layer", "context_kv")
    run, order = job(LateGpu(), tiny, {"text_encoder_layer", "context_kv"}), blocks()
    weights = run.weights
    weights.prefetch(passing + order)
    everything = {pack.key for pack in order}
    settled(weights, lambda: everything <= set(weights._resident))
    for i, pack in enumerate(passing):
        ahead = {p.key for p in passing[i : i + AHEAD]}
        settled(weights, lambda: ahead <= set(weights._resident))  # noqa: B023
        time.sleep(0.005)
        assert set(weights._resident) == everything | ahead
        run.use(pack)
    assert set(weights._resident) == everything
    for pack in order:
        run.use(pack)
    run.end()


def test_a_host_that_runs_ahead_does_not_hold_all_passing_packs_at_once(tiny: Parts) -> None:
    """Generated weights load so fast that 13.4 GB were in use where 12 were allowed, on an H200."""
    gpu = LateGpu()
    run = job(gpu, tiny, {"text_encoder_layer", "context_kv"})
    most = 0
    for pack in packs_of("fp8", "text_encoder_layer", "context_kv"):
        run.use(pack)
        most = max(most, gpu.leaving)
    assert 0 < most <= LEAVING + 1
    run.end()


def test_passing_packs_share_their_memory(tiny: Parts) -> None:
    """Each got new memory here. 19.9 GB were in use with --vram 12 on an H200, perhaps for that reason."""
    gpu, order = LateGpu(), blocks()
    run = job(gpu, tiny, {"text_encoder_layer", "context_kv"})
    for number in range(2):
        passing = packs_of("fp8", "text_encoder_layer", "context_kv")
        before = len(gpu.kept)
        run.weights.prefetch(passing + order)
        for pack in passing:
            time.sleep(0.003)  # the loader is fast
            run.use(pack)
        for pack in order:
            run.use(pack)
        made = Counter(memory.size for memory in gpu.kept[before:])
        size = max(passing[-1].size, ALIGNMENT)  # of four packs
        assert 0 < made[size] <= AHEAD + LEAVING < passing[-1].network.repeats, f"job {number}: {made}"
        assert not run.weights._spare, "memory is kept that no pack of this job needs"
    run.end()


def test_loading_ahead_keeps_to_the_room_while_passing_packs_wait(tiny: Parts) -> None:
    passing = packs_of("fp8", "text_encoder_layer", "context_kv")
    order = blocks()
    run = job(LateGpu(), tiny, {"text_encoder_layer", "context_kv"})
    weights = run.weights
    room = sum(pack.size for pack in order[:4]) + AHEAD * max(pack.size for pack in passing)
    weights.prefetch(passing + order, room)
    for pack in passing:
        time.sleep(0.003)
        assert weights.resident_bytes <= room
        run.use(pack)
    for pack in order:
        run.use(pack)
    run.end()


def test_packs_are_bound_in_any_order(tiny: Parts) -> None:
    packs = packs_of("fp8")
    for seed in range(3):
        rng = random.Random(seed)
        run = job(LateGpu(seed, 0.3), tiny, {"text_encoder_layer", "context_kv", "time_embed"})
        run.weights.plan(blocks()[5:], run.weights.passing)
        run.weights.prefetch(rng.sample(packs, len(packs)))
        for pack in rng.sample(packs, len(packs)) + rng.sample(packs, 20):
            run.use(pack)
        run.end()


def test_released_networks_are_freed_and_loaded_no_more(tiny: Parts) -> None:
    run = job(LateGpu(), tiny)
    first, second = packs_of("fp8", "fuser"), packs_of("fp8", "text_encoder_layer")
    run.weights.prefetch(first + second)
    run.use(first[0])
    run.weights.release({"text_encoder_layer"})
    assert all(key[0] == "fuser" for key in run.weights._resident)
    run.weights.release({"fuser"})
    assert run.weights.resident_bytes == 0
    run.use(first[1])
    run.end()


def test_a_prefetch_frees_passing_packs_of_a_job_that_stopped(tiny: Parts) -> None:
    run = job(LateGpu(), tiny, {"text_encoder_layer"})
    passing = packs_of("fp8", "text_encoder_layer")
    run.weights.prefetch(passing)
    settled(run.weights, lambda: len(run.weights._resident) == AHEAD)
    run.weights.prefetch(blocks())
    settled(run.weights, lambda: len(run.weights._resident) == len(blocks()))
    assert all(key[0] != "text_encoder_layer" for key in run.weights._resident)
    run.end()


# ---- errors ----


class Breaking:
    """Packs of `source`, one of which breaks at its second piece until it is mended."""

    def __init__(self, source: FileSource, key: tuple[str, int], how: str) -> None:
        self.source, self.key, self.how = source, key, how
        self.mended = False

    def pieces(self, pack: Pack) -> Iterator[Piece]:
        yield from self.source.pieces(pack)
        if pack.key == self.key and not self.mended:
            if self.how == "cut":
                raise OSError("the header is gone")
            yield cast(Piece, BrokenPiece(self.how))


class BrokenPiece:
    size = 8

    def __init__(self, how: str) -> None:
        self.how = how

    def read(self, slot: Any) -> None:
        if self.how == "read":
            raise OSError("the disk is gone")

    def enqueue(self, place: Place) -> None:
        raise RuntimeError("the kernel is gone")


@pytest.mark.parametrize("how", ["cut", "read", "enqueue"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_reaches_the_bind_of_its_pack_and_no_other(tiny: Parts, how: str, streamed: bool) -> None:
    gpu, order = LateGpu(), blocks()
    source = Breaking(FileSource(tiny), order[3].key, how)
    run = Job(gpu, DeviceWeights(cast(Any, gpu), source), tiny)
    run.weights.plan(order[2:] if streamed else [])
    run.weights.prefetch(order)
    for pack in order[:3]:
        run.use(pack)
    for _ in range(2):
        with pytest.raises((OSError, RuntimeError), match="is gone"):
            run.weights.bind(order[3].network, order[3].n)
    for pack in order[4:]:
        run.use(pack)
    source.mended = True
    run.use(order[3])
    run.end()


def test_lack_of_device_memory_reaches_bind(tiny: Parts) -> None:
    gpu, order = LateGpu(), blocks()
    run = job(gpu, tiny)
    run.use(order[0])
    gpu.broken["allocate"] = MemoryShort("the GPU is full", "")
    with pytest.raises(MemoryShort, match="the GPU is full"):
        run.use(order[1])
    gpu.broken.clear()
    run.use(order[1])
    run.end()


def test_a_pack_that_found_no_memory_ahead_of_its_use_is_tried_again(tiny: Parts) -> None:
    gpu, order = LateGpu(), blocks()
    run = job(gpu, tiny)
    gpu.broken["allocate"] = MemoryShort("the GPU is full", "")
    run.weights.prefetch(order)
    settled(run.weights, lambda: not run.weights._running)
    gpu.broken.clear()
    for pack in order:
        run.use(pack)
    run.end()


def test_a_file_that_becomes_shorter_is_named(tiny: Parts, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny["transformer"].path.read_bytes())
    tensors: Tensors = Checkpoint(path)
    tensors.stored("blocks.0.modulation")  # maps the file
    path.unlink()
    path.write_bytes(b"short")  # another file: the map of the first stays whole
    run = job(LateGpu(), {"transformer": tensors})
    with pytest.raises(WeightsError, match=r"cut\.safetensors became shorter"):
        run.weights.bind(blocks()[0].network, 0)
    path.unlink()
    with pytest.raises(WeightsError, match=r"cut\.safetensors cannot be read \(No such file"):
        run.weights.bind(blocks()[0].network, 0)
    run.end()


def test_closing_in_the_middle_ends_everything_and_it_opens_again(tiny: Parts) -> None:
    gpu, order = LateGpu(), blocks()
    run = job(gpu, tiny)
    for _ in range(3):
        run.weights.plan(order[2:])
        run.weights.prefetch(order)
        run.use(order[0])
        gpu.stream.sync()
        run.weights.close()
        assert not gpu.live
        assert run.weights.resident_bytes == run.weights.pinned_bytes == 0
    run.use(order[0])
    run.end()
