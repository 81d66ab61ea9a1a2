"""The change that a LoRA makes to one weight, at strength 1, as float32 rows computed on the CPU.

A weight is [rows, inner], a row being everything behind the first axis. A change gives its rows from `first`
on for `base`, the same rows of the unchanged weight. Arrays of a file stay views into its map; merging on the
GPU reads them in their stored type (merging.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BF16 = np.dtype(ml_dtypes.bfloat16)
Rows = NDArray[np.float32]
Stored = NDArray[Any]


class Change(Protocol):
    def rows(self, base: Rows, first: int) -> Rows:
        """float32 [n, inner] for the rows `base` [n, inner] from row `first`."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale * up @ down; up [rows, rank], down [rank, inner]."""

    up: Stored
    down: Stored
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @cached_property
    def _down(self) -> Rows:
        return widened(self.down)

    def rows(self, base: Rows, first: int) -> Rows:
        up = widened(self.up[first : first + len(base)])
        return (up @ self._down) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Whole:
    """The change itself: values [rows, inner]."""

    values: Stored
    scale: float = 1.0

    def rows(self, base: Rows, first: int) -> Rows:
        return widened(self.values[first : first + len(base)]) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Computed:
    """A rare or small change: `make` returns all of it at once, float32 [rows, inner]."""

    make: Callable[[], Rows]

    @cached_property
    def _values(self) -> Rows:
        return self.make()

    def rows(self, base: Rows, first: int) -> Rows:
        return self._values[first : first + len(base)]


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: scale * (a1 @ b1) * (a2 @ b2), element by element."""

    first: LowRank
    second: LowRank
    scale: float

    def rows(self, base: Rows, first: int) -> Rows:
        product = self.first.rows(base, first) * self.second.rows(base, first)
        return product * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Factor:
    """A side of a LoKr: `first` [rows, inner], or first @ second."""

    first: Stored
    second: Stored | None = None

    @property
    def shape(self) -> tuple[int, int]:
        last = self.first if self.second is None else self.second
        return len(self.first), last.shape[1]

    @cached_property
    def values(self) -> Rows:
        first = widened(self.first)
        return first if self.second is None else first @ widened(self.second)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: scale * kron(left, right). Row a*c + b is of row a of left and row b of right, which has c."""

    left: Factor
    right: Factor
    scale: float

    def rows(self, base: Rows, first: int) -> Rows:
        a, b = np.divmod(np.arange(first, first + len(base)), self.right.shape[0])
        product = self.left.values[a][:, :, None] * self.right.values[b][:, None, :]
        return product.reshape(len(base), -1) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Shifted:
    """A change of the rows [start, start + count) only."""

    change: Change
    start: int
    count: int

    def rows(self, base: Rows, first: int) -> Rows:
        result = np.zeros_like(base)
        low, high = max(first, self.start), min(first + len(base), self.start + self.count)
        if low < high:
            part = slice(low - first, high - first)
            result[part] = self.change.rows(base[part], low - self.start)
        return result


@dataclass(frozen=True, eq=False)
class Replaced:
    """The weight becomes `values` [rows, inner]; a strength between 0 and 1 goes part of the way."""

    values: Stored

    def rows(self, base: Rows, first: int) -> Rows:
        return widened(self.values[first : first + len(base)]) - base


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: `magnitude` / norm * (W + change) in place of W + change.

    The shape of the magnitude decides the norm (files_and_loras.md 6.2). With one magnitude per row it is the
    norm of the unchanged row where `merged` is false (`dora_scale`, as ComfyUI), and the norm of the changed
    row where it is true (`lora_magnitude_vector`, as PEFT). With one per input column it is the norm of the
    changed column. `whole` returns the unchanged weight, which only columns need.
    """

    change: Change
    magnitude: Rows  # [rows, 1] or [1, inner]
    merged: bool
    whole: Callable[[], Rows]

    @cached_property
    def _columns(self) -> Rows:
        """Per column, [1, inner]."""
        base = self.whole()
        squares = np.zeros(base.shape[1], np.float64)
        step = max(1, (1 << 20) // base.shape[1])
        for first in range(0, len(base), step):
            part = base[first : first + step]
            squares += np.square(part + self.change.rows(part, first)).sum(axis=0, dtype=np.float64)
        return (self.magnitude / _positive(np.sqrt(squares)[None])).astype(np.float32)

    def rows(self, base: Rows, first: int) -> Rows:
        changed = base + self.change.rows(base, first)
        if len(self.magnitude) == 1:
            factor = self._columns
        else:
            normed = changed if self.merged else base
            norm = np.sqrt(np.square(normed).sum(axis=1, keepdims=True, dtype=np.float64))
            factor = (self.magnitude[first : first + len(base)] / _positive(norm)).astype(np.float32)
        return factor * changed - base


def needs_base(change: Change) -> bool:
    return isinstance(change, Decomposed | Replaced)


def widened(values: Stored) -> Rows:
    """float32. bfloat16 goes by its bits: its own conversion is slower and keeps other threads waiting."""
    if values.dtype == BF16:
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def matrix(values: Stored) -> Stored:
    """[rows, inner] of a tensor; one number is [1, 1]."""
    if values.ndim == 0:
        return values.reshape(1, 1)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _positive(norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """An all-zero row stays zero."""
    return np.maximum(norm, np.finfo(np.float32).tiny)
