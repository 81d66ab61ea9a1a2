"""The harness's own arithmetic: spreads, laws, ratios, bounds, similarity, energy; and how it fails."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trt_wan.benchmarks import bench
from trt_wan.benchmarks.machine import card
from trt_wan.benchmarks.machine.ceilings import Ceiling
from trt_wan.benchmarks.machine.host_use import HostUse, _throttled, cpu_quota
from trt_wan.benchmarks.machine.monitor import Monitor, Sample, Usage
from trt_wan.benchmarks.measure import sweep
from trt_wan.benchmarks.measure import workplace as places
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, rows_of
from trt_wan.benchmarks.measure.similarity import psnr, relative_error, ssim
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.sweep import Ask, Point, Sweep, Times
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.contest import Contest, take_turns
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.compare import compare
from trt_wan.benchmarks.report.repeat import Repeats
from trt_wan.benchmarks.report.result import Result
from trt_wan.benchmarks.report.sheet import as_line, console, tables, write
from trt_wan.benchmarks.report.times import JobTimes, PeerTimes, StepTimes
from trt_wan.benchmarks.work.bound import (
    attention_rate,
    datasheet_rates,
    measured_rates,
    network_times,
    step_bound,
)
from trt_wan.benchmarks.work.cost import calls, step_flops, works
from trt_wan.benchmarks.work.cost_law import fit_rates
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.engines.shape import Plan
from trt_wan.errors import EnvironmentBroken, GraphError, InputError, TrtWanError, UsageError, WeightsError
from trt_wan.install import install_command
from trt_wan.runtime.events import silent

PLAN = Plan(832, 480, 77, "fp8")
WORK, CALLS = works(ANIMATE_14B, PLAN), calls(ANIMATE_14B, PLAN, 4)
CEILINGS = [
    Ceiling("copy", "1024 MiB", 4.27e12),
    Ceiling("bf16 GEMM", "32760x5120x5120", 700e12),
    Ceiling("bf16 GEMM", "32760x13824x5120", 716e12),
    Ceiling("fp8 GEMM", "32760x5120x5120", 1370e12),
]
MILLISECONDS = {
    "attn_in": 8.9,
    "attention": 25.4,
    "attn_out": 3.0,
    "cross_attention": 3.0,
    "ffn": 17.0,
    "fuser": 7.0,
    "patch_embed": 1.4,
    "head": 0.6,
}
PROFILE: list[dict[str, float | str]] = [
    {"name": n, "calls": CALLS[n].step, "seconds": CALLS[n].step * ms / 1e3, "fastest": ms / 1e3}
    for n, ms in MILLISECONDS.items()
]


def made_result(seconds: float = 2.35, window: int = 77, noise: float = 0.01, seed: int = 0) -> Result:
    """A result with an H200's figures of docs/log.md, made up where there are none."""
    rng = np.random.default_rng(seed)
    rounds = [list(seconds * (1 + noise * rng.standard_normal(20)))]
    theirs = [list(2.87 * (1 + noise * rng.standard_normal(20)))]
    rates = measured_rates(CEILINGS, attention_rate(WORK, PROFILE))
    assert rates is not None
    sheet = datasheet_rates(card.DATASHEETS["H200"], fp8_attention=True)
    steps = StepTimes(
        Spread.of(sum(rounds, [])),
        Spread.of([0.02]),
        rounds,
        network_times(WORK, PROFILE, rates),
        2.37,
        {"patch_embed": 1.0},
        step_bound(WORK, CALLS, rates),
        rates.about,
        step_bound(WORK, CALLS, sheet),
    )
    stages = {"weights": 7.1, "text": 0.4, "condition": 2.3, "denoise": 9.5, "decode": 1.6, "write": 0.7}
    usage = Usage("NVML", 100, 23_400_000_000, 4000.0, 650.0, 1700.0)
    cpu, host = {stage: 0.5 for stage in stages}, HostUse(0.0, 0.25)
    job = (23.0, 9.2, 22.0, 77, [seconds] * 4, stages, [], 6_000_000_000, usage)
    warm = JobTimes(*job, writing_seconds=1.2, stages_cpu=cpu, cpu_seconds=9.5, host=host)
    gpu = card.Gpu(
        "NVIDIA H200", "580", "143771 MiB", "9.0", "1980 MHz", "1980 MHz", "3201 MHz", "700 W", "45"
    )
    return Result(
        shape=Shape("14b", 832, 480, window),
        tokens=PLAN.tokens,
        step_flops=step_flops(ANIMATE_14B, PLAN),
        weights="random",
        precision="fp8",
        settings={"tier": "fast"},
        choices=["attention = tensorrt fp8 (25.4 ms)"],
        card=card.Card(gpu, card.datasheet(gpu.name), "EPYC", 16, 137.0, "Linux", "3.12", {"numpy": "2"}),
        ceilings=CEILINGS,
        work=[],
        cold=dataclasses.replace(warm, first_step_seconds=62.0),
        warm_jobs=[warm],
        steps=steps,
        peers=[
            PeerTimes("diffusers_compiled", "diffusers compiled", True, "", Spread.of(theirs[0]), theirs),
            PeerTimes("lightx2v", "LightX2V", False, "no checkout"),
        ],
        not_measured=[],
        version="0",
        time="2026-11-22",
    )


