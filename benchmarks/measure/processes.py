"""Measured processes, which answer in lines of JSON on stdout: `Child` asks, `say` and `answering` answer.

One measurement per process keeps it from every other.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from signal import Signals
from types import TracebackType
from typing import Any

from trt_wan.benchmarks.measure.budget import PATIENCE, Budget
from trt_wan.errors import EnvironmentBroken, GpuFault, TrtWanError, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.events import Note, Progress

STDOUT = sys.stdout
MISSING = re.compile(r"ModuleNotFoundError: No module named '([^'.]+).*'")  # how a traceback ends


class NoAnswer(GpuFault):
    """A process was ended here because its answer took too long. After a budget that is no fault."""


def is_lost(error: TrtWanError, budget: Budget) -> bool:
    """Whether a row is missing because a rank or a process was lost. Other errors, too little memory for
    example, are results, and so is the end of the budget.
    """
    if type(error) in (TrtWanError, NoAnswer):
        return not budget.over
    return isinstance(error, GpuFault)


def killed(code: int, last: str) -> GpuFault:
    """The error for a process that signal `-code` ended; `last` is the end of its stderr."""
    name = Signals(-code).name
    if name == "SIGKILL":
        reason = "The likely reason is too little memory. Look at what is free and what the kernel says:"
        hint = f"{with_commands(reason, 'free -h', 'dmesg | tail')}\nThen run it again."
    else:
        hint = f"Run it again. {f'It said last: {last}' if last else ''}".strip()
    return GpuFault(f"The process that measured was ended by {name}.", hint)


def say(event: str, **values: Any) -> None:
    """Answers the harness."""
    print(json.dumps({"event": event, **values}), file=STDOUT, flush=True)


def answering(act: Callable[[], object]) -> None:
    """Runs `act` as a measured process: a TrtWanError is an answer, and libraries print to stderr."""
    sys.stdout = sys.stderr
    try:
        act()
    except TrtWanError as error:
        say("failed", code=error.code, message=error.message, hint=error.hint, command=error.command)


def refusal(answer: Mapping[str, Any]) -> TrtWanError:
    """The error another process raised: a user's mistake there is one here."""
    kinds = {kind.code: kind for kind in TrtWanError.__subclasses__()}
    return kinds.get(answer["code"], TrtWanError)(
        answer["message"], answer["hint"], tuple(answer.get("command", ()))
    )


def rows_of(
    module: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    not_measured: list[str],
    progress: Progress,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """The answers "row" of a child, as they come. A row with a `reason`, and a child that fails, go into
    `not_measured`; its answers "note" are reported, and "rows" names the rows to come. The end of the budget
    ends the child.
    """
    coming: list[str] = []

    def leave_out(text: str) -> None:
        not_measured.append(text)
        progress(Note(f"not measured: {text}"))

    try:
        with Child(module, arguments, env, budget.patience()) as child:
            while (answer := child.read())["event"] in ("rows", "row", "note"):
                if answer["event"] == "rows":
                    coming = answer["names"]
                elif answer["event"] == "note":
                    progress(Note(answer["text"]))
                else:
                    coming = [name for name in coming if name != answer["name"]]
                    if "reason" in answer:
                        leave_out(f"{answer['name']}: {answer['reason']}")
                    else:
                        yield answer
                child.patience = budget.patience()
    except TrtWanError as error:
        fix = f" {error.hint}" if isinstance(error, EnvironmentBroken) else ""
        for name in coming or [module.rpartition(".")[2]]:
            leave_out(f"{name}: {budget.over or error.message + fix}")


class Child:
    """A module in a new Python: lines in, lines of JSON out. stderr is kept for failures."""

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
        """Returns the next line of JSON. Raises TrtWanError with the end of stderr if the process ends first,
        EnvironmentBroken if it lacks a package, GpuFault if a signal ended it, and NoAnswer after `patience`
        seconds.

        Other lines are skipped: libraries in C print to stdout.
        """
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        watchdog = threading.Timer(self.patience, end)
        watchdog.start()
        try:
            line = next((text for text in self._process.stdout if text.startswith("{")), "")
        finally:
            watchdog.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = [text for text in self._log.read().splitlines() if text.strip()][-3:]
            if late.is_set():
                raise NoAnswer(
                    f"The process that measured did not answer for {self.patience:.0f} s.", "Run it again."
                )
            if code < 0:
                raise killed(code, " | ".join(last))
            if last and (missing := MISSING.fullmatch(last[-1])):
                raise EnvironmentBroken(
                    f"{missing[1]} is not installed (the extra bench).",
                    with_commands("Run:", install_command("bench")),
                )
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
        """Closes its stdin, which ends the process; after an error it is killed."""
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
