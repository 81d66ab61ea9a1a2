"""Convolutions on Hopper by our kernel: channels-last bf16, sums in float32, the next norm fused.

x is [frames, height, width, inner] in bf16. Weights come in the checkpoint's layout and are repacked first.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.device.checked import cuda
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import HOPPER, Module, compile_source, read_source
from trt_wan.runtime.segments.native.convolution import ConvShape

Words = NDArray[np.uint64]

CAPABILITY = (9, 0)
SHARED = 227 << 10  # bytes that a block of Hopper may have
THREADS = 384
MOST_MAPS = 16
KERNELS = ("convolve", "repack_for_hopper")


@dataclass(frozen=True)
class Tiling:
    """How a block of threads works; conv_hopper.cu explains the terms."""

    width: int
    height: int
    chunk: int
    shift: bool = True
    pitch: int = 0  # pixels; 0: the width, with margins rounded up to 8 if `shift`
    a_stages: int = 2


# Kernel and padding of four parts that together enlarge a picture twice (nearest) and convolve it with 3x3.
UP: tuple[tuple[int, int, int], tuple[int, int, int, int]] = ((1, 2, 2), (1, 0, 1, 0))


def tiling(shape: ConvShape, given: int | None = None) -> Tiling | None:
    """The fastest that was measured (docs/log.md); None for shapes that the kernel cannot compute. Eight
    columns of output are for `given`, see HopperConvolution.
    """
    if shape.stride[1:] != (1, 1) or shape.inner % 32:
        return None
    shift = shape.kernel[2] > 1
    match shape.out:
        case 8 if given:
            return Tiling(32, 16, 32, shift, a_stages=4)
        case 96:
            return Tiling(32, 16, 32, shift, a_stages=3)
        case 192 if shape.inner % 64:
            return Tiling(16, 16, 32, shift, a_stages=3)
        case 192:
            return Tiling(16, 16, 64, shift, pitch=18 if shape.kernel[2] == 3 else 0)
        case 384 if shape.inner % 64 == 0:
            tiles = shape.frames * -(-shape.height // 8) * -(-shape.width // 16)
            return Tiling(16 if tiles > 120 else 8, 8, 64, False, a_stages=3 if shape.kernel[1] == 1 else 2)
    return None


def fused(
    gpu: Gpu, shape: ConvShape, parts: int, *, norm: bool, given: int | None = None
) -> "HopperConvolution | None":
    """The convolution of that shape, built once per Gpu. None if this kernel does not compute it here."""
    chosen = tiling(shape, given)
    if gpu.capability != CAPABILITY or chosen is None:
        return None
    made = HopperConvolution
    return gpu.once((made, shape, parts, norm, given), lambda: made(gpu, shape, chosen, parts, norm, given))


def wgmma(columns: int) -> str:
    """Source of the function that multiplies 64 rows of A by `columns` rows of B, 16 channels each."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
        " {{{sums}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
        : {operands} : "l"(a), "l"(b));
}}
"""


class Plan:
    """Macros and sizes of the kernel for a shape and a tiling."""

    def __init__(
        self,
        shape: ConvShape,
        tiling: Tiling,
        parts: int,
        norm: bool,
        given: int | None = None,
    ) -> None:
        self.biases = (2 if parts == 2 else 1) * shape.out
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
        self.box = shape.out // self.split
        self.columns = shape.out // self.split
        self.macros: dict[str, object] = {
            "TILE_W": tiling.width,
            "TILE_H": tiling.height,
            "CHUNK": tiling.chunk,
            "PITCH": self.pitch,
            "SHIFT": int(tiling.shift),
            "A_STAGES": tiling.a_stages,
            "B_STAGES": self.b_stages,
            "SPLIT": self.split,
            "COLUMNS": shape.out,
            "INNER": shape.inner,
            "KT": t,
            "KR": r,
            "KS": s,
            "NORM": int(norm),
            "PARTS": parts,
            "GIVEN_OUT": given or self.biases,
        }

    @property
    def source(self) -> str:
        kernels = read_source(__package__, "conv_hopper.cu", "conv_hopper_weights.cu")
        return HOPPER + wgmma(self.columns) + kernels


def tensor_map(address: int, sizes: tuple[int, ...], box: tuple[int, ...]) -> Words:
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


class Kernel:
    """The kernels of a plan, compiled at their first use or before it by `compile`, perhaps in a thread."""

    def __init__(self, gpu: Gpu, plan: Plan) -> None:
        self._device, self._source, self._macros = gpu.device, plan.source, plan.macros
        self._capability: tuple[int, int] = gpu.capability
        self._code: Any = None

    def compile(self) -> None:
        if self._code is None:
            self._code = compile_source(self._source, self._capability, self._macros, accelerated=True)

    @cached_property
    def module(self) -> Module:
        self.compile()
        module = Module(self._device, self._source, KERNELS, code=self._code)
        module.allow_shared("convolve", SHARED)
        return module


class HopperConvolution:
    """A convolution of one shape, or `parts` of them: see conv_hopper.cu. The shape is that of one part.

    y is [frames, height, width, out] in bf16; with two parts, their frames in turn; with four, one picture
    twice as high and wide. `normed` is like y: its RMS norm times gamma, perhaps with SiLU.

    `given` is the rows of the checkpoint's weights, if zeros fill them up to `out`.
    """

    def __init__(
        self,
        gpu: Gpu,
        shape: ConvShape,
        tiling: Tiling,
        parts: int = 1,
        norm: bool = False,
        given: int | None = None,
    ) -> None:
        self._gpu, self.shape, self._tiling, self._parts = gpu, shape, tiling, parts
        self._plan = plan = Plan(shape, tiling, parts, norm, given)
        self.kernel = gpu.once((__name__, *plan.macros.values()), lambda: Kernel(gpu, plan))
        across, down = -(-shape.width // tiling.width), -(-shape.height // tiling.height)
        processors = int(gpu.device.properties.multiprocessor_count)
        self._grid = min(across * down * shape.frames * parts, processors)
        self._maps: dict[tuple[int, int], tuple[Words, Words]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the repacked weights and of the bias behind them."""
        return 2 * self._weight_rows * self.shape.inner + 4 * self._plan.biases

    @property
    def _weight_rows(self) -> int:
        return self._parts * math.prod(self.shape.kernel) * self.shape.out

    def repack(self, given: int, bias: int, added_bias: int, w: int) -> None:
        """Turns weights [out, inner, t, r, s] and float32 biases [out] of the checkpoint into this
        convolution's. `out` counts two parts. added_bias may be 0.
        """
        blocks = -(-self._plan.biases * self.shape.inner // 256)
        self.kernel.module.launch(
            self._gpu.stream, "repack_for_hopper", blocks, 256, given, bias, added_bias, w
        )

    def enqueue(
        self,
        x: int,
        w: int,
        added: int,
        y: int,
        gamma: int = 0,
        normed: int = 0,
        silu: bool = True,
    ) -> None:
        """Takes addresses on the device; added and y may be 0. y may be added."""
        shape = self.shape
        if (x, w) not in self._maps:
            if len(self._maps) == MOST_MAPS:  # the scratch moves from time to time
                self._maps.clear()
            self._maps[x, w] = self._both(x, w)
        bias = w + 2 * self._weight_rows * shape.inner
        scale, pairs = 1 + (self._parts == 4), 1 + (self._parts == 2)
        row = scale * shape.width
        strides = scale, scale * row, pairs * row * scale * shape.height
        sizes = shape.frames, shape.height, shape.width, shape.pad[0], shape.pad[2], shape.stride[0]
        self.kernel.module.launch(
            self._gpu.stream,
            "convolve",
            self._grid,
            THREADS,
            *(*self._maps[x, w], bias, added, y, gamma, normed),
            *map(np.int32, (silu, *sizes, *strides)),
            shared=SHARED,
        )

    def _both(self, x: int, w: int) -> tuple[Words, Words]:
        shape, plan, chunk = self.shape, self._plan, self._tiling.chunk
        pixels = shape.inner, *reversed(shape.taken)
        weights = shape.inner, self._weight_rows
        return (
            tensor_map(x, pixels, (chunk, plan.pitch, plan.a_rows, 1)),
            tensor_map(w, weights, (chunk, plan.box)),
        )
