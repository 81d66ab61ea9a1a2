"""Frames become SAM2's input on the device: a frame's bytes go up and two kernels filter them.

The filters are those of resample.py, columns first. The host makes their tables once per size. A frame is
uploaded in pieces of whole rows, so memory is bounded for any size: one piece, and the frame at the model's
width, float32 planes [3, H, S] (53 MB for 8K).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_wan.preprocess.sam2.kernels import THREADS, sam2_kernels
from trt_wan.preprocess.sam2.resample import DEVIATION, MEAN, InputRule, filter_table
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import DeviceArray, Gpu, copy
from trt_wan.runtime.device.pinned import Ring
from trt_wan.runtime.video.reader import Picture

PIECE_BYTES = 8 << 20  # a frame of 1080p is one piece
PIECES = 4  # pinned: the host may be this many frames ahead of the copies
MOST_BLOCKS = 65535  # limit of a grid's second dimension; the kernels stride over more rows


@dataclass(frozen=True)
class _Tables:
    """Filters for one frame size and rule, on the device, and the memory that such a frame passes through."""

    across: tuple[DeviceArray, DeviceArray]
    down: tuple[DeviceArray, DeviceArray]
    piece: DeviceArray  # uint8
    narrow: DeviceArray  # float32 [3, H, S]
    buffer: Any  # the memory of all these arrays


class Resizer:
    """Resizes frames to [3, size, size]. Keeps the tables of one frame size: a clip has only one."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.gpu, self.size, self._kernels = gpu, size, sam2_kernels(gpu)
        self._ring = Ring(PIECES, PIECE_BYTES)
        self._made: tuple[tuple[int, int, InputRule], _Tables] | None = None

    def write(self, frame: Picture, rule: InputRule, target: DeviceArray) -> None:
        """Enqueues the work that makes `target`, float32 [3, size, size], from uint8 RGB [H, W, 3]."""
        assert frame.dtype == np.uint8 and frame.shape[2:] == (3,), f"{frame.dtype} {frame.shape}"
        assert target.shape == (3, self.size, self.size) and target.dtype == np.float32, target.shape
        height, width = frame.shape[:2]
        tables, levels = self._tables(height, width, rule), np.int32(rule != "kijai")
        size = np.int32(self.size)
        rows = _rows(height, width)
        first, weights = tables.across
        for start in range(0, height, rows):
            part = frame[start : start + rows]
            _, slot = self._ring.take()
            slot.bytes[: part.size].reshape(part.shape)[...] = part
            copy(tables.piece.address, slot.address, part.size, self.gpu.stream)
            slot.used_by(self.gpu.stream)
            sizes = (first.address, weights.address, np.int32(weights.shape[0]), np.int32(width))
            where = (np.int32(len(part)), np.int32(start), np.int32(height), size, levels)
            self._launch("across", len(part), tables.piece.address, tables.narrow.address, *sizes, *where)
        first, weights = tables.down
        sizes = (first.address, weights.address, np.int32(weights.shape[0]), np.int32(height))
        normal = (*(np.float32(v) for v in MEAN), *(np.float32(v) for v in DEVIATION))
        addresses = (tables.narrow.address, target.address)
        self._launch("down", self.size, *addresses, *sizes, size, levels, *normal)

    def _launch(self, name: str, rows: int, *arguments: Any) -> None:
        grid = (math.ceil(self.size / THREADS), min(rows, MOST_BLOCKS))
        self._kernels.launch(self.gpu.stream, name, grid, THREADS, *arguments)

    def _tables(self, height: int, width: int, rule: InputRule) -> _Tables:
        key = (height, width, rule)
        if self._made is None or self._made[0] != key:
            if self._made is not None:
                self._made[1].buffer.close(self.gpu.stream)
                self._made = None
            self._made = key, self._make(height, width, rule)
        return self._made[1]

    def _make(self, height: int, width: int, rule: InputRule) -> _Tables:
        tables = (*filter_table(width, self.size, rule), *filter_table(height, self.size, rule))
        shapes: list[tuple[tuple[int, ...], Any]] = [(table.shape, table.dtype) for table in tables]
        shapes += [((_rows(height, width) * width * 3,), np.uint8), ((3, height, self.size), np.float32)]
        buffer, arrays = allocated(self.gpu, shapes)
        for table, array in zip(tables, arrays, strict=False):
            self.gpu.write(array, table)
        return _Tables((arrays[0], arrays[1]), (arrays[2], arrays[3]), arrays[4], arrays[5], buffer)


def allocated(gpu: Gpu, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> tuple[Any, list[DeviceArray]]:
    """One buffer outside the arena, and arrays of these shapes and types in it."""
    sizes = {str(i): math.prod(shape) * np.dtype(dtype).itemsize for i, (shape, dtype) in enumerate(shapes)}
    offsets, total = laid_out(sizes)
    buffer = gpu.allocate(total)
    start = int(buffer.handle)
    return buffer, [gpu.view(start + offsets[str(i)], *shape) for i, shape in enumerate(shapes)]


def _rows(height: int, width: int) -> int:
    """Rows per piece."""
    return max(1, min(height, PIECE_BYTES // (width * 3)))
