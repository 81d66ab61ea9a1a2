"""Maps the colours of one set of pixels onto those of another, by published methods.

Colours are float32 [3, N], RGB in [-1, 1]; values outside are mapped too. A fit takes the colours to change
and the statistics of the wanted ones, and returns the map. The names are those of the package color-matcher,
which ComfyUI's nodes call; a test compares the numbers with that package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32
Matrix = NDArray[np.float64]
Transfer = Callable[[Array], Array]

LEVELS = 4096  # per histogram; those of wanted colours are over [-1, 1]
LEAST_VARIANCE = 1e-8  # a plane of one colour has none; this is the square of an 80th of an 8-bit level
# Reinhard et al. 2001, "Color Transfer between Images". The inverse is exact: by the paper's rounded one
# equal colours move by up to 2 of 255 levels. Natural logarithms give the same map as those of base 10. They
# need positive numbers: darker channels keep their distance from DARKEST.
TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
FROM_LMS = np.linalg.inv(TO_LMS)
TO_LAB = np.diag(np.sqrt([1 / 3, 1 / 6, 1 / 2])) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
FROM_LAB = np.linalg.inv(TO_LAB)
DARKEST = 1 / 255  # in the range 0 to 1


class Statistics:
    """Running statistics of colours, in fp64: all that the fits ask of the wanted colours."""

    def __init__(self) -> None:
        self._rgb, self._lab = _Moments(), _Moments()
        self.counts = np.zeros((3, LEVELS), np.int64)

    def add(self, colours: Array) -> None:
        self._rgb.add(colours)
        self._lab.add(_to_lab(colours))
        for counts, values in zip(self.counts, colours, strict=True):
            counts += np.bincount(_level(values, -1, 2 / LEVELS), minlength=LEVELS)

    def packed(self) -> Matrix:
        """All numbers as one array, for `unpacked`: a later process goes on with the same bits."""
        moments = [np.concatenate(([m.count], m.sum, m.products.ravel())) for m in (self._rgb, self._lab)]
        return np.concatenate((*moments, self.counts.ravel()))

    @staticmethod
    def unpacked(packed: Matrix) -> "Statistics":
        made = Statistics()
        for moments, part in zip((made._rgb, made._lab), packed[:26].reshape(2, 13), strict=True):
            moments.count, moments.sum, moments.products = int(part[0]), part[1:4], part[4:].reshape(3, 3)
        made.counts = packed[26:].reshape(3, LEVELS).astype(np.int64)
        return made

    @property
    def count(self) -> int:
        """Number of pixels."""
        return self._rgb.count

    @property
    def mean(self) -> Matrix:
        return self._rgb.mean

    @property
    def covariance(self) -> Matrix:
        return self._rgb.covariance

    @property
    def lab(self) -> tuple[Matrix, Matrix]:
        """Mean and standard deviation of Reinhard's three channels."""
        return self._lab.mean, _spread(self._lab)


class _Moments:
    def __init__(self) -> None:
        self.count, self.sum, self.products = 0, np.zeros(3), np.zeros((3, 3))

    def add(self, values: Array) -> None:
        exact = values.astype(np.float64)
        self.count += exact.shape[1]
        self.sum += exact.sum(axis=1)
        self.products += exact @ exact.T

    @property
    def mean(self) -> Matrix:
        return self.sum / self.count

    @property
    def covariance(self) -> Matrix:
        return self.products / self.count - np.outer(self.mean, self.mean)


def linear(colours: Array, wanted: Statistics) -> Transfer:
    """The Monge-Kantorovitch map between two Gaussians (Pitié and Kokaram 2007): of all linear maps that give
    the wanted mean and covariance the one that moves colours least.

    The multivariate Gaussian of `mvgd` (Hahne and Aggoun 2021) has the same solution:
    S^-1 (S W)^(1/2) = S^(-1/2) (S^(1/2) W S^(1/2))^(1/2) S^(-1/2) for covariances S and W.
    """
    own = _Moments()
    own.add(colours)
    root, unrooted = _roots(own.covariance)
    matrix = unrooted @ _roots(root @ wanted.covariance @ root)[0] @ unrooted
    return Affine(matrix, wanted.mean - matrix @ own.mean)


@dataclass(frozen=True)
class Affine:
    matrix: Matrix
    offset: Matrix

    def __call__(self, colours: Array) -> Array:
        mapped = self.matrix.astype(np.float32) @ colours
        mapped += self.offset.astype(np.float32)[:, None]
        return mapped


