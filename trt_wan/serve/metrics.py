"""Figures for Prometheus (`GET /metrics`)."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600, 7200)


class Metrics:
    def __init__(
        self, waiting: Callable[[], int], starts: Callable[[], int], disk: Callable[[], int]
    ) -> None:
        self.registry = CollectorRegistry()
        shared: Any = {"namespace": "trt_wan", "registry": self.registry}
        self.ended = Counter("jobs_ended", "Jobs that ended.", ["kind", "status"], **shared)
        self.seconds = Histogram("job_seconds", "From start to end.", ["kind"], buckets=SECONDS, **shared)
        self.first_step = Histogram(
            "first_step_seconds",
            "From the request to the first finished step, for jobs that did not wait.",
            buckets=SECONDS,
            **shared,
        )
        self.step = Histogram("step_seconds", "Denoising steps.", buckets=SECONDS, **shared)
        self.frames = Counter("frames", "Frames of finished windows.", **shared)
        self.uploaded = Counter("uploaded_bytes", "Bytes of accepted uploads.", **shared)
        self.requests = Counter(
            "http_requests", "By route and status.", ["method", "route", "status"], **shared
        )
        self.deaths = Counter(
            "worker_deaths", "Worker processes that ended in the middle of a job.", **shared
        )
        for name, about, read in (
            ("jobs_waiting", "Jobs in the queue.", waiting),
            ("worker_starts", "Worker processes that were started.", starts),
            ("disk_bytes", "Bytes of uploads and results.", disk),
        ):
            Gauge(name, about, **shared).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
