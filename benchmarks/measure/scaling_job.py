"""Windows of a long video on an open model of several ranks, in a measured process.

    python -m trt_wan.benchmarks.measure.scaling_job SPEC

SPEC is a `Spec` in JSON, with the settings of the model. Each line on stdin is an `Asked` in JSON; the answer
is "windows". Every window carries a frame from the one before, the first one a picture, so all do the same
work. Nothing watches the executor. The end of stdin closes the model.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.window_job import WindowWatch
from trt_wan.runtime.events import Event, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.opening.model import OpenModel
from trt_wan.runtime.parallel.trace import now
from trt_wan.runtime.render import render
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.window_state import WindowState


@dataclass(frozen=True)
class Asked:
    """Windows `first` (from 0) to `first + windows` of the clips in `spec`. `latent` is the file (.npy) that
    gets the finished latent of the first one.
    """

    spec: Spec
    first: int
    windows: int
    latent: str

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "spec": self.spec.to_json()})

    @staticmethod
    def from_json(text: str) -> "Asked":
        values = json.loads(text)
        return Asked(**{**values, "spec": Spec.from_json(values["spec"])})

    def job(self) -> Job:
        job, new = self.spec.job(), self.spec.shape.window - 1
        used = range(self.first * new, (self.first + self.windows) * new)
        cut = Cut.frames(used, to_the_end=False)
        return replace(job, inputs=replace(job.inputs, start_frame=job.inputs.reference, cut=cut))


@dataclass
class KeepingFirst:
    """A model as `render` uses it, which keeps the latent of a job's first window."""

    model: OpenModel
    latent: Array | None = None

    def pieces(self, job: Job, *, keep: Any, **rest: Any) -> Iterator[Array]:
        def kept(state: WindowState) -> None:
            if self.latent is None:
                self.latent = state.latent
            keep(state)

        return self.model.pieces(job, keep=kept, **rest)


def answer(model: OpenModel, asked: Asked) -> None:
    watch, keeping = WindowWatch(), KeepingFirst(model)
    written: list[dict[str, float]] = []  # when the frames of each window were on the disk, or soon after

    def progress(event: Event) -> None:
        watch.progress(event)
        if isinstance(event, WindowDone):
            written.append({"window": event.window, "at": now()})

    output = Path(asked.spec.clips) / f"{Path(asked.latent).stem}.mp4"  # no other process writes it
    made = render(asked.job(), keeping, output, overwrite=True, progress=progress)
    output.unlink()
    assert keeping.latent is not None
    np.save(asked.latent, keeping.latent)
    say(
        "windows",
        precision=model.precision,
        choices=watch.notes,
        stages=[
            {"window": window, "stage": stage, "seconds": seconds}
            for (window, stage), seconds in watch.stages.items()
        ],
        steps=watch.steps,
        frames=made.frames,
        writing_seconds=made.writing_seconds,
        written=written,
    )


def run(spec: Spec) -> None:
    with spec.open(lambda event: None, None) as model:
        for line in sys.stdin:
            answer(model, Asked.from_json(line))


def main() -> None:
    answering(lambda: run(Spec.from_json(sys.argv[1])))


if __name__ == "__main__":
    main()
