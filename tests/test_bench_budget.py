"""The budget of a benchmark: what does not fit is named, and what was measured before is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from trt_wan.benchmarks.measure import sweep, window_budget
from trt_wan.benchmarks.measure.budget import PATIENCE, Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.quality import _Recorder
from trt_wan.benchmarks.measure.sweep import Ask, Sweep, Times
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.cli.bench_report import keeping
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.runtime.events import silent

SHAPE = Shape("tiny", 64, 48, 13)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_the_seconds_that_are_left() -> None:
    clock = Clock()
    budget, without = Budget(100, clock), Budget(None, clock)
    assert (budget.left, budget.over, budget.patience()) == (100, "", 100)
    assert budget.too_short(100, "a point") == ""
    clock.now += 80
    assert budget.too_short(30, "a point") == "a point takes 30.0 s, 20.0 s are left"
    clock.now += 19.02
    assert budget.too_short(1.01, "a window") == "a window takes 1.1 s, 0.9 s are left"
    clock.now += 10.98
    assert (budget.left, budget.over) == (0, "the budget of 100 s was over")
    assert budget.too_short(0, "a point") == budget.over
    assert (budget.patience(), budget.patience(60)) == (1, 60)
    assert (without.over, without.too_short(1e9, "all"), without.patience()) == ("", "", PATIENCE)


def test_a_sweep_keeps_its_points_and_names_those_that_do_not_fit(tmp_path: Path) -> None:
    clock, kept, measured = Clock(), list[Sweep](), list[str]()
    budget = Budget(100, clock)

    def measure(ask: Ask, n: int, weights: str | None, progress: object) -> Times:
        measured.append(ask.label)
        clock.now += 45 if ask.label == "13 frames" else 30
        if clock.now > 150:  # as a process that is ended
            raise TrtWanError("measured_process ended with -9")
        return [1.0] * n, {}, None

    asked = sweep.asks(SHAPE, {}, ("window",), windows=(5, 9, 13, 17))
    made = sweep.run_sweep(asked, 3, measure=measure, keep=kept.append, budget=budget)
    assert measured == ["5 frames", "9 frames", "13 frames"]
    assert [p.reason for p in made.points] == ["", "", *["the budget of 100 s was over"] * 2]
    assert [len(each.points) for each in kept] == [1, 2, 3, 4]
    assert made.finished and not any(each.finished for each in kept)
    text = [part for part in made.sheets() if isinstance(part, str)]
    assert text[-1] == "Not measured: window 17 frames: the budget of 100 s was over"


def test_a_point_begins_only_if_the_shortest_one_before_would_fit() -> None:
    clock, measured = Clock(), list[str]()
    budget = Budget(100, clock)

    def measure(ask: Ask, n: int, weights: str | None, progress: object) -> Times:
        measured.append(ask.label)
        clock.now += 60
        return [1.0] * n, {}, None

    asked = sweep.asks(SHAPE, {}, ("window",), windows=(5, 9))
    made = sweep.run_sweep(asked, 3, measure=measure, budget=budget)
    assert measured == ["5 frames"] and made.points[1].reason == "a point takes 60.0 s, 40.0 s are left"


def test_what_was_measured_is_in_files_when_a_measurement_is_stopped(tmp_path: Path) -> None:
    def measure(ask: Ask, n: int, weights: str | None, progress: object) -> Times:
        if ask.label == "9 frames":
            raise KeyboardInterrupt
        return [0.5] * n, {}, None

    asked = sweep.asks(SHAPE, {}, ("window",), windows=(5, 9))
    with pytest.raises(KeyboardInterrupt), keeping(tmp_path) as keep:
        sweep.run_sweep(asked, 3, measure=measure, keep=keep)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.csv"}
    assert "sweep seconds,5 frames,s,0.5" in (tmp_path / "sweep.csv").read_text()
    assert '"finished": false' in (tmp_path / "sweep.json").read_text()


def test_a_window_that_is_stopped_is_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stages of the last one that was finished. The one before the measurement does not count."""

    class Stopped:
        """A process that answers three windows and is stopped."""

        def __init__(self, module: str, arguments: list[str], env: Any) -> None:
            self.windows = 0

        def __enter__(self) -> "Stopped":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self) -> dict[str, Any]:
            self.windows += 1
            if self.windows == 3:
                raise KeyboardInterrupt
            kept.append((tmp_path / "window.json").exists())
            stages = [
                {"window": window, "stage": stage, "seconds": float(window)}
                for window in range(1, self.windows + 1)
                for stage in ("denoise", "decode")
            ]
            found = {"window": self.windows, "text": "", "stages": stages}
            return {"event": "window", **found, "steps": [0.25], "choices": ["a = b"]}

    kept: list[bool] = []
    monkeypatch.setattr(window_budget, "Child", Stopped)
    monkeypatch.setattr(window_budget, "measure_ceilings", lambda *given: [])
    with pytest.raises(KeyboardInterrupt) as caught, keeping(tmp_path) as keep:
        window_budget.measure_window(SHAPE, {}, 1, 4, keep=keep)
    assert kept == [False, True]
    assert caught.value.__notes__ == [f"The rows measured so far are in {tmp_path / 'window.json'}."]
    document = json.loads((tmp_path / "window.json").read_text())
    assert (document["finished"], document["window"], document["windows"]) == (False, 2, 4)
    assert document["stages"] == {"denoise": 2.0, "decode": 2.0} and document["seconds"] == 4.0
    assert document["parts"] == document["far_from_floor"] == [] and document["writing_seconds"] is None
    assert "window s,decode" in (tmp_path / "window.csv").read_text()


def test_a_row_of_quality_after_the_budget(tmp_path: Path) -> None:
    clock = Clock()

    class Slow(_Recorder):
        def record(self, name: str, *rest: Any, **options: Any) -> dict[str, Any]:
            raise AssertionError(f"{name} was begun")

    recorder = Slow(tmp_path, {}, Spec(SHAPE, "", 2), False, [], silent, Budget(10, clock))
    recorder.reference = {"candidates": {}}
    clock.now += 11
    assert recorder.compared("fast", {}) is None and recorder.floor({"precision": "bf16"}) is None
    first, *floors = recorder.not_measured
    assert first == "fast: the budget of 10 s was over" and len(floors) == 1
    assert isinstance(recorder.failures[0], UsageError) and floors[0].endswith("the budget of 10 s was over")
