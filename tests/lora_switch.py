"""Seconds of a switch of LoRAs on an open model, by hand on a GPU, as JSON lines.

    python tests/lora_switch.py FOLDER                      # 14B, scaled FP8, resident
    python tests/lora_switch.py FOLDER --vram 12            # blocks stream
    python tests/lora_switch.py FOLDER --transformer bf16
    python tests/lora_switch.py FOLDER --model tiny --size 64x48 --window 5     # the script itself, anywhere

Writes full-size files with random values into FOLDER once (full_size.py, full_size_loras.py; 27 GB with FP8),
and runs jobs of one window and two steps. Two models are opened: one whose first job has no LoRA, then a row
of switches, each followed by the same job again; and one whose first job has the distill LoRA. The cost of a
switch is `first_step_seconds` of a job less that of its repetition.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from full_size import write_full_size
from full_size_loras import lora_layouts
from tiny_job import write_clip, write_reference

from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.build.graphs import build_graphs
from trt_wan.engines.config import MODELS
from trt_wan.engines.shape import Plan
from trt_wan.runtime.events import Event, Note, StepDone
from trt_wan.runtime.job import Inputs, Job, Lora
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.settings import Settings, WeightFiles

_READ = Monitor.open().read
BEFORE = _READ().memory_bytes if _READ else None  # bytes in use on the GPU: peaks are above it

Row = tuple[str, tuple[Lora, ...]]


def rows(distill: Path, relight: Path) -> list[Row]:
    both = Lora(distill), Lora(relight)
    return [
        ("none", ()),
        ("distill", both[:1]),
        ("distill at 0.8", (Lora(distill, 0.8),)),
        ("relight", both[1:]),
        ("distill and relight", both),
        ("none again", ()),
    ]


def run(model: OpenModel, job: Job, case: str, again: bool, base: dict[str, Any]) -> None:
    """Runs a job and prints its line."""
    steps: list[float] = []
    notes: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(time.perf_counter() - began)
        elif isinstance(event, Note):
            notes.append(event.text)

    sizes: Any = model._sizes
    loader: Any = getattr(sizes, "weights", None)  # the CPU has none
    before = (loader.loaded_bytes, loader.loading_seconds) if loader else (0, 0.0)
    with replace(Monitor.open(), before=BEFORE) as monitor:
        began = time.perf_counter()
        for _ in model.pieces(job, progress=watch):
            pass
        seconds = time.perf_counter() - began
    usage = monitor.usage()
    line = {
        **base,
        "case": case,
        "repetition": again,
        "first_step_seconds": round(steps[0], 3),
        "second_step_seconds": round(steps[1] - steps[0], 3),
        "job_seconds": round(seconds, 3),
        "read_gb": round((loader.loaded_bytes - before[0]) / 1e9, 3) if loader else None,
        "loading_seconds": round(loader.loading_seconds - before[1], 3) if loader else None,
        "resident_gb": round(loader.resident_bytes / 1e9, 3) if loader else None,
        "page_locked_gb": round(loader.pinned_bytes / 1e9, 3) if loader else None,
        "peak_gpu_gb": round(usage.peak_memory_bytes / 1e9, 3) if usage.peak_memory_bytes else None,
        "memory_by": usage.source,
        "notes": notes,
    }
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--transformer", choices=("fp8", "bf16", "int8"), default="fp8")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--vram", type=float)
    asked = parser.parse_args()
    config, folder = MODELS[asked.model], asked.folder / f"{asked.model}-{asked.transformer}"
    loras = lora_layouts(config)
    if not (folder / "tokenizer.json").exists():
        write_full_size(folder, config, asked.transformer, more=loras)
    distill, relight = (folder / name for name in loras)
    width, height = map(int, asked.size.split("x"))
    clips = asked.folder / f"clips-{asked.size}-{asked.window}"
    clips.mkdir(exist_ok=True)
    write_reference(clips / "src_ref.png", (width, height))
    write_clip(clips / "src_pose.mp4", (width, height), asked.window, Fraction(16))
    settings = Settings(vram=asked.vram, text_cache=False)
    job = Job(Inputs.from_folder(clips, "animate"), window=asked.window, steps=2)
    open_files: Callable[[], OpenModel] = lambda: open_model(WeightFiles((folder,)), settings)  # noqa: E731
    base = {"model": asked.model, "transformer": asked.transformer, "size": asked.size, "vram": asked.vram}
    with open_files() as model:
        plan = Plan(width, height, asked.window, model.precision)
        build_graphs(config, plan, lambda name, seconds: None)
        for case, chosen in rows(distill, relight):
            for again in (False, True):
                run(model, replace(job, loras=chosen), case, again, base)
    gc.collect()
    with open_files() as model:
        run(model, replace(job, loras=(Lora(distill),)), "first load with distill", False, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
