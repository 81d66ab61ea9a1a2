"""The weight path on a real GPU: every conversion against numpy, streamed against resident, memory, errors.

Run with `python -m pytest -s tests/test_weights_on_gpu.py`. Without a GPU it is skipped.
"""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from on_gpu import require_gpu, require_whole_gpu
from quantised_weights import (
    FORMS,
    QuantisedTensors,
    extreme_blocks,
    quantised_file,
    random_blocks,
    with_quantised_block,
)
from weight_oracle import contents, converted, plain, quantised, rotated

from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.errors import MemoryShort
from trt_wan.runtime.device.gpu import STAGING_BYTES, STAGING_SLOTS, Gpu
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.opening.residency import BLOCK
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.convert import SOURCES, TARGETS, Converter
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.sources import FileSource, RandomSource
from trt_wan.runtime.weights.stored import BLOCKS, ROTATIONS
from trt_wan.runtime.weights.tiny import write_tiny_weights

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
SCALED = (E4M3, E5M2, np.dtype(np.int8))
# Rows and their lengths: one number, less than a block of threads, no multiple of it, more rows than blocks.
SHAPES = [(1, 1), (3, 5), (7, 300), (2, 100_003), (9001, 3), (64, 5120)]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    made: Gpu = require_gpu()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_weights(folder, 3)
    return load_weights([folder], {})[1]


