"""Which frames of a clip are used when its rate is changed. Works on numbers, not on pictures.

There are two rules. `official` (Wan2.2's preprocessing) shows the frame nearest in time. `kijai` (the video
loader of the ComfyUI workflows) shows the first frame that is not earlier. Both repeat frames when the rate
goes up, and neither mixes two frames.
"""

import math
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError, UsageError

Rate = Fraction | float
SamplingRule = Literal["official", "kijai"]

MOST_FRAMES = 200_000  # two hours at 25 frames per second. The numbers of a frame's person take 10 KB


def frame_indices(
    frames: int,
    source_rate: Rate,
    rate: Rate | None,
    rule: SamplingRule = "official",
    times: NDArray[np.float64] | None = None,
) -> list[int]:
    """Numbers of the frames to show at `rate` per second, at least one. None keeps every frame.

    `times` are those of frames that come unevenly, in seconds from the first: then the frame nearest in time
    is shown, so that pictures stay beside their sound.

    Raises InputError for more than MOST_FRAMES of them.
    """
    assert frames > 0 and source_rate > 0, f"{frames} frames at {source_rate}"
    if times is not None and (rate is None or rate == source_rate):
        _require_few(frames)
        return _nearest_in_time(frames, float(source_rate), times)
    if rate is None or rate == source_rate:
        _require_few(frames)
        return list(range(frames))
    if not 0 < float(rate) < math.inf:
        raise UsageError(
            f"A rate of {rate} frames per second makes no video.", "Give a rate such as 16 or 30."
        )
    _require_few(frames / float(source_rate) * float(rate))
    if times is not None:
        count = max(int(frames / float(source_rate) * float(rate)), 1)
        return _nearest_in_time(count, float(rate), times)
    if rule == "kijai":
        return _first_not_before(frames, float(source_rate), float(rate))
    return _nearest(frames, float(source_rate), float(rate))


def _require_few(frames: float) -> None:
    if frames > MOST_FRAMES:
        raise InputError(
            f"The clip gives {frames:.0f} frames, and at most {MOST_FRAMES} are prepared at once.",
            "Cut it into parts, or give a lower --rate.",
        )


def _nearest(frames: int, source_rate: float, rate: float) -> list[int]:
    """The order of operations and ties to even matter: a count or an index may depend on the last bit."""
    count = max(int(frames / source_rate * rate), 1)
    wanted = np.arange(count) / rate * source_rate
    return [int(i) for i in np.clip(np.rint(wanted), 0, frames - 1)]


def _nearest_in_time(count: int, rate: float, times: NDArray[np.float64]) -> list[int]:
    wanted = np.arange(count) / rate
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    nearer = np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
    return [int(i) for i in nearer]


def _first_not_before(frames: int, source_rate: float, rate: float) -> list[int]:
    """VideoHelperSuite sums rounded frame times, so this can differ from ceil(i · source / rate)."""
    step, period = 1 / source_rate, 1 / rate
    chosen, waited = [0], 0.0
    index = 0
    while True:
        if waited < period:
            index += 1
            if index >= frames:
                return chosen
            waited += step
        if waited >= period:
            waited -= period
            chosen.append(index)
