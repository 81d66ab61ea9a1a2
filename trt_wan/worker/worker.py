"""The parent's side of the process that runs commands (child.py).

One thread runs commands, one at a time; any other may cancel. A process that ends in the middle of a command
raises WorkerDied; the next command starts another.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.closing import Closing

Line = dict[str, Any]
GRACE = 20.0  # seconds for a cancelled command to end by itself
SIGNALS = {9: "it was killed, as the system does when the memory is full", 11: "a segmentation fault"}


class WorkerDied(TrtWanError):
    code = "worker_died"

    def __init__(self, returncode: int, hint: str = "The server's log may say more.") -> None:
        self.returncode = returncode
        signal = -returncode
        why = SIGNALS.get(signal, f"signal {signal}") if returncode < 0 else f"exit code {returncode}"
        super().__init__(f"The process that computes the video ended ({why}).", hint)


class Runs(Protocol):
    """A Worker, or an actor of Ray that has one."""

    def run(self, id: str, arguments: Sequence[str], on_event: Callable[[Line], None]) -> Line: ...

    def cancel(self, id: str) -> None: ...

    def close(self) -> None: ...

    @property
    def starts(self) -> int: ...

    @property
    def is_gone(self) -> bool:
        """Whether it runs nothing more, as when its machine was lost."""
        ...


class Worker(Closing):
    is_gone = False  # another process takes the place of one that died

    def __init__(self, environment: Mapping[str, str] = {}) -> None:  # noqa: B006  (never changed)
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self._write = threading.Lock()
        self._kill: threading.Timer | None = None
        self._running: str | None = None
        self.starts = 0

    def run(self, id: str, arguments: Sequence[str], on_event: Callable[[Line], None]) -> Line:
        """Runs `trt-wan ARGUMENTS` and returns the last line of its --json: `ok` with `data`, or `error`.
        `on_event` gets the lines before it. Raises WorkerDied.
        """
        with closing(self.lines(id, arguments)) as lines:
            for line in lines:
                if "schema" in line:
                    return line
                on_event(line)
        raise AssertionError("no last line")

    def lines(self, id: str, arguments: Sequence[str]) -> Generator[Line, None, None]:
        """Runs `trt-wan ARGUMENTS` and yields the lines of its --json. Raises WorkerDied."""
        process = self._ready()
        with self._write:
            self._running = id
        try:
            self._send({"id": id, "arguments": list(arguments)})
            assert process.stdout is not None
            for text in process.stdout:
                if not text.endswith("\n"):
                    break  # the process died in the middle of it
                line = json.loads(text)
                if line["id"] != id:
                    continue
                yield line
                if "schema" in line:
                    return
            raise WorkerDied(process.wait())
        except BrokenPipeError as error:
            raise WorkerDied(process.wait()) from error
        finally:
            with self._write:
                self._running = None
                if self._kill is not None:
                    self._kill.cancel()
                    self._kill = None

    def cancel(self, id: str) -> None:
        """Ends the command `id`, if it is the running one; its process too if that takes too long."""
        with self._write:
            process = self._process
            if process is None or self._running != id or self._kill is not None:
                return
            self._kill = threading.Timer(GRACE, process.kill)
            self._kill.daemon = True
            self._kill.start()
        try:
            self._send({"cancel": id})
        except (BrokenPipeError, ValueError):
            pass  # it has ended

    def close(self) -> None:
        """Ends the process at once; its finished windows are on the disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trt_wan.worker.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=self._environment,
        )
        return self._process

    def _send(self, message: Line) -> None:
        with self._write:
            process = self._process
            assert process is not None and process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
