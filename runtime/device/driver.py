"""The version of the installed NVIDIA driver."""

import re
from contextlib import suppress
from pathlib import Path


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
