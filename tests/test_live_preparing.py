"""Pose and face of live pictures, with made-up people: the same as of a whole clip, a few at a time."""

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_clips import SIZE, FakePeople, standing, textured, write_reference
from test_preprocess import TwoPeople

from trt_wan.errors import UsageError
from trt_wan.preprocess.clips.streams import BATCH
from trt_wan.preprocess.footage import plan_sizes
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.live import BEHIND, MOST_WAITING, LivePreparing
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.onnx_people import OnnxPeople
from trt_wan.preprocess.people.person import PersonFrame
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.pictures.face import FaceCropper
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.live.intake import Intake, LiveFrame
from trt_wan.runtime.live.sources import FRAME
from trt_wan.runtime.video.pictures import read_picture

RATE, FRAMES = Fraction(12), 40
SOON = 30  # seconds


class Source:
    """Delivers when it is told to."""

    width, height = SIZE
    rate = RATE

    def start(self, deliver: Any, ended: Any) -> None:
        self.deliver, self.ended, self.sent = deliver, ended, 0

    def stop(self) -> None:
        pass

    def send(self, count: int) -> None:
        for k in range(self.sent, self.sent + count):
            self.deliver(k / float(RATE), lambda k=k: {FRAME: textured(SIZE, k)})
        self.sent += count


def started(
    folder: Path, people: Any = None, events: list[Event] | None = None, **options: Any
) -> tuple[LivePreparing, Source]:
    reference = write_reference(folder / "character.png")
    job = PreprocessJob(reference, Path("camera"), folder / "out", size=(192, 112), **options)
    source = Source()
    sizes = plan_sizes(job, read_picture(reference), source)
    told = silent if events is None else events.append
    preparing = LivePreparing(Intake(RATE, 200, 1), people or FakePeople(), job, sizes, told)
    preparing.start(source)
    return preparing, source


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def sent_slowly(source: Source, preparing: LivePreparing, count: int) -> None:
    """No more than may wait."""
    for _ in range(count):
        until(lambda: len(preparing._waiting) < MOST_WAITING)
        source.send(1)


def test_poses_and_faces_are_those_of_the_whole_clip(tmp_path: Path) -> None:
    preparing, source = started(tmp_path)
    sent_slowly(source, preparing, FRAMES)
    source.ended("the clip has ended", None)
    made = preparing.intake.take(FRAMES)
    assert [frame.arrived.slot for frame in made] == list(range(FRAMES))
    canvas, cropper = preparing._sizes.canvas, FaceCropper()
    skeletons = [from_keypoints(standing(SIZE, 2.0 * k), *SIZE) for k in range(FRAMES)]
    faces = list(cropper.crops(cropper.cuts((textured(SIZE, k) for k in range(FRAMES)), skeletons)))
    for k, frame in enumerate(made):
        drawn = letterbox(draw_skeleton(skeletons[k], *SIZE), *canvas)
        assert np.array_equal(frame.pictures["pose"], drawn) and drawn.any(), k
        assert np.abs(frame.pictures["face"].astype(int) - faces[k]).mean() < 3, k
    assert preparing.intake.dropped == 0


def test_a_short_gap_is_filled_and_a_long_one_is_not(tmp_path: Path) -> None:
    """Pictures are looked at 8 at a time. The gap at 4 has its beginning among those that are finished, and
    the gap at 15 its end among those that have not come yet. The gap at 24 is too long.
    """
    away = (4, 5, 15, 16, *range(24, 36))
    preparing, source = started(tmp_path, FakePeople(away=away))
    for sent in range(8, FRAMES + 1, 8):
        source.send(8)
        until(lambda sent=sent: len(preparing.intake._ready) == sent - BEHIND)
    source.ended("the clip has ended", None)
    seen = [bool(frame.pictures["pose"].any()) for frame in preparing.intake.take(FRAMES)]
    assert seen == [not 24 <= k < 36 for k in range(FRAMES)]


