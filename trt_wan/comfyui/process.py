"""ComfyUI's side of the process that computes (child.py)."""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, cast

from trt_wan.comfyui.messages import Done, Failed, Request, Stop, Taken, read, write
from trt_wan.comfyui.shared_frames import Frames
from trt_wan.errors import InputError, OutputError, Stopped, TrtWanError, UsageError, WeightsError
from trt_wan.runtime.closing import Closing
from trt_wan.runtime.events import Event, Progress, silent
from trt_wan.worker.worker import WorkerDied

GRACE = 60.0  # seconds for a request that was stopped to end by itself: a step of the 14B takes up to 30
LOOK = 0.1  # seconds between looks at ComfyUI's interrupt
# The model stays usable after these.
HARMLESS = {error.code for error in (Stopped, UsageError, InputError, WeightsError, OutputError)}
DIED = "ComfyUI's log may say more. The next run starts another process."


class RequestFailed(TrtWanError):
    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message, failed.hint)
        self.code = failed.code


class Process(Closing):
    """Starts with the first request and stays, with its open model, until `close`, an error after which the
    model cannot be used, or the end of ComfyUI.

    `grace` is the time in seconds that a stopped request has before its process is killed.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self._grace = grace
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self.holder: object = None  # the model that asked last

    @property
    def id(self) -> int | None:
        return None if self._running is None else self._running.popen.pid

    def ask(
        self,
        request: Request,
        progress: Progress = silent,
        should_stop: Callable[[], bool] = lambda: False,
        holder: object = None,
    ) -> Any:
        """The answer to `request`, its Frames copied. Raises WorkerDied, RequestFailed with the error of the
        process, Stopped after `should_stop`, and exceptions of `progress`, as of the progress bar after
        an interrupt; the request is stopped then.
        """
        raised: list[Exception] = []

        def watched(event: Event) -> None:
            if not raised:
                try:
                    progress(event)
                except Exception as error:
                    raised.append(error)

        with self._lock:
            self.holder = holder
            if self._running is None or self._running.popen.poll() is not None:
                self.close()
                self._running = _Running()
            try:
                answer = self._running.talk(
                    request, watched, lambda: bool(raised) or should_stop(), self._grace
                )
            except BaseException as error:
                self.close()
                raise (raised[0] if raised else error) from None
            if isinstance(answer, Failed) and answer.code not in HARMLESS:
                self.close()
        if raised:
            raise raised[0]
        if isinstance(answer, Done):
            return answer.value
        raise Stopped(answer.message) if answer.code == Stopped.code else RequestFailed(answer)

    def close(self) -> None:
        """Ends the process at once, which frees all its memory. May be called from any thread."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


class _Running(Closing):
    """One process, from its start to its end."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="trt-wan-comfyui-"))
        # -P: the folder that ComfyUI was started in has modules with names such as utils.
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "trt_wan.comfyui.child", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answers: SimpleQueue[Any] = SimpleQueue()  # None: there are no more
        threading.Thread(target=self._read, daemon=True).start()

    def talk(
        self, request: Request, progress: Progress, should_stop: Callable[[], bool], grace: float
    ) -> Done | Failed:
        self._send(request)
        deadline = None
        while True:
            if deadline is None and should_stop():
                deadline = time.monotonic() + grace
                self._send(Stop())
            if deadline is not None and time.monotonic() >= deadline:
                raise Stopped("The job was stopped.")
            try:
                answer = self._answers.get(timeout=LOOK)
            except Empty:
                continue
            if answer is None:
                raise WorkerDied(self.popen.wait(), DIED)
            if isinstance(answer, Failed):
                return answer
            if isinstance(answer, Done):
                value = _copied(answer.value)
                self._send(Taken())
                self._answers.get()  # None, or Done when the frames are freed
                return Done(value)
            progress(answer)

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # it has ended, which `talk` reads
            write(message, cast(BinaryIO, self.popen.stdin))

    def _read(self) -> None:
        with suppress(EOFError):
            while True:
                self._answers.put(read(cast(BinaryIO, self.popen.stdout)))
        self._answers.put(None)


def _copied(value: Any) -> Any:
    if isinstance(value, Frames):
        return value.copied()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return value
