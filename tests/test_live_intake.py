"""Which frames of a live source are kept, by a made-up clock: no thread, no wait."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest

from trt_wan.runtime.live import intake as intake_module
from trt_wan.runtime.live.intake import Intake, LiveFrame, evenly

WINDOW, OVERLAP = 77, 1
STRIDE = WINDOW - OVERLAP


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "POLL", 0.0)


@dataclass
class Simulated:
    """A source of `rate` frames per second for `length` seconds; window j takes `work(j)` seconds."""

    rate: int
    length: float
    work: Callable[[int], float]
    first_guess: float | None = None
    window: int = WINDOW
    now: float = 0.0
    sent: int = 0
    slots: list[int] = field(default_factory=list)  # of the frames that were taken
    latencies: list[float] = field(default_factory=list)  # seconds, by window the oldest of its frames
    most_waiting: int = 0

    def run(self) -> "Simulated":
        self.intake = Intake(
            Fraction(self.rate), self.window, OVERLAP, self.first_guess, clock=lambda: self.now
        )
        j = 0
        while True:
            wanted = self.window - (OVERLAP if j else 0)
            if not (taken := self.intake.take(wanted, self._wait)):
                return self
            self._until(self.now + self.work(j))
            self.slots += [frame.arrived.slot for frame in taken]
            self.latencies += [self.now - frame.arrived.at for frame in taken]
            j += 1

    def _wait(self) -> None:
        self._until((self.sent + self.intake.lacking - 1) / self.rate)

    def _until(self, seconds: float) -> None:
        while self.sent < self.rate * self.length and self.sent / self.rate <= seconds + 1e-9:
            self.now = max(self.now, self.sent / self.rate)
            if (arrived := self.intake.admit(self.sent / self.rate)) is not None:
                self.intake.put(LiveFrame(arrived, {}))
            self.most_waiting = max(self.most_waiting, len(self.intake._ready))
            self.sent += 1
        if self.sent >= self.rate * self.length:
            self.intake.end("the source has ended")
        self.now = max(self.now, seconds)

    @property
    def gaps(self) -> set[int]:
        """Slots from one kept frame to the next."""
        return {int(gap) for gap in np.diff(self.slots)}

    def check_count(self) -> None:
        assert self.intake.frames_in == len(self.slots) + self.intake.dropped


def test_nothing_is_dropped_by_a_model_that_is_fast_enough() -> None:
    """At 16 frames per second 76 frames play 4.75 s."""
    made = Simulated(16, 60, lambda j: 4.5).run()
    made.check_count()
    assert made.slots == list(range(960)) and made.intake.dropped == 0
    assert max(made.latencies) < 4.75 + 4.5 + 0.5


def test_a_little_unsteadiness_drops_nothing() -> None:
    """Windows that take longer by turns wait a little for each other."""
    made = Simulated(16, 60, lambda j: 5.2 if j % 2 else 4.0, first_guess=4.6).run()
    assert made.intake.dropped == 0


@pytest.mark.parametrize(
    ("rate", "seconds", "gaps"), [(16, 9.5, {2}), (30, 8.2, {3, 4}), (16, 5.0, {1, 2}), (30, 2.66, {1, 2})]
)
def test_a_slow_model_gets_fewer_frames_evenly(rate: int, seconds: float, gaps: set[int]) -> None:
    made = Simulated(rate, 120, lambda j: seconds, first_guess=seconds).run()
    made.check_count()
    assert made.gaps == gaps, "as even as whole frames can be"
    held = len(made.slots) / 120
    assert held == pytest.approx(STRIDE / seconds, rel=0.1)


@pytest.mark.parametrize("seconds", [5.5, 9.5, 30.0, 60.0])
def test_latency_does_not_grow(seconds: float) -> None:
    """However slow the model: the second half of a long time waits no longer than two windows take."""
    made = Simulated(16, 20 * seconds, lambda j: seconds).run()
    made.check_count()
    half = len(made.latencies) // 2
    assert max(made.latencies[half:]) < 2.3 * seconds
    assert made.most_waiting <= 2 * WINDOW + 1


def test_without_a_guess_the_first_windows_teach_the_pace() -> None:
    made = Simulated(30, 120, lambda j: 8.2).run()
    assert {int(gap) for gap in np.diff(made.slots[2 * WINDOW :])} == {3, 4}
    assert max(made.latencies) < 2.3 * 8.2


def test_a_model_that_becomes_slow_and_fast_again() -> None:
    made = Simulated(16, 300, lambda j: 12.0 if 10 <= j < 20 else 4.0, first_guess=4.0).run()
    made.check_count()
    assert max(made.latencies) < 2.3 * 12
    assert set(np.diff(made.slots[-5 * STRIDE :])) == {1}, "every frame again"


def test_a_model_that_hangs_once() -> None:
    """A minute without a window: what waits is thinned, again and again, and covers that minute."""
    made = Simulated(16, 200, lambda j: 60.0 if j == 3 else 4.0, first_guess=4.0).run()
    made.check_count()
    assert made.most_waiting <= 2 * WINDOW + 1
    assert max(np.diff(made.slots)) < 5 * 16, "no hole of many seconds"
    assert set(np.diff(made.slots[-5 * STRIDE :])) == {1}


def test_more_frames_than_the_rate_are_left_out_uncounted() -> None:
    intake = Intake(Fraction(15), 13, 1)
    kept = [k for k in range(60) if intake.admit(k / 30) is not None]
    assert intake.frames_in == len(kept) == 30 and intake.dropped == 0
    assert set(np.diff(kept)) == {2}


def test_slots_follow_the_time_of_the_frames() -> None:
    """Rounded to milliseconds, and with a gap of a second, as after a camera was lost."""
    intake = Intake(Fraction(30), 13, 1)
    times = [round(k / 30, 3) for k in (*range(10), *range(40, 50))]
    arrived = [intake.admit(seconds) for seconds in times]
    assert [each.slot for each in arrived if each] == [*range(10), *range(40, 50)]
    assert intake.frames_in == 20 and intake.dropped == 0


def test_a_slow_preparation_lowers_the_pace() -> None:
    intake = Intake(Fraction(30), 13, 1)
    intake.prepared(0.1)  # seconds a frame: ten of them a second
    intake.put(LiveFrame(intake.admit(0.0), {}))  # type: ignore[arg-type]
    intake.take(1)
    kept = [k for k in range(1, 91) if intake.admit(k / 30) is not None]
    assert len(kept) == pytest.approx(30, abs=1)


def test_an_error_of_the_source_comes_after_its_frames() -> None:
    intake = Intake(Fraction(30), 13, 1)
    intake.put(LiveFrame(intake.admit(0.0), {}))  # type: ignore[arg-type]
    intake.end("lost", RuntimeError("a mistake"))
    assert len(intake.take(13)) == 1
    with pytest.raises(RuntimeError, match="a mistake"):
        intake.take(12)


def test_evenly() -> None:
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly(range(3), 1) == [0]
    assert evenly(range(77), 77) == list(range(77))
