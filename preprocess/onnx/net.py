"""A network from a user's ONNX file, run in batches: one picture-like input [n, 3, H, W], any outputs.

It runs on TensorRT on a machine with a GPU, else on ONNX Runtime. A file with a fixed batch of 1 runs frame
by frame, a file with an open batch runs `batch` frames at once. Only detect.py and pose.py know the meaning
of the numbers.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.flavour import Flavour, choose_flavour
from trt_wan.errors import EnvironmentBroken, WeightsError, with_commands
from trt_wan.preprocess.onnx.file import FLOAT, HALF, OnnxFile, read_onnx
from trt_wan.runtime.events import Progress, silent

if TYPE_CHECKING:
    from trt_wan.preprocess.onnx.engine import EngineRunner

Array = NDArray[Any]
Executor = Literal["auto", "onnxruntime", "tensorrt"]

TYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype(np.float32), HALF: np.dtype(np.float16)}


class OnnxNet:
    """`frame` is the input [3, H, W] of one frame for open dimensions. Dimensions fixed by the file win.

    `reason` names the runtime and why it was chosen. `engine` is set on TensorRT, for callers that make the
    input and read the output on the GPU. Raises WeightsError for other networks.
    """

    def __init__(
        self,
        path: Path,
        executor: Executor = "auto",
        batch: int = 16,
        frame: tuple[int, int, int] = (3, 256, 192),
        progress: Progress = silent,
    ) -> None:
        self.file = read_onnx(path)
        self.path = self.file.path
        self.input_shape = _input_shape(self.file, batch, frame)
        self._type = TYPES[self.file.inputs[0].type]
        self._runner, self.reason = _open(self.file, self.input_shape, executor, progress)
        self.engine: EngineRunner | None = None if isinstance(self._runner, SessionRunner) else self._runner

    @property
    def batch(self) -> int:
        return self.input_shape[0]

    @property
    def output_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """As declared by the file. None for open dimensions."""
        return tuple(value.shape for value in self.file.outputs)

    def begin(self) -> None:
        """Call first in a thread that did not open the network."""
        if self.engine is not None:
            self.engine.gpu.device.set_current()

    def run(self, frames: Array) -> list[Array]:
        """Outputs for any number of frames, each as one array."""
        pieces = [frames[i : i + self.batch] for i in range(0, len(frames), self.batch)]
        results = list(self.stream(pieces))
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]

    def stream(self, batches: Iterable[Array]) -> Iterator[list[Array]]:
        """Outputs of each batch of at most `batch` frames, in order, as float32.

        On a GPU the next batch is read while one is computed.
        """
        counts: list[int] = []

        def filled() -> Iterator[Array]:
            for batch in batches:
                assert 0 < len(batch) <= self.batch, f"{len(batch)} frames in a batch of {self.batch}"
                counts.append(len(batch))
                missing = self.batch - len(batch)
                whole = np.concatenate([batch, np.repeat(batch[-1:], missing, 0)]) if missing else batch
                yield whole.astype(self._type, copy=False)

        for outputs in self._runner.stream(filled()):
            count = counts.pop(0)
            for output in outputs:
                self.require_finite(output[:count])
            yield [output[:count].astype(np.float32, copy=False) for output in outputs]

    def require_finite(self, output: Array) -> None:
        if output.dtype.kind == "f" and not np.isfinite(output).all():
            raise WeightsError(
                f"{self.path.name} gives numbers that are not finite.",
                "Try --executor onnxruntime, which computes in fp32; else the file is damaged.",
            )


class SessionRunner:
    """ONNX Runtime, on a CUDA device if its provider works there, else on the CPU."""

    def __init__(self, file: OnnxFile) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # `provider` shows if a provider could not be loaded
        cuda = "CUDAExecutionProvider" in ort.get_available_providers() and _has_cuda_device()
        providers = [*(("CUDAExecutionProvider",) if cuda else ()), "CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(file.path, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated classes for a bad file
            raise WeightsError(
                f"ONNX Runtime cannot load {file.path} ({str(error).splitlines()[0]}).",
                with_commands(
                    "Download the file again; if that does not help:", "pip install -U onnxruntime-gpu"
                ),
            ) from error
        self.provider = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        self._input = file.inputs[0].name

    def stream(self, batches: Iterable[Array]) -> Iterator[list[Array]]:
        for batch in batches:
            try:
                yield [np.asarray(output) for output in self._session.run(None, {self._input: batch})]
            except Exception as error:
                raise WeightsError(
                    f"ONNX Runtime could not run the network ({str(error).splitlines()[0]}).",
                    "If memory ran out, close other programs; else download the file again.",
                ) from error


def _input_shape(file: OnnxFile, batch: int, frame: tuple[int, int, int]) -> tuple[int, int, int, int]:
    name, given = file.path.name, file.inputs[0]
    wrong = "Give the ONNX file of the network that is asked for (yolov10m, ViTPose wholebody)."
    if len(file.inputs) != 1:
        names = ", ".join(value.name for value in file.inputs)
        raise WeightsError(
            f"{name} has {len(file.inputs)} inputs ({names}) where one picture is taken.", wrong
        )
    if given.type not in TYPES:
        raise WeightsError(f"The input {given.name} of {name} is neither float32 nor float16.", wrong)
    if len(given.shape) != 4 or given.shape[1] not in (3, None):
        shape = " x ".join("?" if size is None else str(size) for size in given.shape)
        raise WeightsError(f"The input {given.name} of {name} is {shape}, not n x 3 x height x width.", wrong)
    wanted = (batch, *frame)
    n, c, h, w = (size or default for size, default in zip(given.shape, wanted, strict=True))
    return n, c, h, w


def _open(
    file: OnnxFile, shape: tuple[int, int, int, int], executor: Executor, progress: Progress
) -> "tuple[SessionRunner | EngineRunner, str]":
    why = "it was asked for"
    if executor != "onnxruntime":
        try:
            gpu, flavour = _gpu()
        except EnvironmentBroken as error:
            if executor == "tensorrt":
                raise
            why = error.message.rstrip(".")
        else:
            from trt_wan.preprocess.onnx.engine import EngineRunner

            runner = EngineRunner(gpu, flavour, file, shape, progress)
            return runner, f"{flavour.name} {flavour.version} on {gpu.name}"
    session = SessionRunner(file)
    return session, f"ONNX Runtime, {session.provider} ({why})"


@cache
def _gpu() -> tuple[Any, Flavour]:
    """The GPU and its TensorRT, shared by all networks of a process: each `Gpu` compiles its kernels."""
    from trt_wan.runtime.device.gpu import Gpu

    gpu = Gpu()
    return gpu, choose_flavour(None, gpu.capability)


def _has_cuda_device() -> bool:
    try:
        from cuda.bindings import runtime

        error, count = runtime.cudaGetDeviceCount()
    except Exception:  # without a driver cuda.bindings passes on any error of the loader
        return False
    return not error and count > 0
