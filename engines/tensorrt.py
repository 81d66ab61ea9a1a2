"""Compiles graphs into engines with TensorRT, of either flavour.

Every function called here has the same name in both flavours and all versions, except where a comment says
so (trt_facts.md 4.3). Full TensorRT could not be installed where this was written: nothing of it is proved.

Networks are strongly typed: the graph alone decides the type of each operation. A compiled engine
("plan") holds no weights; they are inputs. This module knows no model.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from types import new_class
from typing import Any

import numpy as np

from trt_wan.engines.flavour import Flavour, Progress
from trt_wan.engines.fp8 import E4M3_MAX
from trt_wan.engines.gpu import FP8_ATTENTION_RANGE, TARGETS, Target
from trt_wan.engines.store import timings
from trt_wan.errors import GraphError, UsageError, with_commands


def compile_onnx(flavour: Flavour, graph: bytes, target: Target, progress: Progress) -> bytes:
    """The plan of an ONNX graph. Raises GraphError with the node that is refused, or the builder's errors."""
    return in_a_thread(flavour, progress, lambda monitor: _onnx(flavour, graph, target, monitor))


def _onnx(flavour: Flavour, graph: bytes, target: Target, monitor: Any) -> bytes:
    builder, network, log = start_network(flavour, target)
    parser = flavour.module.OnnxParser(network, log)  # has to live until the plan is built
    if not parser.parse(graph) or not network.num_outputs:  # bytes that are no graph "parse", and are empty
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}, in {e.func()}" for e in errors]
        raise GraphError(
            f"{flavour.name} {flavour.version} cannot read the graph: {'; '.join(nodes) or 'it is empty'}.",
            with_commands(
                "Remove the graphs, and build them again; if that does not help, report it:",
                "trt-wan rm graphs --yes",
            ),
        )
    return build_plan(flavour, builder, network, log, target, monitor)


def compile_attention(
    flavour: Flavour,
    heads: int,
    tokens: int,
    head_dim: int,
    fp8: bool,
    target: Target,
    progress: Progress,
) -> bytes:
    """The plan of the contract `attention` in bf16; with `fp8`, its products are FP8 inside.

    FP8 takes q, k, v with constant scales, the softmax with 1/448, and k without its mean over the tokens:
    that shifts all logits of a query alike, which a softmax does not see, and halves the error where channels
    of k stand out. In bf16 the ONNX graph is better: this one costs two more copies, of q and v.
    """
    shape = (heads, tokens, head_dim)
    return in_a_thread(flavour, progress, lambda monitor: _attention(flavour, shape, fp8, target, monitor))


def _attention(
    flavour: Flavour, shape: tuple[int, int, int], fp8: bool, target: Target, monitor: Any
) -> bytes:
    heads, tokens, head_dim = shape
    trt = flavour.module
    builder, network, log = start_network(flavour, target)
    if not hasattr(network, "add_attention"):
        raise GraphError(
            f"{flavour.name} {flavour.version} has no attention layer.",
            with_commands("Run:", "pip install 'tensorrt>=10.14'"),
        )
    numbers: list[np.ndarray[Any, Any]] = []  # TensorRT points at them until the plan is built

    def constant(value: float) -> Any:
        numbers.append(np.array(value, np.float32))
        return network.add_constant((), trt.Weights(numbers[-1])).get_output(0)

    def fp8_values(x: Any, largest: float) -> Any:
        scale = constant(largest / E4M3_MAX)
        quantised = network.add_quantize(x, scale, trt.DataType.FP8).get_output(0)
        return network.add_dequantize(quantised, scale, trt.DataType.BF16).get_output(0)

    def batched(x: Any) -> Any:
        layer = network.add_shuffle(x)
        layer.reshape_dims = (1, heads, tokens, head_dim)
        return layer.get_output(0)

    q, k, v = (
        batched(network.add_input(name, trt.DataType.BF16, (heads, tokens, head_dim)))
        for name in ("q", "k", "v")
    )
    if fp8:
        k = _without_mean(trt, network, k)
        q = fp8_values(q, FP8_ATTENTION_RANGE * head_dim**-0.5)
        k, v = fp8_values(k, FP8_ATTENTION_RANGE), fp8_values(v, FP8_ATTENTION_RANGE)
    # Deprecated for add_attention_v2, which tensorrt before 11 lacks.
    attention = network.add_attention(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, False)
    if fp8:
        attention.normalization_quantize_scale = constant(1 / E4M3_MAX)
        attention.normalization_quantize_to_type = trt.DataType.FP8
    merge = network.add_shuffle(attention.get_output(0))
    merge.first_transpose = (0, 2, 1, 3)
    merge.reshape_dims = (tokens, heads * head_dim)
    merge.get_output(0).name = "attended"
    network.mark_output(merge.get_output(0))
    return build_plan(flavour, builder, network, log, target, monitor)


