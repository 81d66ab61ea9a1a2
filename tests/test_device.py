"""What of the GPU code can be proved without a GPU: the arena, copies, errors, the executor's calls.

The kernels are compiled here for every GPU we name, and not run: their arithmetic can only be shown on a GPU.
"""

import ast
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from fake_tensorrt import FakeTensorRt, recipe
from late_gpu import LateGpu

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan
from trt_wan.errors import EnvironmentBroken, GpuFault, GraphError, MemoryShort, TrtWanError
from trt_wan.runtime.device import gpu as gpu_module
from trt_wan.runtime.device import kernels, pinned
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.device.checked import cuda, cuda_core
from trt_wan.runtime.device.gpu import DeviceArray
from trt_wan.runtime.device.pinned import Ring
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.segments.tensorrt import open_engines
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.pack import Pack

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


# Errors


class Code(IntEnum):
    fine = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719


def test_a_call_that_succeeds_returns_its_values() -> None:
    assert cuda((Code.fine,)) is None
    assert cuda((Code.fine, 7)) == 7
    assert cuda((Code.fine, 7, 8)) == (7, 8)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.cudaErrorMemoryAllocation, MemoryShort),
        (Code.cudaErrorInsufficientDriver, EnvironmentBroken),
        (Code.cudaErrorIllegalAddress, GpuFault),
        (Code.cudaErrorLaunchFailure, GpuFault),
    ],
)
def test_a_failed_call_is_told_as_what_it_is(code: Code, kind: type[TrtWanError]) -> None:
    class CUDAError(Exception):
        """As cuda.core raises it."""

    with pytest.raises(kind, match=code.name):
        cuda((code, 0))
    with pytest.raises(kind, match=code.name), cuda_core():
        raise CUDAError(f"{code.name}: a sentence of CUDA's")


def test_no_result_of_cuda_is_checked_by_an_assert() -> None:
    for path in Path(gpu_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                assert "error" not in ast.unparse(node.test), f"{path.name}:{node.lineno}"


# Copies and the arena


class HostGpu(gpu_module.Gpu):
    """The real copies and arena on a stream that runs late; three staging slots of 64 bytes."""

    def __init__(self) -> None:
        self.late = LateGpu()
        self.stream, self.downloads = self.late.stream, self.late.copies
        self.arena = Arena(0)
        self._staging = Ring(3, 64, cast(Any, self.late.pinned))
        self._kept = {}

    def allocate(self, size: int, stream: Any = None) -> Any:
        return self.late.allocate(size, stream)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        self.late.copy(target, source, size, stream)


def test_uploads_wait_for_the_gpu_only_when_all_staging_slots_are_in_use() -> None:
    gpu = HostGpu()
    gpu.reserve(1 << 20)
    hosts = [np.full(10, i, np.float32) for i in range(5)]
    arrays = [gpu.upload(host) for host in hosts[:3]]
    assert gpu.stream.done == 0, "nothing waits"
    arrays += [gpu.upload(host) for host in hosts[3:]]
    assert gpu.stream.done == 3, "the memory, and the copies that read the first two slots"
    for array, host in zip(arrays, hosts, strict=True):
        np.testing.assert_array_equal(array, host)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000])
def test_copies_larger_than_the_staging_memory(size: int) -> None:
    gpu = HostGpu()
    gpu.reserve(1 << 20)
    host = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    np.testing.assert_array_equal(gpu.upload(host), host)


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_a_fetched_array_waits_for_nothing_that_was_asked_for_later(size: int) -> None:
    gpu = HostGpu()
    gpu.reserve(1 << 20)
    host = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    executor = GpuExecutor(gpu, {}, cast(Any, None))
    fetched = executor.fetch(cast(Any, gpu.upload(host)))
    gpu.stream.enqueue(lambda: pytest.fail("the download waited for the next network"))
    np.testing.assert_array_equal(fetched(), host)
    assert executor.fetch(host)() is host
    gpu.stream.queue.clear()


def test_a_model_asks_for_the_next_array_before_it_waits() -> None:
    told: list[str] = []

    class Telling:
        def fetch(self, array: Any) -> Any:
            return lambda: told.append(f"waits for {array}") or array

    def made() -> Iterator[Any]:
        for k in range(3):
            told.append(f"asks for {k}")
            yield k

    model = Model(TINY, Plan(64, 48, 5), cast(Any, Telling()), {})
    for array in model.fetched(made()):
        told.append(f"uses {array}")
    assert told == [
        *("asks for 0", "asks for 1", "waits for 0", "uses 0"),
        *("asks for 2", "waits for 1", "uses 1", "waits for 2", "uses 2"),
    ]


