"""The parts of `bench quality` and `bench window`, by hand; the commands run in test_bench.py and
test_bench_peers.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trt_wan.benchmarks.machine.card import read_card
from trt_wan.benchmarks.machine.ceilings import Ceiling
from trt_wan.benchmarks.measure import quality
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.quality import Quality, QualityRow, _other_attention, _Recorder
from trt_wan.benchmarks.measure.record_velocities import RecordingExecutor, Tape
from trt_wan.benchmarks.measure.window_budget import Part, WindowBudget, parts
from trt_wan.benchmarks.measure.window_job import WindowWatch, told
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Sheet, tables
from trt_wan.benchmarks.work.bound import budget_rates
from trt_wan.benchmarks.work.cost import Work
from trt_wan.cli.bench import _rows
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Note, StageStarted, StepDone, silent
from trt_wan.runtime.executors import Array

SHAPE = Shape("tiny", 64, 48, 13)


def test_a_row_of_the_command_line() -> None:
    context: Any = None
    tier, precision, number, gpus = (
        "fast; attention=cudnn fp8",
        "exact;precision=bf16; attn_out = tensorrt",
        "vram=7.5",
        "gpus=2",
    )
    found = _rows(context, context, (tier, precision, number, gpus))
    assert found == {
        tier: {"tier": "fast", "segments": {"attention": "cudnn fp8"}},
        precision: {"tier": "exact", "precision": "bf16", "segments": {"attn_out": "tensorrt"}},
        number: {"vram": 7.5},
        gpus: {"gpus": 2},
    }


class Doubling:
    """Every network doubles its first input."""

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        return (2 * np.asarray(next(iter(inputs.values()))),)


def recorded(tape: Tape) -> None:
    """Two steps of a job, their latents 0 and 1; before them two batches of faces, each with its number."""
    contracts = networks(TINY, SHAPE.plan)
    executor = RecordingExecutor(Doubling(), tape)  # type: ignore[arg-type]

    def run(name: str, **given: float) -> Array:
        network = contracts[name]
        inputs = {t.name: np.full(t.shape, given.get(t.name, 9), np.float32) for t in network.inputs}
        return executor.run(network, 0, inputs)[0]

    for k in range(2):
        run("motion_encoder", face=k)
    for k in range(2):
        run("patch_embed", latent=k, condition=3 + k)
        run("head", x=10 + k)


def test_a_tape_has_every_step_and_each_condition_once() -> None:
    recorded(tape := Tape())
    assert [latent.flat[0] for latent in tape.latents] == [0, 1]
    assert [velocity.flat[0] for velocity in tape.velocities] == [20, 22]
    assert [face.flat[0] for face in tape.conditions["face"]] == [0, 1]
    assert [array.flat[0] for array in tape.conditions["condition"]] == [3]


def test_a_led_job_gets_the_latents_of_the_other() -> None:
    shape = networks(TINY, SHAPE.plan)["patch_embed"].inputs[0].shape
    given = np.stack([np.full(shape, value, np.float32) for value in (7, 8)])
    recorded(tape := Tape(given))
    assert [latent.flat[0] for latent in tape.latents] == [7, 8] and tape.conditions == {}


def made_recorder(folder: Path, velocities: Mapping[str, list[float]]) -> _Recorder:
    """With recordings of one number a step."""
    recorder = _Recorder(folder, {}, Spec(SHAPE, "", 2), False, [], silent, Budget())
    for name, numbers in velocities.items():
        recorder.files[name] = str(folder / f"{name}.npz")
        np.savez(recorder.files[name], velocities=np.array(numbers)[:, None])
    return recorder


def test_errors_between_rows_are_those_of_the_worst_step(tmp_path: Path) -> None:
    recorder = made_recorder(tmp_path, {"reference": [1, 2], "exact": [1.1, 2], "fast": [1.1, 2.5]})
    assert recorder._errors("fast", "reference") == pytest.approx([0.1, 0.25])
    between = recorder.between(["exact", "fast"])
    assert between == {
        "exact": {"exact": 0, "fast": pytest.approx(0.2)},  # 0.5 of 2.5
        "fast": {"exact": pytest.approx(0.25), "fast": 0},
    }


def test_a_row_that_cannot_run_is_told_and_ends_nothing(tmp_path: Path) -> None:
    class Refused(_Recorder):
        def record(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            raise TrtWanError("It cannot be.")

    recorder = Refused(tmp_path, {}, Spec(SHAPE, "", 2), False, [], silent, Budget())
    assert recorder.compared("fast", {}) is None and recorder.not_measured == ["fast: It cannot be."]


def test_every_row_is_told_and_kept_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Made(_Recorder):
        def record(self, name: str, *rest: Any, **options: Any) -> dict[str, Any]:
            told.append(f"records {name}")
            return {}

        def compared(self, name: str, *rest: Any, **options: Any) -> QualityRow:
            told.append(f"compares {name}")
            return QualityRow(name, {}, [0.25])

        def floor(self, base: Any) -> None:
            return None

        def between(self, names: Any) -> dict[str, dict[str, float]]:
            return {}

    def progress(event: Any) -> None:
        told.append(event.text)

    def keep(unfinished: Quality) -> None:
        assert not unfinished.finished
        told.append(f"keeps {len(unfinished.rows)}")

    monkeypatch.setattr(quality, "_Recorder", Made)
    wanted = [quality.Wanted("a", {}), quality.Wanted("b", {})]
    made = quality.measure_quality(SHAPE, wanted, 1, 0, progress=progress, keep=keep)
    assert made.finished and len(made.rows) == 2
    assert told == [
        "records reference",
        *("compares a", "a: velocity off by 2.50e-01 in the worst step", "keeps 1"),
        *("compares b", "b: velocity off by 2.50e-01 in the worst step", "keeps 2"),
    ]


def test_the_table_names_every_rows_candidates() -> None:
    exact = QualityRow("exact", {}, [0.04, 0.03], {"attention": "cudnn", "ffn": "native"})
    peer = QualityRow("diffusers FP8", {}, [0.05, 0.05])
    between = {
        a: {b: 0.0 if a == b else 0.02 for b in ("exact", "diffusers FP8")}
        for a in ("exact", "diffusers FP8")
    }
    made = Quality(SHAPE, read_card(), "w", 0, "bf16", [exact, peer], between, [])
    sheets = {part.name: part for part in made.sheets() if isinstance(part, Sheet)}
    assert list(sheets["candidates"].rows) == [("exact", "attention = cudnn, ffn = native")]
    assert tables(made) and ("against 2", "1: exact", "", 0.02) in list(sheets["against"].lines())


def test_the_floor_takes_another_attention_than_the_reference() -> None:
    assert "cudnn" in _other_attention({"attention": "tensorrt"})
    assert "cudnn" not in _other_attention({"attention": "cudnn"})


# A window


CEILINGS = [Ceiling("copy", "", 1e9), Ceiling("bf16 GEMM", "", 1e12), Ceiling("fp8 GEMM", "", 2e12)]


def test_floors_take_attention_as_products_of_its_type() -> None:
    exact, fast = budget_rates(CEILINGS, False), budget_rates(CEILINGS, True)
    assert exact and fast and exact.units["attention"] == 1e12 and fast.units["attention"] == 2e12
    assert fast.units["linear"] == 1e12 and "fp8 GEMM" in fast.about
    assert budget_rates(CEILINGS[:1], True) is None


def test_parts_of_a_window_and_the_rest_of_its_stages() -> None:
    networks = [
        {"window": 2, "stage": "denoise", "name": "attention", "calls": 4, "seconds": 8.0},
        {"window": 2, "stage": "decode", "name": "vae_decode_next", "calls": 2, "seconds": 1.0},
        {"window": 1, "stage": "denoise", "name": "attention", "calls": 4, "seconds": 99.0},
        {"window": 2, "stage": "denoise", "name": "sampler", "calls": 4, "seconds": 0.5},
    ]
    work = {"attention": Work(attention=2 * 10**12), "vae_decode_next": Work(bytes=10**8)}
    found = parts(networks, 2, {"denoise": 9.0, "decode": 1.5}, work, budget_rates(CEILINGS, True))
    assert [(p.name, p.seconds, p.floor_seconds) for p in found] == [
        ("attention", 8.0, 4.0),
        ("vae_decode_next", 1.0, 0.2),
        ("sampler", 0.5, None),
        ("the rest of denoise", 0.5, None),
        ("the rest of decode", 0.5, None),
    ]


def test_parts_that_are_large_and_far_from_their_floor() -> None:
    near, far = Part("near", "denoise", 1, 5.0, 4.0), Part("far", "denoise", 1, 4.0, 2.0)
    small, unknown = Part("small", "decode", 1, 0.2, 0.01), Part("unknown", "decode", 0, 0.8, None)
    budget = WindowBudget(
        *(SHAPE, read_card(), "w", {}, [], [], 4, 3, 4, 10.0, 1.0, 0.5, {"denoise": 9.0, "decode": 1.0}),
        *([near, far, small, unknown], [Part("text", "", 2, 30.0, None)], "made up", []),
    )
    assert [part.name for part in budget.far] == budget.to_dict()["far_from_floor"] == ["far"]
    (judged,) = [part for part in budget.sheets() if isinstance(part, str) and part.startswith("Above")]
    judging = (
        "Above 3% of the window, and more than 1.4 times the floor: far (2.00). Without a floor: unknown."
    )
    assert judged == judging
    lines = [line for part in budget.sheets() if isinstance(part, Sheet) for line in part.lines()]
    assert ("part s a window", "far", "s", 4.0) in lines and ("part share", "far", "", 0.4) in lines
    assert [line[0] for line in lines if line[1] == "text"] == ["once calls", "once s a call", "once s a job"]
    assert tables(budget)
    assert ("measured", "window", "", "3 of 4") in lines and ("measured", "finished", "", "yes") in lines
    stopped = [p for p in replace(budget, finished=False).sheets() if isinstance(p, Sheet)][1]
    assert list(stopped.lines())[1] == ("measured", "finished", "", "no: the job was stopped, or goes on")
    shared = [part for part in replace(budget, settings={"gpus": 2}).sheets() if isinstance(part, str)]
    assert f"{judging} Calls are those of GPU 0 of 2; a floor is that of whole calls on one GPU." in shared


def test_stages_belong_to_their_windows() -> None:
    watch = WindowWatch()
    marked: Any = SimpleNamespace(stage="")
    watch.executor = marked
    stages = [("weights", 0), ("condition", 1), ("denoise", 1), ("decode", 1), ("condition", 2), ("write", 0)]
    for stage, window in stages:
        watch.progress(StageStarted(stage, window, 2))
        watch.progress(Note(stage))
        assert marked.stage == f"{window} {stage}"
    watch.progress(StepDone(1, 2, 1, 1, 0.25, 0.1, 0.0))
    assert list(watch.stages) == [(0, "start"), *((window, stage) for stage, window in stages[:-1])]
    assert watch.steps == [0.25] and len(watch.notes) == 6
    seconds = {(0, "start"): 9.0, (1, "denoise"): 2.0, (1, "decode"): 0.5, (2, "denoise"): 3.0}
    assert told(1, seconds) == "window 1: denoise 2.000 s, decode 0.500 s"
