"""Pixels to the condition of the transformer: reference, condition clip, mask, pose, face (model_spec.md
section 2).

Pixel arrays are float32 in [-1, 1], [3, frames, H, W]; the mask is 1 where the picture is known and 0 where
it is to be made. Grey (0) stands for "unknown", black (-1) for a hole in a known picture: the two are
different to the model.
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.shape import Plan
from trt_wan.runtime.context.settings import LATENT
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, WindowCondition, encode_motion
from trt_wan.runtime.networks.vae import Read, encode, encode_read
from trt_wan.runtime.parallel.ranks import TOGETHER, Task
from trt_wan.runtime.references import prefix_order

Pixels = NDArray[np.uint8]

# From so many GPUs on they encode each of the two clips of a window in a pipeline; fewer take a clip each.
MANY_RANKS = 4
MOTION_COST = 0.4  # a face crop's, where a frame of the VAE costs 1 (H200, 832x480)


LEVELS = np.arange(256).astype(np.float32) / 127.5 - 1


def to_signal(frames: Pixels) -> Array:
    """uint8 [frames, H, W, 3] to float32 [3, frames, H, W] in [-1, 1].

    By a table, plane by plane: a third of the time of arithmetic and a transposed copy, of 0.4 GB a window.
    """
    signal = np.empty((3, *frames.shape[:3]), np.float32)
    for k, frame in enumerate(frames):
        for plane, target in zip(cv2.split(frame), signal[:, k], strict=True):
            cv2.LUT(plane, LEVELS, target)
    return signal


def cells(person: Array) -> Array:
    """[F, H, W] to [F, h, w]: each latent cell takes the value of its top-left pixel (model_spec.md 2.2)."""
    return person[:, ::8, ::8]


def known_mask(carried: int, person: Array, ending: int = 0) -> Array:
    """The four mask channels of the window's own slots, [4, T, h, w].

    `carried` frames at the start and `ending` frames at the end are known. `person` [F, h, w] in 0…1 is 1 on
    the person, or everywhere where there is no mask; values between 0 and 1 stay as they are (model_spec.md
    2.1).
    """
    known = 1 - person.astype(np.float32)
    known[:carried] = 1
    known[len(known) - ending :] = 1
    first_four = np.repeat(known[:1], 3, axis=0)  # the first latent frame is one pixel frame, four times
    grouped = np.concatenate((first_four, known)).reshape(-1, 4, *known.shape[1:])
    return np.ascontiguousarray(grouped.transpose(1, 0, 2, 3))


def condition_frames(
    plan: Plan, carried: Array | None, background: Read | None, ending: Array | None = None, count: int = 0
) -> Read:
    """The known pixels [3, frames, H, W] of a window of `count` frames: carried frames, background, `ending`;
    grey where there is none. Only `ending` needs the count.
    """
    ending_at = count if ending is None else count - ending.shape[1]

    def read(start: int, stop: int) -> Array:
        frames = (
            np.zeros((3, stop - start, plan.height, plan.width), np.float32)
            if background is None
            else background(start, stop)
        )
        if carried is not None and start < carried.shape[1]:
            known = carried[:, start:stop]
            frames = np.concatenate((known, frames[:, known.shape[1] :]), axis=1)
        if ending is not None and stop > ending_at:
            known = ending[:, max(start - ending_at, 0) : stop - ending_at]
            frames = np.concatenate((frames[:, : stop - start - known.shape[1]], known), axis=1)
        return frames

    return read


def prefix_frames(canvases: Sequence[Pixels]) -> Pixels:
    """The known frames [n, H, W, 3] in front of every window: five of the first picture, four of each other,
    so that no latent has two pictures.
    """
    order = prefix_order(len(canvases))
    return np.stack([canvases[order[0]], *(canvases[k] for k in order for _ in range(LATENT))])


def behind_prefix(prefix: Pixels, frames: Read) -> Read:
    """A clip behind known frames. Its first frame comes four times: it fills one latent, as the first
    frame of a window is.
    """
    first = len(prefix) + LATENT - 1  # the last time

    def read(start: int, stop: int) -> Array:
        numbers = [max(k - first, 0) for k in range(max(start, len(prefix)), stop)]
        pieces = [to_signal(prefix[start:stop])] if start < len(prefix) else []
        if numbers:
            clip = frames(numbers[0], numbers[-1] + 1)
            pieces.append(clip[:, [number - numbers[0] for number in numbers]])
        return np.concatenate(pieces, axis=1)

    return read


def prefix_latents(prefix: Pixels | None) -> int:
    return 0 if prefix is None else (len(prefix) - 1) // LATENT + 1


def encode_reference(model: Model, canvas: Pixels) -> Array:
    """A slot of the condition, [20, 1, h, w]: mask 1, and a reference encoded as a video of one frame."""
    key = "reference", digest(canvas)
    latent = model.remembered(key, lambda: encode(model, to_signal(canvas[None])))
    return np.concatenate((np.ones((4, *latent.shape[1:]), np.float32), latent))


def digest(pixels: Pixels) -> bytes:
    return hashlib.blake2b(pixels.tobytes()).digest()


@dataclass(frozen=True)
class WindowRender:
    """The camera's render of one window. `frames` gives those with these numbers in the window, from 0. All
    frames of a still one are the same.
    """

    frames: Callable[[Sequence[int]], Array]  # [3, n, H, W]
    still: bool = False
    key: Hashable = None  # see `WindowClips.keys`


@dataclass(frozen=True)
class WindowClips:
    """One window of every clip; None where the job has no such clip. Pixels are read when they are encoded,
    a few frames at a time.
    """

    frames: int
    pose: Read | None  # [3, frames, H, W]
    face: Read | None  # [frames, 3, 512, 512]
    background: Read | None = None  # [3, frames, H, W]
    person: Array | None = None  # `cells`, [frames, h, w], 0 or 1
    soft: int = 0  # pixels of the mask clip that are neither black nor white
    init: Read | None = None  # [3, frames, H, W]
    ending: Array | None = None  # known frames at the end [3, r, H, W], for a window before a finished one
    render: WindowRender | None = None
    # By clip (pose, face, background), all that decides its pixels: jobs with the same need not encode it.
    keys: Mapping[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True)
class Strengths:
    pose: float = 1.0
    face: float = 1.0


@dataclass(frozen=True)
class WindowLatents:
    """The condition of a window of the loop, on the host, before the model takes it whole or in parts."""

    condition: Array  # [20, slots, h, w]
    pose: Array  # [16, slots - 1, h, w]
    motion: Array | None  # [frames, dim]; None without a face clip
    strengths: Strengths
    pictures: int = 0  # slots behind the reference's that are other pictures, with a pose of zeros
    render: Array | None = None  # [16, slots, h, w]; None without a camera


def encode_window(
    model: Model,
    reference: Array,
    clips: WindowClips,
    carried: Array | None,
    strengths: Strengths,
    prefix: Pixels | None = None,
) -> WindowLatents:
    """`reference` are the slots of references, [20, 1…4, h, w]. `carried` are the last frames of the window
    before, [3, r, H, W]. `prefix` are known frames in front of both.
    """
    plan, count = model.plan, clips.frames
    read = condition_frames(plan, carried, clips.background, clips.ending, count)
    alone = carried is None and clips.ending is None
    lead = prefix_latents(prefix)
    pictures = reference.shape[1] - 1 + lead
    key: Hashable = None
    if alone:
        key = ("grey", count) if clips.background is None else clips.keys.get("background")
    if prefix is not None and key is not None:
        key = "prefix", digest(prefix), count, key
    together = model.vae_pipeline is not None and model.ranks.count >= MANY_RANKS
    frames, of_pose = (TOGETHER, TOGETHER) if together else (count + LATENT * lead, count)
    wanted: dict[str, tuple[Hashable, Task]] = {
        "condition": (key, (frames, partial(encode_prefixed, model, prefix, read, count, together=together)))
    }
    if clips.pose is not None:
        encode_pose = partial(encode_read, model, clips.pose, count, together=together)
        wanted["pose"] = clips.keys.get("pose"), (of_pose, encode_pose)
    faces = []
    if (read_face := clips.face) is not None and strengths.face > 0:  # at 0 the fusers would add nothing
        key = clips.keys.get("face")
        for start, stop in _in_batches(count, plan.face_batch, model.ranks.count):
            name, cost = f"face {start}", MOTION_COST * (stop - start)
            wanted[name] = (
                None if key is None else (key, start, stop),
                (cost, partial(encode_motion, model, partial(_from, read_face, start), stop - start)),
            )
            faces.append(name)
    if (given := clips.render) is not None:
        cost = 1 if given.still else count
        wanted["render"] = given.key, (cost, partial(encode_render, model, given, count))
    made = dict(zip(wanted, model.side_by_side(list(wanted.values())), strict=True))
    latent, render = made["condition"], made.get("render")
    motion = np.concatenate([made[name] for name in faces]) if faces else None
    everywhere = np.broadcast_to(np.float32(1), (count, plan.latent_height, plan.latent_width))
    known = known_mask(
        0 if carried is None else carried.shape[1],
        everywhere if clips.person is None else clips.person,
        0 if clips.ending is None else clips.ending.shape[1],
    )
    if lead:
        known = np.concatenate((np.ones((4, lead, *known.shape[2:]), np.float32), known), axis=1)
    condition = np.concatenate((reference, np.concatenate((known, latent))), axis=1)
    pose = made.get("pose", np.zeros_like(latent))
    if (missing := condition.shape[1] - 1 - pose.shape[1]) > 0:
        pose = np.concatenate((np.zeros((len(pose), missing, *pose.shape[2:]), np.float32), pose), axis=1)
    strengths = replace(strengths, pose=0.0 if clips.pose is None else strengths.pose)
    if given is not None and render is not None:
        if given.still:
            render = np.repeat(render, condition.shape[1], axis=1)
        else:  # other pictures have the view of the reference
            render = np.concatenate((np.repeat(render[:, :1], 1 + pictures, axis=1), render[:, 1:]), axis=1)
    return WindowLatents(condition, pose, motion, strengths, pictures, render)


def _in_batches(count: int, batch: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) of at most `parts` parts of `count`, each but the last of whole batches."""
    each = batch * -(-count // (batch * parts))
    return [(start, min(start + each, count)) for start in range(0, count, each)]


def _from(read: Read, first: int, start: int, stop: int) -> Array:
    return read(first + start, first + stop)


def encode_render(model: Model, render: WindowRender, count: int) -> Array:
    """The latent of a render of `count` frames, [16, slots, h, w]; of a still one [16, 1, h, w].

    Its first frame comes four more times in front of it. So slot g has the same frames as slot g of the
    video's latent, and slot 0 has the first one, as the view of the reference (addons_spec.md 1.6).
    """
    if render.still:
        return encode(model, render.frames([0]))
    step = LATENT * model.plan.vae_chunk
    whole = 1 + -(-(count + 3) // step) * step  # the last frame fills it up: no latent before it sees that

    def read(start: int, stop: int) -> Array:
        return render.frames([min(max(k - 4, 0), count - 1) for k in range(start, stop)])

    return encode_read(model, read, whole)[:, : (count - 1) // 4 + 2]


def encode_prefixed(
    model: Model, prefix: Pixels | None, frames: Read, count: int, *, together: bool = False
) -> Array:
    """The latents of known frames and of the `count` frames behind them. `together` as in `encode_read`."""
    if prefix is None:
        return encode_read(model, frames, count, together=together)
    whole = LATENT * prefix_latents(prefix) + count
    return encode_read(model, behind_prefix(prefix, frames), whole, together=together)


def encode_init(
    model: Model, reference: Array, init: Read, frames: int, prefix: Pixels | None = None
) -> Array:
    """The latent [16, slots, h, w] that a window starts from. The slots of references are their latents.
    (ComfyUI-WanVideoWrapper puts the clip's first latent there.)
    """
    return np.concatenate((reference[4:], encode_prefixed(model, prefix, init, frames)), axis=1)


def condition_of(model: Model, window: WindowLatents, face: PerLayer | None) -> WindowCondition:
    """The condition where the executor takes it from. `face` are the fusers' keys of the window's motion."""
    strengths = (np.array([s], np.float32) for s in (window.strengths.pose, window.strengths.face))
    placed = [model.place(array) for array in (window.condition, window.pose, *strengths)]
    condition, pose, pose_strength, face_strength = placed
    render = None if window.render is None else model.place(window.render)
    return WindowCondition(condition, pose, pose_strength, face, face_strength, window.pictures, render)
