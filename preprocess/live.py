"""Pose and face of a live source's pictures, in a thread beside the model.

The networks look at pictures as they come. A pose is drawn and a face is cropped BEHIND frames later, because
a short gap of a joint is filled, and a face's box smoothed, by what comes after it. While the model waits for
frames, and at the end, none are held back. So the pictures are not bit for bit those of `trt-wan preprocess`,
which sees the whole clip.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Thread

from trt_wan.preprocess.clips.streams import BATCH
from trt_wan.preprocess.footage import Sizes
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.people.fill import fill_gaps
from trt_wan.preprocess.people.person import PersonFrame
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.pictures.face import FaceCropper
from trt_wan.preprocess.preprocess import MAX_GAP
from trt_wan.preprocess.stages import PeopleSource
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.live.intake import Arrived, Intake, LiveFrame, Pictures
from trt_wan.runtime.live.sources import FRAME, Source
from trt_wan.runtime.video.reader import Picture

BEHIND = 4  # frames: as far as the smoothing of faces looks ahead (FaceCropper)
ENOUGH = BATCH // 2  # pictures that are looked at together while nobody waits
MOST_WAITING = 2 * BATCH  # pictures; more are dropped until the pace is lower
LOOK = 0.02  # seconds


class LivePreparing:
    """A `Feeding` (runtime/live/live.py)."""

    def __init__(
        self,
        intake: Intake,
        people: PeopleSource,
        job: PreprocessJob,
        sizes: Sizes,
        progress: Progress = silent,
    ) -> None:
        """`progress` is called from the thread."""
        self.intake, self._people, self._job, self._sizes = intake, people, job, sizes
        self._progress = progress
        self._cropper = FaceCropper(padding=job.face_padding)
        self._max_gap = round(MAX_GAP * intake.rate)
        self._waiting: deque[tuple[Arrived, Picture]] = deque()
        self._found: list[tuple[Arrived, Picture, PersonFrame]] = []
        self._past: list[PersonFrame] = []  # finished frames that the next ones look back at
        self._cuts: deque[Picture | None] = deque()
        self._faces = self._cropper.crops(self._popped())
        self._ended: tuple[str, BaseException | None] | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="live preparing", daemon=True)

    def start(self, source: Source) -> None:
        self._progress(Note(f"People are found by {self._people.name}."))
        self._thread.start()
        source.start(self._deliver, self.end)

    def end(self, why: str, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended = self._ended or (why, error)
            self._changed.notify()

    def close(self) -> None:
        """Ends, and waits for the thread."""
        self.end("stopped")
        if self._thread.ident is not None:
            self._thread.join()

    def _deliver(self, seconds: float, pictures: Callable[[], Pictures]) -> None:
        with self._changed:
            if self._ended is not None or (arrived := self.intake.admit(seconds)) is None:
                return
            if len(self._waiting) >= MOST_WAITING:
                self.intake.drop()
                return
            self._waiting.append((arrived, pictures()[FRAME]))
            self._changed.notify()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with self._people.following(self._job.choice, self._progress) as follow:
                while (batch := self._batch()) is not None:
                    began = time.monotonic()
                    people = follow([picture for _, picture in batch]) if batch else []
                    self._found += [(*each, person) for each, person in zip(batch, people, strict=True)]
                    behind = BEHIND if batch and not self._is_awaited(len(self._found)) else 0
                    self._finish(len(self._found) - behind)
                    if batch:
                        self.intake.prepared((time.monotonic() - began) / len(batch))
        except BaseException as caught:
            error = caught
        with self._changed:
            why, other = self._ended or ("the preparation has failed", None)
            self._ended = (why, other)
        self.intake.end(why, error or other)

    def _batch(self) -> list[tuple[Arrived, Picture]] | None:
        """The pictures to look at next. Empty: those that are found shall be finished. None: the end."""
        with self._changed:
            while True:
                awaited = bool(self.intake.lacking) or self._ended is not None
                if len(self._waiting) >= (1 if awaited else ENOUGH):
                    return [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                if self._found and (self._ended is not None or self._is_awaited(len(self._found))):
                    return []
                if self._ended is not None:
                    return None
                self._changed.wait(LOOK)

    def _is_awaited(self, found: int) -> bool:
        """Whether the model waits for no more frames than are found."""
        return 0 < self.intake.lacking <= found

    def _finish(self, count: int) -> None:
        """Draws the first `count` of the frames that are found."""
        if count <= 0:
            return
        before = len(self._past)
        found = [*self._past, *(person for _, _, person in self._found)]
        people = fill_gaps(found, self._max_gap)
        boxes = self._cropper.boxes([from_keypoints(each.keypoints, *self._sizes.clip) for each in people])
        for k, (arrived, picture, _) in enumerate(self._found[:count], before):
            made: dict[str, Picture] = {"pose": self._pose(people[k])}
            if self._job.face:
                self._cuts.append(self._cropper.cut(picture, boxes[k]))
                made["face"] = next(self._faces)
            self.intake.put(LiveFrame(arrived, made))
        self._past = found[: before + count][-(self._max_gap + BEHIND) :]
        del self._found[:count]

    def _pose(self, person: PersonFrame) -> Picture:
        pose = from_keypoints(self._sizes.placed(person).keypoints, *self._sizes.frame)
        drawn = draw_skeleton(pose, *self._sizes.frame, hands=self._job.hands, head=self._job.head)
        return letterbox(drawn, *self._sizes.canvas)

    def _popped(self) -> Iterator[Picture | None]:
        while True:
            yield self._cuts.popleft()
