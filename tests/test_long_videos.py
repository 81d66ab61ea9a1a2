"""Videos longer than one forward of the model, with the tiny model on ONNX Runtime: windows that go on
from a state, context windows, and both together.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import FRAMES, PLAN, read_frames, write_clip, write_sound
from tiny_job import prepare as write_clips

from trt_wan.runtime.context.settings import SCHEDULES, Context
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import WindowCondition, encode_motion, fuser_keys, velocity
from trt_wan.runtime.networks.vae import decode, encode
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.pipeline import _Step, prepared_for
from trt_wan.runtime.preparation import Pictures, Prepared
from trt_wan.runtime.sampling.grids import schedule
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return write_clips(folder / "clips", write_sound(folder / "tone.m4a", 1))


@pytest.fixture(scope="module")
def model(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    weights = tmp_path_factory.mktemp("weights")
    write_tiny_weights(weights, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        files = WeightFiles((weights,))
        with open_model(files, Settings(executor="onnxruntime", text_cache=False)) as opened:
            yield opened


def job(clips: Path, face: bool = False, **changes: Any) -> Job:
    """Faces of 512x512 take most of a job's time on the CPU."""
    inputs = Inputs.from_folder(clips, changes.get("mode", "animate"))
    window = {} if "context" in changes else {"window": PLAN.frames}
    settings = {**window, "steps": 2, "seed": 7} | changes
    return Job(inputs if face else replace(inputs, face=None), **settings)


def frames(model: OpenModel, job: Job, **more: Any) -> Array:
    return np.concatenate(list(model.pieces(job, **more)), axis=1)


def test_a_job_goes_on_between_two_windows_with_the_same_bits(model: OpenModel, clips: Path) -> None:
    task = job(clips, overlap=9)  # 13 frames, then 4 new ones in each of two windows
    states: list[WindowState] = []
    events: list[Event] = []
    whole = frames(model, task, keep=states.append, progress=events.append)
    assert "untrained_overlap" in {event.code for event in events if isinstance(event, Note)}
    assert whole.shape[1] == FRAMES and [state.done for state in states] == [1, 2, 3]
    assert states[0].latent.shape == (16, PLAN.slots, PLAN.latent_height, PLAN.latent_width)
    for state, start in zip(states[:2], (13, 17), strict=True):
        np.testing.assert_array_equal(frames(model, task, begin_from=state), whole[:, start:])
    assert not list(model.pieces(task, begin_from=states[-1]))


# --- Context windows against full-length loops -------------------------------------------------------------

LONG = 30  # frames of the clips: 9 latents, the last three frames of the last are padding
SIZE = 4  # latents of a forward


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    return write_clips(folder / "clips", write_sound(folder / "tone.m4a", 1), LONG)


def starts(context: Context, step: int, latents: int) -> list[int]:
    """First latents of the windows of 4 that share 1 at least, by hand."""
    static = {9: [0, 3, 5], 6: [0, 2], 5: [0, 1]}[latents]
    assert latents == 9 or context.schedule == "static_standard"
    return {
        "static_standard": [static, static],
        "uniform_standard": [[0, 3, 5], [0, 1, 4, 5]],
        "uniform_looped": [[0, 3, 6], [2, 5, 8]],
    }[context.schedule][step]


def raw_weight(context: Context, windows: list[list[int]], number: int, place: int, latents: int) -> float:
    """Of latent `place` of a window: how deep it lies in the window, over what is shared there."""
    window, edges = windows[number], [1.0]
    middle = SIZE // 2
    for side, other in ((-1, number - 1), (1, number + 1)):
        looped = context.schedule == "uniform_looped"
        if not looped and other not in range(len(windows)):
            continue
        shared = len(set(window) & set(windows[other % len(windows)]))
        depth = place + 1 if side < 0 else SIZE - place
        if context.fuse == "linear":
            edges.append(depth / (shared + 1))
        elif (place < middle) == (side < 0):
            edges.append(depth / middle)
    return min(edges)


