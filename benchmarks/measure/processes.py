"""Child processes that answer line by line: how everything that is measured is kept from everything else."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from trt_wan.errors import TrtWanError

PATIENCE = 900  # seconds for one answer: a 14B that is compiled takes minutes


def refusal(answer: Mapping[str, Any]) -> TrtWanError:
    """Another process's error as it was raised there, so that a user's mistake stays one."""
    kinds = {kind.code: kind for kind in TrtWanError.__subclasses__()}
    return kinds.get(answer["code"], TrtWanError)(answer["message"], answer["hint"])


class Child:
    """A module of ours in a Python of its own: lines in, lines of JSON out, stderr kept for when it fails."""

    def __init__(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], patience: float = PATIENCE
    ) -> None:
        self.module, self.patience = module, patience
        self._log = tempfile.TemporaryFile("w+")
        self.started_at = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )

    def read(self) -> dict[str, Any]:
        """The next line of JSON. TrtWanError if there is none, with the end of what it wrote to stderr.

        Lines that are none are passed over: libraries in C print what they like.
        """
        assert self._process.stdout is not None
        watchdog = threading.Timer(self.patience, self._process.kill)
        watchdog.start()
        try:
            line = next((text for text in self._process.stdout if text.startswith("{")), "")
        finally:
            watchdog.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = [text for text in self._log.read().splitlines() if text.strip()][-3:]
            raise TrtWanError(
                f"{self.module} ended with {code} before it answered: {' | '.join(last) or 'no message'}"
            )
        answer: dict[str, Any] = json.loads(line)
        if answer.get("event") == "failed":
            raise refusal(answer)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says how
        return self.read()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Its stdin ends, which ends it; after an error it is ended at once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if error is not None:
            self._process.kill()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
