"""Frames to latents and back, chunk by chunk, the caches of one chunk fed to the next (model_spec.md 7.2).

Frames are float32 [3, F, H, W] in [-1, 1], latents float32 [latent channels, T, H/8, W/8], normalised, with
F = 4(T-1) + 1. Decoded frames are not clamped: a clamp would turn a NaN into a black pixel.
"""

from collections.abc import Callable, Iterator

import numpy as np

from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model

Read = Callable[[int, int], Array]  # frames [start, stop) of a clip, float32


def encode(model: Model, frames: Array) -> Array:
    """The latents of a clip. F is 1, or 1 and a multiple of 4·vae_chunk."""
    return encode_read(model, lambda start, stop: frames[:, start:stop], frames.shape[1])


def encode_read(model: Model, read: Read, count: int) -> Array:
    """`encode` of a clip of `count` frames that is read a chunk at a time, in order."""
    step = 4 * model.plan.vae_chunk
    assert count % step == 1, f"{count} frames are not one and a multiple of {step}"
    latent, *caches = model.run("vae_encode_first", read(0, 1))
    latents = [latent]
    for start in range(1, count, step):
        latent, *caches = model.run("vae_encode_next", read(start, start + step), *caches)
        latents.append(latent)
    return np.concatenate([np.asarray(latent) for latent in latents], axis=1)


def decode(model: Model, latent: Array) -> Iterator[Array]:
    """The frames of a clip as they are ready: one, then 4·vae_chunk at a time.

    T is 1, or 1 and a multiple of vae_chunk.
    """
    step = model.plan.vae_chunk
    latent = np.asarray(latent)
    count = latent.shape[1]
    assert (count - 1) % step == 0, f"{count} latent frames are not one and a multiple of {step}"
    frames, *caches = model.run("vae_decode_first", latent[:, :1])
    yield np.asarray(frames)
    for start in range(1, count, step):
        frames, *caches = model.run("vae_decode_next", latent[:, start : start + step], *caches)
        yield np.asarray(frames)
