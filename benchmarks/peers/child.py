"""A peer's process: builds the peer, warms it up, times its steps and answers in JSON.

    python -m trt_wan.benchmarks.peers.diffusers_peers fp8 --size 832x480 --window 77 --steps 6

With `--serve` it stays: every line on stdin is a number of steps to time, or "rest", and is answered by a
line of JSON. So the harness interleaves peers on one GPU. At rest a peer frees its weights' memory. Weights
are random and are filled again at the next request.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from trt_wan.benchmarks.peers.shape import Shape, add_shape_arguments, shape_from

WARM_UP = 2


class NotRun(Exception):
    """Raised with the reason why a peer cannot run here. A missing package counts too."""


class Peer(Protocol):
    @property
    def settings(self) -> Mapping[str, str]:
        """Everything that decides the speed, in words."""
        ...

    def warm_up(self) -> float | None:
        """Runs WARM_UP steps. Returns the seconds of the first, compilation included, or None if unknown."""
        ...

    def timed(self, steps: int) -> list[float]:
        """Returns the seconds of each of `steps` consecutive steps."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Returns peak bytes since the start, by the name of the counter."""
        ...

    def parts(self) -> Mapping[str, float]:
        """Returns the seconds of interesting parts, each measured alone."""
        ...

    def rest(self) -> None: ...

    def wake(self) -> None: ...


Make = Callable[[Shape, str, argparse.Namespace], Peer]  # shape, device and parsed arguments

AddArguments = Callable[[argparse.ArgumentParser], None]


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For peers without arguments."""


@dataclass(frozen=True)
class PeerResult:
    """A peer's answer. `seconds` are those of consecutive steps after the warm-up."""

    peer: str
    shape: dict[str, Any]
    ran: bool = True
    reason: str = ""  # if it did not run
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    build_seconds: float = 0.0  # imports, model, weights
    first_step_seconds: float | None = None  # with compilation, where there is one
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    part_seconds: Mapping[str, float] = field(default_factory=dict)


def main(
    name: str, make: Make, add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m trt_wan.benchmarks.peers.{name}")
    add_shape_arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--json", action="store_true", help="the result as a line of JSON")
    parser.add_argument("--serve", action="store_true", help="answer lines of stdin until they end")
    add_arguments(parser)
    options = parser.parse_args()
    shape = shape_from(options)

    def answer(result: PeerResult) -> None:
        if options.json or options.serve:
            print(json.dumps(asdict(result)), file=stdout, flush=True)
        else:
            print(as_text(result), file=stdout, flush=True)

    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, and stdout carries the result only
        try:
            start = time.perf_counter()
            peer = make(shape, options.device, options)
            build_seconds = time.perf_counter() - start
            made = PeerResult(
                name,
                asdict(shape),
                settings=peer.settings,
                build_seconds=build_seconds,
                first_step_seconds=peer.warm_up(),
            )
            if options.serve:
                answer(made)
                serve(peer, made, answer)
            else:
                answer(measured(peer, made, options.steps))
        except (NotRun, ModuleNotFoundError) as error:
            answer(PeerResult(name, asdict(shape), ran=False, reason=str(error)))


def serve(peer: Peer, made: PeerResult, answer: Callable[[PeerResult], None]) -> None:
    resting = False
    for line in sys.stdin:
        if line.strip() == "rest":
            peer.rest()
            resting = True
            answer(made)
            continue
        if resting:
            peer.wake()
            peer.timed(WARM_UP)
            resting = False
        answer(measured(peer, made, int(line)))


def measured(peer: Peer, made: PeerResult, steps: int) -> PeerResult:
    seconds = peer.timed(steps)
    memory = peer.memory()  # before `parts`, which runs more than a step
    return replace(made, seconds=seconds, memory_bytes=memory, part_seconds=peer.parts())


def as_text(result: PeerResult) -> str:
    if not result.ran:
        return f"{result.peer}: not run: {result.reason}"
    first = result.first_step_seconds
    start = f"built in {result.build_seconds:.1f} s" + (f", first step {first:.1f} s more" if first else "")
    lines = [
        f"{result.peer}: {np.median(result.seconds):.3f} s/step, median of {len(result.seconds)}",
        f"  {start}",
        *(f"  {name}: {seconds * 1e3:.1f} ms" for name, seconds in result.part_seconds.items()),
        *(f"  {name}: {size / 1e9:.2f} GB" for name, size in result.memory_bytes.items()),
        *(f"  {name}: {value}" for name, value in result.settings.items()),
    ]
    return "\n".join(lines)
