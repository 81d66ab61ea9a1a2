"""The rate that a model holds, and what is lowered so that it holds more; sizes of prepared clips."""

import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import pytest
from test_live import JOB, OVERLAP, SIZE, WINDOW, told, until

from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, Note, Progress, WindowDone
from trt_wan.runtime.job import Job
from trt_wan.runtime.live.hold import Held, hold, measure, smaller
from trt_wan.runtime.live.intake import Intake
from trt_wan.runtime.live.live import Feed
from trt_wan.runtime.live.sources import PlayedClip
from trt_wan.runtime.step_cache import StepCache
from trt_wan.runtime.video.clips import Clips


def of_size(pixels_per_second: float, fixed: float = 0.2) -> Callable[[Job, tuple[int, int]], Held]:
    """A machine that has `fixed` seconds a window outside the steps, in which time goes by pixels."""

    def measured(job: Job, size: tuple[int, int]) -> Held:
        steps = job.steps * size[0] * size[1] / pixels_per_second
        return Held(fixed + steps, steps, sum(job.computed))

    return measured


def held(wanted: float | None, speed: float) -> tuple[int, tuple[int, int], list[str]]:
    events: list[Event] = []
    job, size, made = hold(JOB, (832, 480), wanted, of_size(speed), events.append)
    if wanted is not None and not told(events, "not_held"):
        assert made.rate(job) >= wanted
    return job.steps, size, [event.text for event in events if isinstance(event, Note)]


def test_what_is_held_is_told() -> None:
    """0.2 s and four steps of 0.4 s for 12 new frames."""
    steps, size, notes = held(None, 832 * 480 / 0.4)
    assert (steps, size) == (4, (832, 480))
    assert notes == ["832x480 with 4 steps holds 6.7 frames per second (1.80 s a window of 13)."]


def test_steps_are_lowered_first() -> None:
    """Three steps take 1.4 s for 12 frames."""
    steps, size, notes = held(8, 832 * 480 / 0.4)
    assert (steps, size) == (3, (832, 480))
    assert "To hold 8 frames per second, 4 steps are lowered to 3." in notes
    assert notes[-1] == "832x480 with 3 steps holds 8.6 frames per second (1.40 s a window of 13)."


def test_then_the_size_is_lowered() -> None:
    steps, size, notes = held(16, 832 * 480 / 0.4)
    assert steps == 2 and size[0] < 832 and size[1] < 480 and not size[0] % 16 and not size[1] % 16
    assert abs(size[0] / size[1] - 832 / 480) < 0.2
    assert any(text.startswith("To hold 16 frames per second, 4 steps are lowered to 2.") for text in notes)
    assert any(text.startswith("To hold 16 frames per second, 832x480 is lowered to") for text in notes)


def test_what_cannot_be_held_is_told() -> None:
    steps, size, notes = held(200, 832 * 480 / 0.4)
    assert steps == 2 and min(size) >= 128
    assert any(text.startswith("200 frames per second cannot be held: ") for text in notes)


def test_chosen_noise_levels_and_the_steps_of_a_cache_stay() -> None:
    cached = replace(JOB, steps=20, step_cache=StepCache(0.0))
    for job in (replace(JOB, sigmas=(1.0, 0.5, 0.0)), cached):
        made, size, _ = hold(job, (832, 480), 16, of_size(832 * 480 / 0.4))
        assert made is job and size != (832, 480)


def test_sizes_become_smaller_until_there_is_none() -> None:
    size: Any = (832, 480)
    seen = [size]
    while (size := smaller(size, 0.99)) is not None:
        assert size[0] < seen[-1][0] or size[1] < seen[-1][1]
        seen.append(size)
    assert len(seen) > 5 and min(seen[-1]) < 160


def test_the_second_window_is_measured() -> None:
    class Model:
        def pieces(self, job: Job, *, clips: Clips, progress: Progress, should_stop: Any, **_: Any) -> Any:
            assert clips.frames == 2 * WINDOW - OVERLAP and clips.pose is not None and clips.face is None
            assert not clips.pose.window([clips.frames - 1]).any()
            for j in range(2):
                if should_stop():
                    raise Stopped("Stopped.")
                time.sleep(0.2 if j == 0 else 0.05)
                yield np.zeros((3, 4, 48, 64), np.float32)
                progress(WindowDone(j + 1, 2, 12))

    reference = np.zeros((48, 64, 3), np.uint8)
    assert 0.05 <= measure(JOB, Model(), reference, SIZE).window < 0.2
    with pytest.raises(Stopped):
        measure(JOB, Model(), reference, SIZE, should_stop=lambda: True)


def test_prepared_clips_are_scaled_to_a_lower_size() -> None:
    """Faces stay as they are."""
    intake = Intake(Fraction(10), WINDOW, OVERLAP)
    face = np.full((512, 512, 3), 9, np.uint8)
    pose = cv2.circle(np.zeros((96, 128, 3), np.uint8), (64, 48), 30, (255, 255, 255), -1)
    source = PlayedClip((128, 96), 1, Fraction(10), lambda k: {"pose": pose, "face": face})
    Feed(intake, SIZE).start(source)
    until(lambda: intake.why_ended is not None)
    (frame,) = intake.take(1)
    assert frame.pictures["face"] is face and frame.pictures["pose"].shape == (48, 64, 3)
    assert abs(float(frame.pictures["pose"].mean()) - float(pose.mean())) < 2