class OnDevice:
    """Host arrays on the device, for the length of a test."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.buffers = gpu, list[Any]()

    def __enter__(self) -> "OnDevice":
        return self

    def __exit__(self, *error: object) -> None:
        for buffer in self.buffers:
            buffer.close(self.gpu.stream)

    def put(self, host: np.ndarray[Any, Any]) -> int:
        self.buffers.append(self.gpu.allocate(max(host.nbytes, 1)))
        address = int(self.buffers[-1].handle)
        self.gpu.write(self.gpu.view(address, host.shape, host.dtype), host)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.gpu.download(self.gpu.view(address, shape, dtype))


def numbers(shape: tuple[int, int], dtype: np.dtype[Any], seed: int) -> Any:
    """Numbers of every size that the type has, of both signs, zeros, subnormals, ties, the largest."""
    rng = np.random.default_rng(seed)
    count = shape[0] * shape[1]
    if dtype.itemsize == 1:
        values = rng.integers(0, 256, count, np.uint8)
        values[: min(count, 256)] = np.arange(min(count, 256))
        values[~np.isfinite(values.view(dtype).astype(np.float32))] = 0x3C
        return values.view(dtype).reshape(shape)
    wide = rng.standard_normal(count).astype(np.float32) * np.exp2(
        rng.integers(-30, 14, count).astype(np.float32)
    )
    edges = np.array([0.0, -0.0, 1.0, -1.0, 65504.0, 6e-8, -6e-8, 1e-38, 1e-42, 2.0**-24, 3e38], np.float32)
    if dtype != np.float32:
        edges = edges[:-1]
    wide[: min(count, len(edges))] = edges[: min(count, len(edges))]
    # Halfway between two bf16 and between two fp16 numbers: ties go to even.
    ties = np.float32(1) + np.arange(1, 32, 2).astype(np.float32) * np.float32(2.0**-8)
    more = np.float32(1) + np.arange(1, 32, 2).astype(np.float32) * np.float32(2.0**-11)
    both = np.concatenate([ties, more, -ties, -more])
    if count > 2 * len(both):
        wide[len(edges) : len(edges) + len(both)] = both
    with np.errstate(over="ignore"):
        return wide.astype(dtype).reshape(shape)


def scales_of(rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).uniform(1e-4, 0.03, rows).astype(np.float32)


def same_bits(got: Any, want: Any, what: str) -> None:
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[want.dtype.itemsize]
    wrong = got.view(kind) != np.ascontiguousarray(want).view(kind)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} differ; {got[at]} for {want[at]} at {at}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_conversion_has_numpys_bits(gpu: Gpu, source: str, target: str, shape: tuple[int, int]) -> None:
    converter = gpu.once("weights", lambda: Converter(gpu))
    types = np.dtype(source), np.dtype(target)
    values = numbers(shape, types[0], 1)
    for scales in (None, scales_of(shape[0], 2)) if types[0] in SCALED else (None,):
        with OnDevice(gpu) as device, np.errstate(over="ignore"):
            given = device.put(values), device.put(scales) if scales is not None else 0
            out = device.put(
                np.full(shape, 0xA5A5A5A5 & (256 ** types[1].itemsize - 1), f"u{types[1].itemsize}")
            )
            converter.convert(gpu.stream, (source, target), (*given, out), *shape)
            same_bits(
                device.get(out, shape, types[1]), converted(values, scales, types[1]), f"{source} {target}"
            )


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "int8"])
@pytest.mark.parametrize("target", TARGETS)
def test_numbers_that_are_not_finite_stay_so(gpu: Gpu, source: str, target: str) -> None:
    converter = gpu.once("weights", lambda: Converter(gpu))
    types = np.dtype(source), np.dtype(target)
    values = np.array([[np.inf, -np.inf, np.nan, 1.0]], np.float32).astype(types[0])
    with OnDevice(gpu) as device:
        given, out = device.put(values), device.put(np.zeros((1, 4), types[1]))
        converter.convert(gpu.stream, (source, target), (given, 0, out), 1, 4)
        got = device.get(out, (1, 4), types[1]).astype(np.float32)
    np.testing.assert_array_equal(got, values.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_quantising_has_numpys_bits(gpu: Gpu, source: str, shape: tuple[int, int]) -> None:
    if gpu.capability < (8, 9):
        pytest.skip("no FP8 on this GPU")
    converter, dtype = gpu.once("weights", lambda: Converter(gpu)), np.dtype(source)
    rng = np.random.default_rng(4)
    cases = [
        rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, (shape[0], 1)))
    ]  # rows of different sizes
    outliers = rng.standard_normal(shape)
    outliers[:, -1] *= 1000
    cases.append(outliers)
    cases.append(np.where(np.arange(shape[0])[:, None] % 2, outliers, 0))  # rows of zeros
    cases.append(np.full(shape, 1e-20))  # under the smallest scale
    for case in cases:
        with np.errstate(over="ignore", under="ignore"):
            largest = 127 if dtype == np.int8 else 448
            values = np.clip(case, -largest, largest).astype(np.float32).astype(dtype)
        for scales in (None, scales_of(shape[0], 5)) if dtype in SCALED else (None,):
            want, want_scales = quantised(values, scales)
            with OnDevice(gpu) as device:
                given = device.put(values), device.put(scales) if scales is not None else 0
                out = device.put(np.full(shape, 0xA5, np.uint8))
                out_scales = device.put(np.full(shape[0], np.nan, np.float32))
                converter.quantise(gpu.stream, source, (*given, out, out_scales), *shape)
                same_bits(device.get(out_scales, shape[:1], np.float32), want_scales, f"{source} scales")
                same_bits(device.get(out, shape, E4M3), want, source)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_bits_of_the_gguf_package(gpu: Gpu, kind: str) -> None:
    converter, rng = gpu.once("weights", lambda: Converter(gpu)), np.random.default_rng(6)
    for blocks in (random_blocks(kind, (1024, 5120), rng), extreme_blocks(kind, rng)):
        want = plain(blocks, kind)
        with OnDevice(gpu) as device:
            given, out = device.put(blocks), device.put(np.full(want.shape, 7, np.float32))
            converter.convert(gpu.stream, (kind, "float32"), (given, 0, out), *want.shape)
            got = device.get(out, want.shape, np.float32)
        both = np.isnan(got) & np.isnan(want)
        same_bits(np.where(both, 0, got), np.where(both, 0, want), kind)


@pytest.mark.parametrize("group", ROTATIONS)
def test_rotating_has_numpys_bits(gpu: Gpu, group: int) -> None:
    converter, rng = gpu.once("weights", lambda: Converter(gpu)), np.random.default_rng(7)
    for numbers in (group, 1024 + group, 20_000 * 1024):  # few numbers; more than the blocks of a launch
        values = (rng.standard_normal(numbers) * np.exp2(rng.integers(-9, 9, numbers))).astype(np.float32)
        with OnDevice(gpu) as device:
            there = device.put(np.append(values, np.float32(7)))
            converter.rotate(gpu.stream, there, numbers, group)
            got = device.get(there, (numbers + 1,), np.float32)
        same_bits(got[:numbers], rotated(values, group), f"groups of {group}")
        assert got[numbers] == 7


def packs_of(precision: Precision) -> list[Pack]:
    table = networks(TINY, Plan(64, 48, 5, precision)).values()
    return [Pack.of(network, n) for network in table for n in range(network.repeats)]


def blocks(precision: Precision) -> list[Pack]:
    table = networks(TINY, Plan(64, 48, 5, precision))
    return [Pack.of(table[name], n) for n in range(TINY.transformer.layers) for name in BLOCK]


def fetched(weights: DeviceWeights, pack: Pack) -> dict[str, bytes]:
    """The bytes that a kernel on the compute stream sees."""
    arrays = weights.bind(pack.network, pack.n)
    found = {name: weights.gpu.download(array).tobytes() for name, array in arrays.items()}
    weights.used(pack.network, pack.n)
    return found


@pytest.mark.parametrize("piece", [2048, 16 << 20])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8"])
def test_every_network_gets_the_numbers_of_the_file(
    gpu: Gpu, tiny: Any, precision: Precision, piece: int
) -> None:
    weights = DeviceWeights(gpu, FileSource(tiny, piece))
    weights.prefetch(packs_of(precision))
    for pack in packs_of(precision):
        assert fetched(weights, pack) == contents(pack, tiny[pack.network.part]), pack.key
    weights.close()


@pytest.mark.parametrize("piece", [2048, 16 << 20])
@pytest.mark.parametrize("kind", FORMS)
def test_a_quantised_transformer_is_decoded(
    gpu: Gpu, tiny: Any, tmp_path: Path, kind: str, piece: int
) -> None:
    made: Any = with_quantised_block(tiny["transformer"], tmp_path / "file", kind)
    for precision in ("fp32", "bf16", "fp8", "int8"):
        weights = DeviceWeights(gpu, FileSource({"transformer": made}, piece))
        for pack in blocks(precision)[:2]:
            assert fetched(weights, pack) == contents(pack, made), (precision, pack.key)
        weights.close()


def test_generated_checkpoints_are_quantised(gpu: Gpu) -> None:
    parts = {part: RandomWeights(TINY, part, 5) for part in PARTS}
    weights = DeviceWeights(gpu, FileSource(parts))
    for pack in blocks("fp8"):
        assert fetched(weights, pack) == contents(pack, parts["transformer"]), pack.key
    weights.close()


@pytest.mark.parametrize("kind", ["files", "random"])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_streamed_is_resident(gpu: Gpu, tiny: Any, precision: Precision, kind: str) -> None:
    source = FileSource(tiny) if kind == "files" else RandomSource(7)
    order = blocks(precision)
    kept, streams = DeviceWeights(gpu, source), DeviceWeights(gpu, source)
    wanted = {pack.key: fetched(kept, pack) for pack in order}
    for streamed in (order[3:], order, [], order[5:]):
        streams.plan(streamed)
        streams.prefetch(order)
        for pack in order * 3:
            assert fetched(streams, pack) == wanted[pack.key], pack.key
        for pack in (order[4], order[1], order[6]):  # after a stop in the middle of a step
            assert fetched(streams, pack) == wanted[pack.key], pack.key
        assert streams.pinned_bytes == sum(pack.size for pack in streamed)
    kept.close()
    streams.close()


def test_the_copies_of_a_busy_gpu_are_ordered(gpu: Gpu, tiny: Any) -> None:
    """The compute stream lags far behind the host: no slot may be written before its last use."""
    order = blocks("fp8")
    weights = DeviceWeights(gpu, FileSource(tiny))
    weights.plan(order)
    wanted = {pack.key: fetched(weights, pack) for pack in order}
    sizes = {pack.key: {name: len(data) for name, data in wanted[pack.key].items()} for pack in order}
    busy = gpu.allocate(1 << 30)
    results = gpu.allocate(3 * sum(pack.size for pack in order))
    address, copied = int(results.handle), list[tuple[Pack, str, int]]()
    for pack in order * 3:
        arrays = weights.bind(pack.network, pack.n)
        gpu.copy(int(busy.handle), int(busy.handle) + (1 << 29), 1 << 29, gpu.stream)  # 0.2 ms of work
        for name, array in arrays.items():
            gpu.copy(address, array.address, array.nbytes, gpu.stream)
            copied.append((pack, name, address))
            address += array.nbytes
        weights.used(pack.network, pack.n)
    for pack, name, where in copied:
        got = gpu.download(gpu.view(where, (sizes[pack.key][name],), np.uint8)).tobytes()
        assert got == wanted[pack.key][name], (pack.key, name)
    busy.close(gpu.stream)
    results.close(gpu.stream)
    weights.close()


def test_uploads_run_ahead_of_the_gpu(gpu: Gpu) -> None:
    """As many uploads as there are staging slots return before the GPU is done with the work before them."""
    gpu.reserve(64 << 20)
    busy = gpu.allocate(8 << 30)
    half = 4 << 30
    gpu.sync()
    start = time.perf_counter()
    for _ in range(10):
        gpu.copy(int(busy.handle), int(busy.handle) + half, half, gpu.stream)
    hosts = [np.full(100, i, np.float32) for i in range(STAGING_SLOTS)]
    arrays = [gpu.upload(host) for host in hosts]
    enqueued = time.perf_counter() - start
    gpu.sync()
    done = time.perf_counter() - start
    for array, host in zip(arrays, hosts, strict=True):
        np.testing.assert_array_equal(array, host)
    busy.close(gpu.stream)
    assert enqueued < done / 2, f"{enqueued:.4f} s of {done:.4f} s"


@pytest.mark.parametrize(
    "size", [1, STAGING_BYTES - 1, STAGING_BYTES, (STAGING_SLOTS + 2) * STAGING_BYTES + 5]
)
def test_copies_of_any_size(gpu: Gpu, size: int) -> None:
    gpu.reserve(256 << 20)
    host = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    np.testing.assert_array_equal(gpu.upload(host), host)


@pytest.mark.parametrize("size", [1, 3 * STAGING_BYTES + 5])
def test_a_fetched_array_does_not_wait_for_later_work(gpu: Gpu, size: int) -> None:
    """20 ms of copies are enqueued behind it, which overwrite nothing of it."""
    gpu.reserve(256 << 20)
    executor = GpuExecutor(gpu, {}, cast(Any, None))
    busy = gpu.allocate(8 << 30)
    host = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    fetched = executor.fetch(cast(Any, gpu.upload(host)))
    gpu.sync()
    start = time.perf_counter()
    for _ in range(10):
        gpu.copy(int(busy.handle), int(busy.handle) + (4 << 30), 4 << 30, gpu.stream)
    there = fetched()
    seconds = time.perf_counter() - start
    gpu.sync()
    all_seconds = time.perf_counter() - start
    busy.close(gpu.stream)
    np.testing.assert_array_equal(there, host)
    assert seconds < 0.8 * all_seconds, f"{seconds:.4f} s of {all_seconds:.4f} s"


def test_an_arena_grows_and_old_arrays_harm_nothing(gpu: Gpu) -> None:
    gpu.reserve(1 << 20)
    old = gpu.upload(np.arange(1000.0))
    gpu.reserve(4 << 20)
    new = gpu.upload(np.ones(100_000))
    np.testing.assert_array_equal(old, np.arange(1000.0))
    used = gpu.arena.used
    del old
    assert gpu.arena.used == used
    np.testing.assert_array_equal(new, np.ones(100_000))


def test_twenty_cycles_give_the_memory_back(tiny: Any) -> None:
    """GPU memory as the driver reports it, threads, and page-locked memory."""
    require_whole_gpu()
    require_gpu().close()
    free, threads = list[int](), threading.active_count()
    for cycle in range(21):
        gpu = Gpu()
        gpu.reserve(64 << 20)
        weights = DeviceWeights(gpu, FileSource(tiny))
        order = blocks("fp8")
        weights.plan(order[cycle % 5 :])
        weights.prefetch(packs_of("fp8"))
        for pack in order * 2:
            fetched(weights, pack)
        if cycle % 3 == 0:
            weights.bind(order[0].network, 0)  # a stop between bind and used
        array = gpu.upload(np.zeros(1000))
        del array
        weights.close()
        gpu.close()
        del weights, gpu
        gc.collect()
        free.append(free_now())
        assert threading.active_count() == threads
    print(f"free after each cycle, MB: {[number >> 20 for number in free]}")
    assert free[0] - min(free[1:]) <= 4 << 20, "memory is lost"


def free_now() -> int:
    from cuda.bindings import runtime

    error, free, _ = runtime.cudaMemGetInfo()
    assert not int(error)
    return int(free)


def test_lack_of_memory_is_told_and_survived(gpu: Gpu) -> None:
    with pytest.raises(
        MemoryShort, match=r"10000\.0 GB of GPU memory could not be taken; \d+\.\d GB are free"
    ):
        gpu.allocate(10**13)
    buffer = gpu.allocate(1 << 20)
    buffer.close(gpu.stream)


ILLEGAL = """
import numpy as np
from trt_wan.errors import GpuFault
from trt_wan.runtime.device.gpu import Gpu
gpu = Gpu()
gpu.fill_random(gpu.view(64, (1000,), np.float32), 1, 0.0, 1.0)
for call in (gpu.sync, lambda: gpu.allocate(1 << 20), gpu.free_bytes):
    try:
        call()
    except GpuFault as error:
        print(error.code, error.message)
    else:
        raise SystemExit("no fault")
