"""Our own measured process of the preprocessing, through its public functions.

    python -m trt_wan.benchmarks.preprocess.child SPEC

SPEC is a `Spec` in JSON. Every line on stdout is a JSON object with an "event": "opened" once, "pass" for the
warm-up and for every timed pass, "end" once. Imports no torch.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from trt_wan.benchmarks.measure.measured_process import say
from trt_wan.benchmarks.measure.timed import timed
from trt_wan.benchmarks.preprocess import planted, tiny_sam2
from trt_wan.benchmarks.preprocess.parts import PartClock
from trt_wan.benchmarks.preprocess.result import InsideTime
from trt_wan.errors import TrtWanError
from trt_wan.preprocess.drawing import WRITE
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.onnx.net import OnnxNet
from trt_wan.preprocess.people.detect import open_detector
from trt_wan.preprocess.people.person import JOINTS, Box
from trt_wan.preprocess.people.pose import open_pose
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.preprocess import FIND, preprocess
from trt_wan.preprocess.sam2.segmenter import PERSON
from trt_wan.preprocess.stages import Executor, Networks, open_stages
from trt_wan.runtime.events import Event, Note, StageProgress
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Mode
from trt_wan.runtime.video.reader import Clip, Picture

What = Literal["detector", "pose", "sam2", "animate", "replace"]
MOST_FRAMES = 256  # of a clip, held in memory while a network is timed


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
    """What was said, and since when which stage runs."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.stages: dict[str, float] = {}  # when each was first spoken of

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)
        elif isinstance(event, StageProgress):
            self.stages.setdefault(event.stage, time.perf_counter())


def main() -> None:
    sys.stdout = sys.stderr  # stdout is for the harness; what a library prints is not for it
    tiny_sam2.make_known()
    spec = Spec.from_json(sys.argv[1])
    try:
        MODES[spec.what](spec)
    except TrtWanError as error:
        say("failed", code=error.code, message=error.message, hint=error.hint)


def passes(spec: Spec, run: Callable[[], int]) -> int:
    """What the last one returned. The first warms up: it is said, and is not for counting."""
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
    say("opened", seconds=time.perf_counter() - start, frames=len(frames), **_of(detector.net))
    found = passes(spec, lambda: sum(bool(persons) for persons in detector.detect(frames)))
    end(notes, found=found, by_arrays=_by_arrays(spec, detector.net, len(frames)))


def run_pose(spec: Spec) -> None:
    frames, notes, start = read_frames(spec.clip), Notes(), time.perf_counter()
    pose = open_pose(Path(spec.pose), spec.executor, progress=notes)
    say("opened", seconds=time.perf_counter() - start, frames=len(frames), **_of(pose.net))
    height, width = frames[0].shape[:2]
    x0, y0, x1, y1 = planted.BOX
    boxes = [Box(x0 * width, y0 * height, x1 * width, y1 * height)] * len(frames)
    found = passes(spec, lambda: len(pose.estimate(frames, boxes)))
    end(notes, found=found, by_arrays=_by_arrays(spec, pose.net, len(frames)))


def _of(net: Any) -> dict[str, Any]:
    return {"runs_on": net.reason, "batch": net.batch}


def _by_arrays(spec: Spec, net: OnnxNet, frames: int) -> list[float]:
    """Seconds of as many frames where prepared batches go in and raw results come out."""
    batch = np.random.default_rng(0).random(net.input_shape, np.float32)
    calls = -(-frames // net.batch)
    found = []
    for _ in range(spec.repeat + 1):
        start = time.perf_counter()
        for _ in net.stream(batch for _ in range(calls)):
            pass
        # Full batches only: the last one's empty places are no frames.
        found.append((time.perf_counter() - start) * frames / (calls * net.batch))
    return found[1:]


def run_sam2(spec: Spec) -> None:
    """Prompted as the mode replace prompts it: on up to four frames of a quarter each, and on the first."""
    from trt_wan.preprocess.sam2 import prompts
    from trt_wan.preprocess.sam2.model import Sam2Model, open_sam2
    from trt_wan.preprocess.sam2.tracker import Sam2Tracker
    from trt_wan.preprocess.sam2.weights import load_sam2

    frames, notes, start = read_frames(spec.clip), Notes(), time.perf_counter()
    model = open_sam2(load_sam2(Path(spec.sam2)), spec.executor, progress=notes)
    about = f"{model.config.name}, {model.plan.precision}, {model.config.image_size} pixels wide"
    runs_on = next((text for text in notes.texts if "runs with" in text), spec.executor)
    opened = time.perf_counter() - start
    say("opened", seconds=opened, frames=len(frames), runs_on=f"{runs_on}; {about}", batch=model.plan.batch)
    height, width = frames[0].shape[:2]
    points = np.full((JOINTS, 3), planted.SCORE, np.float32)
    points[:, :2] = planted.in_frame(width, height)
    body = from_keypoints(points, width, height).body
    keys = prompts.key_prompts([body] * len(frames), width, height, "safe")

    def track(model: Sam2Model = model) -> int:
        tracker = Sam2Tracker(model, frames=len(frames))
        for key in keys:
            tracker.add_points(key.frame, PERSON, key.points, key.labels)
        return sum(bool(found.mask(PERSON).any()) for found in tracker.track(iter(frames)))

    found = passes(spec, track)
    watched = timed(model.executor)
    watched.start_watching()
    track(replace(model, executor=watched))
    inside = [
        InsideTime(name, len(seconds), sum(seconds), float(np.median(seconds)))
        for (_, name), seconds in watched.watched().items()
    ]
    end(notes, found=found, prompted=len(keys), by_arrays=None, inside=[asdict(row) for row in inside])


def run_whole(spec: Spec) -> None:
    mode: Mode = "replace" if spec.what == "replace" else "animate"
    notes, start = Notes(), time.perf_counter()
    replacing = mode == "replace"
    networks = Networks(
        Path(spec.detector),
        Path(spec.pose),
        Path(spec.sam2) if replacing else None,
        executor=spec.executor,
    )
    stages = open_stages(networks, mode, None, needs_people=True, progress=notes)
    opened = time.perf_counter() - start
    job = PreprocessJob(
        Path(spec.reference), Path(spec.clip), Path(spec.output), mode=mode, size=spec.size, overwrite=True
    )
    assert stages.people is not None
    say("opened", seconds=opened, runs_on=stages.people.name)
    with PartClock().watching() as clock:
        for _ in range(spec.repeat + 1):
            say("pass", **_one_folder(job, stages, clock, notes))
    with Clip(job.output / "src_pose.mp4") as made:
        end(notes, frames=made.frames, size=(made.width, made.height), missing=clock.missing)


def _one_folder(job: PreprocessJob, stages: Any, clock: PartClock, notes: Notes) -> dict[str, Any]:
    """Seconds of it, of its two halves, and of its parts."""
    notes.stages.clear()
    notes.texts.clear()
    clock.take()
    start = time.perf_counter()
    preprocess(job, stages, notes)
    done = time.perf_counter()
    own, beside = clock.take()
    find, write = (notes.stages.get(stage) for stage in (FIND, WRITE))
    return {
        "seconds": done - start,
        "finding": write - find if find and write else None,
        "writing": done - write if write else None,
        "own": own,
        "beside": beside,
    }


MODES: dict[str, Callable[[Spec], None]] = {
    "detector": run_detector,
    "pose": run_pose,
    "sam2": run_sam2,
    "animate": run_whole,
    "replace": run_whole,
}
assert set(MODES) == set(get_args(What))


if __name__ == "__main__":
    main()
