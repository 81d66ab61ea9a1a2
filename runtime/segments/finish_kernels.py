"""One engine, from standard input, opened and its kernels left in the cache: see engine_segment.py.

python -m trt_wan.runtime.segments.finish_kernels FLAVOUR NAME KERNEL_CACHE < PLAN
"""

import sys
from pathlib import Path

from trt_wan.engines.flavour import choose_flavour
from trt_wan.runtime.segments.tensorrt import EngineSegment


def main(flavour: str, name: str, kernel_cache: str) -> None:
    from cuda.core import Device

    device = Device()
    device.set_current()
    trt = choose_flavour(flavour, tuple(device.compute_capability)).module
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    EngineSegment(0, trt, runtime, name, sys.stdin.buffer.read(), Path(kernel_cache)).settle()


if __name__ == "__main__":
    main(*sys.argv[1:])
