"""SAM2 on a GPU: frames resized by kernels against the host's, and the tracker on TensorRT against ONNX
Runtime in float32, with prompts on several frames, one of them added on the way, and two objects.

Without a GPU only that the kernels compile, and that their tables are the host's filters.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from on_gpu import require_gpu, with_kernels
from sam2_oracle import our_model

from trt_wan.build.sam2 import build_sam2_graphs
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Plan, Sam2Precision, pointers_of
from trt_wan.errors import EnvironmentBroken
from trt_wan.preprocess.sam2 import kernels, memory_attention, resize_on_gpu
from trt_wan.preprocess.sam2.model import Sam2Model, open_sam2_on_gpu
from trt_wan.preprocess.sam2.resample import DEVIATION, InputRule, filter_table, model_input
from trt_wan.preprocess.sam2.segmenter import PATIENCE
from trt_wan.preprocess.sam2.tracker import Sam2Tracker, TrackedFrame
from trt_wan.preprocess.sam2.transfer import AHEAD, DeviceCarrier
from trt_wan.preprocess.sam2.weights import Sam2Weights, random_sam2_weights, weights_of
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.events import silent
from trt_wan.runtime.video.reader import Picture

CONFIG = replace(SAM2_MODELS["sam2.1_tiny"], image_size=256)
SEED, FRAMES, LATE = 1, 14, 10
# Of the logits of a frame, as norms. Features have some 3e-3 in fp16, and memories carry it from frame to
# frame; what is not the same mask has 1 and more.
TOLERANCE: dict[Sam2Precision, float] = {"fp32": 5e-2, "fp16": 1.5e-1}
SIZES = [(90, 160), (480, 272), (256, 256), (1080, 1920), (129, 517), (7, 3), (1, 1), (33, 1), (512, 512)]


def picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    code = bytes(compile_source(kernels.SOURCE, capability).code)
    for name in kernels.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_attention_to_memories_compiles(nvrtc: None, capability: tuple[int, int]) -> None:
    macros = memory_attention.macros(CONFIG)
    code = bytes(compile_source(memory_attention.SOURCE, capability, macros).code)
    for name in memory_attention.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.mark.parametrize(
    ("multiprocessors", "shares"), [(132, 4), (128, 4), (170, 5), (76, 7), (60, 7), (24, 3), (1, 1)]
)
def test_keys_are_shared_out_so_that_few_multiprocessors_idle(multiprocessors: int, shares: int) -> None:
    assert memory_attention.shares_of(32, multiprocessors) == shares


def test_a_gpu_that_is_too_old() -> None:
    memory_attention.require_kernel((8, 0))
    with pytest.raises(EnvironmentBroken, match="compute capability 7.5 is too old"):
        memory_attention.require_kernel((7, 5))


@pytest.mark.parametrize("rule", get_args(InputRule))
@pytest.mark.parametrize("size", SIZES)
def test_tables_are_the_hosts_filters(rule: InputRule, size: tuple[int, int]) -> None:
    """The kernels' arithmetic in numpy. Sums in another order may round to the level beside."""
    frame = picture(*size)
    height, width = size
    levels = rule != "kijai"

    def done(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.clip(np.floor(x + np.float32(0.5)), 0, 255) if levels else x

    values = frame.astype(np.float32) if levels else frame.astype(np.float32) / np.float32(255)
    for axis, length in ((1, width), (0, height)):
        first, weights = filter_table(length, 128, rule)
        taps = [
            np.take(values, np.minimum(first + tap, length - 1), axis) * np.expand_dims(row, (1 - axis, 2))
            for tap, row in enumerate(weights)
        ]
        values = done(np.sum(taps, axis=0, dtype=np.float32))
    want = model_input(frame, 128, rule).transpose(1, 2, 0)
    if levels:
        mean = np.array([0.485, 0.456, 0.406], np.float32)
        difference = np.abs(values - (want * DEVIATION + mean) * 255)
        assert difference.max() <= 1.01 and (difference > 0.5).mean() < 1e-2, difference.max()
    else:
        np.testing.assert_allclose(values, want, atol=1e-6)


def test_a_new_prompt_shows_before_the_next_is_thought_of() -> None:
    assert AHEAD < PATIENCE


# On a GPU


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = with_kernels(tmp_path_factory.mktemp("home"))
        patch.setenv("TRT_WAN_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def weights() -> Sam2Weights:
    return weights_of(CONFIG, random_sam2_weights(CONFIG, SEED))


def open_model(weights: Sam2Weights, precision: Sam2Precision) -> Sam2Model:
    gpu = require_gpu()
    flavour = choose_flavour(None, gpu.capability)
    plan = Sam2Plan(precision, 4)
    start = time.perf_counter()
    build_sam2_graphs(CONFIG, plan, lambda name, seconds: None)
    exported = time.perf_counter()
    model = open_sam2_on_gpu(weights, plan, gpu, flavour, silent)
    print(f"{precision}: graphs {exported - start:.1f} s, open {time.perf_counter() - exported:.1f} s")
    return model


@pytest.fixture(scope="module")
def half(home: Path, weights: Sam2Weights) -> Sam2Model:
    return open_model(weights, "fp16")


@pytest.mark.parametrize("rule", get_args(InputRule))
def test_frames_are_resized_as_on_the_host(rule: InputRule, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = require_gpu()
    told = []
    for size in (256, 1024):
        buffer, (target,) = resize_on_gpu.allocated(gpu, [((3, size, size), np.float32)])
        for height, width in SIZES:
            for whole in (True, False):
                piece = resize_on_gpu.PIECE_BYTES if whole else 5 * 3 * width + 1
                monkeypatch.setattr(resize_on_gpu, "PIECE_BYTES", piece)
                frame = picture(height, width)[::-1, ::-1]  # turned, as a clip may be
                gpu.write(target, np.full(target.shape, np.nan, np.float32))
                resizer = resize_on_gpu.Resizer(gpu, size)
                resizer.write(frame, rule, target)
                difference = np.abs(gpu.download(target) - model_input(frame.copy(), size, rule))
                levels = difference * (255 if rule == "kijai" else 255 * DEVIATION[:, None, None])
                told.append((size, height, width, whole, float(levels.max()), float((levels > 0.5).mean())))
                monkeypatch.undo()
        buffer.close(gpu.stream)
    print(*told, sep="\n")
    for row in told:  # a NaN is no level
        most, share = row[4:]
        assert most <= (1e-3 if rule == "kijai" else 1.01) and share < 1e-2, f"{rule}: {row}"


def test_small_things_go_up_and_come_down() -> None:
    """More of them than there are slots, without waiting; a batch is filled up with its last picture."""
    gpu = require_gpu()
    gpu.reserve(1 << 24)
    plan = Sam2Plan("fp16", 4)
    carrier = DeviceCarrier(gpu, CONFIG, plan)
    rng = np.random.default_rng(0)
    given: list[Any] = []
    reads = []
    for _ in range(100):
        values = {"a": rng.standard_normal(7, np.float32), "b": rng.standard_normal((64, 64), np.float32)}
        up = carrier.small(values)
        given.append(values)
        reads.append(carrier.fetch([up["a"], up["b"]]))
    for k, (values, read) in enumerate(zip(given, reads, strict=True)):
        for got, want in zip(read(), values.values(), strict=True):
            np.testing.assert_array_equal(got, want, f"round {k}")
    pointers = [gpu.upload(rng.standard_normal(CONFIG.channels, np.float32)) for _ in range(5)]
    rows = gpu.download(carrier.rows(pointers, 16))
    np.testing.assert_array_equal(rows[:5], [gpu.download(pointer) for pointer in pointers])
    assert not rows[5:].any()
    frames = [picture(40, 60, seed) for seed in range(2)]
    pixels = gpu.download(carrier.pixels(frames, "official")())
    np.testing.assert_array_equal(pixels[2:], np.stack([pixels[1]] * 2))
    assert np.isfinite(pixels).all() and not np.array_equal(pixels[0], pixels[1])


@pytest.mark.parametrize("size", [256, 464, 1024])
@pytest.mark.parametrize("seen", [(1, 1), (4, 6), (7, 16), (0, 3)])
def test_attention_to_memories(size: int, seen: tuple[int, int]) -> None:
    """Memories and pointers, some of each unseen: with NaN in them, which nothing may look at."""
    gpu, config, places = require_gpu(), replace(CONFIG, image_size=size), 7
    rng = np.random.default_rng(0)
    front, start, back = seen[0] * config.tokens, places * config.tokens, config.pointer_tokens * seen[1]
    keys = rng.standard_normal(
        (start + config.pointer_tokens * pointers_of(places), config.channels), np.float32
    )
    values = rng.standard_normal((len(keys), config.memory_channels), np.float32)
    queries = 0.3 * rng.standard_normal((config.tokens, config.channels), np.float32)
    q, k, v = (t.astype(np.float16) for t in (queries, keys, values))
    for t in (k, v):
        t[front:start] = t[start + back :] = np.nan
    (segment,) = memory_attention.open_memory_attention(gpu, config, (places,)).values()
    gpu.reserve(1 << 28)
    scratch = gpu.empty((segment.scratch_bytes,), np.uint8)
    segment.start(scratch.address)
    out = gpu.empty((config.tokens, config.memory_channels), np.float16)
    given = {"q": q, "keys": k, "values": v, "seen": np.array([front, back], np.int64)}
    arrays = {name: gpu.upload(value) for name, value in given.items()} | {"attended": out}
    segment.enqueue({name: array.address for name, array in arrays.items()})
    there = np.r_[0:front, start : start + back]
    logits = q.astype(np.float32) @ k[there].astype(np.float32).T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    want = shares / shares.sum(1, keepdims=True) @ v[there].astype(np.float32)
    error = np.linalg.norm(gpu.download(out) - want) / np.linalg.norm(want)
    print(f"{size}, {seen}: {error:.1e}")
    assert error < 1e-3  # fp16 has 2e-4 of it


def follow(model: Sam2Model) -> list[TrackedFrame]:
    """Two objects; the first is prompted on two frames and, while the clip runs, on a third."""
    size = CONFIG.image_size
    rng = np.random.default_rng(1)
    points = [rng.uniform(0, size, (8, 2)).astype(np.float32) for _ in range(4)]
    tracker = Sam2Tracker(model, frames=FRAMES)
    tracker.add_points(0, 1, points[0], [1] * 8)
    tracker.add_points(5, 1, points[1], [1] * 8)
    tracker.add_points(3, 2, points[2], [1, 1, 0, 1, 1, 0, 1, 1])
    found = []
    for tracked in tracker.track(picture(size, size, seed) for seed in range(FRAMES)):
        found.append(tracked)
        if tracked.frame == LATE - AHEAD - 1:
            assert tracker.next_frame <= LATE, f"{tracker.next_frame} frames are under way"
            tracker.add_points(LATE, 1, points[3], [1] * 8)
    return found


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_objects_are_followed_as_with_onnxruntime(
    precision: Sam2Precision, half: Sam2Model, weights: Sam2Weights, tmp_path: Path
) -> None:
    want = follow(our_model(CONFIG, weights, tmp_path, Sam2Plan()))
    got = follow(half if precision == "fp16" else open_model(weights, precision))
    assert len(got) == len(want) == FRAMES
    errors: dict[tuple[int, int], float] = {}
    for a, b in zip(got, want, strict=True):
        assert a.frame == b.frame and list(a.objects) == list(b.objects), (a.frame, a.objects, b.objects)
        for number in a.objects:
            one, other = a.objects[number], b.objects[number]
            assert one.prompted == other.prompted, (a.frame, number)
            difference = float(np.linalg.norm(one.logits - other.logits))
            errors[a.frame, number] = difference / float(np.linalg.norm(other.logits))
            agree = float(((one.logits > 0) == (other.logits > 0)).mean())
            print(
                f"{precision}, frame {a.frame}, object {number}: error {errors[a.frame, number]:.1e}, signs "
                f"alike {agree:.4f}, score {one.score:.3f} for {other.score:.3f}"
                f"{', prompted' if one.prompted else ''}"
            )
    assert sorted(f for f, number in errors if number == 1) == list(range(FRAMES))
    worst = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    assert errors[worst] < TOLERANCE[precision], f"frame and object {worst}: {errors[worst]:.1e}"


def test_frames_ahead_change_nothing(half: Sam2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers with every frame waited for, and again."""
    ahead = [follow(half), follow(half)]
    monkeypatch.setattr(half.carrier, "ahead", 0)
    alone = follow(half)
    for run in ahead:
        for a, b in zip(run, alone, strict=True):
            for number, found in a.objects.items():
                difference = float(np.abs(found.logits - b.objects[number].logits).max())
                assert difference == 0 and found.score == b.objects[number].score, (
                    a.frame,
                    number,
                    difference,
                )
    assert half.gpu is not None
    print(f"arena: {half.gpu.arena.peak / half.gpu.arena.size:.0%} of {half.gpu.arena.size / 1e6:.0f} MB")
