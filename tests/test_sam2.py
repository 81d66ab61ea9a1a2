"""SAM2's graphs and tracker against transformers' Sam2VideoModel: the tiny trunk at 256x256 pixels, every
parameter random, in float32.

The frames are noise, given as the model takes them, so that no resampling is in the comparison.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sam2_oracle import ExportingExecutor, our_model, prompt, session_of, transformers_model

from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Config, Sam2Plan
from trt_wan.engines.sam2.contracts import networks
from trt_wan.preprocess.sam2 import transfer as carriers
from trt_wan.preprocess.sam2.model import Sam2Model
from trt_wan.preprocess.sam2.tracker import Sam2Tracker
from trt_wan.preprocess.sam2.weights import random_sam2_weights

Values = NDArray[np.float32]

SIZE, FRAMES, KEYS, POINTS = 256, 20, (0, 11), 8
TOLERANCE = 1e-3  # of logits with a deviation of about 2
# With the other's memories in the bank. On its own each cuts the prompted masks at 0, and a pixel that lies
# on the edge may fall to either side: then everything after it differs by 1.5e-3 to 9e-3. On which seeds one
# does depends on the processor, so seeds are tried until on one none does.
TOLERANCE_SAME_MEMORIES = 1e-4
SEEDS = 8
ON_THE_EDGE = 1e-3  # logits that the rounding of two implementations can bring to either side of 0
LED = 10  # frames of that comparison: the last ones have 8 memories
# Cells of a memory that see one pixel of the mask: 2 in a row after the strided convolutions, and 6 more on
# either side after two of 7x7.
REACH = 14**2
BF16_STEP = 2.0**-7  # memories are rounded to bf16, and a sum on the edge may fall to either side


@dataclass(frozen=True)
class Remembered:
    mask: Values
    pointer: Values
    memory: Values
    score: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs do not depend on weights: all tests of one model share them."""
    return tmp_path_factory.mktemp("sam2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def frames_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(frame: Values, size: int, rule: str) -> Values:
        return frame.transpose(2, 0, 1)

    monkeypatch.setattr(carriers, "model_input", unchanged)


def noise(frames: int, seed: int) -> Values:
    return np.random.default_rng(seed).standard_normal((frames, 3, SIZE, SIZE), np.float32)


def prompts(frames: tuple[int, ...], count: int = POINTS) -> dict[int, Values]:
    rng = np.random.default_rng(1)
    return {f: rng.uniform(0, SIZE, (count, 2)).astype(np.float32) for f in frames}


def config(name: str) -> Sam2Config:
    return replace(SAM2_MODELS[name], image_size=SIZE)


def theirs(
    c: Sam2Config, weights: dict[str, Values], pixels: Values, keys: dict[int, Values]
) -> list[Remembered]:
    model, session = transformers_model(c, weights), session_of(pixels)
    for frame, points in keys.items():
        prompt(session, frame, points, [1] * len(points))
        model(session, frame_idx=frame)
    masks = [model(session, frame_idx=f).pred_masks.numpy()[0, 0] for f in range(len(pixels))]
    outputs = session.output_dict_per_obj[0]
    stored = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
    return [
        Remembered(
            mask,
            stored[f]["object_pointer"].numpy().ravel(),
            stored[f]["maskmem_features"].float().numpy()[:, 0],
            stored[f]["object_score_logits"].item(),
        )
        for f, mask in enumerate(masks)
    ]


def ours(
    model: Sam2Model, pixels: Values, keys: dict[int, Values], memories: list[Remembered] | None = None
) -> Iterator[Remembered]:
    """Prompts are answered before the first frame, as in the other. With `memories`, those are looked at in
    place of our own.
    """
    tracker = Sam2Tracker(model, frames=len(pixels), fill_holes=0)
    pictures = [p.transpose(1, 2, 0) for p in pixels]
    for frame, points in keys.items():
        tracker.add_points(frame, 1, points, [1] * len(points), picture=pictures[frame])
    bank = tracker.objects[1].bank
    for frame in keys if memories else ():
        bank.add_prompted(frame, memories[frame].memory, memories[frame].pointer)
    for tracked in tracker.track(iter(pictures)):
        found = tracked.objects[1]
        kept = (bank.prompted if found.prompted else bank.tracked)[tracked.frame]
        assert found.prompted == (tracked.frame in keys) and kept.memory is not None
        yield Remembered(found.logits, kept.pointer, np.asarray(kept.memory), found.score)
        if memories and not found.prompted:
            seen = memories[tracked.frame]
            bank.add_tracked(tracked.frame, seen.memory, seen.pointer)


def fallen(got: Remembered, want: Remembered) -> int:
    """Pixels of a prompted mask, at the memory encoder's size, that lie on the two sides of 0."""
    a, b = (
        torch.nn.functional.interpolate(
            torch.from_numpy(found.mask)[None, None], (SIZE, SIZE), mode="bilinear"
        )
        for found in (got, want)
    )
    different = (a > 0) != (b > 0)
    assert not different.any() or float(a[different].abs().max()) < ON_THE_EDGE, "no matter of rounding"
    return int(different.sum())


def compare(
    name: str,
    folder: Path,
    frames: int,
    keys: dict[int, Values],
    score: float = 3.0,
    seed: int = 0,
    on_the_edge: int = 0,
) -> list[Remembered]:
    """Ours on the first seed from `seed` on with at most `on_the_edge` such pixels; the rest is asserted at
    every seed.
    """
    c = config(name)
    for tried in range(seed, seed + SEEDS):
        weights, pixels = random_sam2_weights(c, tried, score), noise(frames, tried)
        want = theirs(c, weights, pixels, keys)
        model = our_model(c, weights, folder, Sam2Plan())
        got = list(ours(model, pixels, keys))
        require_alike(name, model, pixels, keys, want)
        fell = {f: fallen(got[f], want[f]) for f in keys}
        print(f"{name}: {sum(fell.values())} pixels of seed {tried} fell to the other side")
        if sum(fell.values()) <= on_the_edge:
            break
    else:
        pytest.fail(f"all of {SEEDS} seeds have more pixels on the edge than {on_the_edge}")
    assert len(got) == len(want) == frames
    worst = {
        what: max(
            float(np.abs(getattr(g, what) - getattr(w, what)).max()) for g, w in zip(got, want, strict=True)
        )
        for what in ("mask", "pointer", "memory", "score")
    }
    size = max(float(np.abs(w.memory).max()) for w in want)
    print(name, {what: f"{difference:.1e}" for what, difference in worst.items()})
    assert worst["mask"] <= TOLERANCE and worst["pointer"] <= TOLERANCE and worst["score"] <= TOLERANCE, worst
    assert any(fell.values()) or worst["memory"] <= BF16_STEP * size, worst
    for f in keys:
        moved = int((np.abs(got[f].memory - want[f].memory) > BF16_STEP * size).any(1).sum())
        assert moved <= REACH * fell[f], f"{moved} cells of frame {f}'s memory for {fell[f]} pixels"
    return got


def require_alike(
    name: str, model: Sam2Model, pixels: Values, keys: dict[int, Values], want: list[Remembered]
) -> None:
    """With the same memories, whatever fell on the edge."""
    led = zip(islice(ours(model, pixels, keys, want), LED), want, strict=False)
    tracked = [
        (float(np.abs(g.mask - w.mask).max()), float(np.abs(g.memory - w.memory).max()))
        for f, (g, w) in enumerate(led)
        if f not in keys
    ]
    print(f"{name}, same memories: {max((mask for mask, _ in tracked), default=0):.1e}")
    size = max(float(np.abs(w.memory).max()) for w in want)
    assert all(mask <= TOLERANCE_SAME_MEMORIES for mask, _ in tracked), tracked
    assert all(memory <= BF16_STEP * size for _, memory in tracked), tracked


@pytest.mark.long
def test_a_clip_with_two_prompted_frames(folder: Path) -> None:
    """The bank is full on the way: 8 memories and 17 pointers, one of them ahead in time."""
    got = compare("sam2.1_tiny", folder, FRAMES, prompts(KEYS), seed=2)
    assert all(1 < float(found.mask.std()) < 5 for found in got), "the masks say nothing"
    assert all(found.score > 0 for found in got)


@pytest.mark.long
def test_frames_without_the_object(folder: Path) -> None:
    """Masks are then all -1024; pointers and memories still differ from frame to frame."""
    got = compare("sam2.1_tiny", folder, 4, prompts((0,)), score=-3.0)
    assert all((found.mask == -1024).all() and found.score < 0 for found in got)
    assert len({float(found.memory.sum()) for found in got}) == len(got)


@pytest.mark.long
def test_one_point_is_answered_with_the_best_of_three(folder: Path) -> None:
    compare("sam2.1_tiny", folder, 2, prompts((0,), count=1), seed=4)


@pytest.mark.long
def test_sam_2_0(folder: Path, tmp_path: Path) -> None:
    """No ages of pointers, no embedding of absence; the other two graphs are the same."""
    new, old = (networks(config(name), Sam2Plan()) for name in ("sam2.1_tiny", "sam2_tiny"))
    for name in ("encoder", "prompt"):
        assert new[name] == old[name]
        if (folder / f"{name}.onnx").exists():
            shutil.copy(folder / f"{name}.onnx", tmp_path)
    compare("sam2_tiny", tmp_path, 3, prompts((0,)), score=3.0)


@pytest.mark.long
def test_a_box(folder: Path) -> None:
    """Two corners with labels of their own, and no best of three."""
    c = config("sam2.1_tiny")
    weights, pixels = random_sam2_weights(c, 4), noise(1, 4)
    model, session = transformers_model(c, weights), session_of(pixels)
    box = np.array([[40, 60], [200, 180]], np.float32)
    prompt(session, 0, box, [2, 3])
    want = model(session, frame_idx=0).pred_masks.numpy()[0, 0]
    tracker = Sam2Tracker(our_model(c, weights, folder, Sam2Plan()), fill_holes=0)
    tracker.add_box(0, 1, box.ravel().tolist())
    (tracked,) = tracker.track([pixels[0].transpose(1, 2, 0)])
    assert float(np.abs(tracked.objects[1].logits - want).max()) <= TOLERANCE


def test_a_mask(folder: Path) -> None:
    """As the official code does it: pointer from the single mask's token, memory from the coarse mask.

    transformers takes the best of three and the fine mask, so its parts are put together here.
    """
    c = config("sam2.1_tiny")
    weights, pixels = random_sam2_weights(c, 5), noise(1, 5)
    model = transformers_model(c, weights)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[37:151, 62:199] = True
    drawn = torch.from_numpy(mask.astype(np.float32))[None, None]
    features = model.get_image_features(torch.from_numpy(pixels)).fpn_hidden_states
    grids = [
        f.permute(1, 2, 0).unflatten(2, (SIZE // n, SIZE // n))
        for f, n in zip(features, (4, 8, 16), strict=True)
    ]
    coarse = model._use_mask_as_output(grids[2], grids[:2], drawn).pred_masks
    dense = model.mask_downsample(drawn)
    found = model._single_frame_forward(input_masks=dense, image_embeddings=grids, multimask_output=False)
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    memory, _ = model._encode_new_memory(features[2], fine, torch.full((1, 1, 1), 10.0), True)

    tracker = Sam2Tracker(our_model(c, weights, folder, Sam2Plan()), fill_holes=0)
    tracker.add_mask(0, 1, mask)
    (tracked,) = tracker.track([pixels[0].transpose(1, 2, 0)])
    kept = tracker.objects[1].bank.prompted[0]
    assert (tracked.mask(1) == mask).mean() > 0.99
    np.testing.assert_allclose(tracked.objects[1].logits, coarse.numpy()[0, 0], atol=1e-4)
    np.testing.assert_allclose(kept.pointer, found.object_pointer.numpy().ravel(), atol=TOLERANCE)
    ours, theirs = np.asarray(kept.memory), memory.float().numpy()[:, 0]
    assert np.abs(ours - theirs).max() <= BF16_STEP * np.abs(theirs).max()


@pytest.mark.long
def test_objects_do_not_see_each_other(folder: Path) -> None:
    """Two objects in one run are what they are alone."""
    c = config("sam2.1_tiny")
    model = our_model(c, random_sam2_weights(c, 6), folder, Sam2Plan())
    pictures = [p.transpose(1, 2, 0) for p in noise(3, 6)]
    points = prompts((0, 1), count=3)

    def logits(numbers: tuple[int, ...]) -> dict[int, list[Values]]:
        tracker = Sam2Tracker(model)
        for number in numbers:
            tracker.add_points(number, number, points[number], [1, 1, 0])
        frames = list(tracker.track(pictures))
        return {n: [f.objects[n].logits for f in frames if n in f.objects] for n in numbers}

    both = logits((0, 1))
    assert [len(both[n]) for n in (0, 1)] == [3, 2]
    for number in (0, 1):
        np.testing.assert_array_equal(both[number], logits((number,))[number])


@pytest.mark.long
def test_places_that_are_not_used_change_nothing(folder: Path) -> None:
    """In a graph with more room the same frames give the same masks, whatever lies in the masked places."""
    c = config("sam2.1_tiny")
    weights, pictures = random_sam2_weights(c, 6), [p.transpose(1, 2, 0) for p in noise(3, 6)]
    masks = []
    for rooms in ((7,), (11,)):
        model = our_model(c, weights, folder, Sam2Plan(memories=rooms))
        tracker = Sam2Tracker(model, fill_holes=0)
        tracker.add_points(0, 1, prompts((0,))[0], [1] * POINTS)
        masks.append([tracked.objects[1].logits for tracked in tracker.track(pictures)])
        seen = last_inputs(model)
        before = model.run(f"track_{rooms[0]}", seen)
        noisy = dict(seen) | {f"memory_{rooms[0] - 1}": 5 * np.asarray(seen["memory_1"]) + 3}
        noisy["pointers"] = np.where(seen["pointer_bias"][:, None] < 0, 99, seen["pointers"]).astype(
            np.float32
        )
        after = model.run(f"track_{rooms[0]}", noisy)
        assert not np.array_equal(noisy["pointers"], seen["pointers"])
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(masks[1], masks[0], atol=1e-4)


def last_inputs(model: Sam2Model) -> dict[str, Any]:
    assert isinstance(model.executor, ExportingExecutor)
    return model.executor.last


@pytest.mark.skipif("SAM2_FULL_SIZE" not in os.environ, reason="minutes; set SAM2_FULL_SIZE=frames to run it")
def test_base_plus_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million pixels some always lie on the edge, and one of them moves little."""
    monkeypatch.setitem(globals(), "SIZE", 1024)
    frames = int(os.environ["SAM2_FULL_SIZE"])
    compare("sam2.1_base_plus", tmp_path, frames, prompts((0,)), on_the_edge=20)
