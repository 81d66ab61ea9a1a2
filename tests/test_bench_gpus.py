"""`trt-wan bench --gpus`: its options, its figures from made-up rows, and the command on the CPU, where ranks
are processes.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from trt_wan.benchmarks.machine.card import read_card, visible_gpus
from trt_wan.benchmarks.measure import scaling
from trt_wan.benchmarks.measure.scaling import Wanted, _Bench, measure_scaling, spans
from trt_wan.benchmarks.measure.scaling_job import Asked
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.scaling import Scaling, ScalingRow, Span, Throughput
from trt_wan.benchmarks.report.sheet import Report, as_line, tables, write
from trt_wan.cli.bench_report import keeping
from trt_wan.cli.main import cli
from trt_wan.errors import GpuFault, MemoryShort, TrtWanError, UsageError
from trt_wan.runtime.events import Event, Note, StageStarted, StepDone, WindowDone, silent
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.trace import VARIABLE, traced

SHAPE = Shape("tiny", 64, 48, 13)
LAYERS = SHAPE.config.transformer.layers
TINY_ARGUMENTS = "--model tiny --size 64x48 --window 13 --executor onnxruntime"


def bench(arguments: str) -> Any:
    return CliRunner().invoke(cli, ["bench", *arguments.split()])


@pytest.mark.parametrize("value", ["0", "2,2", "1,two", "1,", "1;2", "-1", "1,99999"])
def test_numbers_of_gpus_that_are_refused(value: str) -> None:
    refused = bench(f"--model tiny --dry-run --gpus {value}")
    assert refused.exit_code == 2 and "--gpus" in refused.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--budget 9", "Without --gpus --budget would do nothing."),
        ("--dry-run", "Without --gpus --dry-run would do nothing."),
        ("--gpus 1,2 --steps 3", "With --gpus --steps would do nothing."),
        ("--gpus 1,2 --peers none", "With --gpus --peers would do nothing."),
        ("--gpus 1,2 --sizes 64x48 --size 64x48", "With --gpus --size would do nothing."),
        ("--gpus 1,128 --dry-run", "128 GPUs are not possible."),
    ],
)
def test_options_that_do_nothing_are_refused(arguments: str, sentence: str) -> None:
    refused = bench(f"--model tiny {arguments}")
    assert refused.exit_code == 2 and sentence in " ".join(refused.stderr.split())


def test_a_dry_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: 4)
    ran = bench("--gpus 8,1,4 --model tiny --sizes 64x48,48x64 --window 13 --dry-run")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines() == [
        "1 GPU: tiny 64x48x13, tiny 48x64x13, 4 steps",
        "4 GPUs: tiny 64x48x13, tiny 48x64x13, 4 steps",
        "8 GPUs: tiny 64x48x13, tiny 48x64x13, 4 steps (not here: this machine has fewer)",
    ]


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: 1)
    with pytest.raises(UsageError, match="begins with 2, and CUDA shows 1 GPU here"):
        measure_scaling(Wanted([SHAPE], [2, 4]))


def row(
    gpus: int, step: float, window: float, shape: Shape = SHAPE, error: float | None = None
) -> ScalingRow:
    spread = Spread.of([step])
    stages = {"condition": window / 4, "denoise": window / 2, "decode": window / 4}
    own = [Span(rank, "step", window / 4, 3 * window / 4) for rank in range(gpus)]
    return ScalingRow(
        *(shape, gpus, spread, window, 12, stages, 3, 3, 0.5, 9.0, [10**9] * gpus, error, error),
        *(
            "fp32",
            [],
            [*own, Span(0, "decode", 3 * window / 4, window), Span(0, "writing", 0.7 * window, window)],
        ),
    )


def result(rows: Sequence[ScalingRow], throughput: Sequence[Throughput] = ()) -> Scaling:
    return Scaling(read_card(), "random", {"tier": "fast"}, 4, list(rows), list(throughput), ["8 GPUs: no"])


def test_the_figures_of_scaling() -> None:
    other = Shape("tiny", 48, 64, 13)
    made = result([row(1, 2.0, 10.0), row(2, 1.25, 6.0), row(4, 0.5, 3.0), row(2, 9.0, 9.0, other)])
    one, two, four, without = map(made.against, made.rows)
    assert one is not None and two is not None and four is not None and without is None
    assert (one.step, one.efficiency, one.not_hidden_seconds) == (1, 1, 0)
    assert (two.step, two.window, two.efficiency) == (1.6, 10 / 6, 0.8)
    assert two.not_hidden_seconds == pytest.approx(0.25 / LAYERS)
    assert (four.step, four.efficiency, four.not_hidden_seconds) == (4, 1, 0)
    document = json.loads(as_line(made.to_dict()))
    assert [each["frames_per_second"] for each in document["rows"]] == [1.2, 2.0, 4.0, 12 / 9]
    assert document["rows"][1]["against_one"]["step"] == 1.6 and document["rows"][3]["against_one"] is None


def test_tables_and_plots_of_scaling(tmp_path: Path) -> None:
    rows = [row(1, 2.0, 10.0), row(2, 1.25, 6.0, error=0.0625)]
    made: Report = result(rows, [Throughput.of(rows[1], [2.0, 2.25, 3.0], [10.0, 12.0, 15.0])])
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(tables(made))
    assert "tiny 64x48x13, 2 GPUs" in (text := shown.export_text()) and "80.0 %" in text
    assert "tiny 64x48x13, 2 of 3 GPUs" in text and "10.00, 12.00" in text and "2.000, 2.250" in text
    files = {path.name for path in write(made, tmp_path)}
    plots = {f"{name}.{kind}" for name in ("speed-up", "windows", "waterfall-2") for kind in ("png", "svg")}
    assert files == {"scaling.json", "scaling.csv", *plots}
    csv = (tmp_path / "scaling.csv").read_text()
    assert f'scaling not hidden s,"tiny 64x48x13, 2 GPUs",s,{0.25 / LAYERS}' in csv
    assert "6.25e-02 after a step" in csv and "throughput a job each" in csv
    assert '"throughput step x, slowest","tiny 64x48x13, 2 of 3 GPUs",,1.8' in csv
    waterfall = (tmp_path / "waterfall-2.svg").read_text()
    assert "GPU 1" in waterfall and "other work and waits" in waterfall and "writing" in waterfall


@pytest.mark.parametrize(
    ("counts", "footer"),
    [
        ([(2, 2)], "Step x"),
        ([(2, 4), (4, 4)], "2 of 4 GPUs: the first 2 of the 4 jobs that ran side by side. Step x"),
        (
            [(2, 8), (4, 8), (8, 8)],
            "2 of 8 GPUs: the first 2 of the 8 jobs that ran side by side. "
            "4 of 8 GPUs: the first 4 of the 8 jobs that ran side by side. Step x",
        ),
    ],
)
def test_the_footer_tells_which_jobs_count(counts: list[tuple[int, int]], footer: str) -> None:
    made = [Throughput.of(row(n, 1.0, 1.0), [1.0] * of, [1.0] * of) for n, of in counts * 2]  # of two sizes
    *_, text, _ = result([row(1, 2.0, 10.0)], made).sheets()
    assert isinstance(text, str) and text.startswith(footer) and "4 that" not in text


def test_jobs_side_by_side_against_one_job() -> None:
    """The first two of four jobs are for two GPUs. The step of one job is against that of the slowest GPU."""
    steps, windows = [2.0, 2.5, 4.0, 2.0], [10.0, 12.0, 15.0, 10.0]
    two = Throughput.of(row(2, 1.25, 6.0), steps, windows)
    assert (two.gpus, two.side_by_side) == (2, 4)
    assert (two.step_seconds, two.window_seconds) == ([2.0, 2.5], [10.0, 12.0])
    assert two.frames_per_second == pytest.approx(1.2 + 1.0) and two.together_frames_per_second == 2.0
    assert two.step_against_slowest == 2.0
    four = Throughput.of(row(4, 1.0, 3.0), steps, windows)
    assert four.step_against_slowest == 4.0 and four.frames_per_second == pytest.approx(2.2 + 0.8 + 1.2)


class Answers:
    """A process that opens a model and answers at once. It notes each `Asked`."""

    asked: list[tuple[int, str, int]] = []  # GPUs, size, steps

    def __init__(self, module: str, arguments: list[str], env: Any, patience: float) -> None:
        self.started_at = 0.0

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, line: str) -> dict[str, Any]:
        asked = Asked.from_json(line)
        spec, gpus = asked.spec, asked.spec.settings["gpus"]
        self.asked.append((gpus, f"{spec.shape.width}x{spec.shape.height}", spec.steps))
        np.save(asked.latent, np.ones(3))
        stages = [
            {"stage": stage, "window": n + 1, "seconds": 9.0 / gpus}
            for stage in ("condition", "denoise", "decode")
            for n in range(asked.windows)
        ]
        more = {"precision": "fp32", "choices": [], "written": [], "writing_seconds": 0.5}
        return {"stages": stages, "steps": [8.0 / gpus] * spec.steps, **more}


def test_all_numbers_of_gpus_and_all_sizes_come_before_the_jobs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "Child", Answers)
    monkeypatch.setattr(scaling, "spans", lambda *arguments: [])
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: None)
    monkeypatch.setattr(Answers, "asked", [])
    wanted = Wanted([SHAPE, Shape("tiny", 48, 64, 13)], [1, 2, 4], steps=2)
    made = measure_scaling(wanted)
    sizes = ("64x48", "48x64")
    one_job = [(n, size, steps) for n in (1, 2, 4) for size in sizes for steps in (1, 2)]
    jobs = [(1, size, steps) for size in sizes for steps in (1, 2) for _ in range(4)]
    assert Answers.asked == [*one_job, *jobs]
    assert [(each.shape.width, each.gpus, each.side_by_side) for each in made.throughput] == [
        *((64, 2, 4), (64, 4, 4)),
        *((48, 2, 4), (48, 4, 4)),
    ]
    assert [each.step_against_slowest for each in made.throughput] == [2.0, 4.0, 2.0, 4.0]
    assert all(each.step_seconds == [8.0] * each.gpus for each in made.throughput)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GpuFault("The process of GPU 1 was killed (signal 9), so the job cannot go on.", "Again."), 1),
        (TrtWanError("scaling_job ended with -9 before it answered: no message"), 1),
        (MemoryShort("12.0 GB are free.", "Use a smaller size."), 0),
    ],
)
def test_a_lost_rank_is_a_failure_behind_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: TrtWanError, code: int, as_json: bool
) -> None:
    class Losing(Answers):
        def ask(self, line: str) -> dict[str, Any]:
            if Asked.from_json(line).spec.settings["gpus"] == 2:
                raise error
            return super().ask(line)

    monkeypatch.setattr(scaling, "Child", Losing)
    monkeypatch.setattr(scaling, "spans", lambda *arguments: [])
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: None)
    more = " --json" if as_json else ""
    ran = bench(f"--gpus 1,2,4 {TINY_ARGUMENTS} --job-steps 2 --out {tmp_path}{more}")
    assert ran.exit_code == code, ran.output
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [each["gpus"] for each in rows] == [1, 4]
    assert not code or "Run it again with --gpus 2." in ran.output
    lost = f"tiny 64x48x13, 2 GPUs: {error.message.rstrip('.')}."
    told = f"Not everything was measured: {lost}"
    *_, last = ran.stdout.splitlines()
    if as_json and code:
        assert json.loads(last)["error"]["message"] == told
        events = [json.loads(each) for each in ran.stdout.splitlines()]
        (measured,) = [each["data"] for each in events if each.get("code") == "measured"]
        assert measured["rows"] == rows
    else:
        found = json.loads(last)
        assert (found["data"] if as_json else found)["rows"] == rows
        assert (f"Error: {told}\n" in ran.stderr) == bool(code) and "Traceback" not in ran.stderr


def test_lost_jobs_side_by_side_are_no_missing_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(Answers):
        def ask(self, line: str) -> dict[str, Any]:
            if "job1-" in Asked.from_json(line).latent:
                raise TrtWanError("scaling_job ended with -9 before it answered: no message")
            return super().ask(line)

    monkeypatch.setattr(scaling, "Child", Losing)
    monkeypatch.setattr(scaling, "spans", lambda *arguments: [])
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: None)
    ran = bench(f"--gpus 1,2 {TINY_ARGUMENTS} --job-steps 2")
    assert ran.exit_code == 1 and "Not everything was measured: 2 jobs: scaling_job ended" in ran.stderr
    assert "All other rows are measured and shown above. Run it again.\n" in ran.stderr


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), UsageError("No.", "Do.")])
def test_a_measurement_that_ends_early_names_its_rows(tmp_path: Path, stopped: BaseException) -> None:
    with pytest.raises(type(stopped)) as caught, keeping(tmp_path) as keep:
        keep(result([row(1, 2.0, 10.0)]))
        raise stopped
    document = tmp_path / "scaling.json"
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.json", "scaling.csv"}
    error = caught.value
    told = error.hint if isinstance(error, UsageError) else " ".join(error.__notes__)
    assert told.endswith(f"The rows measured so far are in {document}.")


def test_a_rank_writes_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, told = Ranks(), list[Event]()
    assert traced(silent, ranks) is silent
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new" / "trace"))
    progress = traced(told.append, ranks)
    events: list[Event] = [Note("not in it"), StageStarted("condition", 2, 3)]
    for event in events:
        progress(event)

    def encode_motion() -> Any:
        return np.ones(3)

    assert ranks.divide([(1.0, encode_motion)])[0].sum() == 3
    later: list[Event] = [
        StageStarted("denoise", 2, 3),
        StepDone(2, 3, 1, 4, 1e-9, 1e-9, 0.0),
        StageStarted("decode", 2, 3),
        WindowDone(2, 3, 12),
    ]
    for event in later:
        progress(event)
    assert told == [*events, *later]
    found = {span.what: span for span in spans(tmp_path / "new" / "trace", 1, 2, [])}
    assert set(found) == {"face", "step", "decode"}
    assert 0 <= found["face"].end < found["step"].end < found["decode"].end


def lines(rows: Sequence[tuple[float, str, float | None, int]]) -> str:
    keys = ("at", "what", "seconds", "window")
    return "".join(f"{json.dumps(dict(zip(keys, row, strict=True)))}\n" for row in rows)


def test_the_spans_of_a_window(tmp_path: Path) -> None:
    before = [(1.0, "condition", None, 1), (2.0, "encode_read", 0.5, 0), (5.0, "done", None, 1)]
    first = [
        *before,
        (6.0, "condition", None, 2),
        (7.0, "encode_prefixed", 0.75, 0),
        (7.5, "denoise", None, 2),
    ]
    first += [(9.5, "step", 2.0, 2), (9.5, "decode", None, 2), (11.0, "done", None, 2)]
    other = [*before, (6.5, "condition", None, 2), (7.5, "encode_motion", 1.0, 0), (8.0, "denoise", None, 2)]
    other += [
        (9.5, "step", 1.5, 2),
        (9.5, "decode", None, 2),
        (10.5, "decode", 1.0, 0),
    ]  # it has not written yet that it is done
    (tmp_path / "0.jsonl").write_text(lines(first))
    (tmp_path / "1.jsonl").write_text(lines(other))
    assert spans(tmp_path, 2, 2, [{"window": 1, "at": 6.25}, {"window": 2, "at": 12.0}]) == [
        Span(0, "known frames", 0.25, 1.0),
        Span(0, "step", 1.5, 3.5),
        Span(0, "decode", 3.5, 5.0),
        Span(0, "writing", 3.5, 6.0),
        Span(1, "face", 0.5, 1.5),
        Span(1, "step", 2.0, 3.5),
        Span(1, "decode", 3.5, 4.5),
    ]


def test_the_error_is_that_of_the_latents_against_fewest_gpus(tmp_path: Path) -> None:
    bench = _Bench(Wanted([SHAPE], [2, 4]), tmp_path, {}, 0, silent, lambda unfinished: None)
    np.save(bench._latent(2, SHAPE, 4), np.array([3.0, 4.0], np.float32))
    assert bench._error(2, SHAPE, 4) is None
    bench.rows.append(row(2, 1.0, 1.0))
    np.save(bench._latent(4, SHAPE, 4), np.array([3.0, 4.5], np.float32))
    assert bench._error(4, SHAPE, 4) == pytest.approx(0.1)


def test_the_gpus_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a,1")
    assert visible_gpus(2) == ["3", "GPU-8a"]


def test_one_process(tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    monkeypatch.setattr(scaling, "MOST_WINDOWS", 1)
    ran = bench(f"--gpus 1 {TINY_ARGUMENTS} --job-steps 2 --out {tmp_path}")
    assert ran.exit_code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert json.loads((tmp_path / "scaling.json").read_text()) == document
    (one,) = document["rows"]
    assert one["step_seconds"]["count"] == 2 * one["windows"] and one["error"] is None
    assert sum(one["stages"].values()) == pytest.approx(one["window_seconds"])
    assert document["throughput"] == [] and (tmp_path / "windows.png").exists()


@pytest.mark.long
def test_one_two_and_four_processes(
    home_of_ranks: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ranks in (2, 4):
        monkeypatch.setenv("TRT_WAN_HOME", str(home_of_ranks(ranks)))
    kept: list[int] = []
    wanted = Wanted([SHAPE], [1, 2, 4], {"executor": "onnxruntime"}, steps=2)
    made = measure_scaling(wanted, keep=lambda unfinished: kept.append(len(unfinished.rows)))
    assert kept == [1, 2, 3, 3] and made.finished and made.not_measured == []
    for found in made.rows:
        ranks = {span.rank for span in found.spans if span.what == "step"}
        assert ranks == set(range(found.gpus))
        assert sum(span.what == "face" for span in found.spans) >= 1
        assert all(-found.window_seconds < span.start <= span.end for span in found.spans)
    assert [found.error for found in made.rows] == [None, 0.0, 0.0], "on the CPU the bits are equal"
    assert [(jobs.gpus, jobs.side_by_side) for jobs in made.throughput] == [(2, 4), (4, 4)]
    for jobs in made.throughput:
        assert len(jobs.window_seconds) == len(jobs.step_seconds) == jobs.gpus
        assert jobs.frames_per_second == pytest.approx(sum(12 / seconds for seconds in jobs.window_seconds))
    assert {"waterfall-2.png", "waterfall-4.png"} <= {path.name for path in write(made, tmp_path)}


@pytest.mark.long
def test_a_budget_ends_it(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    with pytest.raises(UsageError, match="1 GPU: (the budget of 1 s was over|a window takes)"):
        measure_scaling(Wanted([SHAPE], [1, 2], {"executor": "onnxruntime"}, steps=900, budget=1.0))


@pytest.mark.long
def test_it_stops_at_the_first_number_that_is_not_there(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    monkeypatch.setattr(scaling, "gpus_here", lambda settings: 1)
    made = measure_scaling(Wanted([SHAPE], [1, 2, 4], {"executor": "onnxruntime"}, steps=1))
    assert [each.gpus for each in made.rows] == [1] and len(made.rows[0].memory_bytes) == 1
    assert made.not_measured == ["2 GPUs and more: CUDA shows 1 GPU here"] and made.throughput == []
