"""Opens one engine from standard input and keeps the kernels that TensorRT-RTX finishes: see tensorrt.py.

python -m trt_wan.runtime.segments.finish_kernels FLAVOUR NAME KERNELS < PLAN
"""

import sys
from pathlib import Path

from trt_wan.engines.flavour import choose_flavour
from trt_wan.runtime.segments.tensorrt import EngineSegment


def main(flavour: str, name: str, kernels: str) -> None:
    from cuda.core import Device

    device = Device()
    device.set_current()
    trt = choose_flavour(flavour, tuple(device.compute_capability)).module
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    EngineSegment(0, trt, runtime, name, sys.stdin.buffer.read(), Path(kernels)).settle()


if __name__ == "__main__":
    main(*sys.argv[1:])
