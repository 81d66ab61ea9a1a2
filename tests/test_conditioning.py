"""Reference, condition clip and mask against plain re-statements of model_spec.md section 2."""

import cv2
import numpy as np
import pytest
import torch

from trt_wan.engines.shape import Plan
from trt_wan.runtime.conditioning import cells, condition_frames, known_mask, to_signal
from trt_wan.runtime.executors import Array
from trt_wan.runtime.letterbox import letterbox

PLAN = Plan(32, 48, 13)


def official_mask(known: Array) -> Array:
    """k[F, h, w] to [4, T, h, w]: latent frame 0 is k[0] four times, channel c of frame j is k[4j-3+c]."""
    frames, h, w = known.shape
    result = np.empty((4, (frames - 1) // 4 + 1, h, w), np.float32)
    for c in range(4):
        result[c, 0] = known[0]
        for j in range(1, result.shape[1]):
            result[c, j] = known[4 * j - 3 + c]
    return result


@pytest.mark.parametrize("carried", [0, 1, 5])
def test_mask_of_animate_mode(carried: int) -> None:
    known = np.zeros((13, 6, 4), np.float32)
    known[:carried] = 1
    np.testing.assert_array_equal(known_mask(carried, np.ones((13, 6, 4))), official_mask(known))


@pytest.mark.parametrize("carried", [0, 1, 5])
def test_mask_of_replace_mode(carried: int) -> None:
    """Sampled like torch's `nearest`, neither thresholded nor smoothed."""
    person = np.random.default_rng(0).random((13, 48, 32), np.float32)
    known = torch.nn.functional.interpolate(1 - torch.from_numpy(person)[None], (6, 4), mode="nearest")[
        0
    ].numpy()
    known = known.copy()
    known[:carried] = 1
    np.testing.assert_array_equal(known_mask(carried, cells(person)), official_mask(known))


@pytest.mark.parametrize("chunk", [13, 4, 3, 1])
def test_condition_frames(chunk: int) -> None:
    """Unknown is grey (0) without a background; carried frames come first and nothing else changes."""
    rng = np.random.default_rng(1)
    carried = rng.random((3, 5, 48, 32), np.float32)
    background = rng.random((3, 13, 48, 32), np.float32)
    before = background.copy()

    def clip(carried: Array | None, background: Array | None) -> Array:
        given = None if background is None else lambda start, stop: background[:, start:stop]
        read = condition_frames(PLAN, carried, given)
        return np.concatenate([read(k, min(k + chunk, 13)) for k in range(0, 13, chunk)], axis=1)

    np.testing.assert_array_equal(clip(None, None), np.zeros((3, 13, 48, 32)))
    np.testing.assert_array_equal(clip(None, background), background)
    both = clip(carried, background)
    np.testing.assert_array_equal(both[:, :5], carried)
    np.testing.assert_array_equal(both[:, 5:], background[:, 5:])
    np.testing.assert_array_equal(background, before)
    np.testing.assert_array_equal(clip(carried, None)[:, 5:], 0)


@pytest.mark.parametrize(
    ("h", "w", "box"),
    [
        (100, 100, (0, 45, 90, 90)),  # top, left, height, width of the picture on a 180x90 canvas
        (300, 100, (0, 75, 90, 30)),
        (50, 200, (22, 0, 45, 180)),
        (90, 180, (0, 0, 90, 180)),
        (7, 2000, (44, 0, 1, 180)),
    ],
)
def test_letterbox(h: int, w: int, box: tuple[int, int, int, int]) -> None:
    picture = np.random.default_rng(2).integers(1, 256, (h, w, 3), np.uint8)
    canvas = letterbox(picture, width=180, height=90)
    top, left, height, width = box
    inside = canvas[top : top + height, left : left + width]
    np.testing.assert_array_equal(
        inside, cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    )
    outside = canvas.copy()
    outside[top : top + height, left : left + width] = 0
    assert not outside.any(), "the bars are black"


def test_signal() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    signal = to_signal(pixels)
    assert signal.shape == (3, 1, 16, 16) and signal.min() == -1 and signal.max() == 1
    np.testing.assert_allclose(signal[0, 0], pixels[0, ..., 0] / 127.5 - 1, atol=1e-7)
