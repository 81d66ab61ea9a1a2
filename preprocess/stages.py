"""What can be exchanged in the preprocessing: who finds the person in the frames, and who finds the outline.

A stage is given frames as they come and hands back one result per frame, in order; it may read a batch ahead.
The users' own ONNX files and SAM2 weights come first, MediaPipe's bundled models are the fallback that is
named, and what is missing is said in one sentence before any frame is read.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from trt_wan.errors import UsageError
from trt_wan.preprocess.clips.streams import Item, batches, split
from trt_wan.preprocess.people.detect import official_person
from trt_wan.preprocess.people.mediapipe import MediapipePeople
from trt_wan.preprocess.people.person import NOBODY, Box, Keypoints, PersonFrame, box_of_joints
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.people.track import PersonChoice, Tracker
from trt_wan.preprocess.pictures.masks import Compat, Mask
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.job import Mode
from trt_wan.runtime.video.reader import Picture

if TYPE_CHECKING:
    from trt_wan.preprocess.people.detect import Detector
    from trt_wan.preprocess.people.pose import PoseEstimator

Executor = Literal["auto", "onnxruntime", "tensorrt"]
SegmenterName = Literal["auto", "sam2", "mediapipe", "box"]

INSTALL = "pip install 'trt-wan[mediapipe]'"
PERSON = 1  # SAM2's number of the object
PATIENCE = 3  # frames in which mask and pose disagree: one may be a wrong pose
SURE = 0.3  # the score from which a joint counts where there is no box


class PeopleSource(Protocol):
    name: str  # said to the user

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        """One person's box and joints, frame by frame."""
        ...


class Segmenter(Protocol):
    name: str

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        """The same person's outline, bool [H, W], frame by frame; empty where nobody is."""
        ...


@dataclass(frozen=True)
class Stages:
    people: PeopleSource | None  # None: keypoints are given
    segmenter: Segmenter | None = None  # mode replace only


@dataclass(frozen=True)
class Networks:
    """What the user has named; None: not given."""

    detector: Path | None = None
    pose: Path | None = None
    sam2: Path | None = None
    segmenter: SegmenterName = "auto"
    executor: Executor = "auto"


# What a user is told of the followed person; the number is of the frame.
TOLD = {
    "lost": "The person is out of sight from frame {} on.",
    "back": "Who is in the picture at frame {} is taken for the person that was out of sight.",
    "cut": "Frame {} shows others, as after a cut: the largest of them is followed.",
}


class OnnxPeople:
    """The users' own detector and pose network. `official`: no tracking, the largest person of each frame."""

    def __init__(self, detector: "Detector", pose: "PoseEstimator", official: bool = False) -> None:
        self.detector, self.pose, self.official = detector, pose, official
        self.name = f"{detector.net.path.name} and {pose.net.path.name} ({pose.net.reason})"

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        """The next frames are asked for and looked at while the poses in these are awaited."""
        tracker, told, reported = Tracker(choice), False, 0
        under_way: deque[tuple[list[Box | None], Callable[[], list[Keypoints]]]] = deque()
        looking = ((batch, self.detector.detecting(batch)) for batch in batches(frames))
        for batch, detected in _one_ahead(looking):
            found = detected()
            boxes: list[Box | None]
            if self.official and choice == PersonChoice():
                boxes = [
                    official_person(persons, frame.shape[1], frame.shape[0])
                    for frame, persons in zip(batch, found, strict=True)
                ]
            else:
                boxes = [tracker.follow(persons) for persons in found]
            if not told and (several := tracker.several_people()):
                progress(Note(several))
                told = True
            for event in tracker.events[reported:]:
                progress(Note(TOLD[event.what].format(event.frame)))
            reported = len(tracker.events)
            here = [(frame, box) for frame, box in zip(batch, boxes, strict=True) if box is not None]
            posing = self.pose.estimating([frame for frame, _ in here], [box for _, box in here])
            under_way.append((boxes, posing))
            if len(under_way) > 1:
                yield from _people(*under_way.popleft())
        while under_way:
            yield from _people(*under_way.popleft())


def _people(boxes: Sequence[Box | None], posed: Callable[[], list[Keypoints]]) -> Iterator[PersonFrame]:
    poses = iter(posed())
    for box in boxes:
        yield NOBODY if box is None else PersonFrame(box, next(poses))


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each when the next has been made."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


