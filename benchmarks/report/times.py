"""The times of jobs, steps and peers. Seconds, bytes and FLOPs, never rounded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trt_wan.benchmarks.machine.host_use import HostUse
from trt_wan.benchmarks.machine.monitor import Usage
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.work.bound import NetworkTime

WRITING = "writing, beside the rest"


@dataclass(frozen=True)
class WorkRow:
    """A network's calls per step, per window outside its steps and per job, and the work of one call."""

    name: str
    calls_step: int
    calls_window: int
    calls_job: int
    linear: int
    attention: int
    convolution: int
    bytes: int
    fp8: bool


@dataclass(frozen=True)
class JobTimes:
    """A whole job in its own process: one window, from prepared clips to a video file."""

    process_seconds: float  # from the process's start to its end
    first_step_seconds: float  # from the process's start to the first finished step
    seconds: float  # from opening the clips to the finished file
    frames: int
    steps: list[float]
    stages: Mapping[str, float]
    networks: list[dict[str, Any]]  # by stage: name, calls, seconds
    host_peak_bytes: int | None
    usage: Usage
    writing_seconds: float  # the writing thread, beside the stages
    stages_cpu: Mapping[str, float]  # CPU seconds of all threads
    cpu_seconds: float  # the whole process
    host: HostUse
    loaded_bytes: int | None = None  # weights, onto a GPU
    loading_seconds: float | None = None

    @property
    def loading_rate(self) -> float | None:
        """Bytes of weights per second of loading."""
        if not self.loaded_bytes or not self.loading_seconds:
            return None
        return self.loaded_bytes / self.loading_seconds

    def parts(self) -> dict[str, float]:
        """The parts of the start and of the job, in order, and the writing beside them."""
        begun = {"process start, imports": self.process_seconds - self.seconds}
        ended = {"denoise, first step alone": self.steps[0], WRITING: self.writing_seconds}
        return begun | dict(self.stages) | ended


@dataclass(frozen=True)
class StepTimes:
    """Consecutive steps, in rounds between which peers ran."""

    seconds: Spread
    host_seconds: Spread  # until everything of a step was enqueued
    rounds: list[list[float]]
    networks: list[NetworkTime]  # medians over a few more steps
    profiled_seconds: float  # one of these steps
    uploads: Mapping[str, float]  # host arrays handed in, by network, in a step
    bound_seconds: float | None
    bound_about: str
    datasheet_seconds: float | None  # the same with the datasheet's peaks


@dataclass(frozen=True)
class PeerTimes:
    name: str
    title: str
    ran: bool
    reason: str = ""
    seconds: Spread | None = None
    rounds: list[list[float]] = field(default_factory=list)
    build_seconds: float | None = None
    first_step_seconds: float | None = None  # with compilation
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    part_seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
