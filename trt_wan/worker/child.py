"""The process that runs the commands: `python -m trt_wan.worker.child`.

stdin has a JSON object per line:

    {"id": "video_1", "arguments": ["run", "character.png", "dance.mp4", "-o", "out.mp4"]}
    {"cancel": "video_1"}

stdout has the lines that each command prints with --json, each with the `id` of its command. A command
that is cancelled ends with the error `interrupted`, at its next event. When stdin ends, because the parent
has ended, the process ends at once: a finished window and its state are always whole on the disk.
"""

import json
import os
import signal
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import Any

import click

from trt_wan.cli.main import cli
from trt_wan.cli.report import JsonReport
from trt_wan.cli.session import Session
from trt_wan.errors import GpuFault, Stopped, TrtWanError, UsageError
from trt_wan.runtime.events import Event
from trt_wan.worker.kept_model import KeptModel

UNUSABLE = 70  # exit code of a process whose GPU context is lost (EX_SOFTWARE)


class ChannelReport(JsonReport):
    def __init__(self, channel: int, id: str, cancelled: set[str]) -> None:
        self._channel, self._id, self._cancelled = channel, id, cancelled
        self.error: TrtWanError | None = None

    def progress(self, event: Event) -> None:
        super().progress(event)
        if self._id in self._cancelled:
            raise Stopped("The job was cancelled.")

    def failed(self, error: TrtWanError) -> None:
        self.error = error
        super().failed(error)

    def _line(self, value: dict[str, Any]) -> None:
        super()._line({"id": self._id, **value})

    def _print(self, line: str) -> None:
        data = f"{line}\n".encode()
        while data:
            data = data[os.write(self._channel, data) :]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this
    channel = os.dup(1)
    os.dup2(2, 1)  # libraries that print write into the log
    commands: SimpleQueue[dict[str, Any]] = SimpleQueue()
    cancelled: set[str] = set()
    threading.Thread(target=_read, args=(commands, cancelled), daemon=True).start()
    models = KeptModel()
    while True:
        command = commands.get()
        report = ChannelReport(channel, command["id"], cancelled)
        run(command["arguments"], Session(report, models), report)
        if isinstance(report.error, GpuFault):
            os._exit(UNUSABLE)


def run(arguments: list[str], session: Session, report: ChannelReport) -> None:
    """Runs one command and reports its outcome, also after a mistake in trt-wan."""
    try:
        cli.main(arguments, prog_name="trt-wan", standalone_mode=False, obj=session)
    except click.UsageError as error:
        report.failed(UsageError(error.format_message()))
    except SystemExit:
        pass  # reported
    except BaseException as error:
        traceback.print_exc()
        if report.error is None:
            report.failed(TrtWanError(f"{type(error).__name__}: {error}", "This is a mistake in trt-wan."))


def _read(commands: SimpleQueue[dict[str, Any]], cancelled: set[str]) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "cancel" in message:
            cancelled.add(message["cancel"])
        else:
            commands.put(message)
    os._exit(0)


if __name__ == "__main__":
    main()
