"""Heat maps of the pose network to joints: the peak of each map, refined to parts of a pixel.

The official code's DARK decoding with one Taylor step (preprocess_spec.md A1.3).
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.person import Keypoints

Array = NDArray[Any]

BLUR, SIGMA = 11, 2.0  # taps of the blur kernel, and OpenCV's sigma for that many taps
REACH = BLUR // 2
LEAST_HEAT = 1e-10  # smaller values are raised to this before the logarithm
LOW_HEAT = 1e-6  # below this a value may come near LEAST_HEAT once the blurred map is scaled


def decode_heatmaps(heatmaps: Array, centre: Array, size: Array) -> Keypoints:
    """Heat maps float32 [n, joints, H, W] and each crop's centre and size [n, 2] to keypoints
    [n, joints, 3] in pixels of the frame. A map without values above 0 gives score -1.
    """
    height, width = heatmaps.shape[2:]
    return in_frame(peaks(heatmaps), (width, height), centre, size)


def peaks(heatmaps: Array) -> Array:
    """The peaks of heat maps float32 [n, joints, H, W]: x and y in pixels of the map, and the score, float32
    [n, joints, 3]. A map without values above 0 gives -1 for all three.
    """
    n, joints, height, width = heatmaps.shape
    maps = np.ascontiguousarray(heatmaps, np.float32).reshape(n * joints, height, width)
    peak = maps.reshape(n * joints, -1).argmax(1)
    score = np.take_along_axis(maps.reshape(n * joints, -1), peak[:, None], 1)[:, 0]
    y, x = np.divmod(peak, width)
    at = np.stack([x, y], 1).astype(np.float32)
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & (score > 0)
    at[inside] += _taylor_step(maps[inside], x[inside], y[inside], score[inside])
    at[score <= 0] = -1
    score = np.where(score > 0, score, np.float32(-1))
    return np.concatenate([at, score[:, None]], 1).reshape(n, joints, 3).astype(np.float32)


def in_frame(found: Array, map_size: tuple[int, int], centre: Array, size: Array) -> Keypoints:
    """The result of `peaks` in pixels of the frame. `map_size` is (width, height)."""
    scale = (size / map_size).astype(np.float32)[:, None]
    corner = (np.asarray(centre) - np.asarray(size) / 2).astype(np.float32)[:, None]
    return np.concatenate([found[..., :2] * scale + corner, found[..., 2:]], 2).astype(np.float32)


def _taylor_step(maps: Array, x: Array, y: Array, score: Array) -> Array:
    """From the peaks to the maxima of the blurred maps' logarithms, [maps, 2] in heat-map pixels."""
    if not len(maps):
        return np.zeros((0, 2), np.float32)
    log = np.log(np.maximum(_blurred_patches(maps, x, y, score), LEAST_HEAT)).astype(np.float32)
    dx = 0.5 * (log[:, 2, 3] - log[:, 2, 1])
    dy = 0.5 * (log[:, 3, 2] - log[:, 1, 2])
    dxx = 0.25 * (log[:, 2, 4] - 2 * log[:, 2, 2] + log[:, 2, 0])
    dyy = 0.25 * (log[:, 4, 2] - 2 * log[:, 2, 2] + log[:, 0, 2])
    dxy = 0.25 * (log[:, 3, 3] - log[:, 1, 3] - log[:, 3, 1] + log[:, 1, 1])
    determinant = dxx * dyy - dxy**2
    regular = determinant != 0
    divisor = np.where(regular, determinant, 1)
    step = np.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], 1) / divisor[:, None]
    return np.where(regular[:, None], -step, 0)


def _blurred_patches(maps: Array, x: Array, y: Array, score: Array) -> Array:
    """The 5 x 5 around each peak of the blurred map, scaled so that the blurred map's maximum is `score`.

    Only pixels that these depend on are blurred. The scale adds a constant to the logarithm, which does not
    change the step unless a value meets LEAST_HEAT. Only maps with such values are blurred whole, for their
    maximum.
    """
    kernel = cv2.getGaussianKernel(BLUR, SIGMA, cv2.CV_32F)[:, 0]
    band = np.zeros((5, 5 + 2 * REACH), np.float32)
    for i in range(5):
        band[i, i : i + BLUR] = kernel
    reach = np.arange(-REACH - 2, REACH + 3)
    rows, columns = y[:, None] + reach, x[:, None] + reach
    height, width = maps.shape[1:]
    flat = rows.clip(0, height - 1)[:, :, None] * width + columns.clip(0, width - 1)[:, None, :]
    flat += (np.arange(len(maps)) * height * width)[:, None, None]
    around = np.take(maps.reshape(-1), flat)  # [maps, 15, 15]
    around *= ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    across = around.reshape(-1, len(reach)) @ band.T
    down = across.reshape(len(maps), len(reach), 5).transpose(0, 2, 1).reshape(-1, len(reach)) @ band.T
    patches = down.reshape(len(maps), 5, 5).transpose(0, 2, 1).copy()
    for i in map(int, np.flatnonzero(patches.min((1, 2)) < LOW_HEAT)):
        whole = cv2.sepFilter2D(maps[i], cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
        patches[i] *= score[i] / whole.max()
    return np.asarray(patches)
