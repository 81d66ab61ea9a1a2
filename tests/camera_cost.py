"""Seconds of a step and GPU memory with and without the camera control, by hand, on a GPU.

    python tests/camera_cost.py FOLDER              832x480x77, 4 steps, full-size files of random values
    python tests/camera_cost.py FOLDER --tier fast --vram 16
    python tests/camera_cost.py FOLDER --model tiny --size 64x48 --window 13      anywhere, to try the script

Files are written into FOLDER unless it has them: 28 GB for the 14B. Each job runs twice on one open model.
The steps are those of the second run. Memory is the peak of all jobs up to this one. It prints a line of JSON
for each job, and a table.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from full_size import camera_layout, write_full_size

from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.cli.missing import require_graphs
from trt_wan.cli.report import table
from trt_wan.engines.config import MODELS
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.events import Event, Note, StepDone
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import open_basis
from trt_wan.runtime.settings import Settings, WeightFiles

JOBS: dict[str, dict[str, Any]] = {
    "none": {},
    "static": {"camera": Camera("static")},
    "orbit": {"camera": Camera("orbit")},
    "orbit, first step": {"camera": Camera("orbit", end=10)},
    "none, guided": {"guidance": 3.0},
    "orbit, guided": {"guidance": 3.0, "camera": Camera("orbit")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--ffn", type=int, default=3072, help="channels of Uni3C's FFN, in files that are made"
    )
    parser.add_argument("--tier", choices=("exact", "fast", "turbo"), default="exact")
    parser.add_argument("--vram", type=float)
    parser.add_argument("--jobs", default=";".join(JOBS), help="names, with ; between them")
    asked = parser.parse_args()
    model = MODELS[asked.model]
    if not list(asked.folder.glob("*.safetensors")):
        write_full_size(asked.folder, model, more=camera_layout(model, asked.ffn))
    width, height = map(int, asked.size.split("x"))
    settings = Settings(tier=asked.tier, vram=asked.vram, text_cache=False)
    rows = [("camera", "s/step", "first step", "job", "GPU memory")]
    with tempfile.TemporaryDirectory() as name, Monitor.open() as monitor:
        inputs = Inputs.from_folder(write_clips(Path(name), width, height, asked.window), "animate")
        basis = open_basis(WeightFiles((asked.folder,)), settings, told)
        with basis.open() as opened:
            for named in asked.jobs.split(";"):
                job = Job(inputs, window=asked.window, steps=asked.steps, **JOBS[named])
                require_graphs(told, basis, width, height, job, build=True)()
                runs = [one(opened, job) for _ in range(2)]
                peak = monitor.usage().peak_memory_bytes
                made = {"camera": named, **runs[1], "peak_bytes_so_far": peak, "precision": basis.precision}
                print(json.dumps(made), flush=True)
                steps = runs[1]["steps"]
                shown = f"{statistics.median(steps[1:] or steps):.3f}", f"{steps[0]:.3f}"
                memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
                rows.append((named, *shown, f"{sum(steps):.2f}", memory))
    print(table(rows))


def one(opened: Any, job: Job) -> dict[str, Any]:
    steps: list[float] = []

    def keep(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.seconds)
        told(event)

    frames = sum(1 for _ in opened.stream(job, progress=keep))
    return {"frames": frames, "steps": [round(seconds, 4) for seconds in steps]}


def told(event: Event) -> None:
    if isinstance(event, Note):
        print(event.text, flush=True)


if __name__ == "__main__":
    main()
