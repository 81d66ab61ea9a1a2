"""Events of jobs and builds: plain values handed to `progress(event)`. The library itself prints nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StageStarted:
    """A stage of the pipeline begins: weights, text, image, condition, denoise, decode, write."""

    stage: str
    window: int = 0  # 1-based; 0 where the stage is not part of a window
    windows: int = 0


@dataclass(frozen=True)
class StageProgress:
    """`done` of the `total` frames of a stage are finished; reported a few times per stage."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """A denoising step took `seconds`. After `host_seconds` the host had enqueued all of its work.

    `eta` is the time for the remaining steps of all windows, in seconds.
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
class LiveWindow:
    """A window of a live source is written. Frames are counted from the start; a latency is the time from a
    frame's arrival to its being written, in seconds.
    """

    window: int
    frames_in: int
    frames_out: int
    dropped: int
    latency: float  # the median of this window
    worst: float  # so far
    rate: float  # frames of this window per second since the window before it


@dataclass(frozen=True)
class Note:
    """Something the user should know that is not an error. `code` and `data` say the same to programs."""

    text: str
    code: str = ""
    data: Mapping[str, object] = field(default_factory=dict)  # values that JSON has


@dataclass(frozen=True)
class GraphExported:
    name: str
    number: int  # counted among the graphs that were missing
    graphs: int
    seconds: float


@dataclass(frozen=True)
class EngineStep:
    """An engine is being compiled. TensorRT names the phase and counts its steps."""

    target: str
    name: str
    number: int  # the number of this engine, 1-based
    engines: int
    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class EngineReady:
    """An engine is in the store, or cannot be built. `seconds` is the time of its compilation, also of an
    earlier one.
    """

    target: str
    name: str
    number: int  # the number of this engine, 1-based
    engines: int
    state: str  # built, there, or impossible: then `problem` says why
    seconds: float
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class CandidateStep:
    """A candidate for a network's place is being measured."""

    network: str
    candidate: str
    number: int  # the number of this candidate, 1-based
    candidates: int


@dataclass(frozen=True)
class CandidateReady:
    """A candidate is measured; `text` describes the result in words."""

    network: str
    candidate: str
    number: int  # the number of this candidate, 1-based
    candidates: int
    state: str
    ms: float | None
    error: float | None
    tolerance: float
    text: str


@dataclass(frozen=True)
class FileProgress:
    """`done` of a file's `total` bytes are there; reported twice a second while it is fetched or written."""

    name: str
    number: int  # 1-based
    files: int
    done: int
    total: int
    rate: float  # bytes per second


@dataclass(frozen=True)
class FileReady:
    """A file is complete. `state`: there, or fetched."""

    name: str
    number: int
    files: int
    path: str
    bytes: int
    state: str


Event = (
    StageStarted
    | StageProgress
    | StepDone
    | WindowDone
    | LiveWindow
    | Note
    | GraphExported
    | EngineStep
    | EngineReady
    | CandidateStep
    | CandidateReady
    | FileProgress
    | FileReady
)
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignores every event."""


def reports_waiting(progress: Progress) -> Callable[[Path, int | None], None]:
    """For `held` (engines/store/locks.py): reports that another process holds the lock, and which one."""

    def waiting(lock: Path, process: int | None) -> None:
        other = "another process" if process is None else f"process {process}"
        text = f"Waiting for {other}, which is making the same ({lock})."
        progress(Note(text, "waiting_for_lock", {"lock": str(lock), "process": process}))

    return waiting
