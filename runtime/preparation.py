"""The part of a job that all its windows share, computed once: contexts, time embeddings, RoPE tables,
reference.

Nothing here depends on a window. activation_memory.py runs the same function with arrays without numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trt_wan.runtime.conditioning import Pixels, encode_reference, letterbox, to_signal
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.image_encoder import encode_image
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    PerLayer,
    encode_blank_face,
    encode_context,
    encode_time,
    rope_tables,
)


@dataclass(frozen=True)
class Prepared:
    contexts: list[PerLayer]  # one for the prompt, with guidance one for the negative prompt
    times: list[tuple[Array, Array]]  # embedding and modulation of every step
    rope: tuple[Array, Array]
    reference: Array  # slot 0 of the condition, [20, 1, h, w]
    blank_face: PerLayer | None  # for the negative prompt; None without guidance


def prepare(model: Model, texts: Sequence[Array], picture: Pixels, timesteps: Sequence[float]) -> Prepared:
    """`texts` are the features of the prompt, and with guidance of the negative prompt; `picture` is the
    reference [h, w, 3] as in its file.
    """
    canvas = letterbox(picture, model.plan.width, model.plan.height)
    image = encode_image(model, to_signal(canvas[None])[:, 0])
    model.release("image_encoder_embed", "image_encoder_layer")
    reference = encode_reference(model, canvas)
    contexts = [encode_context(model, text, image) for text in texts]
    times = [encode_time(model, timestep) for timestep in timesteps]
    model.release("text_embed", "image_embed", "context_kv", "time_embed")
    cos, sin = rope_tables(model.config, model.plan)
    blank_face = encode_blank_face(model) if len(texts) > 1 else None
    return Prepared(contexts, times, (model.place(cos), model.place(sin)), reference, blank_face)