class Sam2Segmenter:
    """SAM2, told where the person is by the pose on key frames, and again where it has lost the pose."""

    def __init__(
        self, weights: Path, executor: Executor, official: bool = False, progress: Progress = silent
    ) -> None:
        from trt_wan.preprocess.sam2.model import open_sam2
        from trt_wan.preprocess.sam2.weights import load_sam2

        self.model = open_sam2(load_sam2(weights), executor, progress=progress)
        self.official = official
        self.name = f"SAM2 ({weights.name})"

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        from trt_wan.preprocess.sam2 import prompts
        from trt_wan.preprocess.sam2.tracker import Sam2Tracker

        coming = iter(frames)
        first = next(coming)
        height, width = first.shape[:2]
        bodies = [from_keypoints(person.keypoints, width, height).body for person in people]
        chunk = prompts.CHUNK if self.official else None
        tracker = Sam2Tracker(self.model, chunk=chunk, frames=len(people))
        for key in prompts.key_prompts(bodies, width, height, "official" if self.official else "safe"):
            tracker.add_points(key.frame, PERSON, key.points, key.labels)
        lost = 0
        for k, tracked in enumerate(tracker.track(chain([first], coming))):
            here = PERSON in tracked.objects
            mask = tracked.mask(PERSON) if here else np.zeros((height, width), bool)
            lost = lost + 1 if prompts.wants_prompt(mask, bodies[k]) else 0
            following = tracker.next_frame  # frames before it are under way on a GPU
            if lost >= PATIENCE and following < len(bodies) and not self.official:
                points = prompts.safe_points(bodies[following], width, height)
                if len(points) >= prompts.MIN_JOINTS:
                    tracker.add_points(following, PERSON, points, np.ones(len(points), np.int64))
                    lost = 0
            yield mask


class MediapipeSource:
    """The fallback, for both stages: MediaPipe finds one person by itself, and that person's outline.

    Its graph carries what it saw from frame to frame, so every sequence gets one of its own.
    """

    def __init__(self) -> None:
        with MediapipePeople() as people:  # what is wrong with the installation shows here
            self.name = people.name

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        if choice != PersonChoice():
            raise UsageError(
                "MediaPipe follows the one person that it finds; there is no choosing among several.",
                "Leave out --person, --point and --box, or give --detector and --pose.",
            )
        with MediapipePeople() as people:
            for person, _ in people.frames(frames):
                yield person

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        """The outline is of whom MediaPipe finds, wherever `people` are."""
        readers = split(frames, 2)
        with MediapipePeople() as found:
            for frame, (_, outline) in zip(readers[0], found.frames(readers[1]), strict=True):
                yield np.zeros(frame.shape[:2], bool) if outline is None else outline


class BoxSegmenter:
    """No network: the mask is the person's whole box, which also hides the outline of the person."""

    name = "the person's box"

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        for frame, person in zip(frames, people, strict=True):
            mask = np.zeros(frame.shape[:2], bool)
            box = person.box
            if box is None and person.keypoints is not None:
                box = box_of_joints(person.keypoints, SURE)
            if box is not None:
                height, width = frame.shape[:2]
                x0, x1 = (round(min(max(x, 0), width)) for x in (box.x0, box.x1))
                y0, y1 = (round(min(max(y, 0), height)) for y in (box.y0, box.y1))
                mask[y0:y1, x0:x1] = True
            yield mask


def open_stages(
    networks: Networks, mode: Mode, compat: Compat | None, *, needs_people: bool, progress: Progress = silent
) -> Stages:
    """What `networks` names, else the fallback; UsageError where there is neither."""
    return Stages(
        _open_people(networks, compat, progress) if needs_people else None,
        _open_segmenter(networks, compat, progress) if mode == "replace" else None,
    )


def _open_people(networks: Networks, compat: Compat | None, progress: Progress) -> PeopleSource:
    if networks.detector is None and networks.pose is None:
        if not _has_mediapipe():
            raise UsageError(
                "There is nothing to find people with: no --detector and --pose, and no MediaPipe.",
                f"Give the two ONNX files, or: {INSTALL}",
            )
        return MediapipeSource()
    if networks.detector is None or networks.pose is None:
        missing = "--detector" if networks.detector is None else "--pose"
        raise UsageError(
            f"A detector and a pose network work together, and {missing} is not given.",
            "Give --detector yolov10m.onnx and --pose vitpose-h-wholebody.onnx, or neither.",
        )
    from trt_wan.preprocess.people.detect import open_detector
    from trt_wan.preprocess.people.pose import open_pose

    official = compat is not None  # the wrapper detects as the official code does
    detector = open_detector(networks.detector, networks.executor, official=official, progress=progress)
    order: Literal["bgr", "rgb"] = "bgr" if compat == "official" else "rgb"
    return OnnxPeople(
        detector, open_pose(networks.pose, networks.executor, order, progress=progress), official
    )


def _open_segmenter(networks: Networks, compat: Compat | None, progress: Progress) -> Segmenter:
    name = networks.segmenter
    if name == "box":
        return BoxSegmenter()
    if name == "sam2" or (name == "auto" and networks.sam2 is not None):
        if networks.sam2 is None:
            raise UsageError("SAM2 has no weights.", "Name them with --sam2 FILE.")
        return Sam2Segmenter(networks.sam2, networks.executor, compat == "official", progress)
    if not _has_mediapipe():
        raise UsageError(
            "There is nothing to make masks with: no --sam2, and no MediaPipe.",
            f"Give --sam2 FILE, take the person's box with --segmenter box, or: {INSTALL}",
        )
    return MediapipeSource()


def _has_mediapipe() -> bool:
    return find_spec("mediapipe") is not None
