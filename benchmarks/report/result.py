"""Everything a benchmark measured, as it is written to bench.json. Seconds, bytes, FLOPs; never rounded."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_wan.benchmarks.measure.bound import NetworkTime
from trt_wan.benchmarks.measure.card import Card
from trt_wan.benchmarks.measure.ceilings import Ceiling
from trt_wan.benchmarks.measure.host_use import HostUse
from trt_wan.benchmarks.measure.monitor import Usage
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape

SCHEMA = "trt-wan-bench/1"
OURS = "trt-wan"
WRITING = "writing, beside the rest"


@dataclass(frozen=True)
class WorkRow:
    """A network's calls in a step, in a window beside its steps and in a job, and the work of one call."""

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
    """A whole job in a process of its own: one window, from prepared clips to a video file."""

    process_seconds: float  # from the process's start to its end
    first_step_seconds: float  # from the process's start to the first finished step
    seconds: float  # from opening the clips to the finished file
    frames: int
    steps: list[float]
    stages: Mapping[str, float]
    networks: list[dict[str, Any]]  # by stage: name, calls, seconds
    host_peak_bytes: int | None
    usage: Usage
    writing_seconds: float  # of the thread that writes, beside the stages
    stages_cpu: Mapping[str, float]  # CPU seconds of all threads
    cpu_seconds: float  # of the whole process
    host: HostUse

    def parts(self) -> dict[str, float]:
        """What the first step and the whole job are made of, in order, and what runs beside it."""
        begun = {"process start, imports": self.process_seconds - self.seconds}
        return (
            begun
            | dict(self.stages)
            | {"denoise, first step alone": self.steps[0], WRITING: self.writing_seconds}
        )


@dataclass(frozen=True)
class StepTimes:
    """Consecutive steps, in rounds between which others ran."""

    seconds: Spread
    host_seconds: Spread  # until everything of a step was enqueued
    rounds: list[list[float]]
    networks: list[NetworkTime]  # of a few more steps, each network's median
    profiled_seconds: float  # of one of these steps
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


@dataclass(frozen=True)
class Result:
    shape: Shape
    tokens: int
    step_flops: int
    weights: str
    precision: str
    settings: Mapping[str, Any]  # of runtime.job.Settings, where they were given
    choices: list[str]  # what was decided, and why
    card: Card
    ceilings: list[Ceiling]
    work: list[WorkRow]
    cold: JobTimes | None
    warm_jobs: list[JobTimes]
    steps: StepTimes
    peers: list[PeerTimes]
    not_measured: list[str]
    version: str
    time: str
    schema: str = SCHEMA

    @property
    def warm(self) -> JobTimes:
        """The job from a warm start that took the middle of their times: the one to look into."""
        return sorted(self.warm_jobs, key=lambda job: job.seconds)[len(self.warm_jobs) // 2]

    @property
    def title(self) -> str:
        return f"{self.shape.title}, {self.precision}, {self.card.hardware}"

    def headlines(self) -> dict[str, float]:
        """The figures by which two results are compared, in seconds or bytes; of several jobs the median."""

        def median(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value]
            return float(np.median(known)) if known else None

        jobs = self.warm_jobs
        figures = {f"{OURS} s/step": self.steps.seconds.median}
        figures |= {f"{p.title} s/step": p.seconds.median for p in self.peers if p.seconds is not None}
        of_jobs = {
            "first step, warm": median(job.first_step_seconds for job in jobs),
            "whole job, warm": median(job.seconds for job in jobs),
            "first step, cold": self.cold.first_step_seconds if self.cold else None,
            "peak device memory": median(job.usage.peak_memory_bytes for job in jobs),
            "peak host memory": median(job.host_peak_bytes for job in jobs),
        }
        return figures | {f"{OURS} {name}": value for name, value in of_jobs.items() if value is not None}

    def parts(self) -> dict[str, float]:
        """What the starts and jobs from a warm start are made of, in seconds; of several jobs the median."""
        jobs = [job.parts() for job in self.warm_jobs]
        return {name: float(np.median([job[name] for job in jobs])) for name in jobs[0]}

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "warm": dataclasses.asdict(self.warm),
            "headlines": self.headlines(),
        }

    def to_json(self) -> str:
        """One line. Unknown figures are null, so that any reader takes it."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
