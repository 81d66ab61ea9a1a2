"""FLOPs of an ONNX graph, from its shapes alone: two for each multiply and add of matrix products and
convolutions.
"""

import math
from typing import Any

import onnx


def counted_flops(model: Any) -> tuple[int, int]:
    """Of the matrix products and of the convolutions of an `onnx.ModelProto`, for one frame where the batch
    is open. Weights may be missing; their shapes have to be there.
    """
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
