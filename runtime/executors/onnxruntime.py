"""ONNX Runtime on the CPU in fp32: the executor that proves the numerics and needs no GPU."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.shape import Plan
from trt_wan.errors import EnvironmentBroken, GraphError, MemoryShort, with_commands
from trt_wan.runtime.executors import Array, BlendPart
from trt_wan.runtime.sampling.combine import combine_fp32
from trt_wan.runtime.weights.stored import Tensors


class BoundWeights:
    """float32 weights by network and set, read on first use and kept. Several executors may share them."""

    def __init__(self, weights: Mapping[Part, Mapping[str, Array]]) -> None:
        self._weights: dict[Part, Mapping[str, Array] | Tensors] = dict(weights)
        self._bound: dict[tuple[str, int], dict[str, Array]] = {}
        self._networks: dict[str, Network] = {}

    def change(self, part: Part, tensors: Tensors, changed: Collection[str]) -> None:
        """Reads `part` from `tensors` from now on, and forgets the sets that have a tensor in `changed`."""
        self._weights[part] = tensors
        for name, n in list(self._bound):
            network = self._networks[name]
            if network.part == part and any(
                network.weight_key(w.name, n) in changed for w in network.weights
            ):
                del self._bound[name, n]

    def bind(self, network: Network, n: int) -> dict[str, Array]:
        key = (network.name, n)
        if key not in self._bound:
            stored = self._weights[network.part]
            self._networks[network.name] = network
            self._bound[key] = {w.name: stored[network.weight_key(w.name, n)] for w in network.weights}
        return self._bound[key]

    def release(self, names: Collection[str] | None = None) -> None:
        """Forgets the weights of networks `names`, or all."""
        kept = {} if names is None else {k: v for k, v in self._bound.items() if k[0] not in names}
        self._bound = kept


class OnnxRuntimeExecutor:
    """Sessions are opened from `graphs`/<network>.onnx on first use, and kept."""

    def __init__(self, graphs: Path, weights: BoundWeights, processes: int = 1) -> None:
        """`processes` share the machine's cores: idle threads leave them to others."""
        refuse_two_packages()
        self.graphs, self.weights, self._processes = graphs, weights, processes
        self._sessions: dict[str, Any] = {}
        self._elsewhere: dict[str, Path] = {}  # folders of graphs, by network

    def add(self, graphs: Path, names: Iterable[str]) -> None:
        """Takes the graphs of the networks `names` from another folder from now on."""
        for name in names:
            if self._elsewhere.get(name) != graphs:
                self._sessions.pop(name, None)
            self._elsewhere[name] = graphs

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        feeds = {**inputs, **self.weights.bind(network, n)}
        outputs = self._session(network.name).run([t.name for t in network.outputs], feeds)
        return tuple(outputs)

    def place(self, array: Array) -> Array:
        return array

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        return combine_fp32(terms)

    def dot(self, x: Array, y: Array) -> float:
        return float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)))

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        return array[:, list(slots)]

    def join(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays, axis=1)

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        channels, _, *picture = parts[0][2].shape
        total: Any = np.zeros((channels, slots, *picture), np.float32) if onto is None else onto
        for into, weights, array in parts:
            for k, (slot, weight) in enumerate(zip(into, weights, strict=True)):
                total[:, slot] += np.multiply(array[:, k], weight, dtype=np.float32)
        return cast(Array, total)

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        onto[start:stop] = array[start:stop]
        return onto

    def is_finite(self, array: Array) -> bool:
        return bool(np.isfinite(array).all())

    def fetch(self, array: Array) -> Callable[[], Array]:
        return partial(np.asarray, array)

    def wait(self) -> None:
        pass  # ONNX Runtime returns when it is done

    def settle(self) -> None:
        pass

    def release(self, names: set[str]) -> None:
        self.weights.release(names)

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            import onnxruntime as ort

            path = self._elsewhere.get(name, self.graphs) / f"{name}.onnx"
            options = ort.SessionOptions()
            options.log_severity_level = 3
            if self._processes > 1:  # fewer threads would change bits: convolutions are cut by threads
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            try:
                self._sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime raises a dozen unrelated classes for a bad file
                raise GraphError(
                    f"The graph {path} cannot be loaded ({str(error).splitlines()[0]}).",
                    with_commands(
                        "It is as it was exported, so update ONNX Runtime:", "pip install -U onnxruntime-gpu"
                    ),
                ) from error
        return self._sessions[name]


def refuse_two_packages() -> None:
    found = []
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    if len(found) == 2:
        raise EnvironmentBroken(
            f"{found[0]} and {found[1]} are both installed and overwrite each other's files.",
            with_commands(
                "Run:", "pip uninstall -y onnxruntime onnxruntime-gpu", "pip install onnxruntime-gpu"
            ),
        )


def least_memory(model: ModelConfig, plan: Plan, camera_ffn: int = 0) -> int:
    """Bytes that a job needs at least: the weights in fp32, and one attention's logits. `camera_ffn` are the
    channels of Uni3C's FFN; 0 without a camera.
    """
    parts: tuple[Part, ...] = (*PARTS, "camera_control") if camera_ffn else PARTS
    model = replace(model, camera=replace(model.camera, ffn_dim=camera_ffn))
    shapes = (shape for part in parts for shape in required_tensors(model, part).values())
    weights = 4 * sum(math.prod(shape) for shape in shapes)
    logits = 2 * 4 * model.transformer.heads * plan.tokens**2  # before and after the softmax
    return weights + logits


def require_memory(model: ModelConfig, plan: Plan, processes: int = 1) -> None:
    """MemoryShort if the job cannot fit in memory, in each of several processes."""
    import psutil

    needed, memory = least_memory(model, plan), psutil.virtual_memory().total
    if needed * processes > memory:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise MemoryShort(
            f"The model {model.name} at {plan.width}x{plan.height}, {plan.frames} frames per window, needs "
            f"about {needed / 1e9:.0f} GB in fp32 on the CPU{each}; {memory / 1e9:.0f} GB are here.",
            with_commands(
                "Use a smaller size or window. To try the pipeline, make weights of the tiny model:",
                "trt-wan weights tiny models/",
            ),
        )
