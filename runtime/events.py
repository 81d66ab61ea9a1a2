"""What a run reports: plain values handed to `progress(event)`. The library itself prints nothing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStarted:
    """A stage of the pipeline begins: weights, text, image, condition, denoise, decode, write."""

    stage: str
    window: int = 0  # 1-based; 0 where the stage is not part of a window
    windows: int = 0


@dataclass(frozen=True)
class StageProgress:
    """`done` of the `total` frames of a stage have come; said a few times per stage."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """One denoising step is computed, in `seconds`; the host had asked for all of it after `host_seconds`.
    `eta` counts the remaining steps of all windows, in seconds.
    """

    window: int
    windows: int
    step: int
    steps: int
    seconds: float
    host_seconds: float
    eta: float


@dataclass(frozen=True)
class WindowDone:
    """A window's frames are decoded and handed on."""

    window: int
    windows: int
    frames: int


@dataclass(frozen=True)
class Note:
    """Something the user should know that is not an error."""

    text: str


Event = StageStarted | StageProgress | StepDone | WindowDone | Note
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress of callers that do not care."""
