"""`trt-wan live` with a clip of a minute at its own rate, by hand on a GPU, as JSON lines.

    python tests/live_on_gpu.py FOLDER                          # 14B, 832x480, 4 steps, 16 frames per second
    python tests/live_on_gpu.py FOLDER --random --gpus 1,2 -- --tier fast
    python tests/live_on_gpu.py FOLDER --random --raw -- --detector yolov10m.onnx --pose vitpose.onnx
    python tests/live_on_gpu.py FOLDER --random --model tiny --size 64x48 --window 13 --seconds 4   # anywhere

Writes the clips into FOLDER once, and full-size files with random values, if no --random weights are asked
for. `--raw` plays a clip of people in place of prepared ones. Options after -- are those of `trt-wan live`;
`--gpus` is given on to it only where it is given here. A line has what the command has counted: frames in,
out and dropped, the latency in seconds (`latency_median`, `latency_worst`), the rate that it had measured
before (`holds`), every window, and `rate`: frames that went out per second of the video.
"""

import argparse
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from full_size import write_full_size
from tiny_job import TRT_WAN, write_clip, write_reference

from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.measure.sample_clips import write_driving
from trt_wan.engines.config import MODELS

SHOWN = ("window", "frames_in", "frames_out", "dropped", "latency", "rate")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--random", action="store_true", help="generated weights, no files")
    parser.add_argument("--raw", action="store_true", help="people are found beside the model")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=int, default=16, help="frames per second of the clip")
    parser.add_argument("--gpus", default="", help="numbers of GPUs, such as 1,2")
    typed = sys.argv[1:] if arguments is None else arguments
    here = typed.index("--") if "--" in typed else len(typed)
    asked = parser.parse_args(typed[:here])
    asked.more = typed[here + 1 :]
    return asked


def command(asked: argparse.Namespace, gpus: str) -> list[str]:
    """The command line, with its clips and weights in place."""
    width, height = map(int, asked.size.split("x"))
    frames = round(asked.seconds * asked.rate)
    name = f"{asked.size}-{frames}-{asked.rate}"
    made = asked.folder / f"{'raw' if asked.raw else 'clips'}-{name}"
    driving = made / "driving.mp4"
    if not made.exists():
        made.mkdir(parents=True)
        write_reference(made / "src_ref.png", (width, height))
        if asked.raw:
            write_driving(driving, width, height, frames)
        else:
            write_clip(made / "src_pose.mp4", (width, height), frames, Fraction(asked.rate))
            write_clip(made / "src_face.mp4", (512, 512), frames, Fraction(asked.rate))
    weights = ["--random-weights", asked.model]
    if not asked.random:
        files = asked.folder / f"{asked.model}-fp8"
        if not (files / "tokenizer.json").exists():
            write_full_size(files, MODELS[asked.model], "fp8")
        weights = ["--weights", str(files)]
    source = ["--inputs", str(made)]
    if asked.raw:
        source = ["--input", str(driving), "--reference", str(made / "src_ref.png"), "--size", asked.size]
        source += ["--rate", str(asked.rate)]
    return [
        *(*TRT_WAN, "live", *source, *weights, "--steps", str(asked.steps), "--window", str(asked.window)),
        *("--sampler", "euler", "--grid", "simple", "-o", str(asked.folder / "live.mp4"), "-y", "--json"),
        *(["--gpus", gpus] if gpus else []),
        *asked.more,
    ]


def line_of(printed: str) -> dict[str, Any]:
    """From the command's JSON lines. Raises RuntimeError where it has failed."""
    *events, last = [json.loads(line) for line in printed.splitlines()]
    if not last["ok"]:
        raise RuntimeError(f"{last['error']['message']} {last['error']['hint']}")
    data = last["data"]
    windows = [[each[name] for name in SHOWN] for each in events if each["event"] == "LiveWindow"]
    notes = [event for event in events if event["event"] == "Note"]
    holds = [note["data"]["rate"] for note in notes if note["code"] == "holds"]
    played = data["frames_in"] / data["fps"]
    return {
        **{name: value for name, value in data.items() if name not in ("result", "windows")},
        "rate": round(data["frames_out"] / played, 2),
        "holds": holds[-1],
        "chosen": [
            note["text"] for note in notes if note["text"].startswith(("executor", "attention", "holds"))
        ],
        "windows": [dict(zip(SHOWN, each, strict=True)) for each in windows],
    }


def measured(asked: argparse.Namespace, gpus: str) -> dict[str, Any]:
    with Monitor.open() as watching:
        ran = subprocess.run(command(asked, gpus), stdout=subprocess.PIPE, text=True)
    usage = watching.usage()
    line = line_of(ran.stdout)
    line["peak_gpu_gb"] = round(usage.peak_memory_bytes / 1e9, 3) if usage.peak_memory_bytes else None
    weights = "generated" if asked.random else "files with random values"
    return {"gpus": gpus or None, "model": asked.model, "weights": weights, "raw": asked.raw, **line}


def main(arguments: list[str] | None = None) -> int:
    asked = parsed(arguments)
    for gpus in asked.gpus.split(","):
        print(json.dumps(measured(asked, gpus)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
