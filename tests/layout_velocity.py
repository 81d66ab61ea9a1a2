"""The velocity of one transformer call that every part of the model has a share in: the text goes through
umT5, the reference through CLIP, the pose clip through the VAE. Only the motion encoder has none: it takes a
second for each layout.

The parts that are not given are the float32 originals. Graphs are those of the tiny model, whose blocks are
the same ones; sessions are opened once.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from made_layouts import SMALL
from numpy.typing import NDArray
from tiny_job import PLAN

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.contract import Part
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.networks import image_encoder, text_encoder, transformer, vae
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.weights.checkpoint import orthonormal

Array = NDArray[np.float32]


class Weights(dict[str, Array]):
    def rows(self, name: str, indices: Any) -> Array:
        return self[name][list(indices)]


class Velocity:
    """Callable. The results of parts that do not change are kept."""

    def __init__(self, graphs: Path, originals: dict[Part, dict[str, Array]]) -> None:
        self.executor = OnnxRuntimeExecutor(graphs, BoundWeights({}))
        self.originals: dict[Part, Weights] = {part: Weights(tensors) for part, tensors in originals.items()}
        rng = np.random.default_rng(3)
        c, h, w = SMALL.transformer, PLAN.latent_height, PLAN.latent_width
        self.latent = rng.standard_normal((c.latent_channels, PLAN.slots, h, w), dtype=np.float32)
        self.condition = rng.standard_normal((c.condition_channels, PLAN.slots, h, w), dtype=np.float32)
        coarse = rng.uniform(-1, 1, (3, PLAN.frames, PLAN.height // 16, PLAN.width // 16)).astype(np.float32)
        self.clip = coarse.repeat(16, axis=2).repeat(16, axis=3)
        (motion,) = Model(SMALL, PLAN, self.executor, {}).networks["face_encoder"].inputs
        self.motion = rng.standard_normal(motion.shape, dtype=np.float32)
        self.kept: dict[Part, Array] = {}

    def __call__(self, part: Part, tensors: dict[str, Array]) -> Array:
        weights = self.originals | {part: Weights(tensors)}
        first = weights["transformer"]
        weights["transformer"] = Weights(first | {ORTHONORMAL: orthonormal(first[DIRECTION])})
        self.executor.weights = BoundWeights(dict(weights))
        model = Model(SMALL, PLAN, self.executor, {"text_encoder": weights["text_encoder"]})
        text, image, pose = (self._features(model, of, part) for of in ENCODERS)
        context, one = (
            transformer.encode_context(model, text, transformer.embed_image(model, image)),
            np.ones(1, np.float32),
        )
        face = transformer.fuser_keys(model, self.motion)
        window = transformer.WindowCondition(self.condition, pose, one, face, one)
        time, rope = transformer.encode_time(model, 500), transformer.rope_tables(SMALL, PLAN)
        return np.asarray(transformer.velocity(model, self.latent, time, context, window, rope))

    def _features(self, model: Model, of: Part, changed: Part) -> Array:
        if of not in self.kept or of == changed:
            made = ENCODERS[of](model, self.clip)
            if of == changed:
                return made
            self.kept[of] = made
        return self.kept[of]


def _text(model: Model, clip: Array) -> Array:
    tokenizer: Any = SimpleNamespace(length=SMALL.text.length, encode=lambda prompt: [7, 30, 12, 91, 1])
    return text_encoder.encode_texts(model, tokenizer, ["a prompt"])[0]


ENCODERS: dict[Part, Any] = {
    "text_encoder": _text,
    "image_encoder": lambda model, clip: image_encoder.encode_image(model, clip[:, 0]),
    "vae": lambda model, clip: vae.encode(model, clip),
}
