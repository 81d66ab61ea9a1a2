"""Five jobs in a row on one open model, beside single jobs on fresh models.

    python -m trt_wan.benchmarks.measure.open_model_jobs --model 14b --tier fast --out FOLDER

Two sizes, both modes, a stop in the middle and another prompt. For every job: the overhead before its first
step, the GPU memory after it, and whether its frames are bit-identical to those of a single run.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.plain_jobs import as_argument
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.measure.script import add_arguments, finish, say_note, settings_from
from trt_wan.benchmarks.measure.workplace import SHARED, with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape, shape_from
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.runtime.events import Progress

MODULE = "trt_wan.benchmarks.measure.plain_jobs"
PROMPTS = ("a person dances in the rain", "a person waves from a window")


@dataclass(frozen=True)
class JobRow:
    name: str
    overhead_seconds: float  # from the job's start to its first finished step, without that step
    step_seconds: list[float]
    gpu_bytes: int | None  # in use after the job
    frames: int
    sha256: str
    single_sha256: str | None  # the same job on a fresh model; None for a stopped job
    single_overhead_seconds: float | None

    @property
    def same(self) -> str:
        if self.single_sha256 is None:
            return "stopped"
        return "identical" if self.single_sha256 == self.sha256 else "DIFFERENT"


@dataclass(frozen=True)
class OpenModelJobs:
    card: Card
    weights: str
    settings: Mapping[str, Any]
    jobs: list[JobRow]
    closed_gpu_bytes: int | None
    host_bytes: int | None  # peak without the page cache
    stem: ClassVar[str] = "open-model-jobs"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sheets(self) -> list[Sheet | str]:
        def cells(job: JobRow) -> Row:
            single = "" if job.single_overhead_seconds is None else Figure(job.single_overhead_seconds, "s")
            step = min(job.step_seconds)
            figures = (
                Figure(job.overhead_seconds, "s"),
                single,
                Figure(step, "s"),
                Figure(job.gpu_bytes, "GB"),
            )
            return job.name, *figures, job.same

        heads = ("overhead s", "alone on a fresh model s", "fastest step s", "GPU memory after", "frames")
        title = f"Jobs on one open model, {self.card.hardware}; weights {self.weights}"
        closed = Figure(self.closed_gpu_bytes, "GB").text
        host = Figure(self.host_bytes, "GB").text
        return [
            Sheet("job", title, heads, [cells(job) for job in self.jobs]),
            f"GPU memory in use after close: {closed}. Peak host memory without the page cache: {host}.",
        ]

    def draw(self) -> Mapping[str, Any]:
        return {}


def five_jobs(spec: Spec, other: Spec) -> dict[str, Spec]:
    """`other` is the second size."""
    name, second = spec.shape.title, other.shape.title
    first = replace(spec, prompt=PROMPTS[0])
    return {
        f"{name}, animate": first,
        f"{second}, animate": replace(other, prompt=PROMPTS[0]),
        f"{name}, replace": replace(first, mode="replace"),
        f"{name}, stopped after a step": replace(first, stop_after=1),
        f"{name}, another prompt": replace(first, prompt=PROMPTS[1]),
    }


def measure(
    shape: Shape,
    second: Shape,
    steps: int,
    settings: Mapping[str, Any],
    weights: str | None,
    progress: Progress,
) -> OpenModelJobs:
    with workplace(shape, (*SHARED, "kernels")) as (env, clips):
        spec = Spec(shape, clips, steps, {**settings, "keep_encoders": True}, weights)
        others = write_clips(Path(clips).parent / "second", second.width, second.height, second.window)
        jobs = five_jobs(spec, replace(spec, shape=second, clips=str(others)))

        def run(specs: list[Spec]) -> list[dict[str, Any]]:
            with Child(MODULE, [as_argument(specs)], env) as child:
                return [child.read() for _ in range(len(specs) + 1)]

        for each in list(jobs.values())[:2]:  # builds graphs and engines, and finishes kernels
            with_graphs(partial(run, [each]), progress)
        *rows, closed = run(list(jobs.values()))
        alone = [None if job.stop_after else run([job])[0] for job in jobs.values()]
    found = []
    for name, row, single in zip(jobs, rows, alone, strict=True):
        found.append(
            JobRow(
                name,
                row["first_step_seconds"] - row["steps"][0],
                row["steps"],
                row["gpu_bytes"],
                row["frames"],
                row["sha256"],
                single["sha256"] if single else None,
                single["first_step_seconds"] - single["steps"][0] if single else None,
            )
        )
    return OpenModelJobs(
        read_card(), weights or "generated", settings, found, closed["gpu_bytes"], closed["host_bytes"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--weights", help="folder of checkpoints; default: generated")
    parser.add_argument("--second-size", default="480x832", help="WIDTHxHEIGHT of the second size")
    options = parser.parse_args()
    shape = shape_from(options)
    width, height = (int(side) for side in options.second_size.split("x"))
    second = replace(shape, width=width, height=height)
    settings = settings_from(options)
    finish(measure(shape, second, options.steps, settings, options.weights, say_note), options.out)


if __name__ == "__main__":
    main()
