"""Continuous benchmark of what the host does: planning, enqueueing, loading. Counts are exact; times are
ratios to a loop of plain Python measured beside them, so that a slow or busy machine passes and slower code
does not.

The limits are three times what was measured or more; a regression to catch is of another order: a plan that
is made every step, a tensor that is uploaded for every block, a weight that is read twice.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trt_wan.benchmarks.work.cost import calls
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.denoise import Branch, denoise, predict_window
from trt_wan.runtime.device.arena import Arena
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import WindowCondition
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.preparation import Prepared
from trt_wan.runtime.sampling.grids import schedule
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.tiny import write_tiny_weights

CONFIG, PLAN = ANIMATE_14B, Plan(832, 480, 77, "fp8")
STEPS = 4


class HostGpu:
    """What the executor asks of a Gpu, in bookkeeping alone: real spans of a real arena, no memory."""

    def __init__(self) -> None:
        self.arena, self.uploads, self.handle = Arena(1 << 50), 0, 0
        self.stream = self.loads = SimpleNamespace(record=object, wait=lambda event: None)
        self.device = SimpleNamespace(set_current=lambda: None)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        span = self.arena.take(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return DeviceArray(cast(Gpu, self), span.start, shape, dtype, span, self.arena)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return DeviceArray(cast(Gpu, self), address, shape, dtype)

    def upload(self, host: np.ndarray[Any, Any]) -> DeviceArray:
        self.uploads += 1
        return self.empty(host.shape, host.dtype)

    def combine(self, terms: Any) -> DeviceArray:
        return self.empty(terms[0][1].shape, np.float32)

    def allocate(self, size: int, stream: Any = None) -> Any:
        return SimpleNamespace(handle=0, close=lambda stream: None)

    def reserve(self, size: int) -> None:
        pass

    def sync(self) -> None:
        pass


class CountingSegment:
    scratch_bytes = 0

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def start(self, scratch: int) -> None:
        pass

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        self.counts[self.name] += 1

    def settle(self) -> None:
        pass


class NoWeights:
    """Fills nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.filled = 0

    def pieces(self, pack: Any) -> Iterator[Any]:
        self.filled += 1
        return iter(())


class HostJob:
    """The denoising loop of the 14B on a GPU executor whose GPU does nothing."""

    def __init__(self) -> None:
        self.gpu, self.counts, self.source = HostGpu(), Counter[str](), NoWeights()
        table = networks(CONFIG, PLAN)
        gpu = cast(Gpu, self.gpu)
        segments = {name: CountingSegment(name, self.counts) for name in table}
        executor = GpuExecutor(gpu, segments, DeviceWeights(gpu, self.source))
        executor.start_alone(0)
        self.model = Model(CONFIG, PLAN, executor, {})

        def made(network: str, name: str) -> Any:
            tensor = next(t for t in table[network].inputs if t.name == name)
            return self.gpu.empty(tensor.shape, tensor.dtype)

        context = tuple(made("cross_attention", name) for name in ("text_k", "text_v", "image_k", "image_v"))
        face = (made("fuser", "face_k"), made("fuser", "face_v"))
        window = WindowCondition(
            made("patch_embed", "condition"),
            made("patch_embed", "pose_latent"),
            made("patch_embed", "pose_strength"),
            [face] * CONFIG.transformer.fusers,
            made("fuser", "face_strength"),
        )
        self.branch = Branch([context] * CONFIG.transformer.layers, window)
        self.time = (made("head", "time_embedding"), made("attn_in", "time_modulation"))
        self.rope = (made("attn_in", "rope_cos"), made("attn_in", "rope_sin"))
        self.reference = made("patch_embed", "condition")
        self.noise = made("patch_embed", "latent")

    def run(self, steps: int) -> None:
        contexts: Any = None  # the branch has its own
        prepared = Prepared(contexts, [self.time] * steps, self.rope, self.reference, blank_face=None)
        settings = [StepSettings(1.0, pose=True, face=True)] * steps
        predict = predict_window(self.model, prepared, [self.branch], settings)
        levels = schedule("official", steps, 5.0)
        solver = SAMPLERS["unipc"].make(levels, self.model.executor.combine, lambda: self.noise)
        denoise(predict, self.noise, solver, steps, lambda done: None, lambda latent: True)


@pytest.fixture(scope="module")
def job() -> HostJob:
    made = HostJob()
    made.run(STEPS)  # weights are bound on first use
    return made


def plain_python() -> int:
    """The measure: dictionaries, strings and calls, as the host's own work is."""
    total = 0
    for i in range(20_000):
        entry = {"name": f"tensor {i}", "size": i}
        total += len(entry["name"]) + max(int(entry["size"]), 1)
    return total


def in_loops(act: Callable[[], object], repeats: int = 5) -> float:
    """The time of `act` in times of `plain_python`: the least of several, each measured beside the other."""
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        plain_python()
        between = time.perf_counter()
        act()
        ratios.append((time.perf_counter() - between) / (between - start))
    return min(ratios)


def test_a_step_asks_for_each_network_as_often_as_the_cost_table_says(job: HostJob) -> None:
    job.counts.clear()
    job.run(STEPS)
    expected = {name: STEPS * count.step for name, count in calls(CONFIG, PLAN, STEPS).items() if count.step}
    assert dict(job.counts) == expected
    assert sum(expected.values()) == STEPS * (1 + 40 * 5 + 8 + 1)


def test_a_step_uploads_nothing(job: HostJob) -> None:
    """Everything a step reads is on the device, pose and face strength included."""
    before = job.gpu.uploads
    job.run(STEPS)
    assert job.gpu.uploads == before


def test_weights_are_bound_once_and_all_memory_comes_back(job: HostJob) -> None:
    filled, used = job.source.filled, job.gpu.arena.used
    assert filled == 3 * 40 + 8 + 4  # blocks, fusers; patch_embed, head, the empty ones of both attentions
    job.run(2 * STEPS)
    assert (job.source.filled, job.gpu.arena.used) == (filled, used)


def test_enqueueing_a_step(job: HostJob) -> None:
    assert in_loops(lambda: job.run(STEPS)) / STEPS < 1  # measured 0.3


LOAD = Load(STEPS, guided=True, contexts=2)


def test_planning() -> None:
    assert in_loops(lambda: activation_bytes(CONFIG, PLAN, LOAD), 3) < 150  # measured 48


def test_loading(tmp_path: Path) -> None:
    """Opening checkpoints reads their headers and no tensor."""
    write_tiny_weights(tmp_path, 0)
    assert in_loops(lambda: load_weights([tmp_path], {})) < 8  # measured 1.8
