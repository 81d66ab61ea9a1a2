"""The other ranks' processes, started and watched by rank 0, which is the process that the user started.

They are started with the model, and end with it, with this process, or with the first of them that ends. They
open the same files with the same settings, and compute the same jobs.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from signal import Signals
from typing import Any

from trt_wan.errors import GpuFault, TrtWanError, UsageError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.parallel.ranks import HALF, Links, RankLost, Ranks
from trt_wan.runtime.parallel.ranks import SECONDS as ANSWER_SECONDS
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.window_state import WindowState

SECONDS = 5.0  # for a process to end, when its sockets are closed


class Group:
    """`ranks` is this process's place. `close` ends the others."""

    def __init__(self, files: WeightFiles, settings: Settings, seconds: float = ANSWER_SECONDS) -> None:
        """`seconds` are those to wait for a rank that lives."""
        count = settings.gpus
        if not hasattr(os, "memfd_create"):
            raise UsageError("Several GPUs need Linux.", "Leave --gpus out.")
        pairs: dict[tuple[int, int], tuple[Connection, Connection]] = {
            (i, j): Pipe() for j in range(count) for i in range(j)
        }
        memories = [os.memfd_create(f"trt-wan-rank-{rank}") for rank in range(count)]
        for memory in memories:
            os.truncate(memory, 2 * HALF)  # pages that are never written take no memory
        self._controls: dict[int, Connection] = {}
        self._lifelines: list[int] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._closing = False
        self.abandon: Callable[[], None] = lambda: None  # ends this process's waits for lost ranks
        self.lost: RankLost | None = None
        self.has_begun = False  # a job, at any time
        try:
            for rank in range(1, count):
                ends = {
                    other: pairs[min(rank, other), max(rank, other)][rank > other]
                    for other in range(count)
                    if other != rank
                }
                self._start(rank, count, ends, memories)
            for (i, _), (mine, other) in pairs.items():
                other.close()
                if i:
                    mine.close()
            links = Links({rank: pairs[0, rank][0] for rank in range(1, count)}, memories)
            self.ranks = Ranks(0, count, links, seconds)
        except BaseException:
            self.close()
            raise
        finally:
            for memory in memories:
                os.close(memory)  # it is mapped
        setup = pickle.dumps((files, settings))
        for rank, control in self._controls.items():
            with suppress(OSError):  # it has ended: the first job tells why
                control.send_bytes(setup)
            threading.Thread(target=self._watch, args=(rank,), daemon=True).start()

    def _start(self, rank: int, count: int, ends: dict[int, Connection], memories: list[int]) -> None:
        control, others = Pipe()
        reading, writing = os.pipe()  # its end tells the process that this one has ended
        sockets = ",".join(f"{other}:{end.fileno()}" for other, end in ends.items())
        held = ",".join(map(str, memories))
        arguments = map(str, (rank, count, others.fileno(), reading, sockets, held))
        self._processes[rank] = subprocess.Popen(
            (sys.executable, "-P", "-m", "trt_wan.runtime.parallel.child", *arguments),
            pass_fds=(others.fileno(), reading, *(end.fileno() for end in ends.values()), *memories),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )
        self._controls[rank] = control
        self._lifelines.append(writing)
        others.close()
        os.close(reading)

    def begin(
        self, job: Job, begin_from: WindowState | None, endings: Mapping[int, Array], live: Clips | None
    ) -> None:
        """Has the other ranks compute a job from now on. `endings` are its clips'; `live` are those that no
        file has (relay.py). Raises RankLost.
        """
        self.has_begun = True
        order = pickle.dumps((job, begin_from, endings, live))
        for rank, control in self._controls.items():
            try:
                control.send_bytes(order)
            except OSError:
                raise RankLost(rank, "has ended") from None

    def was_lost(self) -> bool:
        """Whether a rank has ended after a job. Call between jobs: then no rank has anything to tell."""
        return self.has_begun and any(control.poll(0) for control in self._controls.values())

    def check(self) -> None:
        """Raises RankLost if a rank is lost."""
        if self.lost is not None:
            raise self.lost

    def reason(self, lost: RankLost) -> TrtWanError:
        """The error of a rank that has told one, or how the process ended whose loss the others noticed."""
        noticed = {0: lost}
        for rank, control in self._controls.items():
            with suppress(EOFError, OSError):
                if control.poll(0):  # a process tells before it ends
                    told = pickle.loads(control.recv_bytes())
                    if not isinstance(told, RankLost):
                        return _told(rank, told)
                    noticed[rank] = told
        lost = next((each for each in noticed.values() if each.rank not in noticed), lost)
        with suppress(subprocess.TimeoutExpired):
            if lost.rank in self._processes and lost is not self.lost:
                lost = RankLost(lost.rank, _ending(self._processes[lost.rank].wait(SECONDS)))
        return lost

    def close(self) -> None:
        """Ends the other processes. A second call does nothing."""
        self._closing = True
        self.abandon()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        for control in self._controls.values():
            control.close()
        while self._lifelines:
            os.close(self._lifelines.pop())
        if hasattr(self, "ranks"):
            self.ranks.close()

    def _watch(self, rank: int) -> None:
        code = self._processes[rank].wait()
        if self._closing or self.lost is not None:
            return
        self.lost = RankLost(rank, _ending(code))
        for process in self._processes.values():
            process.kill()
        self.abandon()


def _ending(code: int) -> str:
    return f"was ended by {Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"


def _told(rank: int, told: Any) -> TrtWanError:
    """The error of another rank, as it would be if this one had it."""
    if isinstance(told, TrtWanError):
        told.message = f"GPU {rank}: {told.message}"
        told.args = (told.message,)
        return told
    return GpuFault(f"GPU {rank}: {told}", "This is a mistake in trt-wan; please report it.")
