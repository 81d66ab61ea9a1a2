"""Frame numbers: golden values of the official rule, the ComfyUI loader's rule."""

import math
from fractions import Fraction

import numpy as np
import pytest
from made_person import GOLDEN

from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.clips.sampling import SamplingRule, frame_indices

RATES = (Fraction(12), Fraction(16), Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(60))


@pytest.mark.parametrize("case", GOLDEN["indices"], ids=str)
def test_official_golden(case: list[object]) -> None:
    frames, source_rate, rate, count, first, last = case
    assert isinstance(frames, int) and isinstance(source_rate, float) and isinstance(rate, (int, float))
    indices = frame_indices(frames, source_rate, rate, "official")
    assert (len(indices), indices[:8], indices[-4:]) == (count, first, last)


def test_the_wrapper_takes_the_first_frame_that_is_not_too_early() -> None:
    assert frame_indices(12, 25, 16, "kijai") == [0, 2, 4, 5, 7, 8, 10, 11]
    assert frame_indices(6, 25, 50, "kijai") == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # Frame 3 is at 0.125 s exactly, but the loader's 3/24 - 2/16 in doubles comes out a hair too small.
    assert frame_indices(12, 24, 16, "kijai") == [0, 2, 4, 5, 7, 8, 10, 11]
    for source in RATES:
        for rate in RATES:
            indices = np.array(frame_indices(200, source, rate, "kijai"))
            exact = np.array([math.ceil(i * source / rate) for i in range(len(indices))])
            # Its sum of rounded times may be a hair before or after the exact time, never a whole frame.
            on_time = np.array([(i * source / rate).denominator == 1 for i in range(len(indices))])
            assert np.abs(indices - exact).max() <= 1
            assert (indices == exact)[~on_time].all()


@pytest.mark.parametrize("rule", ["official", "kijai"])
@pytest.mark.parametrize("frames", [1, 2, 7, 300])
def test_any_clip_gives_ascending_frames_that_exist_at_the_right_speed(
    rule: SamplingRule, frames: int
) -> None:
    for source in RATES:
        assert frame_indices(frames, source, None, rule) == list(range(frames))
        assert frame_indices(frames, source, source, rule) == list(range(frames))
        for rate in RATES:
            indices = frame_indices(frames, source, rate, rule)
            assert indices and indices == sorted(indices) and 0 <= indices[0] and indices[-1] < frames
            shown, meant = np.array(indices) / float(source), np.arange(len(indices)) / float(rate)
            assert np.abs(shown - meant).max() <= 1.001 / float(source)
            assert (
                abs(len(indices) / float(rate) - frames / float(source)) <= max(1 / source, 1 / rate) * 1.001
            )


@pytest.mark.parametrize("rate", [0, -5, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(UsageError):
        frame_indices(10, 25, rate)


def test_hours_of_frames_are_refused_before_they_are_listed() -> None:
    assert len(frame_indices(200_000, 25, None)) == 200_000
    for frames, rate in ((200_001, None), (40_000, 1000), (10**12, Fraction(1000))):
        with pytest.raises(InputError, match="at most 200000 are prepared at once"):
            frame_indices(frames, 25, rate)


def test_uneven_frames_are_shown_at_their_own_times() -> None:
    """Against a search through all frames; at the mean rate the sound would be up to 0.6 s away."""
    rng = np.random.default_rng(0)
    phone = np.concatenate([np.arange(20) / 25, 0.8 + np.arange(20) / 10])
    for times in (phone, np.cumsum(rng.uniform(0.02, 0.08, 60)) - 0.02):
        times = times - times[0]
        mean = (len(times) - 1) / times[-1]
        for rate in (mean, 16, 30):
            indices = frame_indices(len(times), mean, rate, times=times)
            assert abs(len(indices) / rate - len(times) / mean) < 1 / rate
            for k, index in enumerate(indices):
                assert abs(times[index] - k / rate) <= np.abs(times - k / rate).min() + 1e-12
