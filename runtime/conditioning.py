"""Pixels to the condition of the transformer: reference, condition clip, mask, pose, face (model_spec.md
section 2).

Pixel arrays are float32 in [-1, 1], [3, frames, H, W]; the mask is 1 where the picture is known and 0 where
it is to be made. Grey (0) stands for "unknown", black (-1) for a hole in a known picture: the two are
different to the model.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, WindowCondition, encode_face
from trt_wan.runtime.networks.vae import encode

Pixels = NDArray[np.uint8]


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


def known_mask(plan: Plan, carried: int, person: Array | None) -> Array:
    """The four mask channels of the window's own slots, [4, T, h, w].

    `carried` frames at the start are known. `person` [F, H, W] in 0…1 (replace mode) is 1 on the person; each
    latent cell takes the value of its top-left pixel, and values between 0 and 1 stay as they are
    (model_spec.md 2.1, 2.2).
    """
    h, w = plan.latent_height, plan.latent_width
    known = np.zeros((plan.frames, h, w), np.float32) if person is None else 1 - person[:, ::8, ::8]
    known[:carried] = 1
    first_four = np.repeat(known[:1], 3, axis=0)  # the first latent frame is one pixel frame, four times
    grouped = np.concatenate((first_four, known)).reshape(plan.latent_frames, 4, h, w)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2, 3))


def condition_clip(plan: Plan, carried: Array | None, background: Array | None) -> Array:
    """The window's known pixels [3, F, H, W]: carried frames, then background, grey where there is none."""
    clip = (
        np.zeros((3, plan.frames, plan.height, plan.width), np.float32)
        if background is None
        else background.copy()
    )
    if carried is not None:
        clip[:, : carried.shape[1]] = carried
    return clip


def encode_reference(model: Model, canvas: Pixels) -> Array:
    """Slot 0 of the condition, [20, 1, h, w]: mask 1, and the reference encoded as a video of one frame."""
    latent = encode(model, to_signal(canvas[None]))
    return np.concatenate((np.ones((4, *latent.shape[1:]), np.float32), latent))


@dataclass(frozen=True)
class WindowClips:
    """One window of every clip, float32; None where the job has no such clip."""

    pose: Array | None  # [3, F, H, W]
    face: Array | None  # [F, 3, 512, 512]
    background: Array | None = None  # [3, F, H, W]
    person: Array | None = None  # [F, H, W], 0 or 1
    soft: int = 0  # pixels of the mask clip that are neither black nor white


@dataclass(frozen=True)
class Strengths:
    pose: float = 1.0
    face: float = 1.0


def condition_window(
    model: Model, reference: Array, clips: WindowClips, carried: Array | None, strengths: Strengths
) -> WindowCondition:
    """The condition of one window. `carried` are the last frames of the window before, [3, r, H, W]."""
    carried_frames = 0 if carried is None else carried.shape[1]
    if clips.background is None and carried is None:
        latent = model.kept("grey clip", lambda: encode(model, condition_clip(model.plan, None, None)))
    else:
        latent = encode(model, condition_clip(model.plan, carried, clips.background))
    mask = known_mask(model.plan, carried_frames, clips.person)
    condition = np.concatenate((reference, np.concatenate((mask, latent))), axis=1)
    pose = np.zeros_like(latent) if clips.pose is None else encode(model, clips.pose)
    face: PerLayer | None = None
    if clips.face is not None and strengths.face > 0:  # at 0 the fusers would add nothing
        face = encode_face(model, clips.face)
    pose_strength = 0.0 if clips.pose is None else strengths.pose
    placed = (condition, pose, *(np.array([s], np.float32) for s in (pose_strength, strengths.face)))
    condition, pose, *scales = (model.place(array) for array in placed)
    return WindowCondition(condition, pose, scales[0], face, scales[1])
