"""Everything that can go wrong, on one screen.

    TrtWanError              a failure with a code, one sentence and the fix; exit code 1
    ├── UsageError           the command or its options are wrong; exit code 2
    ├── InputError           a clip or picture cannot be used (unreadable, empty, wrong size, wrong length)
    ├── WeightsError         a checkpoint is missing, is not what it should be, or lacks tensors
    ├── DownloadError        a published file cannot be fetched, or is not the one it should be
    ├── GraphError           a graph or engine is missing, stale or damaged: rebuild it
    ├── MemoryShort          the job does not fit in this machine's memory
    ├── GpuFault             the GPU or its driver failed while it computed
    ├── NotFinite            a network made a NaN or an infinity
    ├── EnvironmentBroken    packages that are missing or break each other
    ├── OutputError          the result cannot be written (folder, rights, full disk)
    └── Stopped              the user asked to stop (Ctrl-C); exit code 130

A user's mistake is one of these; an `assert` is a mistake of ours.
"""

import shlex
import unicodedata
from collections.abc import Iterable, Sequence

MOST_SHOWN = 40  # characters of a value in a message
LONGEST_MESSAGE = 400  # characters


def shell_command(command: Iterable[str]) -> str:
    """The command of trt-wan with these arguments, to be typed."""
    return shlex.join(("trt-wan", *command))


def with_commands(sentence: str, *commands: str) -> str:
    """A hint: a sentence, then each shell command on a line with nothing else, to be pasted."""
    return "\n".join((sentence, *commands))


def shown(value: object) -> str:
    """A value of the user's in a message: as it is, or its beginning where it is long. Without characters
    that a terminal would obey: records and files come from strangers too.
    """
    try:
        text = str(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    return "".join("�" if unicodedata.category(letter) == "Cc" else letter for letter in text)


def some_of(parts: Sequence[str], room: int = 200, most: int = 3) -> str:
    """The first of `parts`, at most `most` and `room` characters of them, and how many more there are."""
    told: list[str] = []
    for part in parts[:most]:
        if told and len("; ".join((*told, part))) > room:
            break
        told.append(part if len(part) <= room else f"{part[: room - 1]}…")
    more = len(parts) - len(told)
    return "; ".join((*told, f"{more} more") if more else told)


class TrtWanError(Exception):
    """`message` is one sentence about the fault, `hint` one about the cure.

    `command` is the cure for programs, where one exists: the arguments of `trt-wan`. A hint that is left out
    names it. Shell commands in a hint stand on lines of their own (`with_commands`).
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, hint: str = "", command: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or (with_commands("Run:", shell_command(command)) if command else "")
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled by its attributes: classes of errors differ in their arguments."""
        return _unpickled, (type(self), self.args, vars(self))

    def add_hint(self, more: str) -> None:
        """Appends lines to the hint."""
        self.hint = f"{self.hint}\n{more}" if self.hint else more


def tell_with(error: BaseException, more: str) -> None:
    """Adds lines that are told with the error: to a TrtWanError's hint, to any other as a note."""
    if isinstance(error, TrtWanError):
        error.add_hint(more)
    else:
        error.add_note(more)


def _unpickled(kind: type[TrtWanError], given: tuple[object, ...], values: dict[str, object]) -> TrtWanError:
    made = kind.__new__(kind, *given)
    vars(made).update(values)
    return made


class UsageError(TrtWanError):
    code = "usage"
    exit_code = 2


class InputError(TrtWanError):
    code = "input_unusable"


class WeightsError(TrtWanError):
    code = "weights_unusable"


class DownloadError(TrtWanError):
    code = "download_failed"


class GraphError(TrtWanError):
    code = "graph_unusable"


class MemoryShort(TrtWanError):
    code = "memory_short"


class GpuFault(TrtWanError):
    code = "gpu_fault"


class NotFinite(TrtWanError):
    code = "not_finite"


class EnvironmentBroken(TrtWanError):
    code = "environment_broken"


class OutputError(TrtWanError):
    code = "output_unwritable"


class Stopped(TrtWanError):
    code = "interrupted"
    exit_code = 130
