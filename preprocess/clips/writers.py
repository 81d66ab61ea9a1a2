"""The clips of a prepared folder, written side by side. Each clip has a thread that makes its pictures and
encodes them, a few frames behind the caller.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Self

from trt_wan.preprocess.observe import Observe, unobserved
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.video.writer_thread import Beside

BEHIND = 2  # frames that wait for a clip's thread, and as many for its encoder, and so are in memory

Work = Callable[[], None]


class ClipSet:
    """A context manager for the threads. The caller opens and closes the writers, which are by name."""

    def __init__(self, writers: Mapping[str, VideoWriter], observe: Observe = unobserved) -> None:
        self._writers, self._observe = writers, observe
        self._threads = {name: Beside(_do, room=BEHIND) for name in writers}
        self._opened = ExitStack()

    def write(self, pictures: Mapping[str, Callable[[], Picture]]) -> None:
        """Gives every clip's thread its next picture. Raises the error of an earlier picture."""
        assert pictures.keys() == self._writers.keys(), f"{pictures.keys()} for {self._writers.keys()}"
        with self._observe("wait for a clip"):
            for name, picture in pictures.items():
                self._threads[name].put(partial(self._write, self._writers[name], picture))

    def finish(self, frames: int) -> None:
        """Completes every clip. Raises the first error after all threads have ended."""
        with self._observe("wait for the last frames"):
            for name, writer in self._writers.items():
                self._threads[name].put(partial(self._finish, writer, name, frames))
            self._opened.close()

    def __enter__(self) -> Self:
        for thread in self._threads.values():
            self._opened.enter_context(thread)
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)  # type: ignore[arg-type]

    def _write(self, writer: VideoWriter, picture: Callable[[], Picture]) -> None:
        made = picture()
        with self._observe("encode"):
            writer.write(made)

    def _finish(self, writer: VideoWriter, name: str, frames: int) -> None:
        assert writer.frames == frames, f"{name} has {writer.frames} of {frames} frames"
        with self._observe("finish clips"):
            writer.finish()


def _do(work: Iterator[Work]) -> None:
    for task in work:
        task()
