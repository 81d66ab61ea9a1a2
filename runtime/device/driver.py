"""The installed NVIDIA driver and the presence of a GPU, read without CUDA."""

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

# Where Linux lists no PCI device: a container, Jetson, WSL.
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/dxg")


def driver_version() -> str:
    """As nvidia-smi shows it, such as 580.95.05; else the CUDA version that the driver brings."""
    with suppress(OSError):  # only Linux has the file
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", text):
            return match[0]
    with suppress(
        Exception
    ):  # cuda-core before 1.0 lacks it; without NVML it raises exceptions of many classes
        from cuda.core import system

        return ".".join(map(str, system.get_kernel_mode_driver_version()))
    with suppress(Exception):
        from cuda.bindings import runtime

        error, version = runtime.cudaDriverGetVersion()
        if not error:
            return f"CUDA {version}"
    return "unknown"


def nvidia_smi() -> list[str]:
    """A line for every GPU: name, memory, driver, the driver's CUDA version. Empty without a driver."""
    fields = "name,memory.total,driver_version"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        about = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cuda = re.search(r"CUDA Version: *([\d.]+)", about)
    rows = [re.split(r", *", line) for line in gpus.splitlines()]
    end = f", CUDA {cuda[1]}" if cuda else ""
    return [f"{', '.join(row[:-1])}, driver {row[-1]}{end}" for row in rows]


def has_nvidia_gpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA GPU is in this machine, with or without a driver. `devices`: those on Linux."""
    for device in devices.glob("*"):
        with suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA, display controller
                return True
    return shutil.which("nvidia-smi") is not None or any(Path(name).exists() for name in DEVICE_FILES)
