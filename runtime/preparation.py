"""The part of a job that all its windows share: contexts, time embeddings, RoPE tables, reference.

Nothing here depends on a window, except which prompts are in use: their contexts, of 0.4 GB each for the 14B,
are computed when a window first needs them. activation_memory.py runs the same functions with arrays without
numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trt_wan.runtime.composite import composite
from trt_wan.runtime.conditioning import (
    Pixels,
    digest,
    encode_reference,
    prefix_frames,
    prefix_latents,
    to_signal,
)
from trt_wan.runtime.executors import Array
from trt_wan.runtime.guidance import ClipVision, Nag
from trt_wan.runtime.identity import FACE_PROMPT
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.networks.image_encoder import encode_image
from trt_wan.runtime.networks.lynx_keys import FaceInputs, Sides, encode_identity
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    PerLayer,
    embed_image,
    encode_blank_face,
    encode_context,
    encode_time,
    rope_tables,
)
from trt_wan.runtime.networks.uni3c import PreparedCamera, prepare_camera
from trt_wan.runtime.references import Use

CONTEXT_NETWORKS = ("text_embed", "context_kv")


class Contexts:
    """Keys and values of prompts, for all blocks. Those of the image are the same for all prompts."""

    def __init__(
        self, model: Model, features: Mapping[str, Array], image_tokens: Array, nag: Nag | None
    ) -> None:
        self._model, self._features, self._image_tokens = model, features, image_tokens
        self._image: PerLayer | None = None
        self._made: dict[str, PerLayer] = {}
        numbers = (nag.scale, nag.tau, nag.alpha) if nag is not None else ()
        self._nag = tuple(model.place(np.array([number], np.float32)) for number in numbers)

    def use(self, texts: Sequence[str]) -> None:
        """Holds the contexts of `texts` and of no others. Call between windows: it may load weights."""
        self._made = {text: made for text, made in self._made.items() if text in texts}
        missing = [text for text in dict.fromkeys(texts) if text not in self._made]
        for text in missing:
            made = encode_context(self._model, self._features[text], self._image_tokens, self._image)
            self._image = self._image or [layer[2:] for layer in made]
            self._made[text] = made
        if missing:
            self._model.release(*CONTEXT_NETWORKS)

    def of(self, text: str) -> PerLayer:
        """The inputs of `cross_attention`, per block."""
        return self._made[text]

    def with_nag(self, text: str, nag: str) -> PerLayer:
        """The inputs of `cross_attention_nag`, per block."""
        pairs = zip(self._made[text], self._made[nag], strict=True)
        return [(*layer, *away[:2], *self._nag) for layer, away in pairs]


@dataclass(frozen=True)
class Prepared:
    contexts: Contexts
    times: list[tuple[Array, Array]]  # embedding and modulation of every step
    rope: tuple[Array, Array]
    reference: Array  # the first slots of the condition, [20, 1…4, h, w]
    blank_face: PerLayer | None  # for the negative prompt; None without guidance
    prefix: Pixels | None = None  # known frames in front of every window, [n, H, W, 3]
    identity: Sides | None = None  # None: no adapter acts
    camera: PreparedCamera | None = None

    @property
    def pictures(self) -> int:
        """Slots behind the reference's in every window, which are other pictures."""
        slots: int = self.reference.shape[1]
        return slots - 1 + prefix_latents(self.prefix)


@dataclass(frozen=True)
class CameraActs:
    """The steps in which the camera acts, one entry each, and how strongly."""

    steps: Sequence[bool]
    strength: float


@dataclass(frozen=True)
class Pictures:
    """[h, w, 3] each, as in their files."""

    reference: Pixels
    second: Pixels | None = None  # for CLIP alone
    more: tuple[Pixels, ...] = ()  # other references
    use: Use = "composite"
    face: FaceInputs | None = None  # for Lynx


def prepare(
    model: Model,
    features: Mapping[str, Array],
    first: Sequence[str],
    pictures: Pictures,
    clip_vision: ClipVision,
    nag: Nag | None,
    timesteps: Sequence[float],
    guided: bool,
    camera: CameraActs | None = None,
) -> Prepared:
    """`features` are those of every text of the job; `first` are the texts of the first window. Of several
    references CLIP sees the main one: its tokens are of one picture as a whole.
    """
    width, height = model.plan.width, model.plan.height
    canvas, *others = (letterbox(picture, width, height) for picture in (pictures.reference, *pictures.more))
    seen = [canvas] if pictures.second is None else [canvas, letterbox(pictures.second, width, height)]
    images = [_image_features(model, picture, clip_vision) for picture in seen]
    model.release("image_encoder_embed", "image_encoder_layer")
    prefix = prefix_frames([canvas, *others]) if pictures.use == "prefix" else None
    if pictures.use == "composite" and others:
        canvas = composite((pictures.reference, *pictures.more), width, height)
    slots = [canvas, *(others if pictures.use == "slots" else ())]
    reference = np.concatenate([encode_reference(model, slot) for slot in slots], axis=1)
    tokens = _image_tokens(model, images, clip_vision)
    contexts = Contexts(model, features, tokens, nag)
    contexts.use(first)
    times = [encode_time(model, timestep) for timestep in timesteps]
    prepared_camera = None
    if camera is not None:
        prepared_camera = prepare_camera(model, times, camera.steps, camera.strength, len(slots) - 1)
    model.release("image_embed", "time_embed")
    cos, sin = rope_tables(model.config, model.plan, len(slots) - 1)
    blank_face = encode_blank_face(model, len(slots) - 1 + prefix_latents(prefix)) if guided else None
    identity: Sides | None = None
    if pictures.face is not None:
        identity = encode_identity(model, pictures.face, features.get(FACE_PROMPT), guided)
    rope = model.place(cos), model.place(sin)
    if model.sequence is not None:
        rope = model.sequence.split(rope[0]), model.sequence.split(rope[1])
    return Prepared(contexts, times, rope, reference, blank_face, prefix, identity, prepared_camera)


def _image_features(model: Model, canvas: Pixels, clip_vision: ClipVision) -> Array:
    if clip_vision.off:
        return np.zeros((model.config.image.tokens, model.config.image.dim), np.float32)
    tiles, ratio = clip_vision.tiles, clip_vision.tile_ratio
    key = "image", digest(canvas), tiles, ratio
    return model.remembered(key, lambda: encode_image(model, to_signal(canvas[None])[:, 0], tiles, ratio))


def _image_tokens(model: Model, images: Sequence[Array], clip_vision: ClipVision) -> Array:
    tokens = [embed_image(model, image) for image in images]
    weights = clip_vision.weights
    if weights == (1.0,):
        return tokens[0]
    return model.executor.combine(list(zip(weights, tokens, strict=True)))
