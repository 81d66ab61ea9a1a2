"""Kills `run`, `preprocess` and `build` at random moments, and checks that nothing is lost or wrong.

    python tests/kills.py --moments 1000 --workers 16 --out kills.json
    python tests/kills.py --moments 20 --kinds resume --kill-only --disks 0   # then run --resume: the same
    python tests/kills.py --moments 60 --kinds resume_hybrid,resume_context,resume_replace --kill-only

By hand (PATIENCE=600 on a busy machine); test_kills.py runs a few moments of each. A moment starts the
command in a folder of its own, sends SIGKILL, SIGTERM, SIGINT or SIGHUP after a random part of its time (with
`--by-events`, for a busy machine, of its events), checks what is on the disk, starts the same command again
and compares its result with that of a command that was left alone. The networks are tiny; people are made up.
One part of the `run` moments fills a small tmpfs in place of a signal, where this process may mount one.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Value
from pathlib import Path
from typing import Any

import av
import numpy as np
from tiny_job import TRT_WAN, prepare, write_sound

WINDOW, FRAMES = 13, 40  # four windows
SMALL_PARTS = ("--context-frames", str(WINDOW), "--context-overlap", "4")
LOOP = ("--window", str(WINDOW))
VIDEOS = {  # kinds that write a video: the options of `run`
    "run": LOOP,
    "resume": LOOP,
    "resume_hybrid": ("--window", "17", "--context", "uniform_standard", *SMALL_PARTS),  # three loop windows
    "resume_context": ("--context", "static_standard", *SMALL_PARTS),
    "resume_replace": (*LOOP, "--mode", "replace", "--overlap", "5"),
}
MISSING = ("head", "face_encoder", "patch_embed", "vae_decode_next", "context_kv")
BUILD = [*TRT_WAN, "build", "--model", "tiny", "--size", "64x48", "--window", str(WINDOW), "--json"]
KILL = signal.SIGKILL
SIGNALS = (KILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = float(os.environ.get("PATIENCE", 60))  # seconds that a signalled command may take to end
STOPPED = 130
EXISTS = re.compile("exists already|has src_.* already")


@dataclass(frozen=True)
class Base:
    """What the moments start from, and what they must end with."""

    folder: Path
    seconds: dict[str, float]  # of each command, left alone
    short_home: Path  # a cache that lacks a few graphs: a build of them alone is short
    options: tuple[str, ...] = ()  # more of `run`
    events: dict[str, int] = field(default_factory=dict)  # lines of each command, where they place a moment

    def command(self, kind: str, here: Path) -> list[str]:
        if kind == "build":
            return BUILD
        if kind == "preprocess":
            child = [sys.executable, str(Path(__file__).with_name("made_up_preprocess.py")), "preprocess"]
            files = [str(self.folder / "character.png"), str(self.folder / "dance.mp4")]
            job = ["--size", "64x48", "--mode", "replace", "--json"]
            return [*child, *files, "-o", str(here / "prepared"), *job]
        files = ["--inputs", str(self.folder / "clips"), "--weights", str(self.folder / "weights")]
        job = [*VIDEOS[kind], "--steps", "1", "--executor", "onnxruntime", "--json", *self.options]
        return [*TRT_WAN, "run", *files, *job, "-o", str(here / "out.mp4")]

    def whole(self, kind: str) -> Path:
        """The folder with the result of the command that was left alone."""
        return self.folder / _like(kind)

    def home(self, kind: str) -> Path:
        """The cache that a moment gets a copy of."""
        return self.short_home if kind == "build" else self.folder / "home"


def _like(kind: str) -> str:
    """The kind whose command is the same."""
    return "run" if kind == "resume" else kind


@dataclass
class Moment:
    kind: str
    signal: int
    part: float  # of the command's time
    returned: int | None = None
    windows: int = 0  # finished ones that the command reported
    kept: int = 0  # frames in partial files that play
    faults: list[str] = field(default_factory=list)

    def check(self, right: bool, fault: str) -> None:
        if not right:
            self.faults.append(fault)


def make_base(
    folder: Path, kinds: Sequence[str], options: tuple[str, ...] = (), by_events: bool = False
) -> Base:
    from made_clips import write_clip as write_driving
    from made_clips import write_reference

    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder / "clips", write_sound(folder / "tone.m4a", 2), FRAMES)
    write_reference(folder / "character.png", (128, 96))
    write_driving(folder / "dance.mp4", 60, codec="libx264", sound=True)
    home = folder / "home"
    environment = os.environ | {"TRT_WAN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    base, seconds = Base(folder, {}, home, options), {}
    events: dict[str, int] = {}
    subprocess.run([*TRT_WAN, "weights", "tiny", str(folder / "weights")], check=True, capture_output=True)
    for kind in dict.fromkeys(("build", *kinds)):
        whole = base.whole(kind)
        if not whole.exists():
            whole.mkdir()
            seconds[_like(kind)], events[_like(kind)] = _timed(base.command(kind, whole), environment)
        seconds[kind], events[kind] = seconds[_like(kind)], events[_like(kind)]
    short = Path(shutil.copytree(home, folder / "short-home"))
    for name in MISSING:
        next(short.glob(f"graphs/*-64x48x{WINDOW}-*/{name}.onnx")).unlink()
    if "build" in kinds:
        copy = Path(shutil.copytree(short, folder / "short-copy"))
        seconds["build"], events["build"] = _timed(BUILD, environment | {"TRT_WAN_HOME": str(copy)})
    return Base(folder, seconds, short, options, events if by_events else {})


def _timed(command: Sequence[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds, and lines of stdout."""
    start = time.perf_counter()
    ran = subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start, ran.stdout.count(b"\n")


