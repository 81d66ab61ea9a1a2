"""An exported graph with all numbers in float32, which ONNX Runtime runs on the CPU: an engine's oracle.

Nodes and tensors keep their names. Rounding to bfloat16 and to FP8 is left out; a weight of 8 bits
keeps its values and its scale.
"""

import ml_dtypes  # noqa: F401  (registers its types with numpy)
import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

ROUNDED = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT8)


def in_float32(model: ModelProto) -> ModelProto:
    twin = ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in ROUNDED:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.name == "to" and attribute.i in ROUNDED:
                attribute.i = TensorProto.FLOAT
        _unquantise(node)
    return twin


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in ROUNDED:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _unquantise(node: NodeProto) -> None:
    """Keeps the scale of a quantising node and drops its rounding. All scales are scalars (models/ops.py)."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        node.op_type = "Div" if node.op_type == "QuantizeLinear" else "Mul"
        del node.input[2:]
        del node.attribute[:]


def marked(model: ModelProto, names: list[str]) -> ModelProto:
    """The graph with the tensors `names` as its only outputs. Not polygraphy's modify_outputs, which loses
    the type of bfloat16 tensors: TensorRT then refuses the graph.
    """
    changed = ModelProto()
    changed.CopyFrom(model)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    del changed.graph.output[:]
    changed.graph.output.extend(known[name] for name in names)
    return changed
