"""Ctrl-C, SIGTERM (kill, a scheduler) and SIGHUP (a closed terminal) end every command alike: one sentence,
exit code 130, finished work kept. A second signal ends it at once. Signals that are ignored, as under nohup,
stay so.

Imports little: `end_at_once` is the first act of the program.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_wan.runtime.events import Event, Progress

EXIT_CODE = 130
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], None]


def end_at_once() -> None:
    """For the time before and after a command, in which there is nothing to keep."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


@contextmanager
def interrupts() -> Iterator[None]:
    """In this block the first signal raises KeyboardInterrupt in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _after_the_first(number)
        raise KeyboardInterrupt

    with _handled_by(interrupt), _raised_again(interrupt):
        yield


@contextmanager
def ignored() -> Iterator[None]:
    """In this block signals do nothing: the result is there, and is told in a moment."""
    with _handled_by(signal.SIG_IGN):
        yield


def forget() -> None:
    """Call when a KeyboardInterrupt has been handled. CPython remembers one that ended code of `exec`, as
    of a dataclass, and then ends the process by SIGINT in place of its exit code. The next `exec` makes it
    forget (`unhandled_keyboard_interrupt` in pythonrun.c, 3.11).
    """
    exec("")


def end_with(code: int) -> None:
    """For the end of the program, whose outcome is told: a signal ends it at once with that. A stopped
    command ends here: Python would wait for threads, and these may wait for the stopped work.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream is not None:  # None: it was closed when the program began
                stream.flush()
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    if code == EXIT_CODE:
        os._exit(code)


class Stop:
    """`asked` is given to a job, which asks it at points where nothing is lost."""

    def __init__(self) -> None:
        self._pressed = self._writing = False

    def asked(self) -> bool:
        return self._pressed

    def watching(self, progress: "Progress") -> "Progress":
        """`progress`, for a job that no longer asks when it writes its last frames."""
        from trt_wan.runtime.events import StageStarted

        def watched(event: "Event") -> None:
            self._writing = self._writing or (isinstance(event, StageStarted) and event.stage == "write")
            progress(event)

        return watched

    def press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            _after_the_first(number)
            raise KeyboardInterrupt
        self._pressed = True
        if hasattr(signal, "SIGHUP") and number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # a terminal and its shell send it both
        now = "Finishing the video: its last frames are being written"
        later = "Stopping as soon as nothing is lost"
        _say(f"\n{now if self._writing else later}; press Ctrl-C again to stop at once.\n")


@contextmanager
def stop_at_a_safe_point() -> Iterator[Stop]:
    """In this block the first signal is a wish; the second raises KeyboardInterrupt in the main thread."""
    stop = Stop()
    with _handled_by(stop.press):
        yield stop


@contextmanager
def _raised_again(interrupt: Handler) -> Iterator[None]:
    """Raises an interrupt again that came while a destructor ran: Python prints and drops it there."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            before(dropped)
            return
        signal.signal(signal.SIGINT, interrupt)
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])  # when the destructor has ended
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a program that uses the commands
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def _after_the_first(number: int) -> None:
    end_at_once()
    if hasattr(signal, "SIGHUP") and number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    if "--json" in sys.argv:
        error = '{"code": "interrupted", "message": "Stopped at once.", "hint": ""}'
        _say(f'{{"schema": "trt-wan/1", "ok": false, "error": {error}}}\n', to=1)
    else:
        _say("Error: Stopped at once.\n")
    os._exit(EXIT_CODE)


def _say(text: str, to: int = 2) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(to, text.encode())
