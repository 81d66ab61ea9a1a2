"""The bank and the tracker's bookkeeping, without the networks: which memories and pointers a frame sees, how
much is kept, chunks, prompts in time; and the resampling of frames.

The official rule is written out here once more, slowly, over everything that was ever remembered.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trt_wan.engines.contract import Network
from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Plan, pointers_of
from trt_wan.errors import UsageError
from trt_wan.preprocess.sam2.bank import MemoryBank
from trt_wan.preprocess.sam2.model import Sam2Model
from trt_wan.preprocess.sam2.resample import model_input, resize_antialiased
from trt_wan.preprocess.sam2.tracker import Sam2Tracker, fill_small_holes
from trt_wan.preprocess.sam2.weights import random_sam2_weights, weights_of

CONFIG = replace(SAM2_MODELS["sam2.1_tiny"], image_size=64)
PLAN = Sam2Plan(memories=(7, 11), batch=3)
GREY = np.full((40, 60, 3), 128, np.uint8)


def official(frame: int, prompted: list[int], frames: int) -> tuple[set[Any], set[Any]]:
    """Memories as (frame, row) and pointers as (frame, distance), of a clip tracked from frame 0."""
    memories = {(f, 6) for f in prompted}
    memories |= {(frame - d, d - 1) for d in range(1, 7) if frame - d >= 0 and frame - d not in prompted}
    pointers = {(f, frame - f) for f in prompted if f <= frame}
    limit = min(frames, 16)
    pointers |= {(frame - d, d) for d in range(1, limit) if frame - d >= 0 and frame - d not in prompted}
    return memories, pointers


def number(value: int) -> NDArray[np.float32]:
    return np.array([value], np.float32)


def seen(bank: MemoryBank, frame: int, limit: int) -> tuple[set[Any], set[Any]]:
    view = bank.view(frame)
    assert view is not None
    memories = {(int(np.asarray(memory)[0]), row) for memory, row in view.memories}
    pointers = {(int(pointer[0]), round(age * max(1, limit - 1))) for pointer, age in view.pointers}
    assert (len(memories), len(pointers)) == (len(view.memories), len(view.pointers)), "something came twice"
    assert len(pointers) <= pointers_of(max(7, len(memories)))
    return memories, pointers


@pytest.mark.parametrize("frames", [2, 5, 6, 7, 9, 11, 15, 16, 40, 106])
@pytest.mark.parametrize("keys", ["first", "official"])
def test_a_frame_sees_what_the_official_code_shows_it(frames: int, keys: str) -> None:
    step = frames // 4 if frames > 4 and keys == "official" else frames
    prompted = list(range(0, frames, step))
    bank = MemoryBank(CONFIG, room=11, frames=frames)
    for f in prompted:
        bank.add_prompted(f, number(f), number(f))
    for f in range(frames):
        if f not in prompted:
            assert seen(bank, f, min(frames, 16)) == official(f, prompted, frames), f
            bank.add_tracked(f, number(f), number(f))


def test_the_nearest_prompted_frames_when_there_are_too_many() -> None:
    bank = MemoryBank(CONFIG, room=11)
    for f in range(0, 1000, 20):
        bank.add_prompted(f, number(f), number(f))
    for f in range(470, 507):
        if f % 20:
            bank.add_tracked(f, number(f), number(f))
    memories, _ = seen(bank, 507, 16)
    # the last before, the first after, then by distance
    assert {f for f, row in memories if row == 6} == {460, 480, 500, 520, 540}
    assert {f for f, row in memories if row < 6} == {506, 505, 504, 503, 502, 501}


def test_memory_does_not_grow() -> None:
    bank = MemoryBank(CONFIG, room=11)
    for f in range(2000):
        if f % 10 == 0:
            bank.add_prompted(f, number(f), number(f))
        else:
            bank.add_tracked(f, number(f), number(f))
        assert len(bank.prompted) <= 12 and len(bank.tracked) <= 15
        assert sum(kept.memory is not None for kept in bank.tracked.values()) <= 6


def test_chunks_begin_afresh() -> None:
    bank = MemoryBank(CONFIG, room=11, chunk=10, frames=24)
    for f in (0, 10, 14, 20):
        bank.add_prompted(f, number(f), number(f))
    for f in range(1, 10):
        bank.add_tracked(f, number(f), number(f))
    assert seen(bank, 11, 10) == ({(10, 6), (14, 6)}, {(10, 1)})
    for f in (11, 12, 13, *range(15, 20)):
        bank.add_tracked(f, number(f), number(f))
    assert seen(bank, 21, 4) == ({(20, 6)}, {(20, 1)})
    assert MemoryBank(CONFIG, room=11, chunk=10).view(3) is None


@dataclass
class Recorder:
    """An executor that computes nothing: it counts, and answers with what tells the calls apart."""

    calls: list[tuple[str, dict[str, Any]]]

    def run(self, network: Network, n: int, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        for tensor in network.inputs:
            assert np.asarray(inputs[tensor.name]).shape == tensor.shape, f"{network.name}.{tensor.name}"
        self.calls.append((network.name, dict(inputs)))
        outputs = [np.full(t.shape, len(self.calls), np.float32) for t in network.outputs]
        if network.name == "encoder":
            outputs = [
                np.broadcast_to(inputs["pixels"].mean((1, 2, 3))[:, None, None], o.shape).copy()
                for o in outputs
            ]
        return tuple(outputs)

    def place(self, array: Any) -> Any:
        return array


@pytest.fixture
def recorder() -> Recorder:
    return Recorder([])


@pytest.fixture(scope="module")
def weights() -> Any:
    return weights_of(CONFIG, random_sam2_weights(CONFIG, 0))


@pytest.fixture
def model(recorder: Recorder, weights: Any) -> Sam2Model:
    return Sam2Model(CONFIG, PLAN, recorder, weights)  # type: ignore[arg-type]


def test_frames_are_encoded_in_batches_and_come_in_order(model: Sam2Model, recorder: Recorder) -> None:
    tracker = Sam2Tracker(model, rule="kijai")
    tracker.add_points(0, 1, np.array([[30.0, 20.0]]), [1])
    frames = [np.full((40, 60, 3), 10 * i, np.uint8) for i in range(8)]
    masks = list(tracker.propagate(iter(frames)))
    assert len(masks) == 8 and all(mask[1].shape == (40, 60) and mask[1].dtype == bool for mask in masks)
    names = [name for name, _ in recorder.calls]
    assert names.count("encoder") == 3 and names.count("track_7") == 7 and names.count("prompt") == 1
    feats = [float(inputs["feat"][0, 0]) * 255 for name, inputs in recorder.calls if name.startswith("track")]
    np.testing.assert_allclose(feats, [10 * i for i in range(1, 8)], atol=1e-3)


def test_prompts_wait_for_their_frame(model: Sam2Model, recorder: Recorder) -> None:
    """Points are scaled by the frame's size; objects begin where they are prompted; late prompts are told."""
    tracker = Sam2Tracker(model)
    tracker.add_points(1, 1, np.array([[30.0, 20.0], [60.0, 40.0]]), [1, 0])
    tracker.add_box(2, 7, (0, 0, 30, 20))
    found = [sorted(masks) for masks in tracker.propagate([GREY] * 4)]
    assert found == [[], [1], [1, 7], [1, 7]]
    first, box = (inputs for name, inputs in recorder.calls if name == "prompt")
    assert first["points"][:3].tolist() == [[32, 32], [64, 64], [0, 0]]
    assert first["labels"][:3].argmax(1).tolist() == [2, 1, 0] and not first["labels"][3:].any()
    assert (first["token_bias"][:3] == 0).all() and (first["token_bias"][3:] < -1e4).all()
    assert box["labels"][:3].argmax(1).tolist() == [3, 4, 0] and box["multimask"] == 0
    with pytest.raises(UsageError, match="comes too late"):
        tracker.add_points(3, 1, np.array([[1.0, 1.0]]), [1])
    tracker.add_points(4, 1, np.array([[1.0, 1.0]]), [1])
    assert list(next(tracker.propagate([GREY]))) == [1, 7]
    assert [i["multimask"][0] for n, i in recorder.calls if n == "prompt"] == [0, 0, 1]