# Figures


def test_the_bound_of_a_step_is_the_sum_of_its_networks() -> None:
    """By hand: linears of the blocks in FP8, fusers in bf16, attention at its own rate."""
    rates = measured_rates(CEILINGS, attention_rate(WORK, PROFILE))
    assert rates is not None and rates.units["linear"] == 716e12
    tokens, d = PLAN.tokens, 5120
    fp8 = 40 * 2 * tokens * (6 * d * d + 2 * d * 13824) / 1370e12
    cross = 40 * 4 * tokens * (512 + 264) * d / rates.units["attention"]
    fusers = 8 * (2 * tokens * 2 * d * d / 716e12 + 4 * tokens * 5 * d / rates.units["attention"])
    small = sum(WORK[name].bytes for name in ("patch_embed", "head")) / 4.27e12
    assert step_bound(WORK, CALLS, rates) == pytest.approx(fp8 + cross + fusers + small + 40 * 25.4e-3)


def test_no_bound_is_claimed_where_a_rate_is_not_known() -> None:
    """bf16's rate in the place of FP8's would be a "lower bound" above what can be reached."""
    rates = measured_rates(CEILINGS[:3], 880e12)
    assert rates is not None and step_bound(WORK, CALLS, rates) is None
    rows = {row.name: row for row in network_times(WORK, PROFILE, rates)}
    assert rows["attn_in"].bound_seconds is None and rows["attention"].bound_seconds is not None
    assert measured_rates(CEILINGS[1:], 880e12) is None
    assert measured_rates(CEILINGS, None) is None


def test_rates_are_found_again() -> None:
    """Whatever the noise, no part of the law takes less than no time."""
    points = [
        (f, share, 0.02 + f / 1e15 * ((1 - share) * 0.8 + share * 1.2))
        for f, share in ((1e13, 0.1), (4e14, 0.3), (1.7e15, 0.51), (6.6e15, 0.71))
    ]
    law = fit_rates(points)
    assert law.fixed_seconds == pytest.approx(0.02)
    assert (law.seconds_per_petaflop, law.seconds_per_attention_petaflop) == (
        pytest.approx(0.8),
        pytest.approx(1.2),
    )
    assert law.seconds(*points[2][:2]) == pytest.approx(points[2][2])
    slow_start = [(f, share, seconds - 0.025 * (f > 1e13)) for f, share, seconds in points]
    assert min(dataclasses.astuple(fit_rates(slow_start))) >= 0


