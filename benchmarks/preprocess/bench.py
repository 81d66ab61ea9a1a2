"""The preprocessing measured from its networks to the whole command; each thing in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trt_wan import __version__
from trt_wan.benchmarks.bench import with_graphs
from trt_wan.benchmarks.measure.card import read_card
from trt_wan.benchmarks.measure.monitor import Monitor, Usage
from trt_wan.benchmarks.measure.processes import Child, refusal
from trt_wan.benchmarks.measure.sample_clips import write_driving, write_reference
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.preprocess import random_networks, tiny_sam2
from trt_wan.benchmarks.preprocess.child import MOST_FRAMES, Spec, What
from trt_wan.benchmarks.preprocess.parts import PARTS
from trt_wan.benchmarks.preprocess.random_networks import ModelName, RandomNetwork
from trt_wan.benchmarks.preprocess.result import (
    InsideTime,
    NetworkTimes,
    PartTime,
    PreprocessResult,
    WholeTimes,
)
from trt_wan.errors import TrtWanError
from trt_wan.preprocess.stages import Executor
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.video.reader import Clip

CHILD = "trt_wan.benchmarks.preprocess.child"
Modes = Literal["animate", "replace", "both"]


@dataclass(frozen=True)
class Options:
    """Networks that are None are random; without a clip it is the sample's, of that many frames."""

    model: ModelName | None = None  # of random networks; None: what suits the machine
    detector: Path | None = None
    pose: Path | None = None
    sam2: Path | None = None
    clip: Path | None = None
    size: tuple[int, int] = (832, 480)
    frames: int = 77
    executor: Executor = "auto"
    mode: Modes = "both"
    repeat: int = 5

    @property
    def modes(self) -> tuple[What, ...]:
        return ("animate", "replace") if self.mode == "both" else (self.mode,)

    @property
    def networks(self) -> tuple[What, ...]:
        """SAM2 has nothing to do in the mode animate."""
        return ("detector", "pose") if self.mode == "animate" else ("detector", "pose", "sam2")


@dataclass(frozen=True)
class Networks:
    """Files by name; FLOPs of a frame where they are known; which are random."""

    files: Mapping[str, Path]
    flops: Mapping[str, int | None]
    random: tuple[str, ...]

    def model(self, name: str) -> str:
        """What a random network is made like; of another, its file."""
        file = self.files[name]
        return file.parent.name.rpartition("-")[0] if name in self.random else file.name

    def source(self, name: str) -> str:
        return f"{self.model(name)}, random weights" if name in self.random else str(self.files[name])


