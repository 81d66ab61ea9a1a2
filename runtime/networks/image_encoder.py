"""The letter-boxed reference picture to CLIP image features (model_spec.md 2.3, 8.2).

The picture is squashed to 224x224, bicubic without antialiasing, as the official code does. Another filter
changes the features measurably. They are the hidden states after all layers but the last, without a norm.
"""

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model

MEAN = np.array((0.48145466, 0.4578275, 0.40821073)).reshape(3, 1, 1)
STD = np.array((0.26862954, 0.26130258, 0.27577711)).reshape(3, 1, 1)
CUBIC = -0.75  # the free parameter of the cubic kernel (Keys 1981); torch and OpenCV use this value, PIL -0.5


def encode_image(model: Model, canvas: Array, tiles: int = 0, ratio: float = 0.5) -> NDArray[np.float32]:
    """Returns features [257, dim] of a picture [3, H, W] in [-1, 1].

    With `tiles` the picture is also seen in tiles x tiles parts, each as large as the whole. The grid of
    their patches is averaged down to that of the whole picture, and so are their class tokens. The result is
    the mean of the whole picture at weight `ratio` and of the tiles at weight 1 (addons_spec.md 5.2, but for
    the layer: the one that the transformer was trained with).
    """
    size = model.config.image.size
    whole = _features(model, clip_pixels(canvas, size))
    if not tiles:
        return whole
    pixels = clip_pixels(canvas, size * tiles)
    rows = [pixels[:, i * size : (i + 1) * size] for i in range(tiles)]
    parts = np.stack(
        [
            [
                _features(model, np.ascontiguousarray(row[..., j * size : (j + 1) * size]))
                for j in range(tiles)
            ]
            for row in rows
        ]
    )  # [tiles, tiles, 257, dim]
    side = size // model.config.image.patch
    grid = parts[:, :, 1:].reshape(tiles, tiles, side, side, -1).transpose(0, 2, 1, 3, 4)
    pooled = grid.reshape(side, tiles, side, tiles, -1).mean((1, 3)).reshape(side * side, -1)
    tiled = np.concatenate((parts[:, :, :1].mean((0, 1)), pooled))
    features: NDArray[np.float32] = (ratio * whole + tiled) / np.float32(ratio + 1)
    return features


def _features(model: Model, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    (hidden,) = model.run("image_encoder_embed", pixels)
    for n in range(model.config.image.layers_used):
        (hidden,) = model.run("image_encoder_layer", hidden, n=n)
    return np.asarray(hidden, np.float32)


def clip_pixels(canvas: Array, size: int = 224) -> NDArray[np.float32]:
    """Returns the input of CLIP, [3, size, size], from a picture [3, H, W] in [-1, 1]."""
    _, height, width = canvas.shape
    squashed = _cubic_weights(height, size) @ canvas.astype(np.float64) @ _cubic_weights(width, size).T
    pixels: NDArray[np.float32] = ((squashed * 0.5 + 0.5 - MEAN) / STD).astype(np.float32)
    return pixels


def _cubic_weights(source: int, size: int) -> NDArray[np.float64]:
    """Returns the matrix [size, source] that resamples one axis: four taps per row, edges repeated.

    cv2.resize is not used: without Intel IPP it rounds positions to fp32 and is off by 2e-4.
    """
    position = (np.arange(size) + 0.5) * (source / size) - 0.5
    taps = np.floor(position).astype(np.int64)[:, None] + np.arange(-1, 3)
    d = np.abs(position[:, None] - taps)
    near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
    far = CUBIC * (((d - 5) * d + 8) * d - 4)
    matrix = np.zeros((size, source))
    np.add.at(matrix, (np.arange(size)[:, None], taps.clip(0, source - 1)), np.where(d <= 1, near, far))
    return matrix
