"""TensorRT engines as segments, without a GPU: building, kernels on disk, and everything TensorRT refuses."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_tensorrt import FakeContext, FakeTensorRt, recipe

from trt_wan.engines.store.kernels import KernelCache
from trt_wan.errors import GraphError, MemoryShort
from trt_wan.runtime.segments import tensorrt as engine_segment
from trt_wan.runtime.segments.tensorrt import EngineSegment, finish_engines, open_engines

GPU = cast(Any, SimpleNamespace(name="A GPU", handle=7))


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tmp_path))
        yield


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], bytes]]:
    """The processes that would be started to finish kernels, with what they would read."""
    started: list[tuple[tuple[str, ...], bytes]] = []

    def run(command: tuple[str, ...], *, input: bytes, capture_output: bool) -> None:
        started.append((command[2:], input))

    monkeypatch.setattr(engine_segment.subprocess, "run", run)
    return started


def opened(trt: FakeTensorRt, plans: dict[str, bytes], gpu: Any = GPU) -> dict[str, EngineSegment]:
    return open_engines(gpu, {name: recipe(trt, name, plan) for name, plan in plans.items()})


def test_the_kernel_cache_is_written_whole_and_read_back(tmp_path: Path) -> None:
    folder, trt = tmp_path / "kernels" / "tensorrt_rtx", FakeTensorRt()
    opened(trt, {"net": b"plan"})["net"].settle()
    (path,) = folder.iterdir()  # nothing partial is left
    assert path.read_bytes() == b"kernels"
    opened(trt, {"net": b"plan"})
    opened(trt, {"net": b"another"})
    assert [cache.blob for cache in trt.caches] == [b"", b"kernels", b""]
    assert [line[1] for line in trt.log if line[0] == "cache"] == trt.caches


def test_a_cache_of_kernels_that_cannot_be_written_ends_no_job(tmp_path: Path) -> None:
    """After the first window is computed: a home that is read-only, or a disk that is full."""
    segment = opened(FakeTensorRt(), {"net": b"plan"})["net"]
    (tmp_path / "kernels").write_text("a file where the folder should be")
    segment.settle()
    segment.settle()


@pytest.mark.parametrize(("gpu", "driver"), [("A GPU", "580.82.07"), ("another GPU", "580.95.05")])
def test_two_drivers_or_gpus_of_one_home_have_kernels_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, driver: str
) -> None:
    trt = FakeTensorRt()
    for name, version in (("A GPU", "580.95.05"), (gpu, driver)):
        monkeypatch.setattr(engine_segment, "driver_version", lambda version=version: version)
        place = cast(Any, SimpleNamespace(name=name, handle=7))
        opened(trt, {"net": b"plan"}, place)["net"].settle()
    assert [cache.blob for cache in trt.caches] == [b"", b""]
    assert len(list((tmp_path / "kernels" / "tensorrt_rtx").iterdir())) == 2


@pytest.mark.parametrize(
    "lacking", ["create_runtime_config", "create_runtime_cache", "create_execution_context"]
)
def test_without_memory_tensorrt_creates_nothing_and_that_is_told(lacking: str) -> None:
    """It returns None, and the AttributeError that followed was called a mistake in trt-wan."""
    with pytest.raises(MemoryShort, match="could not open the engine of net"):
        opened(FakeTensorRt(lacking), {"net": b"plan"})


def test_refusals_of_tensorrt_name_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphError, match="refuses the engine of net"):
        opened(FakeTensorRt(), {"net": b"bad"})
    with pytest.raises(GraphError, match="could not run net"):
        opened(FakeTensorRt(), {"net": b"fails"})["net"].enqueue({"x": 1})
    monkeypatch.setattr(FakeContext, "set_tensor_address", lambda *_: False)
    with pytest.raises(GraphError, match="net takes no tensor x"):
        opened(FakeTensorRt(), {"net": b"plan"})["net"].enqueue({"x": 1})


def test_missing_engines_are_built_and_told_once() -> None:
    notes: list[Any] = []
    for _ in range(2):
        open_engines(GPU, {"net": recipe(FakeTensorRt(), "net", b"plan")}, notes.append)
    (note,) = notes
    assert note.text.startswith("built engine net (tiny, fp32, sm89, tensorrt_rtx 1.6.1) in ")
    assert open_engines(GPU, {}) == {}


def test_new_engines_are_opened_in_processes_of_their_own_first(
    tmp_path: Path, children: list[tuple[tuple[str, ...], bytes]]
) -> None:
    plans = {"known": b"known", "small": b"plan", "large": b"a large plan"}
    opened(FakeTensorRt(), {"known": b"known"})["known"].settle()
    assert not children, "one engine is opened here at once"
    for segment in opened(FakeTensorRt(), plans).values():
        segment.settle()
    module = ("trt_wan.runtime.segments.finish_kernels", "tensorrt_rtx")
    cache = KernelCache("tensorrt_rtx", GPU.name, engine_segment.driver_version())
    files = {plan: str(tmp_path / cache.file(sha256(plan).hexdigest())) for plan in plans.values()}
    assert sorted(children) == [
        ((*module, "large", files[b"a large plan"]), b"a large plan"),
        ((*module, "small", files[b"plan"]), b"plan"),
    ]
    opened(FakeTensorRt(), plans)
    assert len(children) == 2, "once"
    notes: list[Any] = []
    finish_engines(GPU, [recipe(FakeTensorRt(), "new", b"new")], notes.append)
    assert len(children) == 3 and "finishing the kernels of 1 engines" in notes[-1].text


def test_a_process_that_cannot_finish_kernels_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # real processes, which find no GPU, or no engine in this plan
    opened(FakeTensorRt(), {"net": b"plan", "other": b"another"})
