"""What the step cache saves and what it changes, by hand: one window, without and with it, on one open model.

    python tests/full_size.py full/ && python tests/cache_quality.py --weights full/ --tier fast
    python tests/cache_quality.py --random-weights tiny --size 64x48 --window 13 --executor onnxruntime

Skips follow the published ratios of Wan2.1-I2V-480 (random weights have no curve worth skipping by), and then
ratios measured on these weights. A line of JSON each: the skipped steps, the seconds of all steps and of the
job, the peak of the arena, and the error of the decoded frames against the run without a cache on the same
inputs. Prints the uncached run twice: the difference of its times is the noise, that of its frames is 0.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from residual_passes import PUBLISHED

from trt_wan.benchmarks.measure.calibrate_cache import calibrate
from trt_wan.benchmarks.measure.sample_clips import write_prepared
from trt_wan.benchmarks.measure.script import say_note
from trt_wan.benchmarks.measure.similarity import psnr, relative_error
from trt_wan.cli.missing import require_graphs
from trt_wan.cli.sizes import size_of
from trt_wan.runtime.events import Event, StepDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_basis
from trt_wan.runtime.pipeline import to_pixels
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.step_cache import Ratios, StepCache, numbers


def measured(model: OpenModel, job: Job, exact: Array | None) -> tuple[dict[str, Any], Array]:
    steps: list[float] = []

    def progress(event: Event) -> None:
        say_note(event)
        if isinstance(event, StepDone):
            steps.append(event.seconds)

    begun = time.perf_counter()
    frames = np.concatenate(list(model.pieces(job, progress=progress)), axis=1)
    row: dict[str, Any] = {
        "skipped": [numbers(side) for side in job.skips],
        "share": round(sum(map(sum, job.skips)) / sum(step.passes for step in job.step_settings), 3),
        "steps_s": round(sum(steps), 3),
        "median_step_s": round(float(np.median(steps)), 4),
        "job_s": round(time.perf_counter() - begun, 2),
    }
    gpu = getattr(getattr(model, "_sizes"), "_gpu", None)  # noqa: B009  (only here)
    if gpu is not None:
        row |= {"arena_gb": gpu.arena.size / 1e9, "arena_peak_gb": gpu.arena.peak / 1e9}
    if exact is not None:
        row |= {"error": relative_error(frames, exact), "psnr": psnr(to_pixels(frames), to_pixels(exact))}
    return row, frames


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, action="append", default=[])
    parser.add_argument("--random-weights")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--tier", default="exact")
    parser.add_argument("--executor", default="auto")
    asked = parser.parse_args()
    files = WeightFiles(tuple(asked.weights), random=asked.random_weights)
    settings = Settings(executor=asked.executor, tier=asked.tier, keep_encoders=False)
    width, height = size_of(asked.size)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.from_folder(write_prepared(Path(folder), width, height, asked.window), "animate")
        job = Job(inputs, window=asked.window, steps=asked.steps, guidance=asked.guidance)
        basis = open_basis(files, settings, say_note)  # its GPU is closed with its model
        require_graphs(say_note, basis, width, height, job, build=True)()

        def show(name: str, row: dict[str, Any]) -> None:
            print(json.dumps({"run": name, **row}), flush=True)

        published = Ratios(PUBLISHED, PUBLISHED)
        with basis.open() as model:
            for _ in model.pieces(replace(job, steps=1)):  # finishes the kernels
                pass
            row, exact = measured(model, job, None)
            show("uncached", row)
            show("uncached again", measured(model, job, exact)[0])
            for threshold in (0.06, 0.12):
                cached = replace(job, step_cache=StepCache(threshold, ratios=published))
                show(f"published ratios, {threshold}", measured(model, cached, exact)[0])
        found = calibrate(open_basis(files, settings, say_note), job, say_note).ratios
        print(json.dumps({"run": "calibrated", "prompt": found.prompt, "negative": found.negative}))
        with open_basis(files, settings, say_note).open() as model:
            cached = replace(job, step_cache=StepCache(0.06, ratios=found))
            show("own ratios, 0.06", measured(model, cached, exact)[0])


if __name__ == "__main__":
    sys.exit(main())
