"""The two sources of weights for the GPU: checkpoint files, and seeded random numbers.

A source cuts a pack into pieces. A piece is read into pinned memory by one thread and enqueued by another:
copied straight into the pack where the engine takes the stored type, else copied to a staging buffer on the
device and converted from there, GGUF blocks, rotated columns and what becomes int8 through float32. A
scaled-FP8 checkpoint reaches an FP8 product bit for bit, int8 ConvRot an int8 product.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import QUANTISED, Part, Tensor, scale_name
from trt_wan.engines.int8 import GROUP, INT8
from trt_wan.runtime.device.arena import ALIGNMENT, laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.weights.convert import Converter
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.random import random_moments
from trt_wan.runtime.weights.stored import BLOCKS, Stored, Tensors

PIECE_BYTES = 16 << 20
PIECE_ROWS = 1 << 16  # at most, where rows have scales
FLOAT32 = np.dtype(np.float32)
SLOT_BYTES = PIECE_BYTES + 4 * PIECE_ROWS  # a piece and the scales of its rows
FLOAT32_BYTES = 32 << 20  # a piece in float32: it stays in the GPU's cache
RANDOM_E4M3_DEVIATION = 100.0  # 448 is 4.5 deviations away


@dataclass(frozen=True)
class Place:
    """Where a piece has been read to and where it goes; addresses."""

    gpu: Gpu
    slot: int  # pinned memory
    staging: int  # on the device
    pack: int  # on the device
    float32: Callable[[], int]  # FLOAT32_BYTES on the device, allocated at the first call


class Piece(Protocol):
    @property
    def size(self) -> int:
        """Bytes that `read` writes; 0 if nothing is to be read."""
        ...

    def read(self, slot: NDArray[np.uint8]) -> None: ...

    def enqueue(self, place: Place) -> None:
        """Enqueues the writing of the piece into its pack, on `gpu.loads`."""
        ...


class WeightSource(Protocol):
    def pieces(self, pack: Pack) -> Iterator[Piece]:
        """Pieces that together write every tensor of the pack."""
        ...


@dataclass(frozen=True)
class StoredPiece:
    """Rows of one tensor: `count` rows of `inner` numbers from row `first`."""

    stored: Stored
    dtype: np.dtype[Any]  # in the pack
    offset: int  # bytes from the start of the pack to the tensor
    scales_at: int | None  # the same for its scales, if the tensor is to be quantised
    first: int
    count: int
    inner: int

    @property
    def _raw(self) -> int:
        return self.stored.nbytes(self.count * self.inner)

    @property
    def _scales_start(self) -> int:
        return -(-self._raw // ALIGNMENT) * ALIGNMENT

    @property
    def size(self) -> int:
        return self._raw if self.stored.scales is None else self._scales_start + 4 * self.count

    def read(self, slot: NDArray[np.uint8]) -> None:
        self.stored.read(self.stored.nbytes(self.first * self.inner), slot[: self._raw])
        if self.stored.scales is not None:
            scales = slot[self._scales_start : self.size].view(np.float32)
            scales[:] = self.stored.scales[self.first : self.first + self.count]

    def enqueue(self, place: Place) -> None:
        assert self.stored.delta is None
        if _through_float32(self.stored, self.dtype):
            self.decode(place, place.float32())
            self.encode(place, place.float32())
        elif self.stored.encoding == self.dtype.name:
            place.gpu.copy(self._target(place), place.slot, self.size, place.gpu.loads)
        else:
            self._encode(place, self.stored.encoding, *self._staged(place))

    def decode(self, place: Place, target: int) -> None:
        """Enqueues the piece as float32 [count, inner] to `target` on the device, without the delta."""
        converter, stream = _converter(place.gpu), place.gpu.loads
        encodings = self.stored.encoding, "float32"
        converter.convert(stream, encodings, (*self._staged(place), target), self.count, self.inner)
        if self.stored.rotation:
            converter.rotate(stream, target, self.count * self.inner, self.stored.rotation)

    def encode(self, place: Place, values: int) -> None:
        """Enqueues float32 [count, inner] from `values` on the device into the pack. Int8 rotates them."""
        if self.dtype != INT8:
            self._encode(place, "float32", values, 0)
            return
        converter, results = _converter(place.gpu), (self._target(place), self._scales(place))
        converter.rotate(place.gpu.loads, values, self.count * self.inner, GROUP)
        converter.quantise_int8(place.gpu.loads, values, *results, self.count, self.inner)

    def _encode(self, place: Place, encoding: str, values: int, scales: int) -> None:
        converter, stream, target = _converter(place.gpu), place.gpu.loads, self._target(place)
        if self.scales_at is None:
            encodings = encoding, self.dtype.name
            converter.convert(stream, encodings, (values, scales, target), self.count, self.inner)
        else:
            results = target, self._scales(place)
            converter.quantise(stream, encoding, (values, scales, *results), self.count, self.inner)

    def _staged(self, place: Place) -> tuple[int, int]:
        """Enqueues the copy to the device. Returns the addresses of the numbers and of their scales."""
        place.gpu.copy(place.staging, place.slot, self.size, place.gpu.loads)
        return place.staging, 0 if self.stored.scales is None else place.staging + self._scales_start

    def _target(self, place: Place) -> int:
        return place.pack + self.offset + self.first * self.inner * self.dtype.itemsize

    def _scales(self, place: Place) -> int:
        assert self.scales_at is not None
        return place.pack + self.scales_at + 4 * self.first


def _through_float32(stored: Stored, dtype: np.dtype[Any]) -> bool:
    return bool(stored.blocks or stored.rotation or stored.delta is not None or dtype == INT8)


def _as_it_is(stored: Stored, dtype: np.dtype[Any]) -> bool:
    """Whether the stored codes are those of the pack."""
    rotation = GROUP if dtype == INT8 else 0
    return (
        stored.dtype == dtype and not stored.blocks and stored.rotation == rotation and stored.delta is None
    )


def _converter(gpu: Gpu) -> Converter:
    converter: Converter = gpu.once("weights", lambda: Converter(gpu))
    return converter


@dataclass(frozen=True)
class Batch:
    """Small pieces that share a slot: a block has forty tensors of some KB."""

    pieces: tuple[Piece, ...]

    @property
    def _starts(self) -> list[int]:
        return list(laid_out({str(i): piece.size for i, piece in enumerate(self.pieces)})[0].values())

    @property
    def size(self) -> int:
        return self._starts[-1] + self.pieces[-1].size

    def read(self, slot: NDArray[np.uint8]) -> None:
        for start, piece in zip(self._starts, self.pieces, strict=True):
            piece.read(slot[start : start + piece.size])

    def enqueue(self, place: Place) -> None:
        for start, piece in zip(self._starts, self.pieces, strict=True):
            piece.enqueue(replace(place, slot=place.slot + start))


class FileSource:
    """Weights of any `Tensors`, such as checkpoint files."""

    def __init__(self, parts: Mapping[Part, Tensors], piece_bytes: int = PIECE_BYTES) -> None:
        self.parts, self._piece_bytes = parts, piece_bytes

    def pieces(self, pack: Pack) -> Iterator[Piece]:
        waiting: list[Piece] = []
        size = 0
        for piece in self._pieces(pack):
            room = -(-piece.size // ALIGNMENT) * ALIGNMENT
            if waiting and size + room > self._piece_bytes:
                yield Batch(tuple(waiting))
                waiting, size = [], 0
            waiting.append(piece)
            size += room
        if waiting:
            yield Batch(tuple(waiting))

    def _pieces(self, pack: Pack) -> Iterator[Piece]:
        tensors, scaled = self.parts[pack.network.part], pack.scaled
        for tensor in pack.network.weights:
            if tensor.name in scaled:
                continue  # written with its weight
            stored = tensors.stored(pack.network.weight_key(tensor.name, pack.n))
            offset, dtype = pack.offsets[tensor.name], np.dtype(tensor.dtype)
            if tensor.dtype not in QUANTISED:
                yield from self._cut(stored, dtype, offset, None)
                continue
            scales_at = pack.offsets[scale_name(tensor.name)]
            if not _as_it_is(stored, dtype):
                yield from self._cut(stored, dtype, offset, scales_at)
                continue
            scales = np.ones(tensor.shape[0], np.float32) if stored.scales is None else stored.scales
            codes = Stored(stored.values.view(np.uint8), None, stored.file, stored.start)
            yield from self._cut(codes, codes.dtype, offset, None)
            yield from self._cut(Stored(scales), np.dtype(np.float32), scales_at, None)

    def _cut(
        self, stored: Stored, dtype: np.dtype[Any], offset: int, scales_at: int | None
    ) -> Iterator[Piece]:
        """Pieces of whole rows. Where rows do not matter every number is a row, or every block of numbers."""
        by_row = stored.scales is not None or scales_at is not None or stored.rotation or stored.delta
        inner = stored.row if by_row else BLOCKS.get(stored.blocks, (1,))[0]
        rows = math.prod(stored.shape) // inner
        step = self._piece_bytes // stored.nbytes(inner)
        if _through_float32(stored, dtype):
            step = min(step, FLOAT32_BYTES // (4 * inner))
        assert step, f"a row of {inner} numbers does not fit into a piece"
        step = min(step, PIECE_ROWS) if by_row else step
        for first in range(0, rows, step):
            yield StoredPiece(stored, dtype, offset, scales_at, first, min(step, rows - first), inner)


@dataclass(frozen=True)
class RandomPiece:
    """A whole tensor, made on the device."""

    tensor: Tensor
    offset: int
    seed: int
    mean: float
    deviation: float
    size = 0

    def read(self, slot: NDArray[np.uint8]) -> None:
        raise AssertionError("nothing is read")

    def enqueue(self, place: Place) -> None:
        array = place.gpu.view(place.pack + self.offset, self.tensor.shape, self.tensor.dtype)
        place.gpu.fill_random(array, self.seed, self.mean, self.deviation, place.gpu.loads)


@dataclass(frozen=True)
class RandomRows:
    """Rows of a weight that becomes int8: the numbers that other types have for the same seed."""

    rows: StoredPiece
    seed: int
    deviation: float
    size = 0

    def read(self, slot: NDArray[np.uint8]) -> None:
        raise AssertionError("nothing is read")

    def enqueue(self, place: Place) -> None:
        rows, gpu, values = self.rows, place.gpu, place.float32()
        array, first = gpu.view(values, (rows.count, rows.inner), FLOAT32), rows.first * rows.inner
        gpu.fill_random(array, self.seed, 0.0, self.deviation, gpu.loads, first=first)
        rows.encode(place, values)


class RandomSource:
    """Weights of any model without its files: speed and numerics can be shown with them, pictures cannot."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def pieces(self, pack: Pack) -> Iterator[Piece]:
        for tensor in pack.network.weights:
            seed = zlib.crc32(pack.network.weight_key(tensor.name, pack.n).encode(), self.seed)
            if tensor.dtype == "int8":
                yield from _random_rows(pack, tensor, seed)
                continue
            if tensor.name in pack.scaled and pack.scaled[tensor.name].dtype == "int8":
                continue  # written with its weight
            yield RandomPiece(tensor, pack.offsets[tensor.name], seed, *_moments(pack, tensor))


def _random_rows(pack: Pack, tensor: Tensor, seed: int) -> Iterator[Piece]:
    rows, inner = tensor.shape
    step, scales_at = FLOAT32_BYTES // (4 * inner), pack.offsets[scale_name(tensor.name)]
    _, deviation = random_moments(pack.network.weight_key(tensor.name, pack.n), tensor.shape)
    for first in range(0, rows, step):
        place = first, min(step, rows - first), inner
        piece = StoredPiece(Stored(np.empty(0)), INT8, pack.offsets[tensor.name], scales_at, *place)
        yield RandomRows(piece, seed, deviation)


def _moments(pack: Pack, tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation. FP8 values times their scale have those of the weight they stand for."""
    if weight := pack.scaled.get(tensor.name):
        _, deviation = random_moments(pack.network.weight_key(weight.name, pack.n), weight.shape)
        return deviation / RANDOM_E4M3_DEVIATION, 0.0
    if tensor.dtype == "float8_e4m3fn":
        return 0.0, RANDOM_E4M3_DEVIATION
    return random_moments(pack.network.weight_key(tensor.name, pack.n), tensor.shape)
