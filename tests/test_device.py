"""What of the GPU code can be proved without a GPU: the arena, the order of streaming, the bytes of weights.

The kernels are compiled here for every GPU we name, and not run: what they compute (the order of `combine`,
bf16 rounding, the scales of `quantize_rows`) can only be shown on a GPU. Executor and stream run on fakes
that record what they are told.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from fake_tensorrt import FakeTensorRt, recipe
from safetensors.numpy import save_file

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network, Part, Tensor
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.errors import GraphError, MemoryShort
from trt_wan.runtime.device import gpu as gpu_module
from trt_wan.runtime.device import kernels
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.device.gpu import DeviceArray
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.segments.tensorrt import open_engines
from trt_wan.runtime.weights import on_device as weights_module
from trt_wan.runtime.weights.checkpoint import Checkpoint, load_weights
from trt_wan.runtime.weights.convert import FileSource, RandomSource
from trt_wan.runtime.weights.on_device import SLOTS, DeviceWeights, Pack, nbytes
from trt_wan.runtime.weights.random import random_moments
from trt_wan.runtime.weights.tiny import write_tiny_weights

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


# The arena


@pytest.mark.parametrize("seed", range(5))
def test_arena_against_a_table_of_who_has_which_block(seed: int) -> None:
    """Takes and gives in random order; the model is one number per 256 bytes, 0 for free."""
    rng = np.random.default_rng(seed)
    table = np.zeros(400, np.int64)
    arena, held, peak = Arena(400 * 256), dict[int, Span](), 0
    for turn in range(1, 800):
        if held and rng.random() < 0.48:
            owner = int(rng.choice(list(held)))
            arena.give(held.pop(owner))
            table[table == owner] = 0
        else:
            size = int(rng.integers(0, 60 * 256))
            blocks = max(1, -(-size // 256))
            fits = [i for i in range(400 - blocks + 1) if not table[i : i + blocks].any()]
            if not fits:
                with pytest.raises(MemoryShort):
                    arena.take(size)
                continue
            held[turn] = arena.take(size)
            assert held[turn] == Span(fits[0] * 256, blocks * 256)
            table[fits[0] : fits[0] + blocks] = turn
            peak = max(peak, (fits[0] + blocks) * 256)
        assert arena.used == np.count_nonzero(table) * 256
        assert arena.peak == peak
    for span in held.values():
        arena.give(span)
    assert arena.used == 0
    assert arena.take(400 * 256) == Span(0, 400 * 256)


def test_a_full_arena_says_how_much_was_missing() -> None:
    arena = Arena(2 * 10**9 // 256 * 256)
    with pytest.raises(MemoryShort, match=r"3\.00 GB more are needed than the 2\.00 GB planned"):
        arena.take(3 * 10**9)


# Kernels


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    code = bytes(kernels.compile_source(kernels.SOURCE, capability).code)
    assert code.startswith(b"\x7fELF")
    for name in kernels.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


# Sources


def packs(precision: Precision) -> list[Pack]:
    every = networks(TINY, Plan(64, 48, 5, precision)).values()
    return [Pack.of(network, n) for network in every for n in range(network.repeats)]


def read(pack: Pack, tensor: Tensor, data: np.ndarray[Any, Any]) -> Any:
    start = pack.offsets[tensor.name]
    return data[start : start + nbytes(tensor)].view(tensor.dtype).reshape(tensor.shape)


def filled(source: FileSource | RandomSource, pack: Pack) -> np.ndarray[Any, Any]:
    data = np.full(pack.size, 0xA5, np.uint8)
    source.fill_host(pack, data)
    return data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[Part, Checkpoint]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_weights(folder, 3)
    return load_weights(folder, {})[1]


def unscaled(checkpoint: Checkpoint) -> dict[str, Any]:
    """The stored values of a scaled file, without its scales."""
    return {name: checkpoint.raw(name) for name in checkpoint if "scale" not in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_tensors_of_a_pack_are_aligned_and_apart(precision: Precision) -> None:
    for pack in packs(precision):
        end = 0
        for tensor in sorted(pack.network.weights, key=lambda tensor: pack.offsets[tensor.name]):
            assert pack.offsets[tensor.name] % 256 == 0
            assert pack.offsets[tensor.name] >= end
            end = pack.offsets[tensor.name] + nbytes(tensor)
        assert end <= pack.size < end + 256


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_file_source_writes_what_the_checkpoint_says(
    tiny: dict[Part, Checkpoint], precision: Precision
) -> None:
    """FP8 bit for bit with the file's scale for every row; float32 and bf16 as the file's values are."""
    source, kinds = FileSource(tiny), set()
    for pack in packs(precision):
        data, checkpoint = filled(source, pack), tiny[pack.network.part]
        for tensor in pack.network.weights:
            kinds.add(tensor.dtype)
            got, key = read(pack, tensor, data), pack.network.weight_key(tensor.name, pack.n)
            if tensor.dtype == "float8_e4m3fn":
                assert got.tobytes() == checkpoint.raw(key).tobytes(), key
            elif tensor.name.endswith(".scale"):
                stored = checkpoint.raw(key.removesuffix("scale") + "scale_weight")
                np.testing.assert_array_equal(got, np.full(tensor.shape, stored))
            else:
                np.testing.assert_array_equal(got, checkpoint[key].astype(tensor.dtype), key)
    assert kinds == {"float32", "bfloat16"} | ({"float8_e4m3fn"} if precision == "fp8" else set())


def test_file_source_quantises_a_bf16_transformer_per_channel(
    tiny: dict[Part, Checkpoint], tmp_path: Path
) -> None:
    """Of the error, half a step: E4M3 has 3 bits of mantissa down to 2^-6, and steps of 2^-9 below."""
    tensors = unscaled(tiny["transformer"])
    for name, values in tensors.items():
        if values.dtype == E4M3:
            channels = np.linspace(0.1, 3, len(values), dtype=np.float32)[:, None]  # of different sizes
            tensors[name] = (values.astype(np.float32) * channels / 100).astype(BF16)
    tensors["blocks.1.ffn.0.weight"][5] = 0
    save_file(tensors, tmp_path / "bf16.safetensors")
    source = FileSource(cast(Any, {"transformer": Checkpoint(tmp_path / "bf16.safetensors")}))
    seen = 0
    for pack in packs("fp8"):
        if pack.network.part != "transformer":
            continue
        data, by_name = filled(source, pack), {t.name: t for t in pack.network.weights}
        for tensor in pack.network.weights:
            if tensor.dtype != "float8_e4m3fn":
                continue
            weight = tensors[pack.network.weight_key(tensor.name, pack.n)].astype(np.float32)
            scale = read(pack, by_name[tensor.name.removesuffix("weight") + "scale"], data)
            np.testing.assert_allclose(scale, np.maximum(np.abs(weight).max(1) / 448, 1e-12), rtol=1e-6)
            got = read(pack, tensor, data).astype(np.float32) * scale[:, None]
            bound = np.maximum(np.abs(weight) / 16, scale[:, None] * 2.0**-10) * 1.0001
            assert (np.abs(got - weight) <= bound).all()
            seen += 1
    assert seen == 12 * TINY.transformer.layers


def test_a_quantised_weight_takes_nothing_of_the_arena(tiny: dict[Part, Checkpoint], tmp_path: Path) -> None:
    """The arena is planned without weights: `upload` there ended a run from a bf16 file with MemoryShort."""
    names = [f"blocks.0.{part}.weight" for part in ("self_attn.q", "self_attn.k", "self_attn.v")]
    stored = unscaled(tiny["transformer"])
    tensors = {name: v.astype(BF16) if name in names else v for name, v in stored.items()}
    save_file(tensors, tmp_path / "bf16.safetensors")
    source = FileSource(cast(Any, {"transformer": Checkpoint(tmp_path / "bf16.safetensors")}))
    gpu = FakeGpu()
    pack = next(pack for pack in packs("fp8") if pack.network.name == "attn_in")
    source.fill_device(cast(Any, gpu), pack, pack.arrays(cast(Any, gpu), 0))
    assert len(gpu.quantised) == 3
    assert len(gpu.buffers) == 3 and all(buffer.closed for buffer in gpu.buffers)
    assert not gpu.uploads


def test_random_source_is_seeded_and_of_the_promised_moments() -> None:
    for pack in packs("fp8"):
        data = filled(RandomSource(1), pack)
        assert data.tobytes() == filled(RandomSource(1), pack).tobytes()
        if pack.network.weights:
            assert data.tobytes() != filled(RandomSource(2), pack).tobytes()
        by_name = {tensor.name: tensor for tensor in pack.network.weights}
        for tensor in pack.network.weights:
            values = read(pack, tensor, data).astype(np.float32)
            if tensor.dtype == "float8_e4m3fn":
                values *= read(pack, by_name[tensor.name.removesuffix("weight") + "scale"], data)[:, None]
            elif tensor.name.endswith(".scale"):
                continue
            key = pack.network.weight_key(tensor.name, pack.n)
            mean, deviation = random_moments(key, tensor.shape)
            few = 6 / np.sqrt(values.size)
            assert abs(values.mean() - mean) <= deviation * few + 1e-6, key
            if values.size > 50:
                assert values.std() == pytest.approx(deviation, rel=0.01 + few), key


# Streaming


class FakeStream:
    """Records what it is told; its events are numbers of its own lines."""

    handle = 7

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name = log, name

    def record(self) -> Any:
        event = SimpleNamespace(sync=lambda: None, of=self.name, at=len(self.log))
        self.log.append((self.name, "record", event))
        return event

    def wait(self, event: Any) -> None:
        self.log.append((self.name, "wait", event))

    def sync(self) -> None:
        pass


class FakeBuffer:
    def __init__(self, handle: int) -> None:
        self.handle, self.closed = handle, False

    def close(self, stream: Any) -> None:
        self.closed = True


class FakeGpu:
    name = "A GPU"

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.stream, self.copies = FakeStream(self.log, "compute"), FakeStream(self.log, "copies")
        self.device = SimpleNamespace(set_current=lambda: None)
        self.handle = 7
        self.buffers: list[FakeBuffer] = []
        self.written: list[DeviceArray] = []
        self.quantised: list[Any] = []
        self.uploads: list[Any] = []

    def allocate(self, size: int) -> FakeBuffer:
        self.buffers.append(FakeBuffer((len(self.buffers) + 1) << 40))
        return self.buffers[-1]

    def view(self, address: int, shape: Any, dtype: Any) -> DeviceArray:
        return DeviceArray(cast(Any, self), address, shape, dtype, None)

    def empty(self, shape: Any, dtype: Any) -> DeviceArray:
        return self.view(int(self.allocate(0).handle), shape, dtype)

    def upload(self, host: Any) -> DeviceArray:
        self.uploads.append(host)
        return self.empty(host.shape, host.dtype)

    def reserve(self, size: int) -> None:
        self.reserved = size

    def write(self, array: DeviceArray, host: Any) -> None:
        self.written.append(array)

    def quantize_rows(self, *arrays: DeviceArray) -> None:
        self.quantised.append(arrays)


class FakePinned:
    def __init__(self, size: int) -> None:
        self.bytes, self.address = np.zeros(size, np.uint8), 0
        self.busy: Any = None

    def wait(self) -> None:
        self.busy = None

    def used_by(self, stream: FakeStream) -> None:
        assert self.busy is None, "pinned memory is written while a copy reads it"
        self.busy = stream.record()


class CountingSource:
    """Writes the number of the pack; `broken` is the call that fails."""

    def __init__(self, broken: int | None = None) -> None:
        self.calls, self.broken = list[tuple[str, int]](), broken

    def fill_device(self, gpu: Any, pack: Pack, arrays: Mapping[str, DeviceArray]) -> None:
        self.calls.append((pack.network.name, -1 - pack.n))

    def fill_host(self, pack: Pack, target: np.ndarray[Any, Any]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.001)
        self.calls.append((pack.network.name, pack.n))
        if len(self.calls) == self.broken:
            raise OSError("the disk is gone")
        assert len(target) == pack.size


def streamed_packs() -> list[Pack]:
    made = networks(TINY, Plan(64, 48, 5, "fp8"))
    return [Pack.of(made[name], n) for n in range(4) for name in ("attn_in", "attn_out", "ffn")]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(target: int, source: int, size: int, stream: FakeStream) -> None:
        stream.log.append((stream.name, "copy", target, size))

    monkeypatch.setattr(weights_module, "Pinned", FakePinned)
    monkeypatch.setattr(weights_module, "copy", copy)


def weights(gpu: FakeGpu, source: CountingSource, passing: set[str] | None = None) -> DeviceWeights:
    return DeviceWeights(cast(Any, gpu), source, streamed_packs(), passing or set())


def test_packs_come_in_order_and_no_slot_is_written_before_its_use_is_over(copies: None) -> None:
    gpu, source = FakeGpu(), CountingSource()
    order, steps = streamed_packs(), 3
    stream = weights(gpu, source)
    slots = {buffer.handle for buffer in gpu.buffers}
    uses: list[tuple[int, int]] = []  # slot, and the line of the log at which the use is enqueued
    for _ in range(steps):
        for pack in order:
            arrays = stream.bind(pack.network, pack.n)
            slot = min(array.address for array in arrays.values())
            assert slot in slots
            uses.append((slot, len(gpu.log)))
            assert {n: array.address - slot for n, array in arrays.items()} == pack.offsets
            gpu.log.append(("compute", "use", slot))
            stream.used(pack.network, pack.n)
    cast(Any, stream._stream)._thread.shutdown()

    assert source.calls[: len(uses)] == [(pack.network.name, pack.n) for pack in order] * steps
    assert len(source.calls) == len(uses) + SLOTS
    copied = [i for i, line in enumerate(gpu.log) if line[1] == "copy"]
    assert [gpu.log[i][2] for i in copied][: len(uses)] == [slot for slot, _ in uses]
    waits = [line[2] for line in gpu.log if line[:2] == ("copies", "wait")]
    arrived = [line[2] for line in gpu.log if line[:2] == ("compute", "wait")]
    for turn, (_, used_at) in enumerate(uses):
        # The copy waits for what used the slot before, the use for the copy.
        if turn >= SLOTS:
            assert waits[turn].of == "compute" and waits[turn].at > uses[turn - SLOTS][1]
        assert arrived[turn].of == "copies" and copied[turn] < arrived[turn].at < used_at


def test_the_first_copies_wait_for_the_slots_to_be_allocated(copies: None) -> None:
    gpu = FakeGpu()
    stream = weights(gpu, CountingSource())
    cast(Any, stream._stream)._thread.shutdown()
    waits = [line[2] for line in gpu.log if line[:2] == ("copies", "wait")]
    assert [event.of for event in waits] == ["compute"] * SLOTS


def test_a_failure_of_the_loading_thread_reaches_bind(copies: None) -> None:
    stream = weights(FakeGpu(), CountingSource(broken=3))
    order = streamed_packs()
    for pack in order[:2]:
        stream.bind(pack.network, pack.n)
        stream.used(pack.network, pack.n)
    with pytest.raises(OSError, match="the disk is gone"):
        stream.bind(order[2].network, order[2].n)
    cast(Any, stream._stream)._thread.shutdown()


def test_a_pack_out_of_turn_is_a_mistake(copies: None) -> None:
    stream = weights(FakeGpu(), CountingSource())
    with pytest.raises(AssertionError, match="is asked for"):
        stream.bind(streamed_packs()[1].network, 0)
    cast(Any, stream._stream)._thread.shutdown()


def test_resident_packs_are_filled_once_and_passing_ones_are_freed() -> None:
    gpu, source = FakeGpu(), CountingSource()
    kept = DeviceWeights(cast(Any, gpu), source, [], {"context_kv"})
    made = networks(TINY, Plan(64, 48, 5, "fp8"))
    for _ in range(2):
        for name in ("fuser", "context_kv"):
            kept.bind(made[name], 1)
            kept.used(made[name], 1)
    assert source.calls == [("fuser", -2), ("context_kv", -2), ("context_kv", -2)]
    assert [buffer.closed for buffer in gpu.buffers] == [False, True, True]
    kept.release({"fuser"})
    assert gpu.buffers[0].closed


# The TensorRT executor


NETWORK = Network(
    "net",
    "transformer",
    inputs=(Tensor("x", (2, 3), "bfloat16"), Tensor("indices", (4,), "int64")),
    weights=(Tensor("a.weight", (3, 3), "bfloat16"), Tensor("a.bias", (3,))),
    outputs=(Tensor("y", (2, 3)), Tensor("z", (5,), "bfloat16")),
    repeats=2,
)


def executor(trt: FakeTensorRt, gpu: FakeGpu, plans: dict[str, bytes], home: Path) -> GpuExecutor:
    recipes = {name: recipe(trt, name, plan) for name, plan in plans.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home))
        made = GpuExecutor(cast(Any, gpu), open_engines(cast(Any, gpu), recipes))
    made.start(1 << 20, DeviceWeights(cast(Any, gpu), CountingSource(), [], set()))
    return made


def test_executor_casts_inputs_sets_every_address_and_runs(tmp_path: Path) -> None:
    trt, gpu = FakeTensorRt(), FakeGpu()
    runs = executor(trt, gpu, {"net": b"plan", "other": b"a long plan"}, tmp_path)
    scratch = [line for line in trt.log if line[0] == "scratch"]
    assert scratch == [("scratch", gpu.buffers[0].handle, size) for size in (400, 1100)]
    assert gpu.reserved == 1 << 20

    x, there = np.ones((2, 3)), gpu.empty((4,), np.int64)
    y, z = runs.run(NETWORK, 1, {"x": x, "indices": cast(Any, there)})
    (uploaded,) = gpu.uploads
    assert uploaded.dtype == BF16
    assert [(a.shape, a.dtype) for a in (y, z)] == [((2, 3), np.float32), ((5,), BF16)]
    _, addresses, stream = trt.log[-1]
    assert set(addresses) == {"x", "indices", "a.weight", "a.bias", "y", "z"} and stream == gpu.handle
    assert addresses["indices"] == there.address
    assert (addresses["y"], addresses["z"]) == (cast(Any, y).address, cast(Any, z).address)
    assert addresses["a.bias"] == addresses["a.weight"] + 256
    assert len(set(addresses.values())) == 6

    runs.run(NETWORK, 0, {"x": x, "indices": cast(Any, there)})
    assert trt.log[-1][1]["a.weight"] != addresses["a.weight"]  # of the other set


def test_executor_names_the_network_that_is_refused_or_fails(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="refuses the engine of net"):
        executor(FakeTensorRt(), FakeGpu(), {"net": b"bad"}, tmp_path)
    runs = executor(FakeTensorRt(), FakeGpu(), {"net": b"fails"}, tmp_path)
    inputs = {"x": np.ones((2, 3)), "indices": np.zeros(4, np.int64)}
    with pytest.raises(GraphError, match="could not run net"):
        runs.run(NETWORK, 0, inputs)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.core

    from trt_wan.errors import EnvironmentBroken

    def no_driver(ordinal: int) -> Any:
        raise RuntimeError("libcuda.so.1 not found\nand more")

    monkeypatch.setattr(cuda.core, "Device", no_driver)
    with pytest.raises(EnvironmentBroken, match=r"\(libcuda.so.1 not found\)"):
        gpu_module.Gpu()
