"""The clips of a prepared folder, written side by side: each has a thread that makes its pictures and encodes
them, a few frames behind whoever gives them out.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from trt_wan.preprocess.clips.artifacts import ClipWriter
from trt_wan.runtime.video.reader import Picture

BEHIND = 2  # frames that wait for a clip's thread, and so are in memory


class ClipSet:
    """A context manager for the threads of writers, which are by name and which somebody else closes."""

    def __init__(self, writers: Mapping[str, ClipWriter]) -> None:
        self._writers = writers
        self._waiting: dict[str, deque[Future[None]]] = {name: deque() for name in writers}

    def write(self, pictures: Mapping[str, Callable[[], Picture]]) -> None:
        """The next picture of every clip, made in the clip's thread. Raises what went wrong before."""
        assert pictures.keys() == self._writers.keys(), f"{pictures.keys()} for {self._writers.keys()}"
        for name, picture in pictures.items():
            waiting = self._waiting[name]
            while len(waiting) >= BEHIND:
                waiting.popleft().result()
            waiting.append(self._threads[name].submit(_write, self._writers[name], picture))

    def finish(self, frames: int) -> None:
        """Every clip is whole. Raises what went wrong, when all threads have ended."""
        for name, writer in self._writers.items():
            self._waiting[name].append(self._threads[name].submit(_finish, writer, name, frames))
        futures = [future for waiting in self._waiting.values() for future in waiting]
        wait(futures)
        for future in futures:
            future.result()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._threads = {
            name: self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))
            for name in self._writers
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for waiting in self._waiting.values():
            for future in waiting:
                future.cancel()
        self._stack.__exit__(kind, error, trace)


def _write(writer: ClipWriter, picture: Callable[[], Picture]) -> None:
    writer.write(picture())


def _finish(writer: ClipWriter, name: str, frames: int) -> None:
    assert writer.frames == frames, f"{name} has {writer.frames} of {frames} frames"
    writer.finish()