def test_a_prompt_with_its_picture_is_seen_by_frames_before(model: Sam2Model, recorder: Recorder) -> None:
    tracker = Sam2Tracker(model)
    for f in (0, 3):
        tracker.add_points(f, 1, np.array([[1.0, 1.0]]), [1], picture=GREY)
    tracked = list(tracker.track([GREY] * 5))
    assert [t.objects[1].prompted for t in tracked] == [True, False, False, True, False]
    first = next(inputs for name, inputs in recorder.calls if name == "track_7")
    assert (first["memory_bias"] == 0).tolist() == [True, True, *[False] * 5]
    assert (first["pointer_bias"] == 0).sum() == 1, "pointers of frames to come are not shown"


def test_unusable_prompts(model: Sam2Model) -> None:
    tracker = Sam2Tracker(model)
    with pytest.raises(UsageError, match="labels"):
        tracker.add_points(0, 1, np.zeros((2, 2)), [1])
    with pytest.raises(UsageError, match="17 points"):
        tracker.add_points(0, 1, np.zeros((17, 2)), [1] * 17)
    with pytest.raises(UsageError, match="not a finite number"):
        tracker.add_points(0, 1, np.full((1, 2), np.nan), [1])


def test_small_holes_are_filled() -> None:
    logits = np.full((20, 20), 3.0, np.float32)
    logits[2:4, 2:6] = -1.0  # 8 pixels
    logits[10:13, 10:13] = -2.0  # 9
    logits[16, 16] = logits[17, 17] = 0.0  # touch by a corner
    filled = fill_small_holes(logits, 8)
    assert (filled[2:4, 2:6] == np.float32(0.1)).all() and filled[16, 16] == filled[17, 17] == np.float32(0.1)
    assert (filled[10:13, 10:13] == -2).all() and (filled[0] == 3).all()
    assert fill_small_holes(logits, 0) is logits


