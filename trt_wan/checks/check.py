"""A line of `trt-wan doctor`."""

from dataclasses import dataclass
from typing import Literal

from trt_wan.errors import TrtWanError

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Check:
    """`text` names the thing found or, for a choice, the reason. With a fault `trt-wan run` cannot work.
    Faults and warnings have a sentence, `fix`, and lines to paste, `commands`.
    """

    topic: str
    state: State
    text: str
    fix: str = ""
    commands: tuple[str, ...] = ()


def ok(topic: str, text: str) -> Check:
    return Check(topic, "ok", text)


def of_error(topic: str, error: TrtWanError, state: State = "fault") -> Check:
    """The error as a check: the first line of its hint, and the commands below."""
    first, *commands = error.hint.splitlines() or [""]
    return Check(topic, state, error.message, first, tuple(commands))
