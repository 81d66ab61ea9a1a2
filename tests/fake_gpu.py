"""A GPU for tests without one: memory is the host's, and work is done when its event is waited for, in the
order it was enqueued. So what is read too early, or written too soon, shows in the numbers.

Engines run on ONNX Runtime, and the kernels of people are numpy's: what is proved is everything around them.
"""

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trt_wan.preprocess.onnx import engine as onnx_engine
from trt_wan.preprocess.onnx import memory
from trt_wan.preprocess.onnx import net as onnx_net
from trt_wan.preprocess.people.gpu import batches as people
from trt_wan.preprocess.people.gpu.resampling_tables import TAP, WHOLE_TAP
from trt_wan.preprocess.people.pose import MEAN, STD, peaks
from trt_wan.runtime.segments import tensorrt as segments

Array = NDArray[Any]


def at(address: int, shape: tuple[int, ...], kind: Any) -> Array:
    """The memory itself, as an array."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return memory.view(kind).reshape(shape)


class FakeStream:
    handle = 0

    def __init__(self) -> None:
        self.queue = list[Any]()

    def record(self) -> Any:
        mark = object()
        self.queue.append(mark)

        def sync() -> None:
            while mark in self.queue:
                work = self.queue.pop(0)
                if callable(work):
                    work()

        return SimpleNamespace(sync=sync)

    def wait(self, event: Any) -> None:
        self.queue.append(event.sync)


class FakeGpu:
    name, driver, handle = "Fake", 13, 0

    def __init__(self) -> None:
        self.stream, self.copies = FakeStream(), FakeStream()
        self.computing = self.most_computing = 0  # batches

    def allocate(self, size: int) -> Any:
        memory = np.full(size, 0xFF, np.uint8)  # NaN in every type

        def close(stream: FakeStream) -> None:
            stream.queue.append(lambda: memory.fill(0xFF))

        return SimpleNamespace(handle=memory.ctypes.data, memory=memory, close=close)


class FakePinned:
    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.address, self.event = self.bytes.ctypes.data, SimpleNamespace(sync=lambda: None)

    def used_by(self, stream: FakeStream) -> None:
        self.event = stream.record()

    def wait(self) -> None:
        self.event.sync()


def fake_copy(target: int, source: int, size: int, stream: FakeStream) -> None:
    stream.queue.append(lambda: ctypes.memmove(target, source, size))


class FakeSegment:
    """An ONNX file of one input, at a batch."""

    scratch_bytes = 0

    def __init__(self, gpu: FakeGpu, path: Path, shape: tuple[int, ...]) -> None:
        import onnxruntime

        self.gpu = gpu
        self.session = onnxruntime.InferenceSession(str(path))
        (given,) = self.session.get_inputs()
        self.input, self.outputs = given.name, [value.name for value in self.session.get_outputs()]
        kind = np.dtype(np.float16 if "float16" in given.type else np.float32)
        results = self.session.run(None, {self.input: np.zeros(shape, kind)})
        self.tensors = {self.input: (shape, kind)}
        for name, result in zip(self.outputs, results, strict=True):
            self.tensors[name] = (result.shape, result.dtype)

    def tensor(self, name: str) -> Any:
        return self.tensors[name]

    def start(self, scratch: int) -> None: ...

    def settle(self) -> None: ...

    def enqueue(self, addresses: dict[str, int]) -> None:
        arrays = {name: at(addresses[name], *self.tensors[name]) for name in self.tensors}

        def work() -> None:
            results = self.session.run(None, {self.input: arrays[self.input]})
            for name, result in zip(self.outputs, results, strict=True):
                arrays[name][:] = result
            self.gpu.computing -= 1

        self.gpu.stream.queue.append(work)
        self.gpu.computing += 1
        self.gpu.most_computing = max(self.gpu.most_computing, self.gpu.computing)


class NumpyKernels:
    """What PeopleKernels promises."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.queue = gpu.stream.queue

    def stretch(self, kind: Any, frame: int, frame_width: int, taps: Any, out: int, size: Any) -> None:
        def work() -> None:
            (x, y), values = (
                self.tables(taps, size, WHOLE_TAP),
                self.frame(frame, frame_width, taps[1], size[1]),
            )
            across = values[:, x["first"]] * x["first_weight"][:, None]
            across += values[:, x["second"]] * x["second_weight"][:, None]
            parts = [
                (y[f"{k}_weight"][:, None, None] * (across[y[k]] >> 4)) >> 16 for k in ("first", "second")
            ]
            result = ((sum(parts) + 2) >> 2).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
            at(out, (3, size[1], size[0]), kind)[:] = result

        self.queue.append(work)

    def crop(
        self, kind: Any, frame: int, frame_width: int, taps: Any, out: int, size: Any, bgr: bool
    ) -> None:
        def work() -> None:
            (x, y), values = self.tables(taps, size, TAP), self.frame(frame, frame_width, taps[1], size[1])
            result = np.zeros((size[1], size[0], 3), np.float32)
            for row in ("first", "second"):
                for column in ("first", "second"):
                    weight = y[f"{row}_weight"][:, None] * x[f"{column}_weight"]
                    result += values[y[row]][:, x[column]].astype(np.float32) * weight[..., None]
            channels = result[..., ::-1] if bgr else result
            picture = ((channels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)
            at(out, (3, size[1], size[0]), kind)[:] = picture

        self.queue.append(work)

    def decode(self, kind: Any, maps: int, count: int, width: int, height: int, out: int) -> None:
        def work() -> None:
            values = at(maps, (count, height, width), kind).astype(np.float32)
            finite = np.isfinite(values).all((1, 2))
            found = peaks(np.where(finite[:, None, None], values, 0)[None])[0]
            found[~finite, 2] = np.nan
            at(out, (count, 3), np.float32)[:] = found

        self.queue.append(work)

    @staticmethod
    def tables(taps: tuple[int, int], size: tuple[int, int], kind: Any) -> list[Array]:
        return [at(address, (length,), kind) for address, length in zip(taps, size, strict=True)]

    @staticmethod
    def frame(address: int, width: int, rows: int, height: int) -> Array:
        table = at(rows, (height,), TAP)
        needed = int(max(table["first"].max(), table["second"].max())) + 1
        return at(address, (needed, width, 3), np.uint8).astype(np.int64)


class FakeLogger:
    ERROR = 0

    def __init__(self, severity: int) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Networks for TensorRT run on the GPU that is returned."""
    gpu = FakeGpu()
    module = SimpleNamespace(nptype=np.dtype, Runtime=lambda log: None, Logger=FakeLogger)
    flavour = SimpleNamespace(name="fake", version="1", reason="", module=module)
    asked: list[Any] = []
    recipe_of = onnx_engine.recipe_of

    def remembered(file: Any, shape: tuple[int, ...], *rest: Any) -> Any:
        asked[:] = [file.path, shape]
        return replace(recipe_of(file, shape, *rest), compile=lambda progress: b"plan")

    monkeypatch.setattr(onnx_engine, "recipe_of", remembered)
    monkeypatch.setattr(segments, "EngineSegment", lambda *_: FakeSegment(gpu, *asked))
    monkeypatch.setattr(onnx_net, "_gpu", lambda: (gpu, flavour))
    monkeypatch.setattr(memory, "copy", fake_copy)
    monkeypatch.setattr(memory, "Pinned", FakePinned)
    monkeypatch.setattr(people, "people_kernels", NumpyKernels)
    return gpu
