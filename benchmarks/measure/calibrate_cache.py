"""Measures the ratios of the step cache (runtime/step_cache.py): one window of a job, every step computed.

The residual stream is brought to the host before the first block and behind the last: 2 x 0.7 GB a pass for
the 14B model at 832x480x77. Nothing more is held on the GPU than without.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Network
from trt_wan.errors import Stopped, UsageError, WeightsError
from trt_wan.runtime.events import Event, Progress, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.job import Job
from trt_wan.runtime.opening.gpu_sizes import ExportTiles
from trt_wan.runtime.opening.model import Basis
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.step_cache import LEAST_STEPS, Ratios
from trt_wan.runtime.step_ratios import Calibration, made_for
from trt_wan.runtime.video.clips import open_clips

Norms = NDArray[np.float64]


class Watch(ForwardingExecutor):
    """Keeps |R| of every token, float64 [tokens], of each forward pass in order."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.norms: list[Norms] = []
        self._entered: Array | None = None

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        if network.name == "head":
            residual = np.asarray(inputs["x"], np.float32) - np.asarray(self._entered, np.float32)
            self.norms.append(np.sqrt(np.square(residual).sum(axis=1, dtype=np.float64)))
        outputs = super().run(network, n, inputs)
        if network.name == "patch_embed":
            self._entered = np.asarray(outputs[0])
        return outputs


def calibrate(
    basis: Basis, job: Job, progress: Progress, export_tiles: ExportTiles | None = None
) -> Calibration:
    """Ends with the last step of the first window. The graphs must exist. Raises TrtWanError."""
    require_calibration(job)
    steps, passes = job.schedule.steps, 1 + job.guided
    watches: list[Watch] = []
    done = 0

    def observe(executor: Executor) -> Executor:
        watches.append(Watch(executor))
        return watches[-1]

    def counted(event: Event) -> None:
        nonlocal done
        progress(event)
        done += isinstance(event, StepDone)

    with open_clips(job.inputs, job.history) as clips, basis.open(observe, export_tiles) as model:
        try:
            for _ in model.pieces(job, clips=clips, progress=counted, should_stop=lambda: done == steps):
                pass
        except Stopped:
            if done < steps:
                raise
        norms = next(watch.norms for watch in watches if watch.norms)
        with np.errstate(all="ignore"):
            ratios = [_ratios(norms[side::passes]) for side in range(passes)]
        if not all(np.isfinite(side).all() and min(side) > 0 for side in ratios):
            raise WeightsError(
                "The blocks of this model add nothing to some tokens, so they have no ratios.",
                "Leave out --step-cache with these weights.",
            )
        files = basis.weights.files.get("transformer", ())
        made_with = {
            **{"steps": steps, "size": f"{clips.width}x{clips.height}", "window": job.window},
            **{"guidance": job.guidance, "precision": model.precision, "tier": basis.settings.tier},
        }
    return Calibration(made_for(job, basis.weights.config.name, files), made_with, Ratios(*ratios))


def require_calibration(job: Job) -> None:
    """Raises UsageError for a job whose steps are not alike."""
    if job.schedule.steps < LEAST_STEPS:
        raise UsageError(
            f"The step cache is for {LEAST_STEPS} steps and more, so {job.schedule.steps} steps have no use "
            "for its ratios.",
            "Use --steps 20.",
        )
    if SAMPLERS[job.sampler].stochastic:
        good = ", ".join(name for name, row in SAMPLERS.items() if not row.stochastic)
        raise UsageError(
            f"The sampler {job.sampler} adds noise in every step, so no job with it takes the step cache.",
            f"Use the sampler of the job, one of --sampler {good}.",
        )
    if len({step.passes for step in job.step_settings}) > 1:
        raise UsageError(
            "Only some of the steps are guided, and the ratios of a side need all steps of it.",
            "Use one --guidance for all steps, such as --guidance 5.",
        )


def _ratios(norms: list[Norms]) -> tuple[float, ...]:
    pairs = zip(norms, norms[1:], strict=False)
    return (1.0, *(float(np.mean(now / before)) for before, now in pairs))
