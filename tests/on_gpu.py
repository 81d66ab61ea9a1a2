"""A GPU for tests that need one, one network run on it, and kernels that test files share."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_wan.engines.contract import Network
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.segments.segment import Segment


def require_gpu() -> Any:
    """A `Gpu`, or the test is skipped with the reason."""
    from trt_wan.runtime.device.gpu import Gpu

    try:
        return Gpu()
    except EnvironmentBroken as error:
        pytest.skip(error.message)


def require_whole_gpu() -> None:
    """Skips where other test processes use the GPU too: CUDA tells the free memory of the whole GPU."""
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("It measures the whole GPU's memory, which other test processes use: run it with -n 0.")


def with_kernels(home: Path) -> Path:
    """Returns `home`, a TRT_WAN_HOME, with its kernels in the folder KERNELS_OF_TESTS if that is set:
    compiling them takes most of a file's time on a GPU. The names there tell kernels of other code apart.
    """
    if shared := os.environ.get("KERNELS_OF_TESTS"):
        Path(shared).mkdir(parents=True, exist_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another test process was first
            (home / "kernels").symlink_to(Path(shared).resolve(), target_is_directory=True)
    return home


def run_segment(
    gpu: Any, segment: Segment, network: Network, values: Mapping[str, Any], poison: int = 0xFF
) -> dict[str, Any]:
    """The outputs by name, from all inputs and weights. Outputs and scratch are filled with `poison` bytes
    before: 0xFF and 0x7F are NaN in every type, so what is not written, or read before it is, shows.
    """
    outputs = {t.name: (t.shape, np.dtype(t.dtype)) for t in network.outputs}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in outputs.items()}
    sizes["scratch"] = max(segment.scratch_bytes, 256)
    buffers = {name: gpu.allocate(max(size, 256)) for name, size in sizes.items()}
    buffers |= {name: gpu.allocate(max(host.nbytes, 256)) for name, host in values.items()}
    addresses = {name: int(buffer.handle) for name, buffer in buffers.items()}
    for name, size in sizes.items():
        gpu.write(gpu.view(addresses[name], (size,), np.uint8), np.full(size, poison, np.uint8))
    for name, host in values.items():
        gpu.write(gpu.view(addresses[name], host.shape, host.dtype), host)
    segment.start(addresses.pop("scratch"))
    segment.enqueue(addresses)
    made = {n: gpu.download(gpu.view(addresses[n], shape, dtype)) for n, (shape, dtype) in outputs.items()}
    for buffer in buffers.values():
        buffer.close(gpu.stream)
    return made