def run_moment(base: Base, moment: Moment, here: Path) -> Moment:
    here.mkdir(parents=True)
    home = here / "home"
    shutil.copytree(base.home(moment.kind), home)
    environment = os.environ | {"TRT_WAN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = base.command(moment.kind, here)
    with (here / "stdout").open("wb") as out, (here / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, preexec_fn=_as_a_user_has_it
        )
        _wait_for(moment, base, process, here / "stdout")
        process.send_signal(moment.signal)
        try:
            moment.returned = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moment.faults.append(f"did not end in {PATIENCE:.0f} s")
    video = here / "out.mp4"
    result = {"preprocess": here / "prepared" / "src_ref.png", "build": None}.get(moment.kind, video)
    killed_late = moment.signal == KILL and result is not None and result.exists()
    finished = moment.returned == 0 or killed_late
    young = moment.part < 0.1  # Python itself was starting: no handler can be there yet
    ends = {0, STOPPED} | ({-moment.signal} if moment.signal == signal.SIGKILL or young else set())
    moment.check(moment.returned in ends, f"returned {moment.returned}")
    told = (here / "stderr").read_text(errors="replace")
    moment.check("Traceback" not in told, f"traceback: {told[-600:]}")
    CHECKS[moment.kind](base, moment, here, finished)
    kept = {path: _hash(path) for path in here.glob("out.partial*.mp4") if not finished and _played(path)}
    if moment.kind.startswith("resume"):
        command = [*command, "--resume"]
        kept = {}  # nothing may be left
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    there = again.returncode == 1 and finished and EXISTS.search(again.stdout) is not None
    moment.check(
        again.returncode == 0 or there, f"the next start returned {again.returncode}: {again.stdout[-600:]}"
    )
    CHECKS[moment.kind](base, Moment(moment.kind, 0, 1, faults=moment.faults), here, True)
    for path, digest in kept.items():
        moment.check(path.exists() and _hash(path) == digest, f"{path.name} was changed by the next start")
    kept_too = {path.with_name(f"{path.name}.state") for path in kept}
    for path in sorted(here.rglob("*")):
        moment.check(
            not kept_too.isdisjoint({path, path.parent}) or path in kept or not _is_leftover(path),
            f"left over: {path.relative_to(here)}",
        )
    if not moment.faults:
        shutil.rmtree(here)
    return moment


def _wait_for(moment: Moment, base: Base, process: "subprocess.Popen[bytes]", told: Path) -> None:
    """Returns when so much of the command's time has passed, or so many of its events and up to 0.3 s."""
    if moment.kind not in base.events:
        time.sleep(moment.part * base.seconds[moment.kind])
        return
    wanted = moment.part * base.events[moment.kind]
    while told.read_bytes().count(b"\n") < int(wanted) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(wanted % 1 * 0.3)


def _as_a_user_has_it() -> None:
    """Signals that are ignored where this script runs in the background act on the command."""
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


def check_run(base: Base, moment: Moment, here: Path, finished: bool) -> None:
    output, whole = here / "out.mp4", base.whole(moment.kind) / "out.mp4"
    moment.check(output.exists() == finished, f"finished: {finished}, final file: {output.exists()}")
    if output.exists():
        moment.check(_hash(output) == _hash(whole), "the final file is another one")
    if moment.signal == 0:
        return
    lines = (here / "stdout").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    done = [event["frames"] for event in events if event.get("event") == "WindowDone"]
    moment.windows = len(done)
    partials = [path for path in here.glob("*partial*") if path.suffix == ".mp4"]
    pictures = [_played(path) for path in partials]
    moment.kept = max(map(len, pictures), default=0)
    if not finished:
        moment.check(moment.kept >= sum(done), f"{moment.kept} of {sum(done)} finished frames kept")
    reference = _played(whole)
    for path, shown in zip(partials, pictures, strict=True):
        far = [float(np.abs(a - b).mean()) for a, b in zip(shown, reference, strict=False)]
        moment.check(max(far, default=0) < 6, f"{path.name} shows something else ({max(far, default=0):.1f})")


def check_preprocess(base: Base, moment: Moment, here: Path, finished: bool) -> None:
    """Files under final names are right; src_ref.png, without which clips do not count, comes last."""
    got, want = (_files(folder / "prepared") for folder in (here, base.whole("preprocess")))
    moment.check(got.items() <= want.items(), f"other files: {sorted(got.items() - want.items())}")
    moment.check(got == want or not finished and "src_ref.png" not in got, f"{sorted(got)} are there")


def _files(folder: Path) -> dict[str, str]:
    return {path.name: _hash(path) for path in folder.glob("*") if path.is_file()}


def check_build(base: Base, moment: Moment, here: Path, finished: bool) -> None:
    """A graph that counts as finished is right, also after SIGKILL: a later start loads no other."""
    whole, found = (_graphs(home) for home in (base.folder / "home", here / "home"))
    wrong = [name for name, digest in found.items() if whole.get(name) != digest]
    moment.check(not wrong, f"wrong graphs: {wrong[:3]}")
    if finished:  # the base may have sets of other sizes
        sets = {name.partition("/")[0] for name in found}
        of_them = [name for name in whole if name.partition("/")[0] in sets]
        moment.check(0 < len(found) == len(of_them), f"{len(found)} of {len(of_them)} graphs")
    moment.windows = len(found)


def _graphs(home: Path) -> dict[str, str]:
    """The hashes of the graphs that a run would load."""
    from trt_wan.engines.store.graphs import is_whole, read_manifest

    graphs = {}
    for path in (home / "graphs").glob("*/*.onnx"):
        if is_whole(path.parent, path.stem, read_manifest(path.parent)):
            graphs[f"{path.parent.name}/{path.name}"] = _hash(path)
    return graphs


CHECKS: dict[str, Callable[[Base, Moment, Path, bool], None]] = {
    **dict.fromkeys(VIDEOS, check_run),
    "preprocess": check_preprocess,
    "build": check_build,
}


def fill_a_disk(base: Base, here: Path, room: int) -> Moment:
    """`run` into a tmpfs of `room` bytes: one sentence, exit code 1, finished windows play if they fit."""
    moment = Moment("full disk", 0, room)
    here.mkdir(parents=True)
    with mounted_disk(here, room) as small:
        environment = os.environ | {"TRT_WAN_HOME": str(base.folder / "home"), "OMP_NUM_THREADS": "1"}
        command = base.command("run", small)
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        moment.returned = result.returncode
        done = sum(json.loads(s).get("frames", 0) for s in result.stdout.splitlines() if '"WindowDone"' in s)
        moment.windows = done
        told = json.loads(result.stdout.splitlines()[-1])
        if result.returncode == 0:
            moment.check(
                _hash(small / "out.mp4") == _hash(base.whole("run") / "out.mp4"), "the file is another one"
            )
            return moment
        moment.check(result.returncode == 1, f"returned {result.returncode}")
        moment.check("The disk is full" in told["error"]["message"], str(told))
        moment.check(not (small / "out.mp4").exists(), "a final file")
        partials = list(small.glob("*partial*.mp4"))
        moment.kept = max((len(_played(path)) for path in partials), default=0)
        named = all(str(path) in told["error"]["hint"] for path in partials)
        moment.check(named, f"{partials} not named in {told['error']['hint']}")
    return moment


@contextmanager
def mounted_disk(here: Path, room: int) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(here)])
    if mounted.returncode:
        raise PermissionError("a tmpfs cannot be mounted here")
    try:
        yield here
    finally:
        subprocess.run(["umount", str(here)], check=True)


