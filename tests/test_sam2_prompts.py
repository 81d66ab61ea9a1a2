"""Where SAM2 is prompted, and when again: on skeletons whose answer is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trt_wan.errors import InputError
from trt_wan.preprocess.sam2.prompts import (
    disagreement,
    key_prompts,
    official_key_frames,
    safe_key_frames,
    wants_prompt,
)

WIDTH, HEIGHT = 640, 480
Body = NDArray[np.float32]


def standing(x: float = 320.0, score: float = 0.9) -> Body:
    """Nose, neck, shoulders, hips and ankles of somebody upright; the other joints at the neck."""
    body = np.full((20, 3), (x, 120, score), np.float32)
    for joint, (dx, y) in {0: (0, 90), 2: (-40, 120), 5: (40, 120), 8: (-30, 250), 11: (30, 250)}.items():
        body[joint, :2] = x + dx, y
    body[10, :2], body[13, :2] = (x - 30.6, 430.9), (x + 30.6, 430.9)
    return body


def covering(x: float = 320.0) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[70:440, int(x) - 60 : int(x) + 60] = True
    return mask


@pytest.mark.parametrize(
    ("frames", "keys"),
    [
        (1, [0]),
        (4, [0]),
        (5, [0, 1, 2, 3, 4]),
        (7, [*range(7)]),
        (8, [0, 2, 4, 6]),
        (400, [0, 100, 200, 300]),
    ],
)
def test_official_key_frames(frames: int, keys: list[int]) -> None:
    assert official_key_frames(0, frames) == keys


def test_official_rule_by_chunks_of_400() -> None:
    """Whole pixels, joints that nobody saw included; a second chunk begins afresh."""
    bodies = [standing(score=0.0)] * 410
    prompts = key_prompts(bodies, WIDTH, HEIGHT, "official")
    assert [p.frame for p in prompts] == [0, 100, 200, 300, 400, 402, 404, 406, 408]
    assert prompts[0].points.tolist()[-2:] == [[289, 430], [350, 430]]
    assert all(len(p.points) == 8 and p.labels.tolist() == [1] * 8 for p in prompts)


def test_safe_rule_leaves_out_what_is_not_seen() -> None:
    body = standing()
    body[10] = np.nan
    body[13, :2] = 300, HEIGHT + 20  # an ankle below the frame
    body[0, 2] = 0.1
    (prompt,) = key_prompts([body], WIDTH, HEIGHT)
    assert prompt.points.tolist() == body[[1, 2, 5, 8, 11], :2].tolist()


def test_safe_key_frames_show_much_and_begin_early() -> None:
    few, none = standing(), standing(score=0.0)
    few[[0, 8, 10], 2] = 0.0
    bodies = [none, none, few, *[few] * 20, standing(), *[few] * 20]
    keys = safe_key_frames(bodies, 0, len(bodies), WIDTH, HEIGHT)
    assert keys[0] == 2 and 23 in keys and len(keys) <= 4


def test_a_clip_without_a_person() -> None:
    with pytest.raises(InputError, match="No frame shows"):
        key_prompts([standing(score=0.0)] * 9, WIDTH, HEIGHT)


def test_disagreement() -> None:
    body = standing()
    assert disagreement(covering(), body) == 0
    assert disagreement(np.zeros((HEIGHT, WIDTH), bool), body) == 1
    assert disagreement(covering(520), body) == 1  # somebody else
    upper = covering()
    upper[200:] = False
    share = disagreement(upper, body)
    assert share is not None and 0.2 < share < 0.8
    assert disagreement(covering(), standing(score=0.0)) is None
    assert not wants_prompt(covering(520), standing(score=0.0)), "a pose that is not known says nothing"
