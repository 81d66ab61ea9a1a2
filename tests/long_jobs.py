"""Seconds and memory of videos longer than a window, by hand on a GPU, as JSON lines.

    python tests/long_jobs.py FOLDER                        # 14B, FP8: one window, loop and context
    python tests/long_jobs.py FOLDER --steps 4,20 --modes one,loop,context,hybrid
    python tests/long_jobs.py FOLDER --model tiny --size 64x48 --window 21 --frames 43   # anywhere

Writes full-size files with random values into FOLDER once (full_size.py). All jobs run on one open model and
are written to an mp4. A line has the seconds from stage to stage of each window: `condition`, `denoise`,
`decode`; `gap` is what the steps of a window take beyond their median, in its first step. The job `one` is
run twice, and the second counts.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from full_size import write_full_size
from tiny_job import write_clip, write_reference

from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.build.graphs import build_graphs
from trt_wan.engines.config import MODELS
from trt_wan.engines.shape import Plan
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.events import Event, StageStarted, StepDone
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles

_READ = Monitor.open().read
BEFORE = _READ().memory_bytes if _READ else None  # bytes in use on the GPU: peaks are above it


def run(model: OpenModel, job: Job, output: Path, base: Mapping[str, Any]) -> None:
    """Runs a job and prints its line."""
    marks: list[tuple[str, float]] = []
    steps: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, StageStarted):
            marks.append((event.stage, time.perf_counter()))
        elif isinstance(event, StepDone):
            steps.append(event.seconds)

    with replace(Monitor.open(), before=BEFORE) as monitor:
        began = time.perf_counter()
        rendered = render(job, model, output, overwrite=True, progress=watch)
        ended = time.perf_counter()
    usage = monitor.usage()
    stages: dict[str, list[float]] = {}
    for (stage, start), (_, stop) in zip(marks, [*marks[1:], ("end", ended)], strict=True):
        stages.setdefault(stage, []).append(round(stop - start, 3))
    median, count = statistics.median(steps), job.schedule.steps
    line = {
        **base,
        "frames": rendered.frames,
        "seconds": round(ended - began, 3),
        "before_first_window": round(next(at for stage, at in marks if stage == "condition") - began, 3),
        "stages": stages,
        "step_seconds": round(median, 4),
        "gap": [round(sum(steps[k : k + count]) - count * median, 3) for k in range(0, len(steps), count)],
        "writing_seconds": round(rendered.writing_seconds, 3),
        "peak_gpu_gb": round(usage.peak_memory_bytes / 1e9, 3) if usage.peak_memory_bytes else None,
        "lowest_clock_mhz": usage.lowest_clock_mhz,
        "peak_host_gb": round(peak_bytes() / 1e9, 3),
    }
    print(json.dumps(line), flush=True)


def jobs(job: Job, mode: str) -> Job:
    longer = 3 * (job.window - 1) + 1
    return {
        "loop": job,
        "one": job,
        "context": replace(job, window=Job.window, context=Context(frames=job.window)),
        "hybrid": replace(job, window=longer, context=Context(frames=job.window, whole=False)),
    }[mode]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--transformer", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--frames", default="231", help="of the longer videos, such as 229,231")
    parser.add_argument("--steps", default="4")
    parser.add_argument("--modes", default="one,loop,context")
    parser.add_argument("--vram", type=float)
    parser.add_argument("--tier", default="exact")
    asked = parser.parse_args()
    config, folder = MODELS[asked.model], asked.folder / f"{asked.model}-{asked.transformer}"
    if not (folder / "tokenizer.json").exists():
        write_full_size(folder, config, asked.transformer)
    width, height = map(int, asked.size.split("x"))

    def clips(frames: int) -> Inputs:
        made = asked.folder / f"clips-{asked.size}-{frames}"
        if not made.exists():
            made.mkdir()
            write_reference(made / "src_ref.png", (width, height))
            write_clip(made / "src_pose.mp4", (width, height), frames, Fraction(16))
            write_clip(made / "src_face.mp4", (512, 512), frames, Fraction(16))
        return Inputs.from_folder(made, "animate")

    settings = Settings(tier=asked.tier, vram=asked.vram, text_cache=False)
    with open_model(WeightFiles((folder,)), settings) as model:
        plan = Plan(width, height, asked.window, model.precision)
        build_graphs(config, plan, lambda name, seconds: None)
        for steps in map(int, asked.steps.split(",")):
            for mode in asked.modes.split(","):
                for frames in [asked.window] * 2 if mode == "one" else map(int, asked.frames.split(",")):
                    job = jobs(Job(clips(frames), window=asked.window, steps=steps), mode)
                    base = {
                        "model": asked.model,
                        "mode": mode,
                        "steps": steps,
                        "tier": asked.tier,
                        "vram": asked.vram,
                    }
                    run(model, job, asked.folder / "out.mp4", base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
