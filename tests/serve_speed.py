"""Seconds of `trt-wan serve` when warm, and of `trt-wan run` one by one, by hand on a GPU, as JSON lines.

    python tests/serve_speed.py FOLDER                                   # 14B, FP8
    python tests/serve_speed.py FOLDER --model tiny --size 64x48 --window 13 --options ""     # anywhere

Writes full-size files with random values into FOLDER once (full_size.py). `first_step` is the time from the
request, with its clips in it as a .zip or named by the id of an upload, to the server's event of the first
finished step; `over` is that less a step. `throughput` is the time from the first of several requests at once
to the end of the last, and `one_by_one` the same jobs as commands.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from full_size import write_full_size
from serving import Server, ok, serving, zipped
from tiny_job import TRT_WAN, write_clip, write_reference

from trt_wan.engines.config import MODELS
from trt_wan.engines.store.home import home


def first_step(server: Server, send: dict[str, Any]) -> dict[str, float]:
    """Of one job on an idle server. `send` are arguments of httpx's post."""
    start = time.perf_counter()
    job = ok(server.client.post("/v1/videos", **send))
    accepted = time.perf_counter() - start
    seen: dict[str, float] = {}
    with server.client.stream("GET", f"/v1/videos/{job['id']}/events", timeout=600) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            state = json.loads(line[6:])
            at = time.perf_counter() - start
            if state["stage"] and state["stage"] not in seen:
                seen[state["stage"]] = round(at, 3)
            if state["step"] and "first_step" not in seen:
                seen |= {"first_step": at, "step": state["seconds_per_step"]}
    assert state["status"] == "completed", state["error"]
    whole = time.perf_counter() - start
    over = seen["first_step"] - seen["step"]
    return {"accepted": accepted, **seen, "over": over, "whole": whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="14b")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--frames", type=int, default=77)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--commands", type=int, default=3, help="jobs that are run one by one")
    parser.add_argument("--options", default="--tier fast")
    given = parser.parse_args()
    folder, size = given.folder, tuple(map(int, given.size.split("x")))
    weights, clips = folder / "weights", folder / "clips"
    if not weights.exists():
        write_full_size(weights, MODELS[given.model])
    if not clips.exists():
        clips.mkdir(parents=True)
        write_reference(clips / "src_ref.png", size)
        write_clip(clips / "src_pose.mp4", size, given.frames, Fraction(30))
        write_clip(clips / "src_face.mp4", (512, 512), given.frames, Fraction(30))
    packed = zipped(clips, folder / "clips")
    model = ["--weights", str(weights), *given.options.split()]
    start = time.perf_counter()
    options = [*model, "--warm-up", f"--size={given.size}", f"--window={given.window}"]
    fields = {"num_inference_steps": given.steps}
    with serving(folder / "data", home(), *options) as server:
        while ok(server.client.get("/health"))["worker"] == "starting":
            time.sleep(0.05)
        told(what="ready", seconds=time.perf_counter() - start)
        id = server.upload(packed)["id"]
        for _ in range(given.repeat):
            told(
                what="first_step",
                by="id",
                **first_step(server, {"json": {"control_reference": id, **fields}}),
            )
        for _ in range(given.repeat):
            with packed.open("rb") as file:
                send = {
                    "data": {"num_inference_steps": str(given.steps)},
                    "files": {"control_reference": file},
                }
                told(what="first_step", by="upload", **first_step(server, send))
        new = {"control_reference": id, "prompt": f"seen never before {time.time()}", **fields}
        told(what="first_step", by="id, new prompt", **first_step(server, {"json": new}))
        start = time.perf_counter()
        jobs = [server.video(control_reference=id, seed=seed, **fields) for seed in range(given.jobs)]
        done = [server.ended(job, seconds=1200) for job in jobs]
        assert all(job["status"] == "completed" for job in done), done
        seconds = time.perf_counter() - start
        told(what="throughput", jobs=given.jobs, seconds=seconds, each=seconds / given.jobs)
    seconds_each = []
    for seed in range(given.commands):
        output = folder / f"run-{seed}.mp4"
        output.unlink(missing_ok=True)
        command = [*TRT_WAN, "run", f"--inputs={clips}", *model, "-o", str(output), f"--seed={seed}"]
        start = time.perf_counter()
        subprocess.run([*command, f"--window={given.window}", f"--steps={given.steps}", "-q"], check=True)
        seconds_each.append(time.perf_counter() - start)
    if seconds_each:
        told(what="one_by_one", jobs=given.commands, each=statistics.median(seconds_each), all=seconds_each)
    return 0


def told(**line: Any) -> None:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
