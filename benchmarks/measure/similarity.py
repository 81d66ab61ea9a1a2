"""Similarity of two clips or arrays: relative error, PSNR, SSIM. Frames are uint8 [n, H, W, 3]."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.conditioning import Pixels

# Wang et al. 2004, section III.C: Gaussian window of 11 pixels, sigma 1.5.
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def relative_error(value: NDArray[Any], expected: NDArray[Any]) -> float:
    """Returns the norm of the difference over the norm of `expected`."""
    difference = value.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def psnr(frames: Pixels, expected: Pixels) -> float | None:
    """Returns dB over all frames; None for equal frames, whose PSNR is infinite."""
    error = float(np.mean(np.square(frames.astype(np.float64) - expected)))
    return 10 * math.log10(255**2 / error) if error else None


def ssim(frames: Pixels, expected: Pixels) -> float:
    """Returns the mean over frames, channels and the pixels whose window lies inside the picture."""
    assert min(frames.shape[1:3]) >= WINDOW, f"SSIM needs {WINDOW} pixels, the frames are {frames.shape[1:3]}"
    return float(np.mean([_ssim(a, b) for a, b in zip(frames, expected, strict=True)]))


def _ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    import cv2

    def local_mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        blurred = np.asarray(cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA), np.float64)
        return blurred[WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return float(np.mean(alike / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))))
