"""Peer: the same bf16 graphs on ONNX Runtime's CUDA provider, tensors bound to device memory.

Graphs and the order of calls are ours; what differs is who computes them. Self-attention, whose scores would
fill the GPU's memory, is ONNX Runtime's own fused operator in fp16.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from trt_wan.benchmarks.peers.child import WARM_UP, NotRun, Peer, main
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.engines.contract import Network

STEP = ("patch_embed", "attn_in", "attention", "attn_out", "fuser", "head")
PROVIDER = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class OrtSegment:
    """A session as a segment of the GPU executor: it binds addresses and does not wait."""

    scratch_bytes = 0  # ONNX Runtime keeps memory of its own

    def __init__(self, network: Network, graph: bytes, device: str, stream: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = (PROVIDER[device], {"user_compute_stream": str(stream)} if device == "cuda" else {})
        self._session = ort.InferenceSession(graph, options, providers=[provider])
        if self._session.get_providers()[0] != PROVIDER[device]:
            raise NotRun("onnxruntime fell back to the CPU: its CUDA libraries cannot be loaded")
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._network, self._device = network, device

    def start(self, scratch: int) -> None:
        pass

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        binding = self._session.io_binding()
        for tensor in (*self._network.inputs, *self._network.weights):
            place = (self._device, 0, _onnx_type(str(tensor.dtype)), tensor.shape, addresses[tensor.name])
            binding.bind_input(tensor.name, *place)
        for tensor in self._network.outputs:
            place = (self._device, 0, _onnx_type(str(tensor.dtype)), tensor.shape, addresses[tensor.name])
            binding.bind_output(tensor.name, *place)
        self._session.run_with_iobinding(binding, self._options)

    def settle(self) -> None:
        pass


def _onnx_type(dtype: str) -> int:
    import onnx

    names = {"float32": "FLOAT", "bfloat16": "BFLOAT16", "int64": "INT64"}
    return int(getattr(onnx.TensorProto, names[dtype]))


def attention_graph(network: Network, opset: int = 22) -> bytes:
    """The contract `attention` as one com.microsoft.MultiHeadAttention, in fp16 between bf16 tensors."""
    from onnx import TensorProto, checker, helper

    heads, tokens, head_dim = network.inputs[0].shape
    outside = _onnx_type(str(network.inputs[0].dtype))
    inside = TensorProto.FLOAT if outside == TensorProto.FLOAT else TensorProto.FLOAT16
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_cast"], to=inside),
            helper.make_node("Transpose", [f"{name}_cast"], [f"{name}_tokens"], perm=[1, 0, 2]),
            helper.make_node("Reshape", [f"{name}_tokens", "shape"], [f"{name}_rows"]),
        ]
    nodes += [
        helper.make_node(
            "MultiHeadAttention",
            ["q_rows", "k_rows", "v_rows"],
            ["rows"],
            domain="com.microsoft",
            num_heads=heads,
            scale=1.0,  # q comes multiplied
        ),
        helper.make_node("Squeeze", ["rows", "first"], ["merged"]),
        helper.make_node("Cast", ["merged"], ["attended"], to=outside),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(t.name, outside, t.shape) for t in network.inputs],
        [helper.make_tensor_value_info("attended", outside, network.outputs[0].shape)],
        initializer=[
            helper.make_tensor("shape", TensorProto.INT64, [3], [1, tokens, heads * head_dim]),
            helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        ],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    checker.check_model(model)
    return bytes(model.SerializeToString())


class OnnxRuntimeCuda:
    def __init__(self, shape: Shape) -> None:
        import onnxruntime as ort

        from trt_wan.benchmarks.measure.gpu_events import GpuEvents
        from trt_wan.engines.contracts import networks
        from trt_wan.engines.store.graphs import require_graphs
        from trt_wan.runtime.device.gpu import Gpu
        from trt_wan.runtime.executors.gpu import GpuExecutor
        from trt_wan.runtime.networks.model import Model
        from trt_wan.runtime.networks.transformer import WindowCondition, rope_tables, velocity
        from trt_wan.runtime.opening.activation_memory import activation_bytes
        from trt_wan.runtime.weights.on_device import DeviceWeights
        from trt_wan.runtime.weights.sources import RandomSource

        config, plan = shape.config, replace(shape.plan, precision="bf16")
        folder = require_graphs(config, plan)
        table = networks(config, plan)
        self.gpu = Gpu()
        self.events = GpuEvents(self.gpu)
        self.free = self.gpu.free_bytes()
        segments = {}
        for name in STEP:
            stored = (folder / f"{name}.onnx").read_bytes()
            graph = attention_graph(table[name]) if name == "attention" else stored
            segments[name] = OrtSegment(table[name], graph, "cuda", self.gpu.handle)
        executor = GpuExecutor(self.gpu, segments)
        self.model = Model(config, plan, executor, {})
        executor.start(activation_bytes(config, plan, False), DeviceWeights(self.gpu, RandomSource(0)))

        rng = np.random.default_rng(0)

        def placed(network: str, name: str) -> Any:
            tensor = next(t for t in table[network].inputs if t.name == name)
            return self.model.place(rng.standard_normal(tensor.shape, np.float32).astype(tensor.dtype))

        context = tuple(placed("attn_out", name) for name in ("text_k", "text_v", "image_k", "image_v"))
        face = tuple(placed("fuser", name) for name in ("face_k", "face_v"))
        window = WindowCondition(
            placed("patch_embed", "condition"),
            placed("patch_embed", "pose_latent"),
            1.0,
            [face] * config.transformer.fusers,
            1.0,
        )
        cos, sin = rope_tables(config, plan)
        self._step = partial(
            velocity,
            self.model,
            placed("patch_embed", "latent"),
            (placed("head", "time_embedding"), placed("attn_in", "time_modulation")),
            [context] * config.transformer.layers,
            window,
            (self.model.place(cos), self.model.place(sin)),
        )
        self.settings = {
            "library": f"onnxruntime {ort.__version__}, CUDAExecutionProvider",
            "precision": "bf16 linear layers, norms and residuals float32: our bf16 graphs",
            "attention": "com.microsoft.MultiHeadAttention in fp16",
            "binding": "inputs, weights and outputs by device address; nothing waits within a step",
            "in the step": "patch embedding, blocks, face fusers, head; what does not depend on the step is "
            "computed before, as in trt-wan",
            "weights": "random, normal, made on the device",
        }

    def warm_up(self) -> float:
        first = self.timed(1)[0]
        self.timed(WARM_UP - 1)
        return first

    def timed(self, steps: int) -> list[float]:
        return self.events.timed(self._step, warm_up=0, count=steps)

    def memory(self) -> Mapping[str, int]:
        return {"in use": self.free - self.gpu.free_bytes()}

    def parts(self) -> Mapping[str, float]:
        return {}

    def rest(self) -> None:
        self.model.release(*STEP)

    def wake(self) -> None:
        pass  # weights are made again when they are asked for


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    import onnxruntime as ort

    if device != "cuda":
        raise NotRun("on the CPU, ONNX Runtime is what trt-wan itself runs on")
    if PROVIDER["cuda"] not in ort.get_available_providers():
        raise NotRun(f"onnxruntime {ort.__version__} has no CUDA provider")
    from trt_wan.errors import TrtWanError

    try:
        return OnnxRuntimeCuda(shape)
    except TrtWanError as error:
        raise NotRun(f"{error.message} {error.hint}") from error


if __name__ == "__main__":
    main("onnxruntime_cuda", make)