def _is_leftover(path: Path) -> bool:
    return ".partial" in path.name or path.name.startswith((".making-", "."))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _played(path: Path) -> list[np.ndarray]:  # type: ignore[type-arg]
    """The frames that a player shows, as float32."""
    pictures = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pictures.append(frame.to_ndarray(format="gray").astype(np.float32))
    except av.FFmpegError:
        pass
    return pictures


def moments(
    count: int, kinds: Sequence[str], seed: int, signals: Sequence[signal.Signals] = SIGNALS
) -> list[Moment]:
    draw = random.Random(seed)
    numbers = [signals[i // len(kinds) % len(signals)] for i in range(count)]
    return [Moment(kinds[i % len(kinds)], number, draw.random()) for i, number in enumerate(numbers)]


def run_all(
    base: Base, todo: Sequence[Moment], folder: Path, workers: int, seconds: float = 86_400
) -> Iterator[Moment]:
    """The moments that end within `seconds`; each worker has its own cores, as a machine would be loaded."""
    end = time.monotonic() + seconds
    with ProcessPoolExecutor(workers, initializer=_on_own_cores, initargs=(Value("i", 0), workers)) as pool:
        futures = [pool.submit(run_moment, base, moment, folder / f"{i}") for i, moment in enumerate(todo)]
        try:
            for future in as_completed(futures, timeout=max(end - time.monotonic(), 0)):
                yield future.result()
        except TimeoutError:
            for future in futures:
                future.cancel()  # those under way end


def _on_own_cores(number: Any, workers: int) -> None:
    """Two cores or more of this machine for every worker and its commands."""
    with number.get_lock():
        place, number.value = number.value, number.value + 1
    cores = sorted(os.sched_getaffinity(0))
    share = max(2, len(cores) // workers)
    os.sched_setaffinity(0, {cores[(place * share + k) % len(cores)] for k in range(share)})


def report(done: Sequence[Moment]) -> dict[str, object]:
    bad = [moment for moment in done if moment.faults]
    return {
        "moments": dict(Counter(moment.kind for moment in done)),
        "returned": {kind: dict(Counter(str(m.returned) for m in done if m.kind == kind)) for kind in CHECKS},
        "stopped with finished windows": sum(
            m.windows > 0 and m.returned != 0 for m in done if m.kind in VIDEOS
        ),
        "faulty": len(bad),
        "faults": dict(Counter(f"{m.kind}: {fault[:200]}" for m in bad for fault in m.faults)),
        "first": [vars(moment) for moment in bad[:20]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=1000)
    parser.add_argument("--disks", type=int, default=20, help="sizes of a full tmpfs to try")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kinds", default="run,run,run,preprocess,preprocess,build")
    parser.add_argument("--seconds", type=float, default=86_400, help="stop starting moments after that time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-only", action="store_true", help="send SIGKILL and no other signal")
    parser.add_argument("--by-events", action="store_true", help="place moments by events, not by seconds")
    parser.add_argument("--options", default="", help="more options of run, such as '--overlap 5'")
    parser.add_argument("--folder", type=Path, default=Path("kills"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    base = make_base(given.folder / "base", kinds, tuple(shlex.split(given.options)), given.by_events)
    print(f"left alone: {base.seconds}", file=sys.stderr, flush=True)
    todo = moments(given.moments, kinds, given.seed, (KILL,) if given.kill_only else SIGNALS)
    done: list[Moment] = []
    for moment in run_all(base, todo, given.folder / "moments", given.workers, given.seconds):
        done.append(moment)
        if given.out is not None:  # a run that is cut off has told its moments so far
            given.out.write_text(json.dumps(report(done), indent=1, default=str))
    for i in range(given.disks if "run" in kinds else 0):
        size = (base.whole("run") / "out.mp4").stat().st_size
        done.append(fill_a_disk(base, given.folder / f"disk{i}", 4096 + i * 2 * size // max(given.disks, 1)))
    text = json.dumps(report(done), indent=1, default=str)
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
