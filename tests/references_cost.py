"""Seconds of a step and memory with several reference pictures, by hand on a GPU, as JSON lines.

    python tests/references_cost.py FOLDER                                              # 14B, scaled FP8
    python tests/references_cost.py FOLDER --model tiny --size 64x48 --window 5         # the script itself

Writes full-size files with random values into FOLDER once (full_size.py; 27 GB with FP8, those of
lora_switch.py are the same), and runs jobs of one window on one open model. `arithmetic` and `seconds_ratio`
are against the job with one picture. A job that needs more than `planned_gb` of activations fails.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from full_size import write_full_size
from tiny_job import write_clip, write_reference

from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.work.cost import step_flops
from trt_wan.build.graphs import build_graphs
from trt_wan.engines.config import MODELS
from trt_wan.engines.shape import Plan
from trt_wan.runtime.events import Event, StepDone
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.references import References
from trt_wan.runtime.settings import Settings, WeightFiles

WAYS: list[tuple[Any, int]] = [("composite", 4), ("slots", 2), ("slots", 3), ("slots", 4)]
WAYS += [("prefix", 1), ("prefix", 2), ("prefix", 3)]


def run(model: OpenModel, job: Job, frames: int) -> dict[str, Any]:
    steps: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.seconds)

    with Monitor.open() as monitor:
        made = sum(piece.shape[1] for piece in model.pieces(job, progress=watch))
    assert made == frames, f"{made} frames of {frames}"
    peak = monitor.usage().peak_memory_bytes
    return {
        "step_seconds": round(statistics.median(steps[1:]), 4),
        "peak_gpu_gb": None if peak is None else round(peak / 1e9, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    config, folder = MODELS[asked.model], asked.folder / f"{asked.model}-fp8"
    if not (folder / "tokenizer.json").exists():
        write_full_size(folder, config, "fp8")
    width, height = map(int, asked.size.split("x"))
    clips = asked.folder / f"clips-{asked.size}-{asked.window}"
    clips.mkdir(exist_ok=True)
    for name in ("src_ref.png", "back.png", "side.png", "hand.png"):
        write_reference(clips / name, (width, height))
    write_clip(clips / "src_pose.mp4", (width, height), asked.window, Fraction(16))
    plain = Job(Inputs.from_folder(clips, "animate"), window=asked.window, steps=asked.steps)
    more = tuple(clips / name for name in ("back.png", "side.png", "hand.png"))
    jobs = {"one picture": plain}
    for use, count in WAYS:
        jobs[f"{use} {count}"] = replace(plain, references=References(more[: count - 1], use))
    first: dict[str, float] = {}
    with open_model(WeightFiles((folder,)), Settings(text_cache=False)) as model:
        for case, job in jobs.items():
            plan = Plan(width, height, job.model_window, model.precision)
            build_graphs(config, plan, lambda name, seconds: None)
            for _ in range(2):  # engines are built and blocks loaded in the first
                line = run(model, job, asked.window)
            flops, seconds = step_flops(config, plan), line["step_seconds"]
            first = first or {"flops": flops, "seconds": seconds}
            planned = activation_bytes(config, plan, job.load)
            line |= {"case": case, "tokens": plan.tokens, "planned_gb": round(planned / 1e9, 3)}
            line["arithmetic"] = round(flops / first["flops"], 3)
            line["seconds_ratio"] = round(seconds / first["seconds"], 3)
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
