"""The preprocessing measured from its networks to the whole command, each in its own process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trt_wan import __version__
from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.machine.monitor import Monitor, Usage
from trt_wan.benchmarks.measure.processes import Child, refusal
from trt_wan.benchmarks.measure.sample_clips import write_driving, write_reference
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import with_graphs
from trt_wan.benchmarks.preprocess.child import MOST_FRAMES, Spec, What
from trt_wan.benchmarks.preprocess.result import (
    InsideTime,
    NetworkTimes,
    PartTime,
    PreprocessResult,
    WholeTimes,
)
from trt_wan.benchmarks.work.graph_flops import file_flops
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.preprocess.clips.artifacts import KEYPOINTS
from trt_wan.preprocess.stages import Executor
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.video.reader import Clip

CHILD = "trt_wan.benchmarks.preprocess.child"
Modes = Literal["animate", "replace", "both"]


@dataclass(frozen=True)
class Options:
    """The user's files. The default clip is the sample's, `frames` long. SAM2 is for the mode replace."""

    detector: Path
    pose: Path
    sam2: Path | None = None
    clip: Path | None = None
    size: tuple[int, int] = (832, 480)
    frames: int = 77
    executor: Executor = "auto"
    mode: Modes = "both"
    repeat: int = 5

    def __post_init__(self) -> None:
        if self.mode == "replace" and self.sam2 is None:
            raise UsageError("The mode replace needs SAM2.", "Add --sam2 FILE, or use --mode animate.")

    @property
    def modes(self) -> tuple[What, ...]:
        if self.mode == "both":
            return ("animate", "replace") if self.sam2 else ("animate",)
        return (self.mode,)

    @property
    def files(self) -> dict[What, Path]:
        files: dict[What, Path] = {"detector": self.detector, "pose": self.pose}
        return files | ({"sam2": self.sam2} if self.sam2 and "replace" in self.modes else {})


def run_bench(
    options: Options,
    progress: Progress = silent,
    keep: Callable[[PreprocessResult], object] = lambda unfinished: None,
) -> PreprocessResult:
    """`keep` gets the figures so far after every whole preprocessing and every network."""
    card = read_card()
    with tempfile.TemporaryDirectory(prefix="trt-wan-bench-") as temporary:
        folder = Path(temporary)
        clip = options.clip or write_driving(folder / "driving.mp4", *options.size, options.frames)
        reference = write_reference(folder / "reference.png", *options.size)
        with Clip(clip) as read:
            frames, size = read.frames, (read.width, read.height)
        progress(Note(f"{card.hardware}; {frames} frames, {size[0]}x{size[1]}"))
        joints = folder / options.modes[0] / KEYPOINTS

        def spec(what: What) -> Spec:
            return Spec(
                what,
                clip=str(clip),
                reference=str(reference),
                output=str(folder / what),
                detector=str(options.detector),
                pose=str(options.pose),
                sam2=str(options.sam2 or ""),
                keypoints=str(joints),
                size=options.size,
                executor=options.executor,
                repeat=options.repeat,
            )

        def measured(what: What, about: str) -> _Measured:
            progress(Note(about))
            return with_graphs(lambda: _measured(spec(what)), progress)

        whole: list[WholeTimes] = []
        networks: list[NetworkTimes] = []

        def found(finished: bool) -> PreprocessResult:
            return PreprocessResult(
                sources={str(name): str(path) for name, path in options.files.items()},
                clip=str(options.clip) if options.clip else "the sample, scaled, back and forth",
                frames=frames,
                size=size,
                executor=options.executor,
                card=card,
                networks=list(networks),
                whole=list(whole),
                not_measured=_not_measured(options, card, frames),
                version=__version__,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                finished=finished,
            )

        for mode in options.modes:
            steady = measured(mode, f"a whole preprocessing, mode {mode}, stages opened")
            progress(Note(f"the whole command, mode {mode}"))
            whole.append(_whole_times(mode, steady, _commands(spec(mode))))
            opened, command = whole[-1].seconds.median, whole[-1].command.median
            progress(Note(f"  {opened:.3f} s with stages opened, {command:.3f} s the whole command"))
            keep(found(finished=False))
        for name, path in options.files.items():  # after the whole ones, whose joints SAM2 is prompted with
            networks.append(_network_times(name, path, measured(name, f"{name}: {path.name}")))
            progress(Note(f"  {networks[-1].rate:.1f} frames/s"))
            keep(found(finished=False))
        return found(finished=True)


def _not_measured(options: Options, card: Card, frames: int) -> list[str]:
    found = []
    if card.gpu is None:
        found.append("device memory: no GPU driver")
    if frames > MOST_FRAMES:
        found.append(f"networks on more than the first {MOST_FRAMES} frames")
    if options.mode == "both" and options.sam2 is None:
        found.append("SAM2 and the mode replace: no --sam2")
    return found


@dataclass(frozen=True)
class _Measured:
    """The answers of one child."""

    opened: dict[str, Any]
    passes: list[dict[str, Any]]  # the warm-up first
    end: dict[str, Any]
    usage: Usage

    def spread(self, key: str = "seconds") -> Spread:
        return Spread.of([run[key] for run in self.passes[1:]])


def _measured(spec: Spec) -> _Measured:
    with Monitor.open() as monitor, Child(CHILD, [spec.to_json()], os.environ) as child:
        opened = child.read()
        passes = []
        while (line := child.read())["event"] == "pass":
            passes.append(line)
    return _Measured(opened, passes, line, monitor.usage())


def _network_times(name: str, path: Path, found: _Measured) -> NetworkTimes:
    opened, end = found.opened, found.end
    return NetworkTimes(
        name=name,
        title=path.name,
        frames=opened["frames"],
        seconds=found.spread(),
        by_arrays=Spread.of(end["by_arrays"]) if end["by_arrays"] else None,
        open_seconds=opened["seconds"],
        first_seconds=found.passes[0]["seconds"],
        flops=file_flops(Path(opened["file"]), opened["input"]) if "file" in opened else None,
        batch=opened["batch"],
        runs_on=opened["runs_on"],
        found=end["found"],
        prompted=end.get("prompted"),
        inside=[InsideTime(**row) for row in end.get("inside", ())],
        notes=end["notes"],
        host_peak_bytes=end["host_peak_bytes"],
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
    seconds, work = [], []
    with Monitor.open() as monitor:
        for _ in range(spec.repeat + 1):
            start = time.perf_counter()
            command = [sys.executable, "-m", "trt_wan", "preprocess", *arguments]
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
        raise TrtWanError(f"The preparation ended with {ran.returncode}.", ran.stderr.strip()[-300:])
    data: dict[str, Any] = last["data"]
    return data


def _whole_times(mode: str, steady: _Measured, commands: _Commands) -> WholeTimes:
    return WholeTimes(
        mode=mode,
        frames=steady.end["frames"],
        size=tuple(steady.end["size"]),
        seconds=steady.spread(),
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

    names = dict.fromkeys(name for run in runs for key in ("own", "beside") for name in run[key])
    return [PartTime(name, median("own", name), median("beside", name)) for name in names]
