"""One benchmark from its card to its result. Everything that is measured runs in a process of its own; this
one makes no CUDA context and imports no torch.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from trt_wan import __version__
from trt_wan.benchmarks.measure.bound import (
    attention_rate,
    datasheet_rates,
    measured_rates,
    network_times,
    step_bound,
)
from trt_wan.benchmarks.measure.card import Card, read_card, read_gpu
from trt_wan.benchmarks.measure.ceilings import Ceiling, measure_host
from trt_wan.benchmarks.measure.cost import Calls, Work, calls, step_flops, works
from trt_wan.benchmarks.measure.host_use import host_use
from trt_wan.benchmarks.measure.measured_process import Spec, most_steps
from trt_wan.benchmarks.measure.monitor import Monitor
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.peers.table import PEERS
from trt_wan.benchmarks.report.result import JobTimes, PeerTimes, Result, StepTimes, WorkRow
from trt_wan.engines.store.home import home
from trt_wan.errors import GraphError, TrtWanError
from trt_wan.runtime.events import Note, Progress, silent

OURS_MODULE = "trt_wan.benchmarks.measure.measured_process"
T = TypeVar("T")
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"  # in containers, often
BUILD_HINT = "Run: trt-wan "  # how a GraphError names the command that builds what is missing


@dataclass(frozen=True)
class Options:
    shape: Shape
    settings: Mapping[str, Any] = field(default_factory=dict)  # of runtime.job.Settings
    weights: str | None = None  # None: random
    steps: int = 20  # per round
    rounds: int = 1  # in which we and the peers take turns
    job_steps: int = 4  # of a whole job
    jobs: int = 3  # whole jobs from a warm start: one alone says little of a start
    peers: tuple[str, ...] = ()
    peer_steps: int | None = None  # per round; None: as many as ours
    peer_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cold: bool = True  # whether a start without finished kernels is measured too


def run_bench(options: Options, progress: Progress = silent) -> Result:
    card = read_card()
    not_measured: list[str] = []
    if os.environ.get(NO_BYTECODE):
        not_measured.append(
            f"starts without bytecode: {NO_BYTECODE} is set here, and not for what is measured"
        )
    with workplace(options.shape) as (env, clips):
        progress(Note(f"{card.hardware}; {options.shape.title}, {options.shape.plan.tokens} tokens"))
        progress(Note("measuring the ceilings of this machine"))
        ceilings = _ceilings(options.shape, card, env, not_measured)
        spec = Spec(options.shape, clips, options.job_steps, dict(options.settings), options.weights)
        cold = _cold(options, card, spec, env, progress, not_measured)
        if cold is None and card.gpu is not None:
            progress(Note("a whole job that is not counted: it finishes the kernels"))
            with_graphs(lambda: measure_job(spec, env), progress)
        warm_jobs = []
        for n in range(options.jobs):
            progress(Note(f"a whole job, warm, {n + 1} of {options.jobs}"))
            times, opened = with_graphs(lambda: measure_job(spec, env), progress)
            warm_jobs.append(times)
        progress(Note(f"{options.rounds} rounds of {options.steps} steps"))
        rounds, host_rounds, profile, peers = _rounds(options, spec, env, progress)
    plan = replace(options.shape.plan, precision=opened["precision"])
    config = options.shape.config
    work, counts = works(config, plan), calls(config, plan, options.job_steps)
    rates = measured_rates(ceilings, attention_rate(work, profile["networks"]))
    fp8_attention = options.settings.get("tier") == "fast"
    sheet = datasheet_rates(card.datasheet, fp8_attention) if card.datasheet else None
    steps = StepTimes(
        seconds=Spread.of(sum(rounds, [])),
        host_seconds=Spread.of(sum(host_rounds, [])),
        rounds=rounds,
        networks=network_times(work, profile["networks"], rates),
        profiled_seconds=profile["seconds"],
        uploads=profile["uploads"],
        bound_seconds=step_bound(work, counts, rates) if rates else None,
        bound_about=rates.about if rates else "no ceilings were measured",
        datasheet_seconds=step_bound(work, counts, sheet) if sheet else None,
    )
    return Result(
        shape=options.shape,
        tokens=plan.tokens,
        step_flops=step_flops(config, plan),
        weights=options.weights or "random: figures are of speed, never of picture quality",
        precision=plan.precision,
        settings=options.settings,
        choices=opened["choices"],
        card=card,
        ceilings=ceilings,
        work=[work_row(name, work, counts) for name in work],
        cold=cold,
        warm_jobs=warm_jobs,
        steps=steps,
        peers=peers,
        not_measured=not_measured,
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def work_row(name: str, work: Mapping[str, Work], counts: Mapping[str, Calls]) -> WorkRow:
    w, n = work[name], counts[name]
    flops = (w.linear, w.attention, w.convolution)
    return WorkRow(name, n.step, n.window, n.job, *flops, w.bytes, w.fp8)


@contextlib.contextmanager
def workplace(shape: Shape) -> Iterator[tuple[dict[str, str], str]]:
    """The environment of our processes and a folder of clips. Graphs and engines are the user's own; kernels
    that TensorRT-RTX finishes on this machine are not: that is what makes a start cold. Python keeps bytecode
    as it does by itself, in a folder of ours where it is told not to: it would compile ours anew each time.
    """
    with tempfile.TemporaryDirectory(prefix="trt-wan-bench-") as temporary:
        folder = Path(temporary)
        for name in ("graphs", "engines"):
            real = home() / name
            real.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(real.resolve(), target_is_directory=True)
        clips = write_clips(folder / "clips", shape.width, shape.height, shape.window)
        env = os.environ | {"TRT_WAN_HOME": str(folder), "CUDA_CACHE_PATH": str(folder / "cuda")}
        if env.pop(NO_BYTECODE, ""):
            env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        yield env, str(clips)


def forget_kernels(env: Mapping[str, str]) -> None:
    """What TensorRT-RTX and the driver have finished on this machine, in our workplace."""
    for folder in (Path(env["TRT_WAN_HOME"]) / "kernels", Path(env["CUDA_CACHE_PATH"])):
        shutil.rmtree(folder, ignore_errors=True)


def _ceilings(shape: Shape, card: Card, env: Mapping[str, str], not_measured: list[str]) -> list[Ceiling]:
    if card.gpu is None:
        return measure_host()
    command = [sys.executable, "-m", "trt_wan.benchmarks.measure.ceilings", *shape.arguments()]
    answer = subprocess.run(command, capture_output=True, text=True, env=env)
    if answer.returncode:
        last = [line for line in answer.stderr.splitlines() if line.strip()][-1:]
        not_measured.append(f"ceilings: {' '.join(last)}")
        return []
    found = [Ceiling(**row) for row in json.loads(answer.stdout.splitlines()[-1])]
    not_measured += [f"{c.name}: {c.reason}" for c in found if c.rate is None]
    return found


def _cold(
    options: Options,
    card: Card,
    spec: Spec,
    env: Mapping[str, str],
    progress: Progress,
    not_measured: list[str],
) -> JobTimes | None:
    """A job without finished kernels, with graphs and engines there: building them is no part of a start."""
    if not options.cold or card.gpu is None:
        why = "ONNX Runtime keeps nothing between starts" if card.gpu is None else "not asked for"
        not_measured.append(f"cold start: {why}")
        return None
    while True:
        forget_kernels(env)
        progress(Note("a whole job, cold: TensorRT-RTX finishes its kernels"))
        times, opened = with_graphs(lambda: measure_job(spec, env), progress)
        if not any(choice.startswith("built ") for choice in opened["choices"]):
            return times
        progress(Note("engines were built on the way: once more without that"))


def with_graphs(act: Callable[[], T], progress: Progress, within: Sequence[str] = ()) -> T:
    """What `act` returns. If it lacks graphs, the command that it names builds them, and it acts again.
    `within` are modules that run the command's in their turn.
    """
    try:
        return act()
    except GraphError as error:
        if not error.hint.startswith(BUILD_HINT):
            raise
        command = shlex.split(error.hint.removeprefix(BUILD_HINT))
        progress(Note(f"trt-wan {shlex.join(command)}"))
    run = [sys.executable, "-m", *within, "trt_wan", *command]
    built = subprocess.run(run, capture_output=True, text=True)
    if built.returncode:
        raise TrtWanError("The graphs could not be built.", built.stderr.strip()[-300:])
    return act()


def measure_job(spec: Spec, env: Mapping[str, str]) -> tuple[JobTimes, dict[str, Any]]:
    before = host_use()
    with Monitor.open() as monitor, Child(OURS_MODULE, ["job", spec.to_json()], env) as child:
        answer = child.read()
        ended_at = answer["at"]
    times = JobTimes(
        process_seconds=ended_at - child.started_at,
        first_step_seconds=answer["first_step_at"] - child.started_at,
        seconds=answer["seconds"],
        frames=answer["frames"],
        steps=answer["steps"],
        stages=answer["stages"],
        networks=answer["networks"],
        host_peak_bytes=answer["host_peak_bytes"],
        usage=monitor.usage(),
        writing_seconds=answer["writing_seconds"],
        stages_cpu=answer["stages_cpu"],
        cpu_seconds=answer["cpu_seconds"],
        host=host_use().since(before),
    )
    return times, answer


Rounds = list[list[float]]


def _rounds(
    options: Options, spec: Spec, env: Mapping[str, str], progress: Progress
) -> tuple[Rounds, Rounds, dict[str, Any], list[PeerTimes]]:
    """We and the peers in turns: A B C, A B C, …; each warms up anew at the start of its turn. Between turns
    we keep our memory; a peer gives its weights' back.
    """
    most = most_steps(options.rounds, options.steps)
    ours: Rounds = []
    host: Rounds = []

    def our_turn(own: Child) -> None:
        answer = own.ask(str(options.steps))
        ours.append(answer["seconds"])
        host.append(answer["host_seconds"])
        progress(Note(f"round {len(ours)}: trt-wan {Spread.of(ours[-1]).median:.3f} s/step"))

    arguments = ["steps", replace(spec, steps=most).to_json()]
    if options.rounds == 1:  # one after the other, so that nobody holds memory that another needs
        with Child(OURS_MODULE, arguments, env) as own:
            own.read()
            our_turn(own)
            profile = own.ask("")
        times = []
        for name in options.peers:
            with _Contestant(name, options, env, progress) as peer:
                peer.take_turn()
                times.append(peer.times())
        return ours, host, profile, times
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Child(OURS_MODULE, arguments, env))
        own.read()
        peers = []
        for name in options.peers:
            peers.append(stack.enter_context(_Contestant(name, options, env, progress)))
            peers[-1].rest()  # before the next one takes memory
        for _ in range(options.rounds):
            our_turn(own)
            for peer in peers:
                peer.take_turn()
                peer.rest()
        profile = own.ask("")
        return ours, host, profile, [peer.times() for peer in peers]


class _Contestant:
    """A peer's process over all rounds. Whatever goes wrong with it is its result, not ours."""

    def __init__(self, name: str, options: Options, env: Mapping[str, str], progress: Progress) -> None:
        self.row, self.options, self.progress = PEERS[name], options, progress
        self.rounds: Rounds = []
        self.last: dict[str, Any] = {}
        self.reason = ""
        device = "cuda" if read_gpu() else "cpu"
        arguments = [*options.shape.arguments(), "--serve", "--device", device]
        progress(Note(f"starting {self.row.title}"))
        self.child = Child(self.row.module, [*arguments, *options.peer_arguments.get(name, ())], env)

    def __enter__(self) -> "_Contestant":
        self.child.__enter__()
        self._guarded(self._start)
        return self

    def __exit__(self, *error: Any) -> None:
        self.child.__exit__(*error)

    def rest(self) -> None:
        self._guarded(lambda: self.child.ask("rest"))

    def take_turn(self) -> None:
        self._guarded(self._turn)

    def times(self) -> PeerTimes:
        if self.reason or not self.rounds:
            return PeerTimes(self.row.name, self.row.title, ran=False, reason=self.reason)
        kept = ("build_seconds", "first_step_seconds", "memory_bytes", "part_seconds", "settings")
        return PeerTimes(
            self.row.name,
            self.row.title,
            ran=True,
            seconds=Spread.of(sum(self.rounds, [])),
            rounds=self.rounds,
            **{name: self.last[name] for name in kept},
        )

    def _start(self) -> None:
        self._answer(self.child.read())

    def _turn(self) -> None:
        self.last = self._answer(self.child.ask(str(self.options.peer_steps or self.options.steps)))
        self.rounds.append(self.last["seconds"])
        self.progress(Note(f"  {self.row.title} {Spread.of(self.rounds[-1]).median:.3f} s/step"))

    @staticmethod
    def _answer(answer: dict[str, Any]) -> dict[str, Any]:
        if not answer["ran"]:
            raise TrtWanError(answer["reason"])
        return answer

    def _guarded(self, act: Callable[[], object]) -> None:
        """Nothing, once the peer has failed."""
        if self.reason:
            return
        try:
            act()
        except TrtWanError as error:
            self.reason = error.message
            self.progress(Note(f"  {self.row.title} not run: {self.reason}"))
