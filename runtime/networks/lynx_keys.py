"""The keys and values of a face for Lynx's adapters, made once per job before the first step.

The features of the ref adapter come from the transformer that denoises, LoRAs and all, as in the official
code; in that forward pose, face clip, image tokens and adapters are left out (addons_spec.md 2.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trt_wan.engines.lynx import EMBEDDING, FACE_SIDE, Lynx, ip_blocks
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.lynx import Keys, LynxKeys
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, encode_context, encode_time, rope_tables


@dataclass(frozen=True)
class FaceInputs:
    """A face: what the adapters see of it, and how strong they are."""

    embedding: Array | None  # [512], of length 1; for the IP adapter
    picture: Array | None  # [3, 1, 256, 256] in [-1, 1]; for the ref adapter
    noise: Array  # [16, 1, 32, 32]: the encoder draws the picture's latent with it
    ip_scale: float = 1.0
    ref_scale: float = 1.0


Sides = tuple[LynxKeys, LynxKeys | None]  # conditional; unconditional, None without guidance


def encode_identity(model: Model, inputs: FaceInputs, text: Array | None, guided: bool) -> Sides:
    """The keys of a face, and of none: an embedding of zeros and a grey picture. The adapters are those of
    `model.lynx`. `text` are the features of the picture's prompt, for the ref adapter.
    """
    lynx = model.lynx
    assert lynx is not None, "no adapter is open"
    scales = [model.place(np.array([scale], np.float32)) for scale in (inputs.ip_scale, inputs.ref_scale)]
    count = 1 + guided
    ip: list[dict[int, Keys] | None] = [None] * count
    ref: list[Sequence[Keys] | None] = [None] * count
    if lynx.adapters.ip:
        assert inputs.embedding is not None
        faces = [inputs.embedding, np.zeros(EMBEDDING, np.float32)][:count]
        ip[:] = _ip_keys(model, lynx.adapters, faces)
    if lynx.adapters.ref:
        assert inputs.picture is not None and lynx.face is not None and text is not None
        pictures = [inputs.picture, np.zeros((3, 1, FACE_SIDE, FACE_SIDE), np.float32)][:count]
        ref[:] = _ref_keys(model, lynx.face, pictures, inputs.noise, text)
    with_face, *without = (LynxKeys(a, b, *scales) for a, b in zip(ip, ref, strict=True))
    return with_face, without[0] if without else None


def _ip_keys(model: Model, adapters: Lynx, faces: Sequence[Array]) -> list[dict[int, Keys]]:
    tokens = [model.run("lynx_resampler", face[None])[0] for face in faces]
    made: list[dict[int, Keys]] = [{} for _ in faces]
    for i, block in enumerate(ip_blocks(model.config, adapters.kind)):
        for keys, seen in zip(made, tokens, strict=True):
            k, v = model.run("lynx_ip_kv", seen, n=i)
            if adapters.kind == "full":
                (k,) = model.run("lynx_ip_norm", k, n=block)
            keys[block] = k, v
    model.release("lynx_resampler", "lynx_ip_kv", "lynx_ip_norm")
    return made


def _ref_keys(
    model: Model, face: Model, pictures: Sequence[Array], noise: Array, text: Array
) -> list[Sequence[Keys]]:
    latents = [face.run("lynx_face_encode", picture, noise)[0] for picture in pictures]
    context = _text_alone(model, encode_context(model, text, _no_image_tokens(model)))
    _, modulation = encode_time(model, 0.0)
    rope = rope_tables(face.config, face.plan)
    placed = face.place(rope[0]), face.place(rope[1])
    made = [list(_picture_keys(face, latent, modulation, context, placed)) for latent in latents]
    face.release("lynx_face_encode", "lynx_face_embed", "lynx_features", "lynx_ref_kv", "lynx_ref_norm")
    model.release("text_embed", "context_kv", "time_embed")
    return [*made]


def _picture_keys(
    face: Model, latent: Array, modulation: Array, context: PerLayer, rope: tuple[Array, Array]
) -> list[Keys]:
    made: list[Keys] = []
    (x,) = face.run("lynx_face_embed", latent)
    last = face.config.transformer.layers - 1
    for n in range(last + 1):
        (features,) = face.run("lynx_features", x, modulation, n=n)
        keys, v = face.run("lynx_ref_kv", features, n=n)
        (k,) = face.run("lynx_ref_norm", keys, n=n)
        made.append((k, v))
        if n == last:
            break  # no adapter sees the rest
        (attended,) = face.run("attention", *face.run("attn_in", x, modulation, *rope, n=n))
        x, cross_q = face.run("attn_out", x, attended, modulation, n=n)
        (attended,) = face.run("cross_attention", cross_q, *context[n])
        (x,) = face.run("ffn", x, attended, modulation, n=n)
    return made


def _no_image_tokens(model: Model) -> Array:
    return np.zeros((model.config.image.tokens, model.config.transformer.dim), np.float32)


def _text_alone(model: Model, context: PerLayer) -> PerLayer:
    """The model that Lynx was made for attends to text alone: image values of 0 add exactly nothing."""
    c = model.config.transformer
    network = model.networks["cross_attention"]
    dtype = next(np.dtype(t.dtype) for t in network.inputs if t.name == "image_v")
    none = model.place(np.zeros((c.heads, model.config.image.tokens, c.head_dim), dtype))
    return [(*layer[:2], none, none) for layer in context]
