"""Sizes: golden values of the official rule, the wrapper's geometry, odd pictures, 8K in little memory."""

import tracemalloc

import cv2
import numpy as np
import pytest
from made_person import GOLDEN

from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.clips.sizes import Fit, fit, output_size, resize_by_area
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.reader import Picture

Size = tuple[int, int]


def ramp(width: int, height: int) -> Picture:
    """Red grows from left to right, green from top to bottom, 55 to 255; blue is 255."""
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[..., 0] = np.linspace(55, 255, width)
    picture[..., 1] = np.linspace(55, 255, height)[:, None]
    return picture


@pytest.mark.parametrize("picture, asked, expected", GOLDEN["sizes"], ids=str)
def test_official_golden(picture: list[int], asked: list[int], expected: list[int]) -> None:
    size: Size = (picture[0], picture[1])
    assert output_size(size, (asked[0], asked[1]), "official") == tuple(expected)
    resized = resize_by_area(ramp(*size), asked[0] * asked[1])
    assert resized.shape == (expected[1], expected[0], 3)


def test_the_wrapper_gives_what_is_asked_in_steps_of_16() -> None:
    for picture in ((1920, 1080), (1080, 1920), (1, 1)):
        assert output_size(picture, (832, 480), "kijai") == (832, 480)
        assert output_size(picture, (839, 495), "kijai") == (832, 480)


def test_letterbox_is_centred_black_and_keeps_the_shape() -> None:
    wide = letterbox(ramp(400, 100), 200, 300)
    assert wide.shape == (300, 200, 3)
    assert not wide[:125].any() and not wide[175:].any()
    middle = wide[125:175].astype(int)
    assert np.abs(middle - cv2.resize(ramp(400, 100), (200, 50))).max() == 0
    tall = letterbox(ramp(100, 400), 301, 200)
    assert not tall[:, :125].any() and not tall[:, 175:].any() and tall[:, 125:175, 2].min() == 255
    # 160 / 488 * 366 is 120 but for the last bit; the official code cuts it to 119.
    assert letterbox(ramp(366, 488), 160, 160)[..., 2].any(axis=0).sum() == 119
    # 480 / 683 * 1024 = 719.6, cut to 719.
    columns = letterbox(ramp(1024, 683), 832, 480)[..., 2].any(axis=0)
    assert columns.sum() == 719 and columns.argmax() == (832 - 719) // 2


def test_a_picture_of_the_right_size_is_untouched() -> None:
    picture = ramp(64, 48)
    ways: tuple[Fit, ...] = ("stretch", "pad", "crop")
    for result in (letterbox(picture, 64, 48), *(fit(picture, 48, 64, how) for how in ways)):
        np.testing.assert_array_equal(result, picture)


def test_the_wrappers_ways_onto_another_shape() -> None:
    picture = ramp(320, 160)
    stretched = fit(picture, 160, 160, "stretch").astype(int)
    assert abs(stretched[0, 0, 0] - 55) <= 1 and abs(stretched[0, -1, 0] - 255) <= 1
    cropped = fit(picture, 160, 160, "crop")
    np.testing.assert_array_equal(cropped, picture[:, 80:240])
    padded = fit(picture, 160, 160, "pad")
    np.testing.assert_array_equal(padded[80:], np.broadcast_to(padded[79], (80, 160, 3)))  # at the top
    assert padded[0, 0, 1] < 60 and padded[79, 0, 1] > 250
    tall = fit(ramp(160, 320), 160, 160, "pad")
    np.testing.assert_array_equal(
        tall[:, :40], np.broadcast_to(tall[:, 40:41], (160, 40, 3))
    )  # in the middle
    np.testing.assert_array_equal(tall[:, 120:], np.broadcast_to(tall[:, 119:120], (160, 40, 3)))
    # 347 rows would fit; the node makes 336 of them, a multiple of 16, and goes on with the last.
    cut = fit(ramp(1000, 417), 480, 832, "pad")
    assert (cut[335:] == cut[335]).all() and not (cut[334] == cut[335]).all() and cut[335, 0, 1] > 250


def test_random_pictures_of_any_shape_come_out_as_promised() -> None:
    random = np.random.default_rng(0)
    ways: tuple[Fit, ...] = ("stretch", "pad", "crop")
    for _ in range(150):
        width, height = (int(2 ** random.uniform(0, 11)) for _ in range(2))
        picture = np.full((height, width, 3), 200, np.uint8)
        asked = (int(random.integers(16, 400)), int(random.integers(16, 400)))
        try:
            size = output_size((width, height), asked, "official")
        except InputError:
            assert max(width / height, height / width) * 256 > asked[0] * asked[1] * 0.99  # too thin indeed
        else:
            assert size[0] % 16 == size[1] % 16 == 0 and 0 < size[0] * size[1] <= asked[0] * asked[1]
            assert resize_by_area(picture, asked[0] * asked[1]).shape == (size[1], size[0], 3)
        boxed = letterbox(picture, asked[0], asked[1])
        assert boxed.shape == (asked[1], asked[0], 3) and boxed.max() == 200
        for how in ways:
            result = fit(picture, asked[1], asked[0], how)
            assert result.shape == (asked[1], asked[0], 3)
            assert result.min() >= 199 and result.max() <= 201  # Lanczos weights are rounded


@pytest.mark.parametrize("asked", [(0, 480), (832, -1)])
def test_a_size_that_is_none_is_refused(asked: Size) -> None:
    for rule in ("official", "kijai"):
        with pytest.raises(UsageError):
            output_size((640, 480), asked, rule)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        output_size((640, 480), (15, 480), "kijai")


def test_an_8k_frame_takes_no_more_than_its_result() -> None:
    picture = np.zeros((4320, 7680, 3), np.uint8)
    tracemalloc.start()
    resize_by_area(picture, 832 * 480)
    letterbox(picture, 832, 480)
    fit(picture, 480, 832, "crop")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 832 * 480 * 3
