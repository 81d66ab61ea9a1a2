"""Constant tables of SAM2's tracker: positions as sines, and the rotations of its memory attention."""

import math

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.sam2.config import Sam2Config


def tables(config: Sam2Config) -> dict[str, NDArray[np.float32]]:
    """The position tables and rotations for track graphs."""
    grid = config.grid
    pairs = config.channels // 4
    frequency = 10000.0 ** (-4 * np.arange(pairs) / config.channels)
    y, x = np.divmod(np.arange(config.tokens), grid)
    angles = np.concatenate((x[:, None] * frequency, y[:, None] * frequency), axis=1)
    return {
        "position": sines(grid, config.channels),
        "memory_position": sines(grid, config.memory_channels),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
    }


def sines(grid: int, channels: int) -> NDArray[np.float32]:
    """[cells, channels]: alternating sines and cosines, of the row in the first half and of the column in the
    second. 1..grid is a full circle.
    """
    half = channels // 2
    place = (np.arange(grid) + 1) / (grid + 1e-6) * 2 * math.pi
    angles = place[:, None] / 10000.0 ** (2 * (np.arange(half) // 2) / half)
    line = np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles))
    rows = np.broadcast_to(line[:, None], (grid, grid, half))
    columns = np.broadcast_to(line[None], (grid, grid, half))
    return np.concatenate((rows, columns), axis=2).reshape(grid * grid, channels).astype(np.float32)
