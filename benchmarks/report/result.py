"""Everything one benchmark measured: the document, its tables and its plots."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.machine.card import Card
from trt_wan.benchmarks.machine.ceilings import Ceiling
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Cell, Figure, Row, Sheet
from trt_wan.benchmarks.report.times import WRITING, JobTimes, PeerTimes, StepTimes, WorkRow

SCHEMA = "trt-wan-bench/1"
OURS = "trt-wan"


@dataclass(frozen=True)
class Result:
    shape: Shape
    tokens: int
    step_flops: int
    weights: str
    precision: str
    settings: Mapping[str, Any]  # those of runtime.job.Settings that were given
    choices: list[str]  # decisions with their reasons
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
    stem: ClassVar[str] = "bench"

    @property
    def warm(self) -> JobTimes:
        """The job from a warm start with the median time: the one to look into."""
        return sorted(self.warm_jobs, key=lambda job: job.seconds)[len(self.warm_jobs) // 2]

    @property
    def starts(self) -> dict[str, JobTimes]:
        return {"warm": self.warm} | ({"cold": self.cold} if self.cold else {})

    @property
    def title(self) -> str:
        return f"{self.shape.title}, {self.precision}, {self.card.hardware}"

    def headlines(self) -> dict[str, float]:
        """The figures by which two results are compared, in seconds or bytes; the median of several jobs."""

        def median(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value]
            return float(np.median(known)) if known else None

        jobs = self.warm_jobs
        figures = {f"{OURS} s/step": self.steps.seconds.median}
        figures |= {f"{p.title} s/step": p.seconds.median for p in self.peers if p.seconds is not None}
        per_job = {
            "first step, warm": median(job.first_step_seconds for job in jobs),
            "whole job, warm": median(job.seconds for job in jobs),
            "first step, cold": self.cold.first_step_seconds if self.cold else None,
            "peak device memory": median(job.usage.peak_memory_bytes for job in jobs),
            "peak host memory": median(job.host_peak_bytes for job in jobs),
        }
        return figures | {f"{OURS} {name}": value for name, value in per_job.items() if value is not None}

    def parts(self) -> dict[str, float]:
        """The parts of a start and a job, warm, in seconds; the median of several jobs."""
        jobs = [job.parts() for job in self.warm_jobs]
        return {name: float(np.median([job[name] for job in jobs])) for name in jobs[0]}

    def to_dict(self) -> dict[str, Any]:
        more = {"warm": dataclasses.asdict(self.warm), "headlines": self.headlines()}
        return {**dataclasses.asdict(self), **more}

    def sheets(self) -> list[Sheet | str]:
        parts: list[Sheet | str] = [self._job(), self._ceilings()]
        if self.work:
            parts.append(self._work())
        parts += [self._step(), self._stages(), self._peers()]
        if self.not_measured:
            parts.append("Not measured: " + "; ".join(self.not_measured))
        return parts

    def draw(self) -> Mapping[str, Any]:
        """A step's networks, a job's stages, and seconds per step beside the peers'."""
        from trt_wan.benchmarks.report import plots

        colours = {"warm": plots.LEAST, "cold": plots.EXCESS}
        stages = {
            stage: [
                plots.Bar([(f"{start} start", job.stages.get(stage, 0.0), colours[start])], f"{seconds:.2f}")
                for start, job in self.starts.items()
                for seconds in (job.stages.get(stage, 0.0),)
            ]
            for stage in self.warm.stages
        }
        about = f"A whole job: one window of {self.warm.frames} frames, {len(self.warm.steps)} steps"
        drawn = {
            "waterfall": plots.waterfall(self.title, self.steps),
            "stages": plots.bars(about, self.title, stages, "seconds"),
        }
        rows = {OURS: self.steps.seconds} | {p.title: p.seconds for p in self.peers if p.seconds is not None}
        if len(rows) > 1:
            compared = {
                name: [
                    plots.Bar(
                        [("", s.median, plots.LEAST if name == OURS else plots.OTHER)],
                        f"{s.median:.3g} s ({s.median / self.steps.seconds.median:.2f} x)",
                        spread=(s.p10, s.p90),
                    )
                ]
                for name, s in rows.items()
            }
            least = min(s.count for s in rows.values())
            drawn["peers"] = plots.bars(
                f"Seconds per denoising step (median and p10 to p90 of {least} steps or more)",
                self.title,
                compared,
                "seconds per step; dashed: the lower bound of ours",
                self.steps.bound_seconds,
            )
        return drawn

    def _job(self) -> Sheet:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items()) or "the defaults"
        about = f"{self.shape.title}, {self.tokens} tokens, {self.precision}, weights {self.weights}"
        rows = [
            *self.card.rows(),
            ("job", about),
            ("settings", settings),
            *(("choice", c) for c in self.choices),
        ]
        return Sheet("job", f"trt-wan {self.version}, {self.time}", (), rows)

    def _ceilings(self) -> Sheet:
        def rate(c: Ceiling) -> Cell:
            if c.rate is None:
                return f"not measured: {c.reason}"
            return Figure(c.rate, "TB/s") if c.name == "copy" else Figure(c.rate, "TFLOP/s", " TFLOP/s")

        rows = [(f"{c.name} {c.shape}", rate(c)) for c in self.ceilings]
        return Sheet("ceiling", "Ceilings of this machine, measured", ("rate",), rows)

    def _work(self) -> Sheet:
        most = max(row.linear + row.attention + row.convolution for row in self.work)
        unit = "TFLOP" if most >= 1e12 else "GFLOP"

        def cells(row: WorkRow) -> Row:
            counts = (row.calls_step, row.calls_window, row.calls_job)
            flops = (row.linear, row.attention, row.convolution)
            return (
                row.name,
                *(Figure(n, "count", " x") if n else "" for n in counts),
                *(Figure(f, unit) if f else "" for f in (sum(flops), *flops)),
                Figure(row.bytes, "GB"),
            )

        heads = (
            "in a step",
            "window",
            "job",
            f"{unit} a call",
            "linear",
            "attention",
            "convolution",
            "bytes",
        )
        title = "Work: calls, FLOPs of one call, least bytes of one call"
        return Sheet("work", title, heads, [cells(row) for row in self.work])

    def _step(self) -> Sheet:
        steps = self.steps
        rows: list[Row] = []
        for n in steps.networks:
            bound = n.bound_seconds
            least = (Figure(bound, "ms"), Figure(n.seconds / bound, "times") if bound else "")
            rate = Figure(n.rate, "TFLOP/s") if n.flops else ""
            times = (Figure(n.seconds, "ms"), Figure(n.seconds / n.calls, "ms"))
            rows.append((n.name, Figure(n.calls, "count"), *times, rate, *least))
        total = sum(n.seconds for n in steps.networks)
        rate = Figure(self.step_flops / total, "TFLOP/s")
        rows.append(("all networks", "", Figure(total, "ms"), "", rate, "", ""))
        for name, seconds in (("lower bound", steps.bound_seconds), ("datasheet", steps.datasheet_seconds)):
            if seconds or name == "lower bound":
                times_it = Figure(steps.seconds.median / seconds, "times") if seconds else ""
                rows.append((name, "", "", "", "", Figure(seconds, "ms"), times_it))
        heads = ("calls", "ms a step", "ms a call", "TFLOP/s", "bound ms", "times the bound")
        return Sheet("network", f"A step of {OURS} ({steps.bound_about})", heads, rows)

    def _stages(self) -> Sheet:
        jobs = self.starts.values()
        rows: list[Row] = []
        for stage in dict.fromkeys(stage for job in jobs for stage in job.stages):
            cpu = [f" ({job.stages_cpu.get(stage, 0):.2f})" for job in jobs]
            seconds = [job.stages.get(stage, 0.0) for job in jobs]
            rows.append((stage, *(Figure(s, "s", note) for s, note in zip(seconds, cpu, strict=True))))
        rows += [(label, *map(cell, jobs)) for label, cell in _JOB_FIGURES]
        title = f"A whole job: one window, {len(self.warm.steps)} steps (seconds, in brackets of CPU)"
        if len(self.warm_jobs) > 1:
            title += f"; warm: the middle one of {len(self.warm_jobs)}"
        return Sheet("stage", title, [f"{start} start" for start in self.starts], rows)

    def _peers(self) -> Sheet:
        ours = self.steps.seconds.median

        def row(title: str, s: Spread, start: float | None, memory: float | None) -> Row:
            rest = (
                f"{s.p10:.3f} to {s.p90:.3f}",
                Figure(s.count, "count"),
                Figure(s.median / ours, "times"),
            )
            return title, Figure(s.median, "s"), *rest, Figure(start, "s"), Figure(memory, "GB")

        first = self.headlines()[f"{OURS} first step, warm"]
        rows = [row(OURS, self.steps.seconds, first, self.warm.usage.peak_memory_bytes)]
        for p in self.peers:
            if p.seconds is None:
                rows.append((p.title, f"not run: {p.reason}", "", "", "", "", ""))
                continue
            begun = None if p.first_step_seconds is None else (p.build_seconds or 0) + p.first_step_seconds
            rows.append(row(p.title, p.seconds, begun, next(iter(p.memory_bytes.values()), None)))
        heads = ("median", "p10 to p90", "steps", "times ours", "first step after", "memory")
        host = self.steps.host_seconds.median * 1e3
        title = f"Seconds per step, {self.title}; the host asks for a step of ours in {host:.2f} ms"
        return Sheet("step", title, heads, rows)


_JOB_FIGURES: tuple[tuple[str, Callable[[JobTimes], Figure]], ...] = (
    (WRITING, lambda job: Figure(job.writing_seconds, "s")),
    ("whole job", lambda job: Figure(job.seconds, "s", f" ({job.cpu_seconds:.2f})")),
    ("process start to first finished step", lambda job: Figure(job.first_step_seconds, "s")),
    ("weights loaded", lambda job: Figure(job.loaded_bytes, "GB")),
    ("GB/s of loading", lambda job: Figure(job.loading_rate, "GB/s")),
    ("stopped by the container's quota", lambda job: Figure(job.host.throttled_seconds, "s")),
    ("CPUs given to others by the host", lambda job: Figure(job.host.stolen_seconds, "s")),
    ("peak device memory", lambda job: Figure(job.usage.peak_memory_bytes, "GB")),
    ("peak host memory", lambda job: Figure(job.host_peak_bytes, "GB")),
    ("energy", lambda job: Figure(job.usage.joules, "J")),
)
