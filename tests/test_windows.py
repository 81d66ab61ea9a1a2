"""Segment arithmetic against the official loop, spelled out, and against diffusers."""

import pytest
from diffusers import WanAnimatePipeline

from trt_wan.errors import UsageError
from trt_wan.runtime.windows import Windows

SHAPES = [(77, 1), (77, 5), (81, 1), (13, 5), (9, 1), (9, 5), (5, 1)]


def ping_pong(length: int, target: int) -> list[int]:
    frames = list(range(length))
    there_and_back = frames + frames[-2:0:-1]
    return (there_and_back * (target // len(there_and_back) + 1))[:target]


def official(n: int, window: int, overlap: int) -> tuple[int, list[list[int]], list[int]]:
    """model_spec.md 3.1, literally: padded length, frames of each segment, frames of the output."""
    step = window - overlap
    extra = step - (n - overlap) % step if (n - overlap) % step != 0 else 0
    target = n + extra
    padded = ping_pong(n, target)
    segments, video, start = [], list[int](), 0
    while start + overlap < target:
        segment = padded[start : start + window]
        segments.append(segment)
        video += segment if start == 0 else segment[overlap:]
        start += step
    return target, segments, video[:n]


@pytest.mark.parametrize("window, overlap", SHAPES)
def test_official_segments(window: int, overlap: int) -> None:
    for n in range(overlap + 1, 401):
        target, segments, video = official(n, window, overlap)
        windows = Windows(n, window, overlap)
        mine = [windows.indices(j) for j in range(windows.total)]
        assert (windows.target, mine) == (target, segments), f"n = {n}"
        kept = [frame for j in range(windows.total) for frame in windows.indices(j)[windows.keep(j)]]
        assert kept == video == list(range(n)), f"n = {n}"


@pytest.mark.parametrize("window, overlap", SHAPES)
def test_every_frame_is_kept_once(window: int, overlap: int) -> None:
    for n in range(1, 401):
        windows = Windows(n, window, overlap)
        kept = [frame for j in range(windows.total) for frame in list(range(window))[windows.keep(j)]]
        assert len(kept) == n, f"n = {n}"


@pytest.mark.parametrize("n", [2, 3, 5, 10, 76, 77, 78, 153, 154, 200])
@pytest.mark.parametrize("window, overlap", [(77, 1), (77, 5), (5, 1)])
def test_padding_of_diffusers(n: int, window: int, overlap: int) -> None:
    windows = Windows(n, window, overlap)
    padded = WanAnimatePipeline.pad_video_frames(None, list(range(n)), windows.target)
    for j in range(windows.total):
        start = j * (window - overlap)
        assert windows.indices(j) == padded[start : start + window]


@pytest.mark.parametrize(
    "n, total", [(1, 1), (2, 1), (76, 1), (77, 1), (78, 2), (153, 2), (154, 3), (229, 3), (230, 4)]
)
def test_number_of_windows(n: int, total: int) -> None:
    assert Windows(n, 77, 1).total == total


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_clips_no_longer_than_the_overlap(n: int) -> None:
    windows = Windows(n, 13, 5)
    assert (windows.total, windows.target, windows.keep(0)) == (1, 13, slice(0, n))
    assert windows.indices(0) == ping_pong(n, 13)


def test_a_single_frame_is_repeated() -> None:
    assert Windows(1, 9, 1).indices(0) == [0] * 9


@pytest.mark.parametrize(
    "clip_frames, window, overlap, message, hint",
    [
        (0, 77, 1, "A clip of 0 frames", "at least one frame"),
        (77, 77, 0, "An overlap of 0 frames", "--overlap 1 or --overlap 5"),
        (77, 77, -3, "An overlap of -3 frames", "--overlap 1 or --overlap 5"),
        (77, 77, 77, "An overlap of 77 frames", "--window 81"),
        (77, 77, 7, "An overlap of 7 frames", "--overlap 5 or --overlap 9"),
        (77, 5, 5, "nothing new in a window of 5", "--window 9"),
        (77, 1, 1, "nothing new in a window of 1", "--window 5"),
    ],
)
def test_what_cannot_be_cut(clip_frames: int, window: int, overlap: int, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Windows(clip_frames, window, overlap)
    assert hint in caught.value.hint


def test_a_window_that_does_not_exist() -> None:
    with pytest.raises(AssertionError, match="2 windows, asked for number 2"):
        Windows(100, 77, 1).keep(2)
