"""The exchangeable stages of the preprocessing: one finds the person in the frames, one finds the outline.

A stage is given frames as they come and returns one result per frame, in order. It may read a batch ahead.
The users' own ONNX files and SAM2 weights come first; MediaPipe's bundled models are the fallback, and are
named to the user. Missing files raise UsageError before any frame is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from trt_wan.errors import UsageError, with_commands
from trt_wan.install import install_command
from trt_wan.preprocess.clips.streams import split
from trt_wan.preprocess.observe import Observe, unobserved
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.mediapipe import MediapipePeople
from trt_wan.preprocess.people.notes import jumps, person_changed
from trt_wan.preprocess.people.person import Box, Follow, PersonFrame, box_of_joints
from trt_wan.preprocess.pictures.masks import Compat, Mask
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.job import Mode
from trt_wan.runtime.video.reader import Picture

Executor = Literal["auto", "onnxruntime", "tensorrt"]
SegmenterName = Literal["auto", "sam2", "mediapipe", "box"]

ONE_PERSON = "MediaPipe finds one person and does not say whether there are more."
SEVERAL = "Where several are in view, give --detector and --pose."
SURE = 0.3  # least score of a joint, for people without a box


class PeopleSource(Protocol):
    name: str  # shown to the user

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        """One person's box and joints, frame by frame."""
        ...

    def following(self, choice: PersonChoice, progress: Progress) -> AbstractContextManager[Follow]:
        """The same for frames that come a few at a time: each call goes on after the one before. Enter it in
        the thread that calls.
        """
        ...


class Segmenter(Protocol):
    name: str

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        """The same person's outline, bool [H, W], frame by frame; empty in frames without the person."""
        ...


@dataclass(frozen=True)
class Stages:
    people: PeopleSource | None  # None: keypoints are given
    segmenter: Segmenter | None = None  # mode replace only
    observe: Observe = unobserved


@dataclass(frozen=True)
class Networks:
    """The files that the user gave; None: not given."""

    detector: Path | None = None
    pose: Path | None = None
    sam2: Path | None = None
    segmenter: SegmenterName = "auto"
    executor: Executor = "auto"

    def require_used(self, mode: Mode, needs_people: bool) -> None:
        """Raises UsageError for a file that a job of that kind leaves aside."""
        if mode == "animate" and (self.sam2 is not None or self.segmenter != "auto"):
            option = "--segmenter" if self.sam2 is None else "--sam2"
            raise UsageError(
                f"In the mode animate there is no mask, so {option} would do nothing.",
                f"Leave out {option}, or use --mode replace.",
            )
        if self.sam2 is not None and self.segmenter in ("mediapipe", "box"):
            raise UsageError(
                f"Masks are made by --segmenter {self.segmenter}, so --sam2 would do nothing.",
                "Leave out one of them.",
            )
        if not needs_people and (self.detector is not None or self.pose is not None):
            option = "--pose" if self.detector is None else "--detector"
            raise UsageError(
                f"The people are in the file of --keypoints, so {option} would do nothing.",
                f"Leave out {option} or --keypoints.",
            )


class MediapipeSource:
    """The fallback for both stages: MediaPipe finds one person, and that person's outline.

    Its graph keeps state from frame to frame, so every sequence gets a new graph.
    """

    def __init__(self) -> None:
        with MediapipePeople() as people:  # raises for a broken installation
            self.name = people.name

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        _require_no_choice(choice, progress)
        boxes: list[Box | None] = []
        with MediapipePeople() as people:
            for person, _ in people.frames(frames):
                boxes.append(person.box)
                yield person
        if changed := person_changed([], [], jumps(boxes), SEVERAL):
            progress(changed)

    @contextmanager
    def following(self, choice: PersonChoice, progress: Progress) -> Iterator[Follow]:
        _require_no_choice(choice, progress)
        with MediapipePeople() as people:
            yield lambda frames: [person for person, _ in people.frames(frames)]

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        """Outlines of the person that MediaPipe finds. `people` are ignored."""
        readers = split(frames, 2)
        with MediapipePeople() as found:
            for frame, (_, outline) in zip(readers[0], found.frames(readers[1]), strict=True):
                yield np.zeros(frame.shape[:2], bool) if outline is None else outline


