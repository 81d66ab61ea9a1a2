"""The measured process of the preprocessing, through its public functions.

    python -m trt_wan.benchmarks.preprocess.child SPEC

SPEC is a `Spec` in JSON. Answers: "opened" once, "pass" for the warm-up and for every timed pass, "end" once.
Imports no torch.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.timed import timed
from trt_wan.benchmarks.preprocess.parts import PartClock
from trt_wan.preprocess.clips.keypoints import read_keypoints
from trt_wan.preprocess.drawing import WRITE
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.onnx.net import OnnxNet
from trt_wan.preprocess.people.detect import open_detector
from trt_wan.preprocess.people.person import Box
from trt_wan.preprocess.people.pose import open_pose
from trt_wan.preprocess.preprocess import FIND, preprocess
from trt_wan.preprocess.sam2.segmenter import open_segmenter
from trt_wan.preprocess.stages import Executor, Networks, open_stages
from trt_wan.runtime.events import Event, Note, StageProgress
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Mode
from trt_wan.runtime.video.reader import Clip, Picture

What = Literal["detector", "pose", "sam2", "animate", "replace"]
MOST_FRAMES = 256  # held in memory while a network is timed
BOX = (0.375, 0.125, 0.625, 0.875)  # x0, y0, x1, y1 in the frame: the person for whom a pose is timed


@dataclass(frozen=True)
class Spec:
    """`animate` and `replace` make a whole folder, the others run a network over the clip's frames."""

    what: What
    clip: str
    reference: str
    output: str
    detector: str
    pose: str
    sam2: str
    keypoints: str  # keypoints.json of the clip, from which SAM2 is prompted
    size: tuple[int, int]
    executor: Executor
    repeat: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Spec":
        values = json.loads(text)
        return Spec(**{**values, "size": tuple(values["size"])})


class Notes:
    """The texts of notes, and the time at which each stage first reported."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.stages: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)
        elif isinstance(event, StageProgress):
            self.stages.setdefault(event.stage, time.perf_counter())


def passes(spec: Spec, run: Callable[[], int]) -> int:
    """Returns the result of the last pass. The first pass is the warm-up."""
    for _ in range(spec.repeat + 1):
        start = time.perf_counter()
        found = run()
        say("pass", seconds=time.perf_counter() - start)
    return found


def end(notes: Notes, **more: Any) -> None:
    say("end", host_peak_bytes=peak_bytes(), notes=notes.texts, **more)


def read_frames(path: str) -> list[Picture]:
    with Clip(Path(path)) as clip:
        return [clip.window([i])[0] for i in range(min(clip.frames, MOST_FRAMES))]


def run_detector(spec: Spec) -> None:
    frames, notes, start = read_frames(spec.clip), Notes(), time.perf_counter()
    detector = open_detector(Path(spec.detector), spec.executor, progress=notes)
    _opened(detector.net, start, len(frames))
    found = passes(spec, lambda: sum(bool(persons) for persons in detector.detect(frames)))
    end(notes, found=found, by_arrays=_by_arrays(spec, detector.net, len(frames)))


def run_pose(spec: Spec) -> None:
    frames, notes, start = read_frames(spec.clip), Notes(), time.perf_counter()
    pose = open_pose(Path(spec.pose), spec.executor, progress=notes)
    _opened(pose.net, start, len(frames))
    height, width = frames[0].shape[:2]
    x0, y0, x1, y1 = BOX
    boxes = [Box(x0 * width, y0 * height, x1 * width, y1 * height)] * len(frames)
    found = passes(spec, lambda: len(pose.estimate(frames, boxes)))
    end(notes, found=found, by_arrays=_by_arrays(spec, pose.net, len(frames)))


def _opened(net: OnnxNet, start: float, frames: int) -> None:
    about = {"runs_on": net.reason, "batch": net.batch, "input": net.input_shape, "file": str(net.path)}
    say("opened", seconds=time.perf_counter() - start, frames=frames, **about)


def _by_arrays(spec: Spec, net: OnnxNet, frames: int) -> list[float]:
    """Seconds of as many frames where prepared batches go in and raw results come out."""
    batch = np.random.default_rng(0).random(net.input_shape, np.float32)
    calls = -(-frames // net.batch)
    found = []
    for _ in range(spec.repeat + 1):
        start = time.perf_counter()
        for _ in net.stream(batch for _ in range(calls)):
            pass
        # Batches are full; the places beyond the last frame do not count.
        found.append((time.perf_counter() - start) * frames / (calls * net.batch))
    return found[1:]


def run_sam2(spec: Spec) -> None:
    """SAM2 as the mode replace runs it, prompted with the joints in `spec.keypoints`."""
    frames, notes = read_frames(spec.clip), Notes()
    people = read_keypoints(Path(spec.keypoints)).frames[: len(frames)]
    start = time.perf_counter()
    segmenter = open_segmenter(Path(spec.sam2), spec.executor, official=False, progress=notes)
    model = segmenter.model
    about = f"{model.config.name}, {model.plan.precision}, {model.config.image_size} pixels wide"
    runs_on = next((text for text in notes.texts if "runs with" in text), spec.executor)
    opened = time.perf_counter() - start
    say("opened", seconds=opened, frames=len(frames), runs_on=f"{runs_on}; {about}", batch=model.plan.batch)

    def track() -> int:
        return sum(bool(mask.any()) for mask in segmenter.outlines(iter(frames), people))

    found = passes(spec, track)
    watched = timed(model.executor)
    watched.start_watching()
    segmenter.model = replace(model, executor=watched)
    track()
    inside = [
        {"name": name, "calls": len(s), "seconds": sum(s), "median": float(np.median(s))}
        for (_, name), s in watched.watched().items()
    ]
    end(notes, found=found, prompted=watched.calls["prompt"], by_arrays=None, inside=inside)


def run_whole(spec: Spec) -> None:
    mode: Mode = "replace" if spec.what == "replace" else "animate"
    notes, clock, start = Notes(), PartClock(), time.perf_counter()
    sam2 = Path(spec.sam2) if mode == "replace" else None
    networks = Networks(Path(spec.detector), Path(spec.pose), sam2, executor=spec.executor)
    stages = open_stages(networks, mode, None, needs_people=True, progress=notes, observe=clock.inside)
    opened = time.perf_counter() - start
    job = PreprocessJob(
        Path(spec.reference), Path(spec.clip), Path(spec.output), mode=mode, size=spec.size, overwrite=True
    )
    assert stages.people is not None
    say("opened", seconds=opened, runs_on=stages.people.name)
    for _ in range(spec.repeat + 1):
        notes.stages.clear()
        notes.texts.clear()
        clock.take()
        start = time.perf_counter()
        folder = preprocess(job, stages, notes)
        ended = time.perf_counter()
        own, beside = clock.take()
        halves = {
            "finding": notes.stages[WRITE] - notes.stages[FIND],
            "writing": ended - notes.stages[WRITE],
        }
        say("pass", seconds=ended - start, own=own, beside=beside, **halves)
    with Clip(folder / "src_pose.mp4") as clip:
        made = clip.frames, (clip.width, clip.height)
    end(notes, frames=made[0], size=made[1])


MODES: dict[What, Callable[[Spec], None]] = {
    "detector": run_detector,
    "pose": run_pose,
    "sam2": run_sam2,
    "animate": run_whole,
    "replace": run_whole,
}
assert set(MODES) == set(get_args(What))


def main() -> None:
    spec = Spec.from_json(sys.argv[1])
    answering(lambda: MODES[spec.what](spec))


if __name__ == "__main__":
    main()
