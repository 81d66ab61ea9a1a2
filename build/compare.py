"""Runs two sides of a comparison through polygraphy's Comparator, and measures their difference.

Segments run in `SegmentRunner` and not in polygraphy's TrtRunner (0.53, which has a TensorRT-RTX mode). That
one needs torch for CUDA to take bfloat16 and FP8 arrays, finds libcudart only in a CUDA toolkit, and opens no
native kernels. This one opens an engine exactly as a run does.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from trt_wan.build.on_gpu import run_segment
from trt_wan.build.realistic import Host, realistic
from trt_wan.build.reference import ADDED_TO
from trt_wan.engines.contract import Network
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.segment import Segment

SEED = 0

Values = Mapping[str, Host]


def inputs(network: Network) -> dict[str, Host]:
    """Inputs and weights in the contract's types."""
    made = realistic(network, SEED)
    return {name: np.abs(array) if array.dtype == np.int64 else array for name, array in made.items()}


def widened(values: Values) -> dict[str, Host]:
    """The same numbers in float32; integers stay."""
    return {n: a if a.dtype == np.int64 else a.astype(np.float32) for n, a in values.items()}


def compare(runner: BaseRunner, reference: BaseRunner, values: Values) -> float:
    """The largest error of an output."""
    found: list[float] = []

    def compared(made: Mapping[str, Host], wanted: Mapping[str, Host]) -> "OrderedDict[str, bool]":
        for name in wanted:
            before = values.get(ADDED_TO.get(name, ""))
            found.append(difference(made[name], wanted[name], before))
        return OrderedDict((name, True) for name in wanted)  # the caller judges the error

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run([runner, reference], data_loader=[dict(values)])
        Comparator.compare_accuracy(results, compare_func=compared)
    return max(found)


def difference(made: Host, wanted: Host, before: Host | None = None) -> float:
    """Relative, of everything that was added to `before`; infinite if a number is not finite."""
    if not np.isfinite(made.astype(np.float32)).all():
        return math.inf
    off = float(np.linalg.norm(made.astype(np.float64) - wanted.astype(np.float64)))
    size = float(np.linalg.norm(wanted.astype(np.float64) - (0.0 if before is None else before)))
    return off / size if size else off


def differs_among(made: Values, wanted: Values, inputs: Values, largest: float) -> bool:
    """Whether any of the results `made` is further from `wanted` than `largest`."""
    return any(
        difference(array, wanted[name], inputs.get(ADDED_TO.get(name, ""))) > largest
        for name, array in made.items()
    )


def outputs_of(runner: BaseRunner, values: Values) -> dict[str, Host]:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), runner:
        return {name: array.copy() for name, array in runner.infer(dict(values)).items()}


def on_cpu(graph: ModelProto) -> BaseRunner:
    def session() -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    return OnnxrtRunner(session, name="onnxruntime")


class _Runner(BaseRunner):  # type: ignore[misc]  # polygraphy has no types
    """A runner that takes `values`, in float32, as its inputs."""

    def __init__(self, name: str, values: Values) -> None:
        super().__init__(name=name)
        self._values = values

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, array in self._values.items():
            metadata.add(name, dtype=array.dtype, shape=array.shape)
        return metadata


class Given(_Runner):
    """Outputs that are computed already."""

    def __init__(self, name: str, values: Values, outputs: Mapping[str, Host]) -> None:
        super().__init__(name, values)
        self._outputs = outputs

    def infer_impl(self, feed_dict: Values) -> "OrderedDict[str, Host]":
        self.inference_time = 0.0
        return OrderedDict(self._outputs)


class SegmentRunner(_Runner):
    """A segment on the GPU. Its inputs have the contract's types and hold the numbers of the feed."""

    def __init__(self, gpu: Gpu, network: Network, values: Values, segment: Segment) -> None:
        super().__init__("segment", widened(values))
        self._gpu, self._network, self._typed, self._segment = gpu, network, values, segment

    def infer_impl(self, feed_dict: Values) -> "OrderedDict[str, Host]":
        made = run_segment(self._gpu, self._segment, self._network, self._typed)
        self.inference_time = 0.0
        return OrderedDict((name, array.astype(np.float32)) for name, array in made.items())
