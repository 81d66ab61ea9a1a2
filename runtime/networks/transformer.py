"""The transformer as the denoising loop sees it: parts that are computed once, and `velocity` for every step.

Once per job: the context (keys and values of text and image tokens for every block) and the time table.
Once per window: the face (keys and values of the face tokens for every fuser). Arrays have no batch axis.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts.attention import of_heads, rows_name
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.lynx import LynxKeys, with_ip, with_ref
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
    pictures: int = 0  # slots behind the reference's that have no pose either (references.py)
    render: Array | None = None  # [16, T1, h, w], of the camera; None without one


class Control(Protocol):
    """Residuals for the blocks of one step and window (networks/uni3c.py)."""

    def added(self, x: Array, n: int) -> Array:
        """`x` [tokens, dim] behind block n with the block's residual."""
        ...


def rope_tables(
    model: ModelConfig, plan: Plan, pictures: int = 0, head_dim: int | None = None
) -> tuple[Array, Array]:
    """cos and sin, [tokens, head_dim/2] each, pairs in the order time, height, width (model_spec.md 1.5).
    `pictures` slots behind the reference's are at the times -1, -2, …, and the video begins at 1 all the same
    (addons_spec.md 5.1). `head_dim` is the transformer's by default.
    """
    head_dim = head_dim or model.transformer.head_dim
    spatial = 2 * (head_dim // 6)
    axes = (head_dim - 2 * spatial, spatial, spatial)
    grid = (plan.slots, plan.latent_height // 2, plan.latent_width // 2)
    positions = np.indices(grid).reshape(3, -1)
    times = [*range(0, -1 - pictures, -1), *range(1, plan.slots - pictures)]
    positions[0] = np.array(times)[positions[0]]
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


def encode_blank_face(model: Model, pictures: int = 0) -> PerLayer:
    """`encode_face` of black crops (all -1), the face of the unconditional branch (model_spec.md 2.4)."""
    size = model.config.motion.size
    black = np.full((model.plan.face_batch, 3, size, size), -1, np.float32)
    (motion,) = model.run("motion_encoder", black)
    frames = model.plan.frames - 4 * pictures
    return fuser_keys(model, np.repeat(np.asarray(motion)[:1], frames, axis=0), pictures)


def fuser_keys(model: Model, motion: Array, pictures: int = 0) -> PerLayer:
    """Per fuser: face_k, face_v, from the motion of a window's frames [frames, dim]. `pictures` slots behind
    the reference's have zeros for face tokens, as that has. The encoder's convolutions are causal and repeat
    the first frame in front, so repeating it for those slots changes no token of the video.
    """
    if pictures:
        motion = np.concatenate((np.repeat(motion[:1], 4 * pictures, axis=0), motion))
    (tokens,) = model.run("face_encoder", motion)
    if pictures:
        host = np.asarray(tokens)
        none = np.zeros_like(host[:1]).repeat(pictures, axis=0)
        tokens = np.concatenate((host[:1], none, host[1 + pictures :]))
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
    control: Control | None = None,
    identity: LynxKeys | None = None,
    cache: Residual | None = None,
) -> Array:
    """The flow velocity, noise - x0, of `latent` [16, T1, h, w]; same shape. `cross_attention` is the network
    that attends to `context`. With `keep` [1] self-attention is block-sparse, but in the first DENSE_BLOCKS.
    `rope` are the tables of the rank's tokens. `control` adds its residual behind a block and its fuser,
    `identity` attention to a face to every attention. `cache` is at the step, and stands for the blocks where
    it skips them.
    """
    c = model.config.transformer
    time_embedding, time_modulation = time
    latents = latent, window.condition, window.pose_latent
    (x,) = model.run("patch_embed", *latents, window.pose_strength)
    if window.pictures:  # nothing is added to them: a pose of zeros would add the bias
        (bare,) = model.run("patch_embed", *latents, np.zeros(1, np.float32))
        size = model.plan.tokens_per_slot
        x = model.executor.put_rows(x, bare, size, size * (1 + window.pictures))
        del bare
    sequence = model.sequence
    if sequence is not None:
        x = sequence.split(x)
    if cache is not None:
        cache.enter(x)
    for n in range(0 if cache is not None and cache.skips else c.layers):
        name, share = ("attention", ()) if keep is None or n < DENSE_BLOCKS else ("sparse_attention", (keep,))
        q, *kv = model.run("attn_in", x, time_modulation, *rope, n=n)
        if sequence is None:
            (attended,) = model.run(name, q, *kv, *share)
        else:
            attended = sequence.attend(partial(_attend, model, name, share), q, *kv)
        kv.clear()
        if identity is not None:
            attended = with_ref(model, identity, n, q, rope, attended)
        del q
        x, cross_q = model.run("attn_out", x, attended, time_modulation, n=n)
        (attended,) = model.run(cross_attention, cross_q, *context[n])
        if identity is not None:
            attended = with_ip(model, identity, n, cross_q, attended)
        (x,) = model.run("ffn", x, attended, time_modulation, n=n)
        if window.face is not None and n % c.fuser_interval == 0:
            i = n // c.fuser_interval
            (x,) = model.run("fuser", x, *window.face[i], window.face_strength, n=i)
        if control is not None:
            x = control.added(x, n)
    if cache is not None:
        x = cache.leave(x)
    if sequence is not None:
        x = sequence.join(x)
    (result,) = model.run("head", x, time_embedding)
    return result


def _attend(
    model: Model, name: str, share: Sequence[Array], q: Array, k: Array, v: Array, *own: Array
) -> Array:
    """With as many of the heads as are given. `own` are the further inputs of attention to rows."""
    part = of_heads(model.networks[name], q.shape[0])
    (attended,) = model.run(rows_name(part.name) if own else part.name, q, k, v, *share, *own)
    return attended
