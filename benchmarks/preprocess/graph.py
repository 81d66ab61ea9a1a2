"""ONNX graphs with random weights, written without torch: nodes one by one, weights when the file is written.

A graph can be built and counted without any weight in memory; writing it holds one weight at a time.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import EnvironmentBroken

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
OPSET, IR_VERSION = 17, 8
ALIGNMENT = 4096  # of weights in a file of their own, so that they can be mapped


def onnx_helper() -> Any:
    """The package `onnx`, which is not needed to run anything."""
    try:
        import onnx.external_data_helper
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as error:
        raise EnvironmentBroken(
            "Random networks are written with the package onnx, which is not installed.",
            "pip install onnx, or name your own networks: --detector FILE --pose FILE",
        ) from error
    return onnx


@dataclass(frozen=True)
class Weight:
    """Normally distributed float32."""

    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float


class GraphBuilder:
    """One input `images` [batch, 3, H, W], batch open; `op` returns the names of what it adds."""

    def __init__(self) -> None:
        self.onnx = onnx_helper()
        self.nodes: list[Any] = []
        self.weights: list[Weight] = []
        self.constants: dict[str, Array] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The output's name, or a tuple of them."""
        n = len(self.nodes)
        names = tuple(f"{kind.lower()}_{n}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs))
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), list(names), **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Stored in the graph itself, whatever its size."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype)
        return name

    def weight(self, *shape: int, mean: float = 0.0, deviation: float | None = None) -> str:
        """By default as large as keeps a layer's output as large as its input: 1 / sqrt(fan in)."""
        if deviation is None:
            deviation = 1 / math.sqrt(math.prod(shape[1:]))
        name = f"weight_{len(self.weights)}"
        self.weights.append(Weight(name, shape, mean, deviation))
        return name

    def reshaped(self, x: str, *shape: int) -> str:
        """0 keeps a dimension, -1 is whatever is left."""
        name: str = self.op("Reshape", x, self.constant(shape, np.int64))
        return name

    def model(self, frame: tuple[int, ...], output: str, result: tuple[int, ...]) -> "onnx.ModelProto":
        """Without its weights' values: they are said to be in a file that is not written yet."""
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        self.nodes.append(helper.make_node("Identity", [output], ["output"]))
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("images", kind, ["batch", *frame])],
            [helper.make_tensor_value_info("output", kind, ["batch", *result])],
            [
                *(self.onnx.numpy_helper.from_array(v, name) for name, v in self.constants.items()),
                *(self._placeholder(w) for w in self.weights),
            ],
        )
        opset = [helper.make_opsetid("", OPSET)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        return model

    def _placeholder(self, weight: Weight) -> Any:
        tensor = self.onnx.TensorProto(name=weight.name, dims=weight.shape)
        tensor.data_type = self.onnx.TensorProto.FLOAT
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="not written")
        return tensor


def write(model: "onnx.ModelProto", weights: list[Weight], path: Path, seed: int, beside: str | None) -> None:
    """Gives the weights their values and writes the graph; the weights go into the file named `beside` it, or
    into the graph's own.
    """
    rng = np.random.default_rng(seed)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    stream = (path.parent / beside).open("wb") if beside else None
    try:
        for weight in weights:
            values = rng.standard_normal(weight.shape, np.float32)
            values *= np.float32(weight.deviation)
            values += np.float32(weight.mean)
            tensor = tensors[weight.name]
            del tensor.external_data[:]
            if stream is None:
                tensor.data_location = type(tensor).DEFAULT
                tensor.raw_data = values.tobytes()
                continue
            stream.seek(-(-stream.tell() // ALIGNMENT) * ALIGNMENT)
            place = {"location": beside, "offset": stream.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            stream.write(values.data)
    finally:
        if stream is not None:
            stream.close()
    path.write_bytes(model.SerializeToString())