def reference_latent(
    model: Model, prepared: Prepared, task: Job, start: int, count: int, noise: Array, carried: Array | None
) -> Array:
    """Euler on the whole latent, every velocity fused in float64. Conditions are those of the whole window of
    the loop, which begins at frame `start`.
    """
    context, latents = task.context, (count - 1) // 4 + 1
    assert context is not None
    order = [min(k, 2 * (LONG - 1) - k) for k in range(start, start + count)]

    def pixels(path: Path | None) -> Array:
        assert path is not None
        frames = read_frames(path)
        return frames[order].astype(np.float32).transpose(3, 0, 1, 2) / np.float32(127.5) - 1

    known = np.zeros((count, PLAN.latent_height, PLAN.latent_width), np.float32)
    clip = np.zeros((3, count, PLAN.height, PLAN.width), np.float32)
    if task.inputs.mask is not None:
        known = (pixels(task.inputs.mask)[0, :, ::8, ::8] < 0).astype(np.float32)
        clip = pixels(task.inputs.background)
    if carried is not None:
        known[: carried.shape[1]] = 1
        clip[:, : carried.shape[1]] = carried
    mask = np.stack([[known[max(4 * j - 3 + c, 0)] for j in range(latents)] for c in range(4)])
    condition = np.concatenate([mask, encode(model, clip)])
    pose = encode(model, pixels(task.inputs.pose))
    motion = None
    if task.inputs.face is not None:
        faces = pixels(task.inputs.face).transpose(1, 0, 2, 3)
        motion = encode_motion(model, lambda start, stop: faces[start:stop], count)
    one = np.ones(1, np.float32)
    levels = schedule(task.grid, task.steps, task.shift)
    latent = noise.astype(np.float64)
    for step in range(task.steps):
        windows = [[(start + k) % latents for k in range(SIZE)] for start in starts(context, step, latents)]
        total, weights = np.zeros_like(latent), np.zeros(latents + 1)
        for number, window in enumerate(windows):
            slots = [0, *(k + 1 for k in window)]
            prompts = [text.strip() for text in task.prompt.split("|")]
            prompt = prompts[min(int(max(slots) * len(prompts) / (latents + 1)), len(prompts) - 1)]
            face = None
            if motion is not None:
                frames = [4 * window[0]] + [4 * k - 3 + c for k in window[1:] for c in range(4)]
                face = fuser_keys(model, motion[frames])
            under = WindowCondition(
                np.concatenate([prepared.reference, condition[:, window]], axis=1),
                pose[:, window],
                one,
                face,
                one,
            )
            v = velocity(
                model,
                latent[:, slots].astype(np.float32),
                prepared.times[step],
                prepared.contexts.of(prompt),
                under,
                prepared.rope,
            )
            if task.guided:
                blank = replace(under, face=None if face is None else prepared.blank_face)
                u = velocity(
                    model,
                    latent[:, slots].astype(np.float32),
                    prepared.times[step],
                    prepared.contexts.of(task.negative_prompt),
                    blank,
                    prepared.rope,
                )
                v = u + task.guidance * (v - u)
            for k, slot in enumerate(slots):
                weight = 1.0 if k == 0 else raw_weight(context, windows, number, k - 1, latents)
                total[:, slot] += weight * v[:, k]
                weights[slot] += weight
        fused = total / weights[None, :, None, None]
        latent += (levels.sigmas[step + 1] - levels.sigmas[step]) * fused
    return latent


CASES: dict[str, dict[str, Any]] = {
    "static_standard": {},
    "uniform_standard": {"fuse": "pyramid"},
    "uniform_looped": {},
    "everything": {
        "face": True,
        "mode": "replace",
        "guidance": 2.0,
        "prompt": "he sits | he runs | he falls",
    },
    "hybrid": {"window": 21, "overlap": 5},  # a window of 21 frames, then one of 17
}


@pytest.mark.parametrize("case", CASES)
def test_context_windows_equal_full_length_loops(model: OpenModel, long_clips: Path, case: str) -> None:
    changes = dict(CASES[case])
    kind: Any = case if case in SCHEDULES else "static_standard"
    fuse = changes.pop("fuse", "linear")
    context = Context(kind, PLAN.frames, overlap=4, fuse=fuse, freenoise=False, whole="window" not in changes)
    task = job(long_clips, sampler="euler", context=context, **changes)
    states: list[WindowState] = []
    made = frames(model, task, keep=states.append)
    assert made.shape[1] == LONG
    inner = model.begin(task, PLAN.width, PLAN.height, LONG, silent)
    with open_clips(task.inputs, task.history) as clips:
        features = model.texts(inner, task, silent)
        prepared = prepared_for(inner, task, features, task.texts, Pictures(clips.reference))
    generator, carried, decoded = CpuGenerator(task.seed), None, []
    windows = [(0, 21), (16, 17)] if case == "hybrid" else [(0, 33)]
    for (start, count), state in zip(windows, states, strict=True):
        slots = (count - 1) // 4 + 2
        noise = generator.randn((16, slots, PLAN.latent_height, PLAN.latent_width))
        expected = reference_latent(inner, prepared, task, start, count, noise, carried)
        np.testing.assert_allclose(state.latent, expected, atol=2e-5, rtol=0)
        video = np.concatenate(list(decode(inner, state.latent[:, 1:])), axis=1)
        decoded.append(video[:, 5 if start else 0 : LONG - start])
        carried = state.carried
        np.testing.assert_array_equal(carried, video[:, -task.overlap :].clip(-1, 1))
    np.testing.assert_array_equal(made, np.concatenate(decoded, axis=1))