def histogram(colours: Array, wanted: Statistics) -> Transfer:
    """Every channel alone gets the wanted distribution: a level goes to the level with the same share of
    pixels below it. Levels that no pixel of `colours` has lie between their neighbours.
    """
    centres = (np.arange(LEVELS) + 0.5) * 2 / LEVELS - 1
    lowest = np.minimum(colours.min(axis=1), -1).astype(np.float64)
    steps = (np.maximum(colours.max(axis=1), 1) - lowest) / LEVELS
    shifts = np.empty((3, LEVELS), np.float32)
    for c, (low, step, there) in enumerate(zip(lowest, steps, wanted.counts, strict=True)):
        own = np.bincount(_level(colours[c], low, step), minlength=LEVELS)
        used, known = np.flatnonzero(own), np.flatnonzero(there)
        shares = np.cumsum(there[known]) / there.sum()
        mapped = np.interp(np.cumsum(own[used]) / own.sum(), shares, centres[known])
        shifts[c] = np.interp(np.arange(LEVELS), used, mapped - (low + (used + 0.5) * step))

    def transfer(colours: Array) -> Array:
        moved = np.empty_like(colours)
        for c, (low, step) in enumerate(zip(lowest, steps, strict=True)):
            np.add(colours[c], shifts[c][_level(colours[c], low, step)], out=moved[c])
        return moved

    return transfer


def reinhard(colours: Array, wanted: Statistics) -> Transfer:
    """Three decorrelated channels, logarithms, get the wanted means and deviations (Reinhard et al. 2001)."""
    own = _Moments()
    own.add(_to_lab(colours))
    mean, spread = wanted.lab
    scale = spread / _spread(own)
    there = Affine(np.diag(scale), mean - scale * own.mean)

    def transfer(colours: Array) -> Array:
        logs = FROM_LAB.astype(np.float32) @ there(_to_lab(colours))
        mapped = FROM_LMS.astype(np.float32) @ np.exp(logs, out=logs)
        return np.asarray(colours + 2 * (mapped - _positive(colours)), np.float32)

    return transfer


# By name the fits in turn; each changes the colours that the one before it has made.
METHODS: dict[str, tuple[Callable[[Array, Statistics], Transfer], ...]] = {
    "mkl": (linear,),
    "hm": (histogram,),
    "reinhard": (reinhard,),
    "mvgd": (linear,),
    "hm-mvgd-hm": (histogram, linear, histogram),
    "hm-mkl-hm": (histogram, linear, histogram),
}


def fit(method: str, strength: float, colours: Array, wanted: Statistics) -> Transfer:
    """The map of `method` from `colours` to `wanted`, of which `strength` (0 to 1) is taken."""
    steps: list[Transfer] = []
    for make in METHODS[method]:
        steps.append(make(colours, wanted))
        colours = steps[-1](colours)
    if len(steps) == 1 and isinstance(steps[0], Affine):
        only = steps[0]
        return Affine(np.eye(3) + strength * (only.matrix - np.eye(3)), strength * only.offset)

    def transfer(colours: Array) -> Array:
        mapped = colours
        for step in steps:
            mapped = step(mapped)
        return colours + np.float32(strength) * (mapped - colours)

    return transfer


def _level(values: Array, lowest: float, step: float) -> NDArray[np.int32]:
    scaled = (values - np.float32(lowest)) * np.float32(1 / step)
    return np.clip(scaled, 0, LEVELS - 1, out=scaled).astype(np.int32)


def _positive(colours: Array) -> Array:
    return np.asarray(np.maximum(colours * np.float32(0.5) + np.float32(0.5), np.float32(DARKEST)))


def _to_lab(colours: Array) -> Array:
    lms = TO_LMS.astype(np.float32) @ _positive(colours)
    return np.asarray(TO_LAB.astype(np.float32) @ np.log(lms, out=lms), np.float32)


def _spread(moments: _Moments) -> Matrix:
    return np.sqrt(np.maximum(np.diag(moments.covariance), LEAST_VARIANCE))


def _roots(symmetric: Matrix) -> tuple[Matrix, Matrix]:
    """The square root of a matrix and its inverse."""
    values, vectors = np.linalg.eigh(symmetric)
    roots = np.sqrt(np.maximum(values, LEAST_VARIANCE))
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T
