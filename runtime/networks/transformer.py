"""The transformer as the denoising loop sees it: parts that are computed once, and `velocity` for every step.

Once per job: the context (keys and values of text and image tokens for every block) and the time table.
Once per window: the face (keys and values of the face tokens for every fuser). Arrays have no batch axis.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.step_cache import Residual

ROPE_THETA = 10000.0

PerLayer = list[tuple[Array, ...]]

DENSE_BLOCKS = 2  # that attend to everything in every step: attention is least local in the first blocks


@dataclass(frozen=True)
class WindowCondition:
    """The condition of one window. The latents are [channels, slots or frames, h, w]."""

    condition: Array  # [20, T1, h, w]: 4 of mask, 16 of latent
    pose_latent: Array  # [16, T, h, w]; zeros without a pose clip
    pose_strength: Array  # [1]; 0 without a pose clip
    face: PerLayer | None  # None: the fusers are skipped
    face_strength: Array  # [1]


def rope_tables(model: ModelConfig, plan: Plan) -> tuple[Array, Array]:
    """cos and sin, [tokens, head_dim/2] each, pairs in the order time, height, width (model_spec.md 1.5)."""
    head_dim = model.transformer.head_dim
    spatial = 2 * (head_dim // 6)
    axes = (head_dim - 2 * spatial, spatial, spatial)
    grid = (plan.slots, plan.latent_height // 2, plan.latent_width // 2)
    positions = np.indices(grid).reshape(3, -1)
    angles = np.concatenate(
        [
            np.outer(position, ROPE_THETA ** (-np.arange(0, axis, 2) / axis))
            for position, axis in zip(positions, axes, strict=True)
        ],
        axis=1,
    )
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def encode_time(model: Model, timestep: float) -> tuple[Array, Array]:
    """Time embedding [1, dim] and modulation [6, dim] of a timestep in 0…1000; the sinusoid is cos first."""
    half = model.config.transformer.frequency_dim // 2
    angles = timestep * 10000.0 ** (-np.arange(half) / half)
    sinusoid = np.concatenate((np.cos(angles), np.sin(angles)))[None].astype(np.float32)
    embedding, modulation = model.run("time_embed", sinusoid)
    return embedding, modulation


def embed_image(model: Model, image: Array) -> Array:
    """Image tokens [257, dim] of CLIP's features [257, …]."""
    (tokens,) = model.run("image_embed", image)
    return tokens


def encode_context(model: Model, text: Array, image_tokens: Array, image: PerLayer | None = None) -> PerLayer:
    """Per block: text_k, text_v, image_k, image_v, from features of text [512, …] and image tokens. `image`
    are image_k and image_v of these tokens, if an earlier context has them: they are shared.
    """
    (text_tokens,) = model.run("text_embed", text)
    made = []
    for n in range(model.config.transformer.layers):
        layer = model.run("context_kv", text_tokens, image_tokens, n=n)
        made.append(layer if image is None else (*layer[:2], *image[n]))
    return made


def encode_face(model: Model, face: Array) -> PerLayer:
    """Per fuser: face_k, face_v, from the window's face crops [frames, 3, 512, 512] in [-1, 1]."""
    return fuser_keys(model, encode_motion(model, lambda start, stop: face[start:stop], len(face)))


def encode_motion(model: Model, read: Callable[[int, int], Array], count: int) -> Array:
    """The motion of every face crop, [count, dim]. `read` gives crops [start, stop), in order."""
    size = model.plan.face_batch

    def batches() -> Iterator[Array]:
        for start in range(0, count, size):
            batch = read(start, min(start + size, count))
            if missing := size - len(batch):
                batch = np.concatenate((batch, np.repeat(batch[-1:], missing, axis=0)))
            yield model.run("motion_encoder", batch)[0]

    return np.concatenate(list(model.fetched(batches())))[:count]


def encode_blank_face(model: Model) -> PerLayer:
    """`encode_face` of black crops (all -1), the face of the unconditional branch (model_spec.md 2.4)."""
    size = model.config.motion.size
    black = np.full((model.plan.face_batch, 3, size, size), -1, np.float32)
    (motion,) = model.run("motion_encoder", black)
    return fuser_keys(model, np.repeat(np.asarray(motion)[:1], model.plan.frames, axis=0))


def fuser_keys(model: Model, motion: Array) -> PerLayer:
    """Per fuser: face_k, face_v, from the motion of a window's frames [frames, dim]."""
    (tokens,) = model.run("face_encoder", motion)
    return [model.run("fuser_kv", tokens, n=i) for i in range(model.config.transformer.fusers)]


def velocity(
    model: Model,
    latent: Array,
    time: tuple[Array, Array],
    context: PerLayer,
    window: WindowCondition,
    rope: tuple[Array, Array],
    cross_attention: str = "cross_attention",
    keep: Array | None = None,
    cache: Residual | None = None,
) -> Array:
    """The flow velocity, noise - x0, of `latent` [16, T1, h, w]; same shape. `cross_attention` is the network
    that attends to `context`. With `keep` [1] self-attention is block-sparse, but in the first DENSE_BLOCKS.
    `cache` is at the step, and stands for the blocks where it skips them.
    """
    c = model.config.transformer
    time_embedding, time_modulation = time
    (x,) = model.run("patch_embed", latent, window.condition, window.pose_latent, window.pose_strength)
    if cache is not None:
        cache.enter(x)
    for n in range(0 if cache is not None and cache.skips else c.layers):
        name, share = ("attention", ()) if keep is None or n < DENSE_BLOCKS else ("sparse_attention", (keep,))
        (attended,) = model.run(name, *model.run("attn_in", x, time_modulation, *rope, n=n), *share)
        x, cross_q = model.run("attn_out", x, attended, time_modulation, n=n)
        (attended,) = model.run(cross_attention, cross_q, *context[n])
        (x,) = model.run("ffn", x, attended, time_modulation, n=n)
        if window.face is not None and n % c.fuser_interval == 0:
            i = n // c.fuser_interval
            (x,) = model.run("fuser", x, *window.face[i], window.face_strength, n=i)
    if cache is not None:
        x = cache.leave(x)
    (result,) = model.run("head", x, time_embedding)
    return result
