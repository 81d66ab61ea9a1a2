"""A user's ONNX file as a TensorRT engine: one static batch, weights as constants, built once and kept.

The hash of the file and its weights is the engine's origin. Products and convolutions of a float32 file are
computed in fp16 (fp32 sums inside), everything between in fp32: half the memory, fused attention, and on our
users' GPUs two to four times the speed. TensorRT without weak typing leaves that to us: casts are put around
those layers before the network is built.
"""

import hashlib
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines import tensorrt
from trt_wan.engines.flavour import Flavour, Progress
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.store.engine_id import EngineId, Recipe
from trt_wan.errors import GraphError
from trt_wan.preprocess.onnx.file import OnnxFile

Array = NDArray[Any]

VERSION = "fp16 products and convolutions, 1"  # raise the number when the same file gives another engine


def recipe_of(
    file: OnnxFile, shape: tuple[int, ...], target: Target, flavour: Flavour, gpu: GpuKind | None
) -> Recipe:
    """The engine of a file, which its first use builds; `shape` is the shape of the input, with its batch."""
    origin = hashlib.sha256(f"{file.sha256} {shape} {VERSION}".encode()).hexdigest()
    about = f"batch {shape[0]}, {shape[3]}x{shape[2]}"
    engine = EngineId("onnx", file.path.name, about, "fp16", (), origin, target, flavour, gpu)
    return Recipe(engine, partial(compile_file, flavour, file, shape, target))


def compile_file(
    flavour: Flavour, file: OnnxFile, shape: tuple[int, ...], target: Target, progress: Progress
) -> bytes:
    """The plan. GraphError names the node that TensorRT does not take, or what stopped the builder."""
    return tensorrt.in_a_thread(
        flavour, progress, lambda monitor: _compile(flavour, file, shape, target, monitor)
    )


def _compile(flavour: Flavour, file: OnnxFile, shape: tuple[int, ...], target: Target, monitor: Any) -> bytes:
    trt = flavour.module
    builder, network, log = tensorrt.start_network(flavour, target)
    parser = trt.OnnxParser(network, log)  # has to live until the plan is built
    if not parser.parse_from_file(str(file.path)):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [f"{p.node_name()} ({p.node_operator()}): {p.desc()}" for p in problems]
        raise GraphError(
            f"{flavour.name} {flavour.version} cannot read {file.path}: {'; '.join(nodes)}.",
            "Run it with ONNX Runtime: --executor onnxruntime.",
        )
    network.get_input(0).shape = shape
    kept = _lower_to_half(trt, network)
    plan = tensorrt.build_plan(flavour, builder, network, log, target, monitor)
    del kept  # TensorRT reads them until here
    return plan


def _lower_to_half(trt: Any, network: Any) -> list[Array]:
    """Puts casts around every float32 product and convolution, but for one that is a result itself. Returns
    arrays that must live until the build.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    users: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for i in range(layer.num_inputs):
            tensor = layer.get_input(i)
            if tensor is not None:
                users.setdefault(tensor.name, []).append((layer, i))
    results = {network.get_output(i).name for i in range(network.num_outputs)}
    convolutions = {
        trt.LayerType.CONVOLUTION: trt.IConvolutionLayer,
        trt.LayerType.DECONVOLUTION: trt.IDeconvolutionLayer,
    }
    kept: list[Array] = []
    for layer in layers:
        result = layer.get_output(0)
        kind = layer.type
        if kind not in (trt.LayerType.MATRIX_MULTIPLY, *convolutions) or result.name in results:
            continue
        if layer.get_input(0).dtype != trt.DataType.FLOAT:
            continue
        if kind in convolutions and not _halve_constants(trt, layer, convolutions[kind], kept):
            continue
        for i in range(layer.num_inputs):
            if layer.get_input(i) is not None:  # a kernel of the layer's own leaves its place empty
                cast = network.add_cast(layer.get_input(i), trt.DataType.HALF)
                layer.set_input(i, cast.get_output(0))
        back = network.add_cast(result, trt.DataType.FLOAT).get_output(0)
        for user, i in users.get(result.name, ()):
            user.set_input(i, back)
    return kept


def _halve_constants(trt: Any, layer: Any, kind: Any, kept: list[Array]) -> bool:
    """Kernel and bias in fp16, where they are the layer's own and no inputs; False if fp16 does not reach."""
    layer.__class__ = kind  # TensorRT's Python hands out the base class
    kernel, bias = (np.asarray(values, np.float32) for values in (layer.kernel, layer.bias))
    largest = max((float(np.abs(values).max()) for values in (kernel, bias) if values.size), default=0.0)
    if largest > float(np.finfo(np.float16).max):
        return False
    for name, values in (("kernel", kernel), ("bias", bias)):
        if values.size:
            kept.append(values.astype(np.float16))
            setattr(layer, name, trt.Weights(kept[-1]))
    return True