def run_bench(options: Options, progress: Progress = silent) -> PreprocessResult:
    card = read_card()
    model = options.model or ("full" if card.gpu else "tiny")
    not_measured: list[str] = []
    with tempfile.TemporaryDirectory(prefix="trt-wan-bench-") as temporary:
        folder = Path(temporary)
        clip = options.clip or write_driving(folder / "driving.mp4", *options.size, options.frames)
        reference = write_reference(folder / "reference.png", *options.size)
        with Clip(clip) as opened:
            frames, size = opened.frames, (opened.width, opened.height)
        networks = _networks(options, model, size[0] / size[1], progress)
        progress(Note(f"{card.hardware}; {frames} frames, {size[0]}x{size[1]}"))

        def spec(what: What) -> Spec:
            files = {"sam2": ""} | {name: str(path) for name, path in networks.files.items()}
            places = {"clip": str(clip), "reference": str(reference), "output": str(folder / what)}
            return Spec(
                what, **files, **places, size=options.size, executor=options.executor, repeat=options.repeat
            )

        def measured(what: What) -> _Measured:
            return with_graphs(lambda: _measured(spec(what)), progress, (tiny_sam2.SELF,))

        timed: list[NetworkTimes] = []
        for what in options.networks:
            progress(Note(f"{what}: {networks.files[what].name}"))
            found = measured(what)
            timed.append(_network_times(what, networks, found))
        whole = []
        for what in options.modes:
            progress(Note(f"a whole preprocessing, mode {what}, stages opened"))
            steady = measured(what)
            progress(Note(f"the whole command, mode {what}"))
            whole.append(_whole_times(what, steady, _commands(spec(what))))
            not_measured += [f"part {name} of {what}: no such function" for name in steady.end["missing"]]
    if card.gpu is None:
        not_measured.append("device memory: no GPU driver")
    if frames > MOST_FRAMES:
        not_measured.append(f"networks on more than the first {MOST_FRAMES} frames")
    return PreprocessResult(
        sources={name: networks.source(name) for name in networks.files},
        random=[networks.model(name) for name in networks.random],
        clip=str(options.clip) if options.clip else "the sample, scaled, back and forth",
        frames=frames,
        size=size,
        executor=options.executor,
        card=card,
        networks=timed,
        whole=whole,
        not_measured=not_measured,
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _networks(options: Options, model: ModelName, aspect: float, progress: Progress) -> Networks:
    given = {"detector": options.detector, "pose": options.pose, "sam2": options.sam2}
    given = {name: path for name, path in given.items() if name in options.networks}
    make = {
        "detector": lambda: random_networks.random_detector(model, progress),
        "pose": lambda: random_networks.random_pose(model, aspect, progress),
        "sam2": lambda: random_networks.random_sam2(model, progress),
    }
    found = {name: RandomNetwork(path, None) if path else make[name]() for name, path in given.items()}
    return Networks(
        {name: network.path for name, network in found.items()},
        {name: network.flops for name, network in found.items()},
        tuple(name for name, path in given.items() if path is None),
    )


@dataclass(frozen=True)
class _Measured:
    """What a child said."""

    opened: dict[str, Any]
    passes: list[dict[str, Any]]  # the warm-up first
    end: dict[str, Any]
    usage: Usage

    def spread(self, key: str) -> Spread | None:
        values = [run[key] for run in self.passes[1:]]
        return None if None in values else Spread.of(values)

    @property
    def seconds(self) -> Spread:
        return Spread.of([run["seconds"] for run in self.passes[1:]])


def _measured(spec: Spec) -> _Measured:
    with Monitor.open() as monitor, Child(CHILD, [spec.to_json()], os.environ) as child:
        opened = child.read()
        passes = []
        while (line := child.read())["event"] == "pass":
            passes.append(line)
    return _Measured(opened, passes, line, monitor.usage())


def _network_times(name: str, networks: Networks, found: _Measured) -> NetworkTimes:
    by_arrays = found.end["by_arrays"]
    return NetworkTimes(
        name=name,
        title=networks.model(name) + (", random weights" if name in networks.random else ""),
        frames=found.opened["frames"],
        seconds=found.seconds,
        by_arrays=Spread.of(by_arrays) if by_arrays else None,
        open_seconds=found.opened["seconds"],
        first_seconds=found.passes[0]["seconds"],
        flops=networks.flops[name],
        batch=found.opened["batch"],
        runs_on=found.opened["runs_on"],
        found=found.end["found"],
        prompted=found.end.get("prompted"),
        inside=[InsideTime(**row) for row in found.end.get("inside", ())],
        notes=found.end["notes"],
        host_peak_bytes=found.end["host_peak_bytes"],
        usage=found.usage,
    )


@dataclass(frozen=True)
class _Commands:
    seconds: list[float]
    work: list[float]
    usage: Usage


def _commands(spec: Spec) -> _Commands:
    """The command in fresh processes; the first one warms up the disk's cache and the kernels'."""
    arguments = [
        spec.reference,
        spec.clip,
        "-o",
        f"{spec.output}-command",
        "--mode",
        spec.what,
        "-y",
        "--json",
    ]
    arguments += ["--detector", spec.detector, "--pose", spec.pose, "--executor", spec.executor]
    arguments += ["--size", "x".join(map(str, spec.size))]
    if spec.what == "replace":
        arguments += ["--sam2", spec.sam2]
    tiny = (tiny_sam2.SELF,) if tiny_sam2.TINY_SAM2.name in spec.sam2 else ()
    command = [sys.executable, "-m", *tiny, "trt_wan", "preprocess", *arguments]
    seconds, work = [], []
    with Monitor.open() as monitor:
        for _ in range(spec.repeat + 1):
            start = time.perf_counter()
            ran = subprocess.run(command, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            work.append(_envelope(ran)["seconds"])
    return _Commands(seconds[1:], work[1:], monitor.usage())


def _envelope(ran: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    last = json.loads(lines[-1]) if lines else {}
    if not last.get("ok"):
        if "error" in last:
            raise refusal(last["error"])
        raise TrtWanError(f"trt-wan preprocess ended with {ran.returncode}.", ran.stderr.strip()[-300:])
    data: dict[str, Any] = last["data"]
    return data


def _whole_times(mode: str, steady: _Measured, commands: _Commands) -> WholeTimes:
    return WholeTimes(
        mode=mode,
        frames=steady.end["frames"],
        size=tuple(steady.end["size"]),
        seconds=steady.seconds,
        finding=steady.spread("finding"),
        writing=steady.spread("writing"),
        parts=_parts(steady.passes[1:]),
        open_seconds=steady.opened["seconds"],
        first_seconds=steady.passes[0]["seconds"],
        command=Spread.of(commands.seconds),
        command_work=Spread.of(commands.work),
        runs_on=steady.opened["runs_on"],
        notes=steady.end["notes"],
        host_peak_bytes=steady.end["host_peak_bytes"],
        usage=steady.usage,
        command_usage=commands.usage,
    )


def _parts(runs: Sequence[Mapping[str, Any]]) -> list[PartTime]:
    def median(key: str, name: str) -> float:
        return Spread.of([run[key].get(name, 0.0) for run in runs]).median

    found = [PartTime(part.name, median("own", part.name), median("beside", part.name)) for part in PARTS]
    return [part for part in found if part.seconds or part.beside]
