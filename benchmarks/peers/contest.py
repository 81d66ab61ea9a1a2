"""trt-wan and its peers on one machine, in turns: A B C, A B C, …"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from trt_wan.benchmarks.machine.card import read_gpu
from trt_wan.benchmarks.measure.measured_process import Spec, most_steps
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import OURS_MODULE, Rounds
from trt_wan.benchmarks.peers.table import PEERS, PeerRow
from trt_wan.benchmarks.report.times import PeerTimes
from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Note, Progress

MakeChild = Callable[[str, Sequence[str], Mapping[str, str]], Child]


@dataclass(frozen=True)
class Contest:
    steps: int = 20  # per round
    rounds: int = 1
    peers: tuple[str, ...] = ()
    peer_steps: int | None = None  # per round; None: as many as ours
    peer_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def take_turns(
    contest: Contest, spec: Spec, env: Mapping[str, str], progress: Progress, child: MakeChild = Child
) -> tuple[Rounds, Rounds, dict[str, Any], list[PeerTimes]]:
    """Seconds per step, the host's seconds per step, our profile, and the peers' times.

    Every process warms up anew at the start of its turn. Between turns we keep our memory, and a peer frees
    its weights' memory. In a single round we end before the first peer begins.
    """
    device = "cuda" if read_gpu() else "cpu"
    ours: Rounds = []
    host: Rounds = []
    arguments = ["steps", spec.with_steps(most_steps(contest.rounds, contest.steps)).to_json()]

    def our_turn(own: Child) -> None:
        answer = own.ask(str(contest.steps))
        ours.append(answer["seconds"])
        host.append(answer["host_seconds"])
        progress(Note(f"round {len(ours)}: trt-wan {Spread.of(ours[-1]).median:.3f} s/step"))

    def peer(name: str) -> "_Peer":
        row = PEERS[name]
        served = [*row.arguments, *spec.shape.arguments(), "--serve", "--device", device]
        progress(Note(f"starting {row.title}"))
        started = child(row.module, [*served, *contest.peer_arguments.get(name, ())], env)
        return _Peer(row, started, contest.peer_steps or contest.steps, progress)

    if contest.rounds == 1:  # one after the other: none holds memory that another needs
        with child(OURS_MODULE, arguments, env) as own:
            own.read()
            our_turn(own)
            profile = own.ask("")
        times = []
        for name in contest.peers:
            with peer(name) as one:
                one.take_turn()
                times.append(one.times())
        return ours, host, profile, times
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(child(OURS_MODULE, arguments, env))
        own.read()
        peers = []
        for name in contest.peers:
            peers.append(stack.enter_context(peer(name)))
            peers[-1].rest()  # before the next peer takes memory
        for _ in range(contest.rounds):
            our_turn(own)
            for one in peers:
                one.take_turn()
                one.rest()
        profile = own.ask("")
        return ours, host, profile, [one.times() for one in peers]


class _Peer:
    """A peer's process over all rounds. Its failure is its result and ends nothing else."""

    def __init__(self, row: PeerRow, child: Child, steps: int, progress: Progress) -> None:
        self.row, self.child, self.steps, self.progress = row, child, steps, progress
        self.rounds: Rounds = []
        self.last: dict[str, Any] = {}
        self.reason = ""

    def __enter__(self) -> "_Peer":
        self.child.__enter__()
        self._guarded(lambda: self._answer(self.child.read()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.__exit__(kind, error, trace)

    def rest(self) -> None:
        self._guarded(lambda: self.child.ask("rest"))

    def take_turn(self) -> None:
        def turn() -> None:
            self.last = self._answer(self.child.ask(str(self.steps)))
            self.rounds.append(self.last["seconds"])
            self.progress(Note(f"  {self.row.title} {Spread.of(self.rounds[-1]).median:.3f} s/step"))

        self._guarded(turn)

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

    @staticmethod
    def _answer(answer: dict[str, Any]) -> dict[str, Any]:
        if not answer["ran"]:
            raise TrtWanError(answer["reason"])
        return answer

    def _guarded(self, act: Callable[[], object]) -> None:
        """Runs `act`, unless the peer has failed before."""
        if self.reason:
            return
        try:
            act()
        except TrtWanError as error:
            self.reason = error.message
            self.progress(Note(f"  {self.row.title} not run: {self.reason}"))
