"""The card a benchmark opens with: the machine, its state and the versions of its packages."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from trt_wan.benchmarks.machine.host_use import cpu_quota

PACKAGES = (
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "cuda-bindings",
    "cuda-core",
    "nvidia-cudnn-frontend",
    "flash-attn-4",
    "torch",
    "diffusers",
)


@dataclass(frozen=True)
class Gpu:
    """Fields of nvidia-smi, as text with units, because drivers leave fields out ("[N/A]")."""

    name: str
    driver: str
    memory: str
    capability: str
    clock_now: str  # the multiprocessors' clock
    clock_highest: str
    memory_clock_highest: str
    power_limit: str
    temperature: str


@dataclass(frozen=True)
class Datasheet:
    """Peaks with dense operands and float32 sums, in FLOP/s and bytes/s."""

    bf16: float
    fp8: float | None
    bandwidth: float


# NVIDIA's datasheets by a part of the GPU's name, without sparsity.
DATASHEETS = {
    "B200": Datasheet(2250e12, 4500e12, 8.0e12),
    "H200": Datasheet(989.5e12, 1979e12, 4.8e12),
    "H100 80GB HBM3": Datasheet(989.5e12, 1979e12, 3.35e12),
    "L40S": Datasheet(362e12, 733e12, 0.864e12),
    "RTX 4090": Datasheet(165.2e12, 330.3e12, 1.008e12),
    "RTX 5090": Datasheet(209.5e12, 419e12, 1.792e12),
}


@dataclass(frozen=True)
class Card:
    gpu: Gpu | None
    datasheet: Datasheet | None  # None if the GPU is not in the table
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    packages: dict[str, str]
    cpu_quota: float | None = None  # CPUs' time that the container may use; None without a limit

    @property
    def hardware(self) -> str:
        """The label of every table and plot."""
        return self.gpu.name if self.gpu else f"{self.cpu}, {self.cores} cores"

    def rows(self) -> list[tuple[str, str]]:
        """The lines of a table about this machine."""
        gpu, found = self.gpu, []
        quota = "" if self.cpu_quota is None else f" (of which the container may use {self.cpu_quota:g})"
        if gpu is not None:
            clocks = f"{gpu.clock_now} now, {gpu.clock_highest} at most, memory {gpu.memory_clock_highest}"
            found = [
                ("GPU", f"{gpu.name}, {gpu.memory}, driver {gpu.driver}"),
                ("clocks", f"{clocks}; power limit {gpu.power_limit}, {gpu.temperature} °C"),
            ]
        host = f"{self.cpu}, {self.cores} cores{quota}, {self.memory_gb:.0f} GB, {self.system}"
        return [
            *found,
            ("host", host),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.packages.items())),
        ]


def read_card() -> Card:
    import psutil

    gpu = read_gpu()
    return Card(
        gpu=gpu,
        datasheet=datasheet(gpu.name) if gpu else None,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=platform.platform(),
        python=platform.python_version(),
        packages=_versions(),
        cpu_quota=cpu_quota(),
    )


def datasheet(name: str) -> Datasheet | None:
    return next((row for part, row in DATASHEETS.items() if part in name), None)


def visible_gpus(count: int) -> list[str]:
    """The numbers or UUIDs of CUDA's first `count` GPUs, as NVML and nvidia-smi have them: they list all,
    also those that CUDA_VISIBLE_DEVICES hides.
    """
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def first_gpu() -> str:
    return visible_gpus(1)[0]


def read_gpu() -> Gpu | None:
    """Returns the first GPU, or None without a driver. Makes no CUDA context."""
    fields = (
        "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.max.sm,clocks.max.memory,"
        "power.limit,temperature.gpu"
    )
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={first_gpu()}"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if answer.returncode or len(values) != len(fields.split(",")):
        return None
    return Gpu(*values)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
