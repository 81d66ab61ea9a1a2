"""Finds people with the users' own ONNX files: a detector, a tracker, and a pose network."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from trt_wan.preprocess.clips.streams import Item, batches
from trt_wan.preprocess.observe import Observe, begun, unobserved
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.detect import Detector, official_person
from trt_wan.preprocess.people.person import NOBODY, Box, Keypoints, PersonFrame
from trt_wan.preprocess.people.pose import PoseEstimator
from trt_wan.preprocess.people.track import Tracker
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.video.reader import Picture

# Notes to the user about the followed person; {} is the frame's number.
TOLD = {
    "lost": "The person is out of sight from frame {} on.",
    "back": "The person in frame {} is taken for the person that was out of sight.",
    "cut": "Frame {} shows others, as after a cut: the largest of them is followed.",
}


class OnnxPeople:
    """`official`: no tracking, the largest person of each frame."""

    def __init__(
        self,
        detector: Detector,
        pose: PoseEstimator,
        official: bool = False,
        observe: Observe = unobserved,
    ) -> None:
        self.detector, self.pose, self.official, self.observe = detector, pose, official, observe
        self.name = f"{detector.net.path.name} and {pose.net.path.name} ({pose.net.reason})"

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress
    ) -> Iterator[PersonFrame]:
        """On a GPU the next batch is read and detected while the poses of this one are computed."""
        tracker, told, reported = Tracker(choice), False, 0
        under_way: deque[tuple[list[Box | None], Callable[[], list[Keypoints]]]] = deque()
        looking = (
            (batch, begun("detect", self.observe, partial(self.detector.detecting, batch)))
            for batch in batches(frames)
        )
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
            pictures, around = [frame for frame, _ in here], [box for _, box in here]
            posing = begun("pose", self.observe, partial(self.pose.estimating, pictures, around))
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
    """The same items. Each is given when the next has been made."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