def test_similarity_against_the_formulas_written_out() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (1, 13, 14, 3), np.uint8)
    b = np.clip(a + rng.integers(-20, 21, a.shape), 0, 255).astype(np.uint8)
    ramp = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window = np.outer(ramp, ramp) / ramp.sum() ** 2
    values = []
    for y in range(3):
        for x in range(4):
            for channel in range(3):
                p, q = (t[0, y : y + 11, x : x + 11, channel].astype(np.float64) for t in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)
    assert psnr(a, a) is None
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / error))
    assert relative_error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.08)


def test_energy_and_memory_of_what_was_watched() -> None:
    """Memory is beyond what was there before; energy is the driver's counter where it has one."""
    readings = iter([Sample(5, 100, 1000, 50.0), Sample(30, 600, 1500, 70.0), Sample(20, 500, 1400, 90.0)])
    last = Sample(10, 50, 300, 95.0)
    monitor = Monitor("fake", lambda: next(readings, last), interval=0.001)
    with monitor:
        while len(monitor._samples) < 4:
            pass
    usage = monitor.usage()
    assert (usage.peak_memory_bytes, usage.joules, usage.lowest_clock_mhz) == (25, 45.0, 1400)


def test_energy_from_power_where_the_driver_has_no_counter() -> None:
    monitor = Monitor("fake", None)
    monitor._samples = [(0.0, Sample(0, 1, None)), (2.0, Sample(0, 300, None)), (3.0, Sample(0, 100, None))]
    assert monitor.usage().joules == pytest.approx(2 * 300 + 100)


# Comparison and repetition


def test_ratios_say_what_differs(tmp_path: Path) -> None:
    for name, result in (
        ("a", made_result(2.35)),
        ("b", made_result(2.35, seed=1)),
        ("c", made_result(2.20, seed=2)),
    ):
        (tmp_path / name).write_text(as_line(result.to_dict()))
    same = {row.name: row for row in compare(tmp_path / "a", tmp_path / "b").ratios}
    faster = {row.name: row for row in compare(tmp_path / "a", tmp_path / "c").ratios}
    assert same["trt-wan s/step"].differs is False and faster["trt-wan s/step"].differs is True
    assert faster["trt-wan s/step"].ratio == pytest.approx(2.20 / 2.35, rel=0.01)
    assert same["diffusers compiled s/step"].differs is False
    assert same["trt-wan whole job, warm"].differs is None


def test_different_jobs_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(as_line(made_result(window=77).to_dict()))
    (tmp_path / "b.json").write_text(as_line(made_result(window=81).to_dict()))
    (tmp_path / "c.json").write_text('{"schema": "something else"}')
    with pytest.raises(UsageError, match="a.json has the window 77, b.json 81"):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(InputError, match="not a result of a benchmark"):
        compare(tmp_path / "a.json", tmp_path / "c.json")


def test_repeated_runs_show_their_spread_and_can_be_compared(tmp_path: Path) -> None:
    repeats = Repeats([made_result(s, noise=0.0) for s in (2.30, 2.35, 2.42)])
    rows = {row.name: row for row in repeats.headlines}
    assert rows["trt-wan s/step"].spread == pytest.approx(0.12 / 2.35) and not rows["trt-wan s/step"].steady
    assert rows["trt-wan whole job, warm"].steady
    parts = {row.name: row for row in repeats.parts}
    assert parts["process start, imports"].values == [1.0, 1.0, 1.0] and parts["weights"].median == 7.1
    assert parts["denoise, first step alone"].values == [2.30, 2.35, 2.42]
    assert repeats.to_dict()["parts"][0]["name"] == "process start, imports"
    (tmp_path / "three.json").write_text(as_line(repeats.to_dict()))
    ratios = {row.name: row for row in compare(tmp_path / "three.json", tmp_path / "three.json").ratios}
    assert ratios["trt-wan whole job, warm"].low == pytest.approx(1)


# The host