def _without_mean(trt: Any, network: Any, k: Any) -> Any:
    """k [1, heads, tokens, head_dim] minus its mean over the tokens, in float32.

    The mean is taken in two steps, over groups and then over their means, and k is cast once for the mean and
    once for the difference: otherwise TensorRT writes k in float32 (4.4 GB moved around the 14B's attention,
    not 3.4).
    """
    _, heads, tokens, head_dim = tuple(k.shape)
    group = next(size for size in range(math.isqrt(tokens), 0, -1) if tokens % size == 0)

    def exact(x: Any) -> Any:
        return network.add_cast(x, trt.DataType.FLOAT).get_output(0)

    def reshaped(x: Any, *shape: int) -> Any:
        layer = network.add_shuffle(x)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def mean(x: Any, axis: int) -> Any:
        return network.add_reduce(x, trt.ReduceOperation.AVG, 1 << axis, True).get_output(0)

    of_groups = mean(reshaped(exact(k), heads, tokens // group, group, head_dim), axis=2)
    of_all = reshaped(mean(of_groups, axis=1), 1, heads, 1, head_dim)
    centred = network.add_elementwise(exact(k), of_all, trt.ElementWiseOperation.SUB).get_output(0)
    return network.add_cast(centred, trt.DataType.BF16).get_output(0)


def start_network(flavour: Flavour, target: Target) -> tuple[Any, Any, Any]:
    """A builder, an empty strongly typed network, and the log that both write to."""
    trt = flavour.module
    if flavour.name == "tensorrt" and target != "current":
        raise UsageError(
            f"tensorrt builds only for the GPU of this machine, not for {target}.",
            "Leave --target out, or use --flavour tensorrt_rtx.",
        )
    log = new_class("Log", (_Log, trt.ILogger))()
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # the default of all but 10
    return builder, builder.create_network(flags), log


def in_a_thread(flavour: Flavour, progress: Progress, work: Callable[[Any], bytes]) -> bytes:
    """Calls `work(monitor)` in a thread, so that this one can report and be stopped.

    Python sees no Ctrl-C while TensorRT works, and loses one that comes while TensorRT calls our log. Only
    the main thread gets any. An exception (KeyboardInterrupt, or one that `progress` raises) ends the build
    at TensorRT's next step.
    """
    monitor = new_class("Monitor", (_Monitor, flavour.module.IProgressMonitor))()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            future = pool.submit(work, monitor)
            while not wait([future], timeout=0.1).done:
                progress(*monitor.state)
        except BaseException:
            monitor.stopped = True
            raise
    return future.result()


def build_plan(flavour: Flavour, builder: Any, network: Any, log: Any, target: Target, monitor: Any) -> bytes:
    trt = flavour.module
    config = builder.create_builder_config()
    # More streams take a gigabyte more at full size, and only tiny layers could overlap (trt_facts.md 1.3).
    config.max_aux_streams = 0
    config.clear_flag(trt.BuilderFlag.TF32)
    if flavour.name == "tensorrt_rtx":  # without a target it compiles for four GPUs that it chooses
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, TARGETS[target].compute_capability)
        config.set_compute_capability(capability, 0)
    else:
        timings.attach(config, flavour.version)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        hint = "Report it, with this message."
        if target == "current":
            hint = "See that nvidia-smi shows the GPU, or build for a named one, such as --target sm89."
        raise GraphError(
            f"{flavour.name} {flavour.version} cannot build for {target}: {'; '.join(log.errors)}.", hint
        )
    if flavour.name == "tensorrt":
        timings.keep(config, flavour.version)
    return bytes(plan)


class _Log:
    """Keeps errors for the exception and drops all other lines."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity.name in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message.strip())


class _Monitor:
    """Called by TensorRT at every phase and step; stops the build once `stopped` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self.state = ("starting", 0, 1)
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        self.state = (phase_name, step + 1, self._steps[phase_name])
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        del self._steps[phase_name]
