"""Finds people with the users' own ONNX files: a detector, a tracker, and a pose network."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from trt_wan.preprocess.clips.streams import Item, batches
from trt_wan.preprocess.observe import Observe, begun, unobserved
from trt_wan.preprocess.people import notes
from trt_wan.preprocess.people.choice import LARGEST, PersonChoice
from trt_wan.preprocess.people.detect import Detector, official_person
from trt_wan.preprocess.people.person import NOBODY, Box, Follow, Keypoints, PersonFrame
from trt_wan.preprocess.people.pose import PoseEstimator
from trt_wan.preprocess.people.track import SURE, Tracker
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.video.reader import Picture

ADVICE = "Cut the clip there if so, or choose with --person, --point or --box."
CROWD = 5  # frames with several people: fewer may be false detections


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

    @contextmanager
    def following(self, choice: PersonChoice, progress: Progress) -> Iterator[Follow]:
        for net in (self.detector.net, self.pose.net):
            net.begin()
        tracker = Tracker(choice)
        yield lambda frames: list(self.follow(frames, choice, progress, tracker))

    def follow(
        self,
        frames: Iterable[Picture],
        choice: PersonChoice,
        progress: Progress,
        goes_on: Tracker | None = None,
    ) -> Iterator[PersonFrame]:
        """On a GPU the next batch is read and detected while the poses of this one are computed. `goes_on`
        has the people of earlier frames; then there are no notes about all frames.
        """
        tracker = goes_on or Tracker(choice)
        told = tracker.first_frame is not None
        tracked = not self.official or choice != LARGEST
        followed: list[Box | None] = []
        counts: list[int] = []  # people in every frame
        under_way: deque[tuple[list[Box | None], Callable[[], list[Keypoints]]]] = deque()
        looking = (
            (batch, begun("detect", self.observe, partial(self.detector.detecting, batch)))
            for batch in batches(frames)
        )
        for batch, detected in _one_ahead(looking):
            found = detected()
            boxes: list[Box | None]
            if tracked:
                boxes = [tracker.follow(persons) for persons in found]
            else:
                boxes = [
                    official_person(persons, frame.shape[1], frame.shape[0])
                    for frame, persons in zip(batch, found, strict=True)
                ]
            if not told and (several := tracker.several_people()):
                progress(
                    notes.several_people(tracker.first_frame or 0, tracker.people, tracker.followed, several)
                )
                told = True
            followed += [None if box is None or box.score < 0 else box for box in boxes]
            counts += [sum(person.score >= SURE for person in persons) for persons in found]
            here = [(frame, box) for frame, box in zip(batch, boxes, strict=True) if box is not None]
            pictures, around = [frame for frame, _ in here], [box for _, box in here]
            posing = begun("pose", self.observe, partial(self.pose.estimating, pictures, around))
            under_way.append((boxes, posing))
            if len(under_way) > 1:
                yield from _people(*under_way.popleft())
        while under_way:
            yield from _people(*under_way.popleft())
        if goes_on is not None:
            return
        first = tracker.first_frame if tracked else None
        crowd = None if told or choice != LARGEST else _crowd(first, counts)
        back, cut = ([e.frame for e in tracker.events if e.what == what] for what in ("back", "cut"))
        jumps = [] if tracked else notes.jumps(followed)
        for note in (crowd, notes.person_changed(back, cut, jumps, ADVICE)):
            if note is not None:
                progress(note)


def _crowd(first: int | None, counts: Sequence[int]) -> Note | None:
    """For people who were not told of when the choice was made. `first`: the frame of the choice, None for
    the official rule; `counts`: people in every frame.
    """
    crowded = [k for k, count in enumerate(counts) if count > 1]
    if len(crowded) < CROWD:
        return None
    how = f"the person of frame {first} is followed. To follow another, cut the clip"
    if first is None:
        how = "the largest of each frame is taken. Follow one with --person N, --point x,y or --box"
    return notes.several_later(crowded, max(counts), len(counts), how)


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