@pytest.mark.parametrize(
    ("files", "quota", "throttled"),
    [
        ({"cpu.max": "1600000 100000\n", "cpu.stat": "usage_usec 9\nthrottled_usec 2500000\n"}, 16, 2.5),
        ({"cpu.max": "max 100000\n", "cpu.stat": "usage_usec 9\n"}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "150000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.stat": "nr_throttled 3\nthrottled_time 500000000\n",
            },
            1.5,
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        ({}, None, None),
    ],
)
def test_what_a_container_may_use_and_was_refused(
    tmp_path: Path, files: dict[str, str], quota: float | None, throttled: float | None
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota and _throttled(tmp_path) == throttled


def test_what_the_host_took_is_the_difference() -> None:
    assert HostUse(3.5, None).since(HostUse(1.0, 2.0)) == HostUse(2.5, None)


@pytest.mark.parametrize("told", ["", "1"])
def test_measured_processes_keep_their_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", told)
    (tmp_path / "imported.py").write_text("")
    with workplace(Shape("tiny", 64, 48, 5)) as (env, _):
        command = [sys.executable, "-c", "import imported"]
        subprocess.run(command, env=env | {"PYTHONPATH": str(tmp_path)}, check=True)
        kept = tmp_path if not told else Path(env["PYTHONPYCACHEPREFIX"])
        assert list(kept.rglob("imported.*.pyc"))
        assert (tmp_path / "__pycache__").exists() is not bool(told)


def test_a_hint_names_no_file_of_the_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    with pytest.raises(TrtWanError) as caught, workplace(Shape("tiny", 64, 48, 5)) as (_, clips):
        raise TrtWanError("Rank 1 was lost.", f"Start it again.\nThe finished frames are in {clips}/a.mp4.")
    assert caught.value.hint == "Start it again."


def test_a_package_that_a_measured_process_lacks(tmp_path: Path) -> None:
    (tmp_path / "a_peer.py").write_text("import no_such_package.part\n")
    env, not_measured = os.environ | {"PYTHONPATH": str(tmp_path)}, list[str]()
    with pytest.raises(EnvironmentBroken) as caught, Child("a_peer", [], env) as child:
        child.read()
    assert caught.value.message == "no_such_package is not installed (the extra bench)."
    assert caught.value.hint == f"Run:\n{install_command('bench')}"
    assert list(rows_of("a_peer", [], env, not_measured, silent, Budget())) == []
    said = f"a_peer: no_such_package is not installed (the extra bench). Run:\n{install_command('bench')}"
    assert not_measured == [said]


def test_a_folder_without_a_part_is_told_without_options_that_benchmarks_lack(tmp_path: Path) -> None:
    spec = Spec(Shape("tiny", 64, 48, 5), "", 1, {"executor": "onnxruntime"}, str(tmp_path))
    with pytest.raises(WeightsError, match="holds the transformer") as caught:
        spec.open(silent, None)
    assert caught.value.hint == "Put it there: benchmarks take all parts from one folder."


# Files


def test_plots_are_named_and_labelled(tmp_path: Path) -> None:
    paths = write(made_result(), tmp_path)
    names = {path.name for path in paths}
    assert {"bench.json", "bench.csv", "waterfall.png", "stages.svg", "peers.svg"} <= names
    svg = (tmp_path / "waterfall.svg").read_text()
    assert all(text in svg for text in ("NVIDIA H200", "milliseconds", "attn_out", "lower bound"))
    assert "seconds" in (tmp_path / "peers.svg").read_text()
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert any(line.startswith("step median,trt-wan,s,2.3") for line in lines)
    assert any(line.startswith("network bound s,attention,s,1.0") for line in lines)


def test_a_note_tells_that_plots_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "trt_wan.benchmarks.report.plots", raising=False)
    monkeypatch.delattr("trt_wan.benchmarks.report.plots", raising=False)
    told: list[Any] = []
    paths = write(made_result(), tmp_path, told.append)
    assert [path.name for path in paths] == ["bench.json", "bench.csv"]
    sentence = "Plots are left out: matplotlib is not installed (the extra bench). Run:"
    assert [note.text for note in told] == [f"{sentence}\n{install_command('bench')}"]


