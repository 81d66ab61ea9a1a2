"""FLOPs of an ONNX graph, from its shapes alone: two for each multiply and add of matrix products and
convolutions.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def file_flops(path: Path, input_shape: Sequence[int]) -> int | None:
    """FLOPs of one frame of a network with one input of that shape. None if `onnx` is not installed or its
    shape inference leaves shapes open.
    """
    try:
        import onnx

        model = onnx.load(path, load_external_data=False)
        for d, size in zip(model.graph.input[0].type.tensor_type.shape.dim, input_shape, strict=True):
            d.dim_value = size
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        return sum(counted_flops(model)) or None
    except (ImportError, LookupError, ValueError):
        return None


def counted_flops(model: Any) -> tuple[int, int]:
    """FLOPs of the matrix products and of the convolutions of an `onnx.ModelProto`, for one frame where the
    batch is open. Only the shapes of the weights are read.
    """
    import onnx

    counted = onnx.ModelProto()
    counted.CopyFrom(model)
    for value in (*counted.graph.input, *counted.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if not dimension.dim_value:
                dimension.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(counted).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    products = convolutions = 0
    for node in graph.node:
        first, out = shapes.get(node.input[0], ()) if node.input else (), math.prod(shapes[node.output[0]])
        if node.op_type == "MatMul":
            products += 2 * out * first[-1]
        elif node.op_type == "Gemm":
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            products += 2 * out * first[0 if transposed else -1]
        elif node.op_type == "Conv":
            convolutions += 2 * out * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":  # every number of the input meets the kernel [in, out, h, w]
            convolutions += 2 * math.prod(first) * math.prod(shapes[node.input[1]][1:])
    return products, convolutions
