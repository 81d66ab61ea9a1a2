"""Convolutions on Hopper by a kernel of our own: channels-last bf16, sums in float32, the next layer's norm fused.

x [frames_in, height_in, width_in, inner], y and residual [frames, height, width, out] in bf16, bias and gamma [out] in
float32. Weights are [t, r, s, out, inner] in bf16 with their rows permuted (`permuted`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_wan.runtime.device.checked import cuda
from trt_wan.runtime.device.kernels import Module, read_source

SHARED = 227 << 10  # bytes that a block of Hopper may have
THREADS = 384
MAP_BYTES = 128


@dataclass(frozen=True)
class ConvShape:
    """A convolution's sizes; height and width are the output's. Time is not padded: the caller prepends frames."""

    frames: int
    height: int
    width: int
    inner: int
    out: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right

    @property
    def frames_in(self) -> int:
        return (self.frames - 1) * self.stride[0] + self.kernel[0]

    @property
    def height_in(self) -> int:
        return (self.height - 1) * self.stride[1] + self.kernel[1] - self.pad[0] - self.pad[1]

    @property
    def width_in(self) -> int:
        return (self.width - 1) * self.stride[2] + self.kernel[2] - self.pad[2] - self.pad[3]


@dataclass(frozen=True)
class Tiling:
    """How a block of threads works; conv_hopper.cu explains the terms."""

    width: int
    height: int
    chunk: int
    shift: bool = True
    pitch: int = 0  # pixels; 0: the width, with margins rounded up to 8 if `shift`
    a_stages: int = 2
    cluster: int = 1
    base_offset: bool = False


def wgmma(columns: int) -> str:
    """Source of the function that multiplies 64 rows of A by `columns` rows of B, 16 channels each."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b, int add) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0;"
        " wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{sums}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0; }}"
        : {operands} : "l"(a), "l"(b), "r"(add));
}}
"""


def permuted(out: int) -> np.ndarray:
    """The output channel that each row of the weights holds.

    A thread of wgmma holds columns 2q and 2q + 1 of every eight; in this order it has channels 8q to 8q + 7 of 32.
    """
    row = np.arange(out)
    group, j, q, e = row // 32, row % 32 // 8, row % 8 // 2, row % 2
    return group * 32 + q * 8 + j * 2 + e


class Plan:
    """Macros and sizes of the kernel for a shape and a tiling."""

    def __init__(self, shape: ConvShape, tiling: Tiling, norm: bool) -> None:
        t, r, s = shape.kernel
        margin = s - 1 if tiling.shift else 0
        self.pitch = tiling.pitch or -(-(tiling.width + margin) // 8) * 8
        row = tiling.chunk * 2
        self.a_rows = tiling.height + r - 1
        a = -(-self.a_rows * self.pitch * row // 1024) * 1024
        b = shape.out * row
        self.split = 2 if shape.out > 256 else 1
        free = SHARED - 1024 - 256 - tiling.a_stages * a - self.split * tiling.width * tiling.height * 4
        self.b_stages = min(free // b, 16)
        assert self.b_stages >= 2, f"{shape} {tiling} needs too much shared memory"
        self.box = shape.out // tiling.cluster
        if self.box > 256:
            self.box //= 2
        self.shared = SHARED
        self.columns = shape.out // self.split
        self.macros: dict[str, object] = {
            "TILE_W": tiling.width,
            "TILE_H": tiling.height,
            "CHUNK": tiling.chunk,
            "PITCH": self.pitch,
            "SHIFT": int(tiling.shift),
            "A_STAGES": tiling.a_stages,
            "B_STAGES": self.b_stages,
            "CLUSTER": tiling.cluster,
            "SPLIT": self.split,
            "COLUMNS": shape.out,
            "INNER": shape.inner,
            "KT": t,
            "KR": r,
            "KS": s,
            "NORM": int(norm),
            "BASE_OFFSET": int(tiling.base_offset),
        }

    @property
    def source(self) -> str:
        return wgmma(self.columns) + read_source(__package__, "conv_hopper.cu")


def tensor_map(address: int, sizes: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """A map of a dense bf16 tensor; sizes and box begin with the dimension that is contiguous."""
    from cuda.bindings import driver

    row = box[0] * 2
    strides, stride = [], 2
    for size in sizes[:-1]:
        stride *= size
        strides.append(driver.cuuint64_t(stride))
    swizzle = driver.CUtensorMapSwizzle
    made = cuda(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            strides,
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if row == 128 else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return np.array([int(word) for word in made.opaque], np.uint64)


class HopperConvolution:
    """A convolution of one shape. `normed` is silu(rms_norm(y) * gamma)."""

    def __init__(
        self, gpu: Any, shape: ConvShape, tiling: Tiling, norm: bool = False, **macros: object
    ) -> None:
        self._gpu, self.shape, self._tiling = gpu, shape, tiling
        self._plan = plan = Plan(shape, tiling, norm)
        self._module = Module(gpu.device, plan.source, ("convolve",), plan.macros | macros, accelerated=True)
        self._module.allow_shared("convolve", plan.shared)
        across, down = -(-shape.width // tiling.width), -(-shape.height // tiling.height)
        rounds = -(-across * down * shape.frames // tiling.cluster)
        clusters = int(gpu.device.properties.multiprocessor_count) // tiling.cluster
        self._grid = min(rounds, clusters) * tiling.cluster
        self._maps: dict[tuple[int, int], Any] = {}

    def enqueue(
        self, x: int, w: int, bias: int, residual: int, y: int, gamma: int = 0, normed: int = 0
    ) -> None:
        """Takes addresses on the device; residual and y may be 0."""
        shape = self.shape
        maps = self._maps.get((x, w))
        if maps is None:
            maps = self._maps[x, w] = self._gpu.upload(self._both(x, w))
        self._module.launch(
            self._gpu.stream,
            "convolve",
            self._grid,
            THREADS,
            *(maps.address, maps.address + MAP_BYTES, bias, residual, y, gamma, normed),
            *map(
                np.int32,
                (shape.frames, shape.height, shape.width, shape.pad[0], shape.pad[2], shape.stride[0]),
            ),
            *map(np.int32, (1, shape.width, shape.width * shape.height)),
            shared=self._plan.shared,
        )

    def _both(self, x: int, w: int) -> Any:
        shape, plan, chunk = self.shape, self._plan, self._tiling.chunk
        sizes = shape.inner, shape.width_in, shape.height_in, shape.frames_in
        pixels = tensor_map(x, sizes, (chunk, plan.pitch, plan.a_rows, 1))
        rows = int(np.prod(shape.kernel)) * shape.out
        return np.concatenate([pixels, tensor_map(w, (shape.inner, rows), (chunk, plan.box))])