@pytest.mark.parametrize("size", [(90, 160), (480, 272), (64, 64)])
def test_input_rules(size: tuple[int, int]) -> None:
    """Against Pillow (official) and torch (the others), on uint8 as they do it.

    torch has weights of 16 bits. Pillow's two passes are asked for one by one: 13 sometimes takes rows
    first, earlier ones never did.
    """
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pillow = np.asarray(image.fromarray(picture).resize((128, size[0])).resize((128, 128)))
    levels = model_input(picture, 128, "official").transpose(1, 2, 0) * deviation + mean
    difference = np.abs(levels * 255 - pillow)
    assert difference.max() <= 1.01 and (difference > 0.5).mean() < 1e-3

    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    smooth = torch.nn.functional.interpolate(planes, (128, 128), mode="bilinear", antialias=True)
    levels = model_input(picture, 128, "transformers").transpose(1, 2, 0) * deviation + mean
    difference = np.abs(levels * 255 - smooth[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 1.01 and (difference > 0.5).mean() < 5e-2

    plain = torch.nn.functional.interpolate(planes.float() / 255, (128, 128), mode="bilinear")
    np.testing.assert_allclose(model_input(picture, 128, "kijai"), plain[0].numpy(), atol=2e-5)


def test_float_resampling() -> None:
    values = np.random.default_rng(0).random((90, 160), np.float32)
    for height, width in ((64, 64), (256, 128)):
        want = torch.nn.functional.interpolate(
            torch.from_numpy(values)[None, None], (height, width), mode="bilinear", antialias=True
        )
        np.testing.assert_allclose(resize_antialiased(values, height, width), want[0, 0], atol=1e-5)


def test_logits_are_enlarged_as_torch_does() -> None:
    logits = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = torch.nn.functional.interpolate(
            torch.from_numpy(logits)[None, None], (270, 480), mode="bilinear"
        )
    got = cv2.resize(logits, (480, 270), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(got, want[0, 0].numpy(), atol=1e-4)
