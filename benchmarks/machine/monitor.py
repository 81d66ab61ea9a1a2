"""A run's use of the GPU, seen from outside: memory, power and clock, sampled several times a second.

Samples come from NVML if nvidia-ml-py is installed, else from nvidia-smi. Memory is that of the whole GPU
minus the memory in use before.
"""

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from trt_wan.benchmarks.machine.card import first_gpu

NVML_INTERVAL, SMI_INTERVAL = 0.05, 0.5  # seconds


@dataclass(frozen=True)
class Sample:
    memory_bytes: int
    watts: float | None
    clock_mhz: float | None
    joules: float | None = None  # the driver's counter, if it has one


@dataclass(frozen=True)
class Usage:
    """Figures are None if the driver does not report them."""

    source: str
    samples: int
    peak_memory_bytes: int | None = None
    joules: float | None = None
    mean_watts: float | None = None
    lowest_clock_mhz: float | None = None  # among samples under load: above half of the highest power


Reader = Callable[[], Sample]


@dataclass
class Monitor:
    """with Monitor.open() as monitor: …; then `monitor.usage()`. Peaks are above `before`, in bytes;
    None: the bytes in use at the start.
    """

    source: str
    read: Reader | None
    interval: float = SMI_INTERVAL
    before: int | None = None
    _samples: list[tuple[float, Sample]] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    def open(gpu: str | None = None, before: int | None = None) -> "Monitor":
        """`gpu` is as in `visible_gpus`, the first of these by default."""
        gpu = gpu or first_gpu()
        if read := _nvml_reader(gpu):
            return Monitor("NVML", read, NVML_INTERVAL, before)
        if read := _smi_reader(gpu):
            return Monitor("nvidia-smi", read, SMI_INTERVAL, before)
        return Monitor("none: no GPU driver", None)

    def __enter__(self) -> "Monitor":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.read is not None:
            self._samples.append((time.perf_counter(), self.read()))
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self.read is not None:
            self._thread.join()

    def usage(self) -> Usage:
        if not self._samples:
            return Usage(self.source, 0)
        samples = [sample for _, sample in self._samples]
        before = samples[0].memory_bytes if self.before is None else self.before
        watts = [s.watts for s in samples if s.watts is not None]
        clocks = [
            s.clock_mhz
            for s in samples
            if s.clock_mhz is not None and s.watts is not None and s.watts > max(watts) / 2
        ]
        seconds = self._samples[-1][0] - self._samples[0][0]
        joules = self._joules()
        return Usage(
            self.source,
            len(samples),
            max(s.memory_bytes for s in samples) - before,
            joules,
            joules / seconds if joules is not None and seconds else None,
            min(clocks, default=None),
        )

    def _joules(self) -> float | None:
        """Returns the difference of the driver's counter, or power times time."""
        first, last = self._samples[0][1], self._samples[-1][1]
        if first.joules is not None and last.joules is not None:
            return last.joules - first.joules
        total = 0.0
        for (before, _), (now, sample) in zip(self._samples, self._samples[1:], strict=False):
            if sample.watts is None:
                return None
            total += sample.watts * (now - before)
        return total or None

    def _watch(self) -> None:
        assert self.read is not None
        while not self._done.wait(self.interval):
            self._samples.append((time.perf_counter(), self.read()))
        self._samples.append((time.perf_counter(), self.read()))


def _nvml_reader(which: str) -> Reader | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        by_number, by_name = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
        gpu = by_number(int(which)) if which.isdecimal() else by_name(which)
    except pynvml.NVMLError:
        return None

    def asked(function: Callable[..., float], *arguments: object) -> float | None:
        try:
            return function(gpu, *arguments)
        except pynvml.NVMLError:
            return None

    def read() -> Sample:
        milliwatts = asked(pynvml.nvmlDeviceGetPowerUsage)
        millijoules = asked(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return Sample(
            int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),
            milliwatts / 1e3 if milliwatts is not None else None,
            asked(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            millijoules / 1e3 if millijoules is not None else None,
        )

    try:
        read()
    except pynvml.NVMLError:  # a driver that refuses queries
        return None
    return read


def _smi_reader(which: str) -> Reader | None:
    command = [
        "nvidia-smi",
        "--query-gpu=memory.used,power.draw,clocks.sm",
        "--format=csv,noheader,nounits",
        f"--id={which}",
    ]

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:  # "[N/A]"
            return None

    def read() -> Sample:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        memory, watts, clock = (value.strip() for value in answer.stdout.strip().split(","))
        return Sample(int(float(memory)) << 20, number(watts), number(clock))

    try:
        read()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return read