def _require_no_choice(choice: PersonChoice, progress: Progress) -> None:
    """Raises UsageError for a choice that MediaPipe cannot make."""
    if choice != PersonChoice():
        raise UsageError(
            "MediaPipe follows the one person that it finds and cannot choose among several.",
            "Leave out --person, --point and --box, or give --detector and --pose.",
        )
    progress(Note(f"{ONE_PERSON} {SEVERAL}", "one_person"))


class BoxSegmenter:
    """Needs no network: the mask is the person's whole box, which also hides the person's outline."""

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
    networks: Networks,
    mode: Mode,
    compat: Compat | None,
    *,
    needs_people: bool,
    progress: Progress = silent,
    observe: Observe = unobserved,
) -> Stages:
    """Opens the files in `networks`, else the fallback. Raises UsageError if there is neither, and for files
    that would not be used.
    """
    networks.require_used(mode, needs_people)
    return Stages(
        _open_people(networks, compat, progress, observe) if needs_people else None,
        _open_segmenter(networks, compat, progress) if mode == "replace" else None,
        observe,
    )


def require_finder(networks: Networks) -> None:
    """Raises UsageError if nothing can find people. Opens nothing."""
    if networks.detector is None and networks.pose is None:
        if not _has_mediapipe():
            raise UsageError(
                "There is nothing to find people with: no --detector and --pose, and no MediaPipe.",
                with_commands("Give the two ONNX files, or install MediaPipe:", install_command("mediapipe")),
            )
    elif networks.detector is None or networks.pose is None:
        missing = "--detector" if networks.detector is None else "--pose"
        raise UsageError(
            f"A detector and a pose network work together, and {missing} is not given.",
            "Give --detector yolov10m.onnx and --pose vitpose-h-wholebody.onnx, or neither.",
        )


def _open_people(
    networks: Networks, compat: Compat | None, progress: Progress, observe: Observe
) -> PeopleSource:
    require_finder(networks)
    if networks.detector is None or networks.pose is None:
        return MediapipeSource()
    from trt_wan.preprocess.people.detect import open_detector
    from trt_wan.preprocess.people.onnx_people import OnnxPeople
    from trt_wan.preprocess.people.pose import open_pose

    official = compat is not None  # the wrapper detects as the official code does
    order: Literal["bgr", "rgb"] = "bgr" if compat == "official" else "rgb"
    detector = open_detector(networks.detector, networks.executor, official=official, progress=progress)
    pose = open_pose(networks.pose, networks.executor, order, progress=progress)
    return OnnxPeople(detector, pose, official, observe)


def _open_segmenter(networks: Networks, compat: Compat | None, progress: Progress) -> Segmenter:
    name = networks.segmenter
    if name == "box":
        return BoxSegmenter()
    if name == "sam2" or (name == "auto" and networks.sam2 is not None):
        if networks.sam2 is None:
            raise UsageError("SAM2 has no weights.", "Name them with --sam2 FILE.")
        from trt_wan.preprocess.sam2.segmenter import open_segmenter

        return open_segmenter(networks.sam2, networks.executor, compat == "official", progress)
    if not _has_mediapipe():
        raise UsageError(
            "There is nothing to make masks with: no --sam2, and no MediaPipe.",
            with_commands(
                "Give --sam2 FILE, take the person's box with --segmenter box, or install MediaPipe:",
                install_command("mediapipe"),
            ),
        )
    return MediapipeSource()


def _has_mediapipe() -> bool:
    return find_spec("mediapipe") is not None
