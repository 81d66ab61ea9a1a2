"""The weight of every latent of a context window, before the weights of a latent are divided by their sum."""

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.context.settings import Fuse

F64 = NDArray[np.float64]


def pyramid(size: int) -> F64:
    """Rises by equal steps to 1 in the middle and falls again; never 0."""
    weights: F64 = np.minimum(np.arange(1.0, size + 1), np.arange(size, 0.0, -1)) / ((size + 1) // 2)
    return weights


def fades(fuse: Fuse, size: int, before: int, after: int) -> F64:
    """A window that shares `before` latents with the window in front of it and `after` with the next one; 0
    at an end of the video. Never 0.

    linear: with two windows the weights of a latent sum to 1, over all that they share.
    """
    weights = np.ones(size)
    if fuse == "linear":
        if before:
            weights = np.minimum(weights, np.arange(1, size + 1) / (before + 1))
        if after:
            weights = np.minimum(weights, np.arange(size, 0, -1) / (after + 1))
        return weights
    middle, whole = size // 2, pyramid(size)
    weights[middle:] = whole[middle:] if after else 1
    weights[:middle] = whole[:middle] if before else 1
    return weights


def wrappers(fuse: Fuse, size: int, overlap: int, first: bool, last: bool) -> F64:
    """The weights of ComfyUI-WanVideoWrapper (kijai_semantics.md 3.5); `first` and `last` are the windows at
    the ends of the video. Ramps go down to exactly 0, at the right one after the left one.
    """
    rising = np.linspace(0, 1, overlap)
    if fuse == "pyramid":
        weights = pyramid(size)
        if first:
            weights[:overlap] = np.maximum(weights[:overlap], rising)
        if last:
            weights[-overlap:] = np.maximum(weights[-overlap:], np.linspace(1, 0, overlap))
        return weights
    weights = np.ones(size)
    if not first:
        weights[:overlap] = rising
    if not last:
        weights[-overlap:] = np.linspace(1, 0, overlap)
    return weights
