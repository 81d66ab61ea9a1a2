"""Weights with LoRAs for the GPU: rows decoded to float32 on the device, changes added there, then encoded.

    base rows --decode--> float32 [count, inner] --merge.cu--> float32, or codes and a scale per row --> pack

The factors of a low-rank change travel with the rows, in the type of their file. LoHa, LoKr, DoRA and
replaced weights are computed on the host, row by row. So are small tensors as a whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Part
from trt_wan.engines.int8 import INT8
from trt_wan.runtime.device.arena import ALIGNMENT
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.loras.changes import Change, LowRank, Shifted, Whole, matrix, needs_base, widened
from trt_wan.runtime.loras.merge import TYPES, Merger
from trt_wan.runtime.loras.merged import Merge
from trt_wan.runtime.weights.sources import PIECE_BYTES, FileSource, Piece, Place, StoredPiece
from trt_wan.runtime.weights.stored import Stored, Tensors

ON_THE_HOST = 1 << 18  # numbers of a tensor that is merged on the host as a whole: a bias, a norm
FLOAT32 = np.dtype(np.float32)


class MergingSource(FileSource):
    """Tensors that may have a `delta`. Those of up to `small` numbers are merged on the host."""

    def __init__(
        self, parts: Mapping[Part, Tensors], piece_bytes: int = PIECE_BYTES, small: int = ON_THE_HOST
    ) -> None:
        super().__init__(parts, piece_bytes)
        self._small = small

    def _cut(
        self, stored: Stored, dtype: np.dtype[Any], offset: int, scales_at: int | None
    ) -> Iterator[Piece]:
        if stored.delta is None:
            yield from super()._cut(stored, dtype, offset, scales_at)
        elif math.prod(stored.shape) <= self._small and scales_at is None:
            yield from super()._cut(Stored(stored.float32()), dtype, offset, scales_at)
        else:
            for piece in super()._cut(stored, dtype, offset, scales_at):
                assert isinstance(piece, StoredPiece)
                yield from _merged(piece, self._piece_bytes)


def _merged(piece: StoredPiece, most: int) -> Iterator[Piece]:
    """The pieces, of at most `most` bytes each, that together write the rows of `piece`. They follow each
    other on one stream and share the float32 numbers of `Place`.
    """
    delta = piece.stored.delta
    assert isinstance(delta, Merge)
    yield Decoded(piece)
    on_host = []
    for strength, change in delta.parts:
        inner, start = (change.change, change.start) if isinstance(change, Shifted) else (change, 0)
        rows = change.count if isinstance(change, Shifted) else 1 << 62
        low, high = max(piece.first, start), min(piece.first + piece.count, start + rows)
        if isinstance(inner, LowRank | Whole):
            into = 4 * piece.inner * (low - piece.first)
            cut = _products if isinstance(inner, LowRank) else _additions
            yield from cut(inner, strength, low - start, high - start, into, most)  # type: ignore[arg-type]
        else:
            on_host.append((strength, change))
    if on_host:
        step = max(1, most // (4 * piece.inner))
        for first in range(0, piece.count, step):
            yield OnHost(piece, tuple(on_host), first, min(step, piece.count - first))
    yield Encoded(piece)


def _products(
    change: LowRank, strength: float, first: int, stop: int, into: int, most: int
) -> "Iterator[Product]":
    if first >= stop:
        return
    up, down = change.up[first:stop], change.down
    dtype = up.dtype if up.dtype == down.dtype and up.dtype.name in TYPES else FLOAT32
    step = max(1, most // ((len(up) + down.shape[1]) * dtype.itemsize + 1))
    for k in range(0, len(down), step):
        yield Product(up[:, k : k + step], down[k : k + step], dtype, strength * change.scale, into)


def _additions(
    change: Whole, strength: float, first: int, stop: int, into: int, most: int
) -> "Iterator[Addition]":
    values = change.values
    dtype = values.dtype if values.dtype.name in TYPES else FLOAT32
    step = max(1, most // (values.shape[1] * dtype.itemsize))
    for row in range(first, stop, step):
        part = values[row : min(stop, row + step)]
        at = into + 4 * values.shape[1] * (row - first)
        yield Addition(part, dtype, strength * change.scale, at)


@dataclass(frozen=True, eq=False)
class Decoded:
    """The rows of the base, as float32 on the device."""

    piece: StoredPiece

    @property
    def size(self) -> int:
        return self.piece.size

    def read(self, slot: NDArray[np.uint8]) -> None:
        self.piece.read(slot)

    def enqueue(self, place: Place) -> None:
        self.piece.decode(place, place.float32())


@dataclass(frozen=True, eq=False)
class Product:
    """up [rows, rank] times down [rank, inner], added to the rows from byte `into` of the float32 numbers."""

    up: NDArray[Any]
    down: NDArray[Any]
    dtype: np.dtype[Any]  # in which they travel
    scale: float
    into: int

    @property
    def _down_at(self) -> int:
        return -(-self.up.size * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def size(self) -> int:
        return self._down_at + self.down.size * self.dtype.itemsize

    def read(self, slot: NDArray[np.uint8]) -> None:
        _write(slot, self.up, self.dtype)
        _write(slot[self._down_at :], self.down, self.dtype)

    def enqueue(self, place: Place) -> None:
        stream = place.gpu.loads
        place.gpu.copy(place.staging, place.slot, self.size, stream)
        addresses = place.staging, place.staging + self._down_at, place.float32() + self.into
        sizes = len(self.up), self.down.shape[1], len(self.down)
        _merger(place.gpu).add_product(stream, self.dtype, addresses, self.scale, sizes)


@dataclass(frozen=True, eq=False)
class Addition:
    """Rows that are added as they are."""

    values: NDArray[Any]
    dtype: np.dtype[Any]
    scale: float
    into: int

    @property
    def size(self) -> int:
        return self.values.size * self.dtype.itemsize

    def read(self, slot: NDArray[np.uint8]) -> None:
        _write(slot, self.values, self.dtype)

    def enqueue(self, place: Place) -> None:
        _add(place, self.dtype, self.scale, self.into, self.values.size)


@dataclass(frozen=True, eq=False)
class OnHost:
    """Changes that a reader computes: rows `first` to `first + count` of the piece."""

    piece: StoredPiece
    parts: tuple[tuple[float, Change], ...]
    first: int
    count: int

    @property
    def size(self) -> int:
        return 4 * self.count * self.piece.inner

    def read(self, slot: NDArray[np.uint8]) -> None:
        first = self.piece.first + self.first
        base = np.zeros((self.count, self.piece.inner), np.float32)
        if any(needs_base(change) for _, change in self.parts):
            unchanged = replace(self.piece.stored, delta=None)
            base = matrix(unchanged.rows(range(first, first + self.count)))
        values = base.copy()
        Merge(self.parts).add(values, first)
        np.subtract(values, base, out=slot[: self.size].view(np.float32).reshape(values.shape))

    def enqueue(self, place: Place) -> None:
        into = 4 * self.first * self.piece.inner
        _add(place, FLOAT32, 1.0, into, self.count * self.piece.inner)


@dataclass(frozen=True, eq=False)
class Encoded:
    """The finished rows, into the pack."""

    piece: StoredPiece
    size = 0

    def read(self, slot: NDArray[np.uint8]) -> None:
        pass

    def enqueue(self, place: Place) -> None:
        piece = self.piece
        if piece.scales_at is None or piece.dtype == INT8:
            piece.encode(place, place.float32())
            return
        target = place.pack + piece.offset + piece.first * piece.inner
        scales = place.pack + piece.scales_at + 4 * piece.first
        rows = piece.count, piece.inner
        _merger(place.gpu).quantise_rows(place.gpu.loads, place.float32(), target, scales, *rows)


def _add(place: Place, dtype: np.dtype[Any], scale: float, into: int, numbers: int) -> None:
    stream = place.gpu.loads
    place.gpu.copy(place.staging, place.slot, numbers * dtype.itemsize, stream)
    _merger(place.gpu).add(stream, dtype, place.staging, scale, place.float32() + into, numbers)


def _write(slot: NDArray[np.uint8], values: NDArray[Any], dtype: np.dtype[Any]) -> None:
    target = slot[: values.size * dtype.itemsize]
    if values.dtype == dtype:  # by the bits: bfloat16's own copy keeps other threads waiting
        bits = np.dtype(f"u{dtype.itemsize}")
        target.view(bits).reshape(values.shape)[...] = values.view(bits)
    else:
        target.view(dtype).reshape(values.shape)[...] = widened(values)


def _merger(gpu: Gpu) -> Merger:
    merger: Merger = gpu.once("merge", lambda: Merger(gpu))
    return merger