def test_nothing_is_held_back_while_the_model_waits(tmp_path: Path) -> None:
    """A window's last frames do not wait for frames after them."""
    preparing, source = started(tmp_path)
    source.send(3)
    time.sleep(0.1)
    assert not preparing.intake._ready, "too few to look at"
    assert len(preparing.intake.take(3)) == 3
    source.send(BATCH)
    until(lambda: len(preparing.intake._ready) > 0)
    assert len(preparing.intake._ready) < BATCH, "the last ones wait for those after them"
    assert len(preparing.intake.take(BATCH)) == BATCH
    source.ended("stopped", None)
    until(lambda: preparing.intake.why_ended == "stopped")


def test_without_faces(tmp_path: Path) -> None:
    preparing, source = started(tmp_path, face=False)
    source.send(2)
    source.ended("the clip has ended", None)
    assert [set(frame.pictures) for frame in preparing.intake.take(2)] == [{"pose"}] * 2


class Slow(FakePeople):
    def follow(self, frames: Any, choice: Any, progress: Any, first: int = 0) -> Any:
        for person in super().follow(frames, choice, progress, first):
            time.sleep(0.01)
            yield person


def test_a_slow_preparation_drops_frames(tmp_path: Path) -> None:
    """Frames that come all at once are more than may wait."""
    preparing, source = started(tmp_path, Slow())
    source.send(120)
    source.ended("the clip has ended", None)
    until(lambda: preparing.intake.why_ended is not None)
    intake = preparing.intake
    taken = intake.take(200)
    assert intake.frames_in == 120 == len(taken) + intake.dropped and intake.dropped > 0
    assert MOST_WAITING <= len(taken) < 120


def test_an_error_of_the_networks_is_raised_to_the_model(tmp_path: Path) -> None:
    class Broken(FakePeople):
        def follow(self, *_: Any, **__: Any) -> Any:
            raise UsageError("There is no person 7.", "Choose another.")

    preparing, source = started(tmp_path, Broken())
    source.send(BATCH)
    with pytest.raises(UsageError, match="no person 7"):
        preparing.intake.take(13)


def follow_all(source: OnnxPeople, sizes: Sequence[int], choice: PersonChoice) -> list[PersonFrame]:
    found: list[PersonFrame] = []
    with source.following(choice, silent) as follow:
        for size in sizes:
            found += follow([np.zeros((180, 320, 3), np.uint8)] * size)
    return found


@pytest.mark.parametrize("number", [1, 2])
def test_a_person_is_followed_from_call_to_call(number: int) -> None:
    """Two people cross: the same one in runs of any length as in one clip."""
    choice = PersonChoice(number=number)
    both, again = TwoPeople(), TwoPeople()
    whole = OnnxPeople(both, both)  # type: ignore[arg-type]
    expected = list(whole.follow([np.zeros((180, 320, 3), np.uint8)] * 28, choice, silent))
    found = follow_all(OnnxPeople(again, again), (1, 5, 16, 6), choice)  # type: ignore[arg-type]
    assert [person.box for person in found] == [person.box for person in expected]
    widths = {round(person.box.width) for person in found if person.box is not None}
    assert widths == {(40, 50)[number - 1]}


def test_several_people_are_said_once() -> None:
    events: list[Event] = []
    both = TwoPeople()
    with OnnxPeople(both, both).following(PersonChoice(), events.append) as follow:  # type: ignore[arg-type]
        for _ in range(5):
            follow([np.zeros((180, 320, 3), np.uint8)] * 5)
    assert [event.code for event in events if isinstance(event, Note)] == ["several_people"]


def test_the_intake_has_only_prepared_frames(tmp_path: Path) -> None:
    preparing, source = started(tmp_path)
    put = preparing.intake.put
    seen: list[LiveFrame] = []
    preparing.intake.put = lambda frame: (seen.append(frame), put(frame))[1]  # type: ignore[method-assign]
    source.send(BATCH)
    source.ended("the clip has ended", None)
    until(partial(lambda intake: intake.why_ended is not None, preparing.intake))
    canvas = preparing._sizes.canvas
    assert len(seen) == BATCH
    for frame in seen:
        assert frame.pictures["pose"].shape == (canvas[1], canvas[0], 3)
        assert frame.pictures["face"].shape == (512, 512, 3)
