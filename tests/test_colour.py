"""Colour maps against slow versions and color-matcher, and windows of a video whose colours drift."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trt_wan.cli import colour_options
from trt_wan.errors import UsageError
from trt_wan.runtime.colour import Anchor, Colour, Matching, unused_match
from trt_wan.runtime.colour_transfer import METHODS, Statistics, fit

Array = NDArray[Any]


def colours(seed: int, count: int = 6000) -> Array:
    """Correlated colours [3, N] within [-0.9, 0.9]."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(0, 0.25, (3, 3)) @ rng.normal(0, 1, (3, count)) + rng.uniform(-0.3, 0.3, (3, 1))
    return np.clip(mixed, -0.9, 0.9).astype(np.float32)


def statistics(*parts: Array) -> Statistics:
    made = Statistics()
    for part in parts:
        made.add(part)
    return made


def slow_histogram(source: Array, target: Array) -> Array:
    """Level by level: the target's level with the same share of pixels up to it."""
    mapped = np.empty(source.shape)
    for out, own, wanted in zip(mapped, source, target, strict=True):
        ranks = np.searchsorted(np.sort(own), own, side="right") / own.size
        out[:] = np.quantile(wanted, ranks, method="interpolated_inverted_cdf")
    return mapped


def slow_linear(source: Array, target: Array) -> Array:
    """By the square root of the product of both covariances, which is not symmetric."""
    own, wanted = np.cov(source.astype(np.float64)), np.cov(target.astype(np.float64))
    values, vectors = np.linalg.eig(own @ wanted)
    matrix = np.linalg.inv(own) @ np.real(vectors * np.sqrt(values) @ np.linalg.inv(vectors))
    moved = matrix @ (source - source.mean(1, keepdims=True, dtype=np.float64))
    return np.asarray(moved + target.mean(1, keepdims=True, dtype=np.float64))


