"""A user's ONNX file as a TensorRT engine: one static batch, weights as constants, built once and kept.

The hash of the file and its weights is the engine's origin. Products and convolutions of a float32 file are
computed in fp16 (fp32 sums inside), everything between in fp32: half the memory, fused attention, and on the
GPUs of our users two to four times the speed. TensorRT without weak typing leaves that to us: casts are put
around those layers before the network is built.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines import tensorrt
from trt_wan.engines.flavour import Flavour, Progress
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import EngineId
from trt_wan.engines.store.engines import ensure, open_checked
from trt_wan.engines.store.home import home
from trt_wan.errors import GraphError
from trt_wan.preprocess.onnx.file import OnnxFile
from trt_wan.preprocess.onnx.memory import Flight, Sender, Slot
from trt_wan.runtime import events
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.tensorrt import open_engines

Array = NDArray[Any]

SLOTS = 2  # batches on their way: while one is computed, the host prepares the next
RECIPE = "fp16 products and convolutions, 1"  # raise the number when the same file gives another engine


class FileEngine(EngineId):
    """An engine whose graph is a user's file: no command builds it ahead, the next use does."""

    @property
    def shape(self) -> str:
        return ""

    @property
    def rebuild(self) -> str:
        return f"trt-wan rm {self.key}; it is built again when it is used"


def engine_of(
    file: OnnxFile, shape: tuple[int, ...], target: Target, flavour: Flavour, gpu: GpuKind | None
) -> FileEngine:
    """`shape` is that of the input, with its batch."""
    origin = hashlib.sha256(f"{file.sha256} {shape} {RECIPE}".encode()).hexdigest()
    model = f"batch {shape[0]}, {shape[3]}x{shape[2]}"
    return FileEngine(file.path.name, model, Plan(), origin, target, flavour, gpu)


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


def _ignore(*progress: Any) -> None:
    """The engine is reported when it is built, not while."""


class EngineRunner:
    """An engine and its memory. Batches are of exactly `shape`; results are copies on the host.

    Whoever asks for a slot sends a batch into it, has the engine compute it and fetches what is wanted of it;
    that only enqueues. A slot that is still in use is waited for.
    """

    def __init__(
        self,
        gpu: Gpu,
        flavour: Flavour,
        file: OnnxFile,
        shape: tuple[int, ...],
        progress: events.Progress = events.silent,
    ) -> None:
        self.gpu = gpu
        engine = engine_of(file, shape, "current", flavour, GpuKind(gpu.name, gpu.driver))
        manifest, built = ensure(engine, lambda: compile_file(flavour, file, shape, "current", _ignore))
        if built:
            progress(events.Note(f"built {engine.title} in {manifest.build_seconds:.1f} s"))
        kernels = home() / "kernels" / flavour.name
        name = file.path.name
        plans, hashes = {name: open_checked(engine)}, {name: manifest.sha256}
        self._segment = open_engines(gpu, flavour, plans, kernels, progress, hashes)[name]
        self._scratch = gpu.allocate(max(1, self._segment.scratch_bytes))
        self._segment.start(int(self._scratch.handle))
        self.input = file.inputs[0].name
        self.outputs = [value.name for value in file.outputs]
        sender = Sender(gpu)
        parts = {n: self._segment.tensor(n) for n in (self.input, *self.outputs)}
        self.shapes = {n: shape for n, (shape, _) in parts.items()}
        self._slots = [Slot(gpu, sender, parts) for _ in range(SLOTS)]
        self.settle = self._segment.settle

    def slot(self) -> Slot:
        """The one that was used longest ago; results of it that nobody has waited for yet are kept."""
        slot = self._slots.pop(0)
        self._slots.append(slot)
        if slot.flight is not None:
            slot.flight.wait()
        return slot

    def compute(self, slot: Slot) -> None:
        self._segment.enqueue({name: address for name, (address, _, _) in slot.parts.items()})

    def stream(self, batches: Iterable[Array]) -> Iterator[list[Array]]:
        """The outputs of each batch, in order; the next batch is asked for while one is computed."""
        waiting: deque[Flight] = deque()
        for batch in batches:
            slot = self.slot()
            address, shape, dtype = slot.parts[self.input]
            assert batch.shape == shape, f"{batch.shape} != {shape}"
            slot.send_to(address, np.asarray(batch, dtype))
            self.compute(slot)
            waiting.append(slot.fetch([slot.parts[name] for name in self.outputs], self.settle))
            if len(waiting) == SLOTS:
                yield waiting.popleft().wait()
        while waiting:
            yield waiting.popleft().wait()