def test_the_arena_is_taken_again_and_old_arrays_harm_nothing() -> None:
    gpu = HostGpu()
    gpu.reserve(1024)
    first = gpu.arena.memory
    gpu.upload(np.zeros(4))
    gpu.reserve(2048)
    assert first not in gpu.late.live, "freed: no array needs it"
    old = gpu.upload(np.arange(8.0))
    second = gpu.arena.memory
    gpu.reserve(4096)
    new = gpu.upload(np.ones(8))
    np.testing.assert_array_equal(old, np.arange(8.0))
    used = gpu.arena.used
    assert second.address == old.address and gpu.arena.size == 4096
    del old
    assert gpu.arena.used == used, "the span went back to its own arena"
    np.testing.assert_array_equal(new, np.ones(8))


def test_objects_of_a_gpu_are_made_once() -> None:
    gpu, made = HostGpu(), []

    def make() -> list[int]:
        made.append(1)
        return made

    assert gpu.once("key", make) is gpu.once("key", make) and made == [1]


# Host memory


def test_control_groups_limit_host_memory(tmp_path: Path) -> None:
    """A limit above counts as well; cached files do not."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    inner = root / "outer/inner"
    inner.mkdir(parents=True)
    for group, limit in ((inner, "max"), (inner.parent, "1000")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("700\n")
        (group / "memory.stat").write_text("anon 100\nactive_file 20\ninactive_file 30\nslab 5\n")
    own.write_text("1:name=systemd:/old\n0::/outer/inner\n")
    assert min(pinned._cgroup_rooms(root, own)) == 1000 - 700 + 50
    assert min(pinned._cgroup_rooms(root, tmp_path / "absent")) == 1 << 62


# The TensorRT executor


class FakeBuffer:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def close(self, stream: Any) -> None:
        pass


class FakeGpu:
    name = "A GPU"

    def __init__(self) -> None:
        self.stream = self.loads = SimpleNamespace(record=object, wait=lambda event: None)
        self.device = SimpleNamespace(set_current=lambda: None)
        self.handle = 7
        self.buffers: list[FakeBuffer] = []
        self.uploads: list[Any] = []

    def allocate(self, size: int, stream: Any = None) -> FakeBuffer:
        self.buffers.append(FakeBuffer((len(self.buffers) + 1) << 40))
        return self.buffers[-1]

    def view(self, address: int, shape: Any, dtype: Any) -> DeviceArray:
        return DeviceArray(cast(Any, self), address, shape, dtype)

    def empty(self, shape: Any, dtype: Any) -> DeviceArray:
        return self.view(int(self.allocate(0).handle), shape, dtype)

    def upload(self, host: Any) -> DeviceArray:
        self.uploads.append(host)
        return self.empty(host.shape, host.dtype)

    def reserve(self, size: int) -> None:
        self.reserved = size


class NoWeights:
    def pieces(self, pack: Pack) -> Iterator[Any]:
        return iter(())


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
        segments = open_engines(cast(Any, gpu), recipes)
    made = GpuExecutor(cast(Any, gpu), segments, DeviceWeights(cast(Any, gpu), NoWeights()))
    made.start_alone(1 << 20)
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

    def no_driver(ordinal: int) -> Any:
        raise RuntimeError("libcuda.so.1 not found\nand more")

    monkeypatch.setattr(cuda.core, "Device", no_driver)
    monkeypatch.setattr(gpu_module, "has_nvidia_gpu", lambda: True)
    with pytest.raises(EnvironmentBroken, match=r"\(libcuda.so.1 not found\)") as caught:
        gpu_module.Gpu()
    assert caught.value.hint.startswith("Install an NVIDIA driver")
    monkeypatch.setattr(gpu_module, "has_nvidia_gpu", lambda: False)
    with pytest.raises(EnvironmentBroken, match="^No NVIDIA GPU is here.$") as caught:
        gpu_module.Gpu()
    assert caught.value.hint.endswith("CUDA says: libcuda.so.1 not found")