def test_tables_name_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = dataclasses.replace(made_result(), work=[bench.work_row("attention", WORK, CALLS)])
    console().print(tables(result))
    shown = capsys.readouterr().err
    assert "NVIDIA H200" in shown and "not run: no checkout" in shown
    assert f"{result.steps.seconds.median:.3f}" in shown


# Sweeps


def test_a_sweep_fits_its_law_and_keeps_points_that_failed(tmp_path: Path) -> None:
    def measured(ask: Ask, n: int, weights: str | None, progress: object) -> Times:
        plan = ask.shape.plan
        if plan.frames == 161:
            raise TrtWanError("out of memory")
        work, counts = works(ANIMATE_14B, plan), calls(ANIMATE_14B, plan, 1)
        flops = step_flops(ANIMATE_14B, plan)
        attention = sum(w.attention * counts[name].step for name, w in work.items())
        seconds = 0.01 + 1.1e-15 * (flops - attention) + 1.3e-15 * attention
        share = 0.3 + plan.tokens / 100_000
        return [seconds] * n, {"attention": seconds * share, "attn_in": seconds * (1 - share)}, 10**10

    asked = sweep.asks(
        Shape("14b", 832, 480, 77), {}, ("size", "window"), ("832x480", "1280x720"), (5, 33, 77, 161)
    )
    result = sweep.run_sweep(asked, 3, measure=measured)
    assert result.rates is not None and result.rates.fixed_seconds == pytest.approx(0.01)
    assert result.rates.seconds_per_petaflop == pytest.approx(1.1)
    assert result.rates.seconds_per_attention_petaflop == pytest.approx(1.3)
    assert [p.reason for p in result.points if p.seconds is None] == ["out of memory"]
    pair = sweep.crossing(result.points)
    assert pair is not None and (pair[0].tokens, pair[1].tokens) == (15600, 32760)
    names = {path.name for path in write(result, tmp_path)}
    assert {"sweep.json", "sweep.csv", "scaling.png", "scaling.svg"} <= names
    assert "PFLOP" in (tmp_path / "scaling.svg").read_text()
    assert "sweep seconds,77 frames,s," in (tmp_path / "sweep.csv").read_text()


def test_an_impossible_point_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UsageError, match="14 frames"):
        sweep.asks(Shape("tiny", 64, 48, 13), {}, ("window",), windows=(5, 14))


def test_bars_of_an_axis(tmp_path: Path) -> None:
    shape = Shape("14b", 832, 480, 77)
    points = [
        Point("vram", f"{gb} GB", shape, {}, 32760, 10**15, 0.5, Spread.of([s]), gb * 10**9)
        for gb, s in ((12, 2.7), (24, 2.5))
    ]
    write(Sweep(made_result().card, points, None, []), tmp_path)
    assert "2.7 s, 12.0 GB" in (tmp_path / "sweep-vram.svg").read_text()


# Processes


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_peer_at_a_time_has_its_weights(rounds: int) -> None:
    """Two of them do not fit on a GPU beside us."""
    awake: set[tuple[str, str]] = set()

    class FakeChild:
        def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
            self.name = (module, arguments[0])
            self.peer = module != places.OURS_MODULE
            self._wake()

        def _wake(self) -> None:
            if self.peer:
                awake.add(self.name)
                assert awake == {self.name}

        def read(self) -> dict[str, Any]:
            return {"ran": True}

        def ask(self, line: str) -> dict[str, Any]:
            if line == "rest":
                awake.discard(self.name)
            else:
                self._wake()
            made = {"build_seconds": 1.0, "first_step_seconds": 1.0, "memory_bytes": {}, "part_seconds": {}}
            return {"ran": True, "seconds": [1.0], "host_seconds": [1.0], "settings": {}, **made}

        def __enter__(self) -> "FakeChild":
            return self

        def __exit__(self, *error: Any) -> None:
            awake.discard(self.name)

    shape = Shape("tiny", 64, 48, 13)
    contest = Contest(rounds=rounds, peers=("diffusers_eager", "diffusers_fp8"))
    make: Any = FakeChild
    ours, _, _, peers = take_turns(contest, Spec(shape, "clips", 4), {}, lambda event: None, make)
    assert len(ours) == rounds and all(peer.ran and peer.rounds == [[1.0]] * rounds for peer in peers)


