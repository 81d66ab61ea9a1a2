"""SAM2 ready to run: contracts, host weights, and what computes.

On a GPU, TensorRT-RTX engines that are missing are built on the spot from the graphs, which have to be there
already (`trt-wan build --sam2 MODEL`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Network
from trt_wan.engines.flavour import Flavour, choose_flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
from trt_wan.engines.sam2.contracts import kernels, networks
from trt_wan.engines.sam2.recipes import graph_set, recipes
from trt_wan.errors import EnvironmentBroken
from trt_wan.preprocess.sam2.memory_attention import open_memory_attention, require_kernel
from trt_wan.preprocess.sam2.transfer import Carrier, DeviceCarrier, HostCarrier
from trt_wan.preprocess.sam2.weights import Sam2Source, Sam2Weights
from trt_wan.runtime.device.arena import ALIGNMENT
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.segments.tensorrt import open_engines
from trt_wan.runtime.weights.on_device import DeviceWeights, nbytes

ExecutorName = Literal["auto", "onnxruntime", "tensorrt"]
BATCH = 4  # frames per call of the encoder on a GPU
GPU_PLAN = Sam2Plan("fp16", BATCH, memories=(11,))  # what `trt-wan build --sam2` builds engines of
# Kept at once at most, over all objects: an object has 18, and one for every prompted frame ahead.
MEMORIES = 256


@dataclass(frozen=True)
class Sam2Model:
    """`weights` are those that the host itself reads: time rows, the mask prompt's convolution."""

    config: Sam2Config
    plan: Sam2Plan
    executor: Executor
    weights: Mapping[str, NDArray[np.float32]]
    gpu: Gpu | None = None  # the executor's, if it computes on one
    networks: Mapping[str, Network] = field(init=False)
    carrier: Carrier = field(init=False)

    def __post_init__(self) -> None:
        config, plan = self.config, self.plan
        carrier = HostCarrier(config, plan) if self.gpu is None else DeviceCarrier(self.gpu, config, plan)
        object.__setattr__(self, "networks", networks(config, plan) | kernels(config, plan))
        object.__setattr__(self, "carrier", carrier)

    def track(self, places: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        """Mask, pointer, object score and memory of a frame with up to `places` memories; `inputs` are those
        of `track_<n>`, or those of its parts.
        """
        if not self.plan.by_kernel:
            return self.run(f"track_{places}", inputs)
        x, keys, values = self.run(f"track_start_{places}", inputs)
        for layer in range(self.config.memory_layers):
            x, q = self.run("track_query", {**inputs, "x": x}, layer)
            looked_at = {"q": q, "keys": self.carrier.part(keys, layer), "values": values}
            (attended,) = self.run(f"track_attention_{places}", {**looked_at, "seen": inputs["seen"]})
            (x,) = self.run("track_read", {"x": x, "attended": attended}, layer)
        return self.run("track_end", {**inputs, "x": x})

    def run(self, name: str, inputs: Mapping[str, Array], n: int = 0) -> tuple[Array, ...]:
        """The outputs of a network with its `n`-th weights, in the contract's order; of `inputs` those are
        taken that the contract names.
        """
        network = self.networks[name]
        for tensor in network.inputs:
            shape = tuple(inputs[tensor.name].shape)
            assert shape == tensor.shape, f"{name}.{tensor.name} is {tensor.shape}, got {shape}"
        wanted = {tensor.name: inputs[tensor.name] for tensor in network.inputs}
        return self.executor.run(network, n, wanted)


def open_sam2(
    weights: Sam2Weights,
    executor: ExecutorName = "auto",
    progress: Progress = silent,
) -> Sam2Model:
    """On the GPU in fp16, or with ONNX Runtime on the CPU in fp32; "auto" says which and why."""
    if executor != "onnxruntime":
        try:
            gpu = Gpu()
            require_kernel(gpu.capability)
            flavour = choose_flavour(None, gpu.capability)
        except EnvironmentBroken as error:
            if executor == "tensorrt":
                raise
            progress(Note(f"SAM2 runs with onnxruntime on the CPU ({error.message})"))
        else:
            progress(Note(f"SAM2 runs with {flavour.name} {flavour.version} on {gpu.name}"))
            return open_sam2_on_gpu(weights, GPU_PLAN, gpu, flavour, progress)
    plan = Sam2Plan()
    graphs = graph_set(weights.config, plan).require()
    on_cpu = OnnxRuntimeExecutor(graphs, BoundWeights({"sam2": weights}))
    return Sam2Model(weights.config, plan, on_cpu, weights)


def open_sam2_on_gpu(
    weights: Sam2Weights, plan: Sam2Plan, gpu: Gpu, flavour: Flavour, progress: Progress
) -> Sam2Model:
    config = weights.config
    engines = recipes(config, plan, "current", flavour, GpuKind(gpu.name, gpu.driver))
    segments: dict[str, Segment] = {**open_engines(gpu, engines, progress)}
    if plan.by_kernel:
        segments |= open_memory_attention(gpu, config, plan.memories)
    executor = GpuExecutor(gpu, segments, DeviceWeights(gpu, Sam2Source(weights)))
    executor.start_alone(arena_bytes(config, plan))
    return Sam2Model(config, plan, executor, weights, gpu)


def arena_bytes(config: Sam2Config, plan: Sam2Plan) -> int:
    """Inputs and outputs of every network once, the encoder's thrice, and memories."""
    contracts = networks(config, plan) | kernels(config, plan)

    def size(network: Network) -> int:
        tensors = network.inputs + network.outputs
        return sum(-(-nbytes(t) // ALIGNMENT) * ALIGNMENT for t in tensors)

    memory = nbytes(contracts["memory_encoder"].outputs[0])
    total = sum(map(size, contracts.values())) + 2 * size(contracts["encoder"]) + MEMORIES * memory
    return math.ceil(1.1 * total)
