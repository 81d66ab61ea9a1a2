"""Jobs on one open model in a measured process, as `trt-wan run` computes them: nothing watches the executor.

    python -m trt_wan.benchmarks.measure.plain_jobs SPECS

SPECS is a list of `Spec` in JSON, all with the same model and settings. Answers: "job" after each job, and
"closed" after the model is closed.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from trt_wan.benchmarks.machine.host_memory import HostPeak
from trt_wan.benchmarks.measure.measured_process import Spec, loading
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, StepDone
from trt_wan.runtime.executors import Executor
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.opening.model import OpenModel


@dataclass
class Steps:
    """The steps of a job, and the time of day at which the first one finished."""

    begun: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    first_at: float | None = None
    first_after: float | None = None  # seconds since the job began

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.seconds.append(event.seconds)
            if self.first_at is None:
                self.first_at, self.first_after = time.time(), time.perf_counter() - self.begun


def run(specs: list[Spec]) -> None:
    executors: list[Executor] = []

    def observe(executor: Executor) -> Executor:
        executors.append(executor)
        return executor

    with HostPeak() as host:
        with specs[0].open(lambda event: None, observe) as model:
            for spec in specs:
                said = one_job(model, spec)
                say("job", **said, **loading(executors[-1]), gpu_bytes=gpu_bytes(executors[-1]))
        say("closed", host_bytes=host.peak_bytes, gpu_bytes=gpu_bytes(executors[-1]), at=time.time())


def one_job(model: OpenModel, spec: Spec) -> dict[str, Any]:
    steps, digest, frames = Steps(), hashlib.sha256(), 0

    def should_stop() -> bool:
        return spec.stop_after is not None and len(steps.seconds) >= spec.stop_after

    stopped = False
    try:
        for frame in model.stream(spec.job(), progress=steps, should_stop=should_stop):
            digest.update(frame.tobytes())
            frames += 1
    except Stopped:
        stopped = True
    return {
        "seconds": time.perf_counter() - steps.begun,
        "steps": steps.seconds,
        "first_step_at": steps.first_at,
        "first_step_seconds": steps.first_after,
        "frames": frames,
        "sha256": digest.hexdigest(),
        "stopped": stopped,
        "precision": model.precision,
        "at": time.time(),
    }


def gpu_bytes(executor: Executor) -> int | None:
    """Bytes in use on the GPU by all processes; None on the CPU."""
    if not isinstance(executor, GpuExecutor):
        return None
    from cuda.bindings import runtime

    error, free, total = runtime.cudaMemGetInfo()
    return None if error else int(total - free)


def as_argument(specs: list[Spec]) -> str:
    return json.dumps([asdict(spec) for spec in specs])


def main() -> None:
    specs = [Spec.from_json(json.dumps(values)) for values in json.loads(sys.argv[1])]
    answering(lambda: run(specs))


if __name__ == "__main__":
    main()