gpu.close()
print("closed")
"""


def test_an_illegal_access_is_no_lack_of_memory(gpu: Gpu, tmp_path: Path) -> None:
    """In a process of its own: the fault is sticky."""
    made = subprocess.run([sys.executable, "-c", ILLEGAL], capture_output=True, text=True, timeout=120)
    lines = made.stdout.splitlines()
    assert len(lines) == 4 and lines[-1] == "closed", made.stdout + made.stderr
    assert all(line.startswith("gpu_fault The GPU reported ") for line in lines[:3]), lines
    assert "IllegalAddress" in lines[0] or "ILLEGAL_ADDRESS" in lines[0]


@pytest.mark.parametrize("kind", ["fp8", "bf16", "int8 convrot", "Q8_0", "Q5_0", "Q4_K", "Q3_K", "Q2_K"])
def test_the_speed_of_loading(gpu: Gpu, tmp_path: Path, kind: str) -> None:
    """GB/s from a file in the page cache to FP8 packs, resident and streamed, printed."""
    from trt_wan.engines.contract import Network, Tensor, scale_name

    rows, inner, count = 8192, 8192, 24
    names, path = [f"blocks.{n}.w.weight" for n in range(count)], tmp_path / "speed"
    tensors: Any
    if kind in ("fp8", "bf16"):
        stored = np.dtype(ml_dtypes.float8_e4m3fn if kind == "fp8" else ml_dtypes.bfloat16)
        _write(path, {name: (stored, (rows, inner)) for name in names})
        tensors = Checkpoint(path)
    else:
        matrix = np.random.default_rng(0).standard_normal((rows, inner), np.float32)
        one = quantised_file(tmp_path / "one", kind, {names[0]: matrix})[0][names[0]]
        data = np.zeros(one.nbytes(rows * inner), np.uint8)
        one.read(0, data)
        with path.open("wb") as file:
            for _ in names:
                file.write(data)
        many = {name: replace(one, file=path, start=n * len(data)) for n, name in enumerate(names)}
        tensors = QuantisedTensors(RandomWeights(TINY, "transformer", 0), many)
    weight = Tensor("w.weight", (rows, inner), "float8_e4m3fn")
    scale = Tensor(scale_name(weight.name), (rows,))
    network = Network("w", "transformer", (), (weight, scale), (), "blocks.{n}.", count)
    packs = [Pack.of(network, n) for n in range(count)]
    for streamed in ([], packs):
        weights = DeviceWeights(gpu, FileSource({"transformer": tensors}))
        start = time.perf_counter()
        weights.plan(streamed)
        weights.prefetch(packs)
        for pack in packs:
            weights.bind(pack.network, pack.n)
            weights.used(pack.network, pack.n)
        gpu.sync()
        seconds = time.perf_counter() - start
        rate = weights.loaded_bytes / 1e9 / seconds
        where = "streamed" if streamed else "resident"
        alone = weights.loaded_bytes / 1e9 / weights.loading_seconds
        print(f"{kind} {where}: {rate:.1f} GB/s, the loader alone {alone:.1f}")
        weights.close()
        assert rate > 1


def _write(path: Path, tensors: dict[str, tuple[np.dtype[Any], tuple[int, int]]]) -> None:
    """A file of any numbers, the same bytes for every tensor."""
    import json

    header, position = dict[str, Any](), 0
    names = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16"}
    data = b""
    for name, (dtype, shape) in tensors.items():
        size = shape[0] * shape[1] * dtype.itemsize
        if len(data) != size:
            values = np.random.default_rng(0).standard_normal(shape[0] * shape[1], np.float32)
            data = values.astype(dtype).tobytes()
        header[name] = {
            "dtype": names[dtype.name],
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            file.write(data)
