"""The ceilings of this GPU: copies and matrix products at the shapes of a step, without torch.

    python -m trt_wan.benchmarks.machine.ceilings --size 832x480 --window 77

Data is random, because a GPU that multiplies zeros is faster. The attention's ceiling is not measured here:
it is the fastest attention of a run.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_void_p
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from trt_wan.benchmarks.machine.gpu_events import GpuEvents
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape, add_shape_arguments, shape_from
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.errors import TrtWanError
from trt_wan.runtime.device.gpu import Gpu, copy

COPY_BYTES = 1 << 30
FEW_TOKENS, ENOUGH_TOKENS = 4096, 8192  # fewer do not fill a large GPU


@dataclass(frozen=True)
class Ceiling:
    """A rate in FLOP/s, or in bytes read and written per second; None if it could not be measured."""

    name: str  # copy, bf16 GEMM, fp8 GEMM, fp32 GEMM
    shape: str
    rate: float | None
    seconds: float | None = None
    reason: str = ""


def measure(shape: Shape) -> list[Ceiling]:
    """Measures the first GPU. Products are always those of the 14B model, because they fill the GPU."""
    gpu = Gpu()
    c = ANIMATE_14B.transformer
    tokens = shape.plan.tokens if shape.plan.tokens >= FEW_TOKENS else ENOUGH_TOKENS
    shapes = [(tokens, c.dim, c.dim), (tokens, c.ffn_dim, c.dim), (tokens, c.dim, c.ffn_dim)]
    return [
        _copy(gpu),
        *_products("bf16 GEMM", gpu, shapes, "bfloat16", _bf16_gemm),
        *_products("fp8 GEMM", gpu, shapes, "float8_e4m3fn", _fp8_gemm),
    ]


def measure_host() -> list[Ceiling]:
    """Measures the CPU with numpy in float32, for machines without a GPU."""
    side = 1024
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    source = np.ones(COPY_BYTES // 8, np.uint8)
    target = np.empty_like(source)
    product, moved = _host_seconds(lambda: x @ w), _host_seconds(lambda: np.copyto(target, source))
    return [
        Ceiling("copy", f"{source.nbytes >> 20} MiB", 2 * source.nbytes / moved, moved),
        Ceiling("fp32 GEMM", f"{side}x{side}x{side}", 2 * side**3 / product, product),
    ]


def _host_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds[1:]).median


def _copy(gpu: Gpu) -> Ceiling:
    source, target = gpu.allocate(COPY_BYTES), gpu.allocate(COPY_BYTES)

    def enqueue() -> None:
        copy(int(target.handle), int(source.handle), COPY_BYTES, gpu.stream)

    seconds = Spread.of(GpuEvents(gpu).timed(enqueue)).median
    return Ceiling("copy", f"{COPY_BYTES >> 20} MiB", 2 * COPY_BYTES / seconds, seconds)


Enqueue = Callable[[int, int, int], None]  # addresses of x, w, y
MakeGemm = Callable[[Gpu, int, int, int], Enqueue]


def _products(
    name: str, gpu: Gpu, shapes: list[tuple[int, int, int]], dtype: str, make: MakeGemm
) -> list[Ceiling]:
    found = []
    for tokens, out, inner in shapes:
        text = f"{tokens}x{out}x{inner}"
        try:
            enqueue = make(gpu, tokens, out, inner)
        except (TrtWanError, ImportError, OSError) as error:
            return [Ceiling(name, text, None, reason=str(error))]
        x, w = _random(gpu, (tokens, inner), dtype, 1), _random(gpu, (out, inner), dtype, 2)
        y = gpu.allocate(2 * tokens * out)
        addresses = int(x.handle), int(w.handle), int(y.handle)
        seconds = Spread.of(GpuEvents(gpu).timed(partial(enqueue, *addresses))).median
        found.append(Ceiling(name, text, 2 * tokens * out * inner / seconds, seconds))
        for buffer in (x, w, y):
            buffer.close(gpu.stream)
    return found


def _random(gpu: Gpu, shape: tuple[int, int], dtype: str, seed: int) -> Any:
    array = gpu.view(0, shape, dtype)
    buffer = gpu.allocate(array.nbytes)
    gpu.fill_random(gpu.view(int(buffer.handle), shape, dtype), seed, 0.0, 1.0)
    return buffer


def _fp8_gemm(gpu: Gpu, tokens: int, out: int, inner: int) -> Enqueue:
    from trt_wan.runtime.segments.native.gemm import WORKSPACE_BYTES, CublasLt, Fp8Gemm

    gemm = Fp8Gemm(gpu, CublasLt(), tokens, out, inner)
    workspace = gpu.allocate(WORKSPACE_BYTES)
    return lambda x, w, y: gemm.enqueue(x, w, y, int(workspace.handle))


# cublas_api.h, library_types.h
_TRANSPOSED, _AS_IS = 1, 0
_BFLOAT16, _COMPUTE_32F, _DEFAULT_ALGORITHM = 14, 68, -1


def _bf16_gemm(gpu: Gpu, tokens: int, out: int, inner: int) -> Enqueue:
    """y [tokens, out] = x [tokens, inner] times w [out, inner] transposed, by cuBLAS."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception as error:  # cuda.pathfinder raises its own exceptions
        raise OSError(f"cuBLAS is not installed ({str(error).splitlines()[0]})") from error
    handle, one, zero = c_void_p(), c_float(1), c_float(0)

    def call(function: str, *arguments: Any) -> None:
        status = getattr(library, function)(*arguments)
        assert not status, f"{function} failed with status {status}"

    call("cublasCreate_v2", byref(handle))
    call("cublasSetStream_v2", handle, c_void_p(gpu.handle))

    def enqueue(x: int, w: int, y: int) -> None:
        call(
            "cublasGemmEx",
            *(handle, _TRANSPOSED, _AS_IS, c_int(out), c_int(tokens), c_int(inner), byref(one)),
            *(c_void_p(w), _BFLOAT16, c_int(inner), c_void_p(x), _BFLOAT16, c_int(inner), byref(zero)),
            *(c_void_p(y), _BFLOAT16, c_int(out), _COMPUTE_32F, _DEFAULT_ALGORITHM),
        )

    return enqueue


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trt_wan.benchmarks.machine.ceilings")
    add_shape_arguments(parser)
    print(json.dumps([asdict(ceiling) for ceiling in measure(shape_from(parser.parse_args()))]))


if __name__ == "__main__":
    main()