def run_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, patience: float = 60) -> Child:
    (tmp_path / "a_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import os

    return Child("a_child", [], dict(os.environ), patience)


def test_a_child_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = "print('a library says hello')\nprint('{\"event\": \"ready\"}', flush=True)"
    code = f"import sys\n{ready}\nsys.stdin.readline()\nsys.exit('no memory')"
    with run_child(tmp_path, monkeypatch, code) as child:
        assert child.read() == {"event": "ready"}
        with pytest.raises(TrtWanError, match="a_child ended with 1 before it answered: no memory"):
            child.ask("20")


def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_child(tmp_path, monkeypatch, "import time\ntime.sleep(60)", patience=0.5) as child:
        with pytest.raises(TrtWanError, match="did not answer for 0 s"):
            child.read()


def test_a_refusal_in_a_child_is_a_refusal_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(
        {
            "event": "failed",
            "code": "graph_unusable",
            "message": "No graphs.",
            "hint": "Build.",
            "command": ["build"],
        }
    )
    with run_child(tmp_path, monkeypatch, f"print({line!r})") as child:
        with pytest.raises(GraphError) as caught:
            child.read()
    assert (caught.value.message, caught.value.hint) == ("No graphs.", "Build.")
    assert caught.value.command == ("build",)


def test_missing_graphs_are_built_by_the_command_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sequence[str]] = []

    class Done:
        returncode, stderr = 0, ""

    monkeypatch.setattr(places.subprocess, "run", lambda command, **options: ran.append(command) or Done())
    attempts = count()

    def act() -> str:
        if not next(attempts):
            command = ("build", "--model", "tiny", "--size", "64x48", "--window", "5")
            raise GraphError("They are not built.", "The cure, in words.", command)
        return "measured"

    assert with_graphs(act, lambda event: None) == "measured"
    assert ran == [[sys.executable, "-m", "trt_wan", *"build --model tiny --size 64x48 --window 5".split()]]
    with pytest.raises(GraphError, match="Damaged"):
        with_graphs(
            lambda: (_ for _ in ()).throw(GraphError("Damaged.", "Run: trt-wan rm everything")),
            lambda event: None,
        )


def test_the_card_without_a_driver_and_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.read_gpu() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 580.1, 143771 MiB, 9.0, 345 MHz, 1980 MHz, 3201 MHz, 700 W, 31'"
    )
    smi.chmod(0o755)
    gpu = card.read_gpu()
    assert gpu is not None and (gpu.name, gpu.power_limit) == ("NVIDIA H200", "700 W")
    assert card.datasheet(gpu.name) is card.DATASHEETS["H200"]
    assert card.datasheet("GeForce GT 710") is None


@pytest.mark.parametrize(("visible", "first"), [("", "0"), ("1,0", "1"), (" GPU-8932f937 ", "GPU-8932f937")])
def test_the_gpu_that_is_measured_is_the_first_that_cuda_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, first: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho ${3}, 580.1, x, x, x, x, x, x, x\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = card.read_gpu()
    assert gpu is not None and gpu.name == f"--id={first}"
    used = SimpleNamespace(used=1 << 30)
    asked: list[object] = []
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=asked.append,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetPowerUsage=lambda gpu: 1,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 1,
        nvmlDeviceGetClockInfo=lambda gpu, which: 1,
        nvmlDeviceGetMemoryInfo=lambda gpu: used,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Monitor.open().source == "NVML"
    assert asked == [int(first) if first.isdecimal() else first]