def slow_reinhard(source: Array, target: Array) -> Array:
    """Pixel by pixel in base 10, with the numbers of the paper."""
    to_lms = [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
    turn = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    a, b = (turn @ np.log10(np.array(to_lms) @ (c.astype(np.float64) + 1) / 2) for c in (source, target))
    scaled = (a - a.mean(1, keepdims=True)) * (b.std(1) / a.std(1))[:, None] + b.mean(1, keepdims=True)
    return np.asarray(np.linalg.solve(np.array(to_lms), 10 ** np.linalg.solve(turn, scaled)) * 2 - 1)


def slow(method: str, source: Array, target: Array) -> Array:
    steps = {"mkl": slow_linear, "mvgd": slow_linear, "hm": slow_histogram, "reinhard": slow_reinhard}
    for step in method.split("-"):
        source = steps[step](source, target)
    return source


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_of_slow_versions(method: str) -> None:
    """Histograms have levels, and differ where colours are few."""
    source, target = colours(1), colours(2)
    mapped = fit(method, 1.0, source, statistics(target[:, :2000], target[:, 2000:]))(source)
    error = np.abs(mapped - slow(method, source, target))
    assert mapped.dtype == np.float32
    assert np.quantile(error, 0.99) < (4e-3 if "hm" in method else 2e-4), error.max()
    assert np.abs(mapped - source).mean() > 0.1, "the two are far apart"
    half = fit(method, 0.5, source, statistics(target))(source)
    assert np.abs(half - (source + mapped) / 2).max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_of_color_matcher(method: str) -> None:
    """Of the package that ComfyUI's nodes call, for pictures in [0, 1]. Its Reinhard has the paper's rounded
    inverse.
    """
    package = pytest.importorskip("color_matcher")
    source, target = colours(3), colours(4)
    pictures = [((c.T.reshape(60, 100, 3) + 1) / 2).astype(np.float64) for c in (source, target)]
    theirs = package.ColorMatcher().transfer(src=pictures[0], ref=pictures[1], method=method)
    mapped = fit(method, 1.0, source, statistics(target))(source)
    error = np.abs((mapped + 1) / 2 - theirs.reshape(-1, 3).T)
    allowed = 0.02 if method == "reinhard" else 4e-3 if "hm" in method else 1e-4
    assert np.quantile(error, 0.99) < allowed, error.max()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_colours_stay_and_flat_ones_are_moved(method: str) -> None:
    same = colours(5)
    assert np.abs(fit(method, 1.0, same, statistics(same))(same) - same).max() < 1e-3
    flat = np.full((3, 500), 0.25, np.float32)
    moved = fit(method, 1.0, flat, statistics(flat - 0.5))(flat)
    assert np.abs(moved - (flat - 0.5)).max() < 5e-3
    outside = np.array([[-1.5], [0.0], [1.5]], np.float32)
    assert np.isfinite(fit(method, 1.0, same, statistics(colours(6)))(outside)).all()


def test_statistics_go_on_in_another_process_with_the_same_bits() -> None:
    whole = statistics(colours(1), colours(2))
    halves = Statistics.unpacked(statistics(colours(1)).packed())
    halves.add(colours(2))
    assert (halves.packed() == whole.packed()).all() and halves.count == whole.count == 12_000


WINDOW, OVERLAP, SIDE = 9, 1, 32


def scene(k: int) -> Array:
    """Frame k [3, 1, SIDE, SIDE] of a still scene: patches of 8 pixels, and a little noise of its own."""
    patches = np.random.default_rng(0).uniform(-0.6, 0.6, (3, SIDE // 8, SIDE // 8))
    noise = np.random.default_rng(k + 1).normal(0, 0.002, (3, SIDE, SIDE))
    return np.asarray(patches.repeat(8, 1).repeat(8, 2) + noise, np.float32)[:, None]


DRIFT = np.float32([[1.06, 0.03, 0], [0, 1.02, 0], [0, -0.03, 0.97]])
SHIFT = np.float32([0.03, 0, -0.02])[:, None, None, None]


def windows(matching: Matching, count: int, person: Array | None = None) -> list[Array]:
    """Every window's frames. Each continues the colours of the one before, and drifts by DRIFT and SHIFT."""
    matrix, offset = np.eye(3, dtype=np.float32), np.zeros_like(SHIFT)
    carried, made = None, list[Array]()

    def drifted(j: int) -> Iterator[Array]:
        for start in (0, 1, 5):
            frames = [scene(j * (WINDOW - OVERLAP) + k) for k in range(start, min(start + 4, WINDOW))]
            frames = frames[:1] if start == 0 else frames
            yield np.einsum("ab,bnhw->anhw", matrix, np.concatenate(frames, axis=1)) + offset

    for j in range(count):
        made.append(np.concatenate(list(matching.window(drifted(j), carried, person)), axis=1))
        assert made[-1].shape == (3, WINDOW, SIDE, SIDE)
        carried = made[-1][:, -OVERLAP:]
        # What the model makes next has the colours of what it is given, and drifts from there.
        plain = np.concatenate([scene((j + 1) * (WINDOW - OVERLAP))], axis=1)
        matrix, offset = _map(plain, carried)
        matrix, offset = DRIFT @ matrix, np.einsum("ab,bnhw->anhw", DRIFT, offset) + SHIFT
    return made


def _map(plain: Array, seen: Array) -> tuple[Array, Array]:
    """The linear map from one to the other by least squares."""
    ones = np.concatenate([plain.reshape(3, -1), np.ones((1, plain[0].size), np.float32)])
    found = np.linalg.lstsq(ones.T, seen.reshape(3, -1).T, rcond=None)[0].T.astype(np.float32)
    return found[:, :3], found[:, 3:].reshape(3, 1, 1, 1)


@pytest.mark.parametrize("anchor", ["first", "carried", "reference"])
def test_a_later_process_matches_later_windows_with_the_same_bits(anchor: Anchor) -> None:
    picture = np.random.default_rng(9).integers(40, 200, (50, 70, 3)).astype(np.uint8)
    frames = [
        np.concatenate([scene(k + 10 * j) for k in range(WINDOW)], axis=1) * (1 - 0.1 * j) for j in range(2)
    ]
    whole = Matching(Colour("hm-mkl-hm", anchor=anchor), picture)
    first = np.concatenate(list(whole.window([frames[0]], None)), axis=1)
    later = Matching(Colour("hm-mkl-hm", anchor=anchor), picture, whole.state)
    for matching in (whole, later):
        (made,) = matching.window([frames[1]], first[:, -OVERLAP:])
        assert (made == next(whole.window([frames[1]], first[:, -OVERLAP:]))).all()
        assert (made != frames[1]).any()


def drift(made: list[Array]) -> float:
    """How far the colours of the last window are from those of the first, on the average."""
    return float(np.abs(made[-1].mean(axis=1) - made[0].mean(axis=1)).mean())


@pytest.mark.parametrize("anchor", ["first", "carried"])
@pytest.mark.parametrize("method", METHODS)
def test_colours_do_not_drift_from_window_to_window(method: str, anchor: Anchor) -> None:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    free = drift(windows(Matching(None, picture), 6))
    matched = windows(Matching(Colour(method, 1.0, anchor), picture), 6)
    # A rotation of colours, which this drift has, is beyond all of these methods.
    assert free > 0.1 and drift(matched) < 0.3 * free
    for frames in matched:
        means = frames.mean(axis=(2, 3))
        assert np.abs(np.diff(means, axis=1)).max() < 6e-3, "no flicker inside a window"
    first = windows(Matching(None, picture), 1)[0]
    assert (matched[0] == first).all(), "the first window stays as it is"


def test_every_frame_alone_gets_the_colours_of_the_reference() -> None:
    rng = np.random.default_rng(9)
    picture = rng.integers(40, 200, (50, 70, 3)).astype(np.uint8)
    (frames,) = windows(Matching(Colour("mkl", anchor="reference"), picture), 1)
    wanted = picture.reshape(-1, 3).T / 127.5 - 1
    for k in range(WINDOW):
        pixels = frames[:, k].reshape(3, -1)
        assert np.abs(pixels.mean(1) - wanted.mean(1)).max() < 1e-4
        assert np.abs(np.cov(pixels) - np.cov(wanted)).max() < 1e-3


def test_with_a_mask_the_person_alone_counts_and_changes() -> None:
    """The background of later windows is far off, and neither moves the person's colours nor changes."""
    person = np.zeros((WINDOW, SIDE // 8, SIDE // 8), bool)
    person[:, :, 0] = True
    matching = Matching(Colour("mkl", anchor="first"), np.zeros((SIDE, SIDE, 3), np.uint8))
    frames = np.concatenate([scene(k) for k in range(WINDOW)], axis=1)
    first = np.concatenate(list(matching.window([frames[:, :1], frames[:, 1:]], None, person)), axis=1)
    later = frames * 0.9 + 0.05
    later[..., 8:] = np.random.default_rng(1).uniform(-1, 1, later[..., 8:].shape)
    matched = np.concatenate(
        list(matching.window([later[:, :5], later[:, 5:]], first[:, -1:], person)), axis=1
    )
    assert np.abs(matched[..., :8] - frames[..., :8]).max() < 5e-3
    assert (matched[..., 24:] == later[..., 24:]).all()
    nobody = np.zeros_like(person)
    assert (np.concatenate(list(matching.window([later], None, nobody)), axis=1) == later).all()


def test_a_frame_that_is_not_finite_passes_to_the_check() -> None:
    broken, anchors = np.full((3, 1, SIDE, SIDE), np.nan, np.float32), ("first", "carried", "reference")
    for anchor in anchors:
        matching = Matching(Colour("mkl", anchor=anchor), np.zeros((SIDE, SIDE, 3), np.uint8))
        assert np.isnan(next(matching.window([broken, broken], None))).all()
        list(matching.window([scene(0)], None))
        assert np.isnan(next(matching.window([broken, broken], scene(0)))).all()


def test_settings_of_a_match() -> None:
    assert tuple(METHODS) == colour_options.METHODS
    for wrong in (lambda: Colour("mlk"), lambda: Colour("mkl", 0.0), lambda: Colour("mkl", 1.5)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="would do nothing"):
        colour_options.colour_of(None, "first")
    assert colour_options.colour_of(("hm", 0.5), None) == Colour("hm", 0.5, "first")
    first, carried, reference = (Colour("hm", anchor=anchor) for anchor in ("first", "carried", "reference"))
    assert unused_match(first, 1, True) and unused_match(carried, 1, False)
    for colour, count, continues in (
        (first, 2, False),
        (None, 1, False),
        (reference, 1, False),
        (carried, 1, True),
    ):
        assert not unused_match(colour, count, continues)