@pytest.mark.parametrize("changes", [{}, {"compat": "kijai"}], ids=str)
def test_one_context_window_is_the_loop_bit_for_bit(
    model: OpenModel, clips: Path, changes: dict[str, Any]
) -> None:
    short = replace(job(clips).inputs, pose=clips / "short.mp4")
    write_clip(clips / "short.mp4", frames=11 if not changes else 13)
    alone = replace(job(clips, mode="animate", **changes), inputs=short)
    loop = frames(model, alone)
    context = Context(frames=17 if changes else 13, overlap=8)
    whole = replace(alone, window=Job.window, context=context)
    assert loop.shape[1] == (13 if changes else 11)
    np.testing.assert_array_equal(frames(model, whole), loop)
    if not changes:
        hybrid = replace(alone, window=13, context=replace(context, whole=False))
        np.testing.assert_array_equal(frames(model, hybrid), loop)


def test_the_wrappers_context_windows(model: OpenModel, clips: Path) -> None:
    """Slot 0 is one of the axis there: 17 slots' worth of windows, a forward of 5 and FreeNoise over all."""
    context = Context(frames=17, overlap=8)
    states: list[WindowState] = []
    task = job(clips, context=context, compat="kijai", sampler="euler")
    made = frames(model, task, keep=states.append)
    assert made.shape[1] == 17 and states[0].latent.shape[1] == 6  # 20 frames are 17 to the wrapper
    plan = task.context_plan(17)
    assert plan is not None and [part.slots[0] for part in plan.parts(0)] == [0, 1]
    # The last slot is made by the last window alone, from the noise of slots 1 to 5.
    inner = model.begin(task, PLAN.width, PLAN.height, FRAMES, silent)
    generator = CpuGenerator(task.seed)
    noise = generator.randn((16, 6, PLAN.latent_height, PLAN.latent_width))
    noise[:, 5] = noise[:, generator.permutation(1)[0]]
    with open_clips(task.inputs, task.history) as opened:
        levels = schedule(task.grid, 2, task.shift)
        features = model.texts(inner, task, silent)
        prepared = prepared_for(inner, task, features, task.texts, Pictures(opened.reference))
        pose = encode(inner, opened.pose.window(range(17)).transpose(3, 0, 1, 2) / np.float32(127.5) - 1)
    grey = encode(inner, np.zeros((3, 17, PLAN.height, PLAN.width), np.float32))
    unknown = np.concatenate([np.zeros((4, *grey.shape[1:]), np.float32), grey])
    latent, one = noise, np.ones(1, np.float32)
    for step in range(2):
        made_of = []
        for window in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]):
            behind = [slot - 1 for slot in window[1:]]
            condition = np.concatenate([prepared.reference, unknown[:, behind]], axis=1)
            under = WindowCondition(condition, pose[:, behind], one, None, one)
            v = velocity(
                inner,
                latent[:, window],
                prepared.times[step],
                prepared.contexts.of(task.prompt),
                under,
                prepared.rope,
            )
            made_of.append(v)
        first, second = np.array([1, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 1])
        total = np.zeros_like(latent)
        total[:, :5] += first[:, None, None] * made_of[0]
        total[:, 1:] += second[:, None, None] * made_of[1]
        total[:, 2:4] /= 2
        latent = latent + np.float32(levels.sigmas[step + 1] - levels.sigmas[step]) * total
    np.testing.assert_allclose(states[0].latent, latent, atol=2e-5, rtol=0)


def test_the_wrappers_loop_draws_noise_for_the_whole_video_first(model: OpenModel, clips: Path) -> None:
    states: list[WindowState] = []
    made = frames(model, job(clips, compat="kijai", steps=1), keep=states.append)
    assert made.shape[1] == 25 and len(states) == 2  # 17 frames: two windows of 13, never trimmed
    size = PLAN.latent_height, PLAN.latent_width
    generator = CpuGenerator(7)
    for slots in (6, PLAN.slots):
        generator.randn((16, slots, *size))
    assert states[0].generator == generator.state()


def test_a_step_is_computed_again_from_the_files(model: OpenModel, long_clips: Path) -> None:
    """To explain a NaN: the clips stand at their end then, and keep fewer frames than the window has."""
    context = Context(frames=PLAN.frames, overlap=4)
    for task, window in (
        (job(long_clips, context=context), 0),
        (job(long_clips, context=replace(context, whole=False), window=21), 1),
    ):
        inner = model.begin(task, PLAN.width, PLAN.height, LONG, silent)
        slots = (task.windows(LONG).length(window) - 1) // 4 + 2
        with open_clips(task.inputs, task.history) as opened:
            assert opened.pose is not None
            opened.pose.window([LONG - 1])
            latent = np.zeros((16, slots, PLAN.latent_height, PLAN.latent_width), np.float32)
            carried = None if window == 0 else np.zeros((3, 1, PLAN.height, PLAN.width), np.float32)
            texts = model.texts(inner, task, silent)
            _Step(task, opened, texts, window, 0, carried, 1, latent)(inner)
