"""Uni3C beside the transformer: the modulation of every step, and the residuals of one step and window.

Residual n is added behind block n and the face fuser that follows it, on all tokens, as in
ComfyUI-WanVideoWrapper, with which users of Animate set their strengths (addons_spec.md 1.3). ComfyUI's own
code adds it in front of the fuser, whose layer norm then sees it. Uni3C was trained with a model without
fusers, so neither place is the trained one. Behind it, the face is fused from the same tokens as without a
camera.

The residuals depend on the noisy latent, the mask, the render and the time: both sides of the guidance have
the same. The second side takes the features of every block, [tokens, 1024], that the first one made. For the
14B these are 1.3 GB in bf16 at 832x480x77 and 20 residuals would be 6.7 GB. Without guidance nothing is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trt_wan.engines.contracts.uni3c import STEPS
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import rope_tables

MODULATION = "uni3c_modulation"


@dataclass(frozen=True)
class PreparedCamera:
    """The part of a job that all its windows share."""

    # By step and block, [6, dim]. None: the camera is off in that step.
    modulations: Sequence[Sequence[Array] | None]
    rope: tuple[Array, Array]
    strength: Array  # [1]


def prepare_camera(
    model: Model,
    times: Sequence[tuple[Array, Array]],
    acting: Sequence[bool],
    strength: float,
    pictures: int = 0,
) -> PreparedCamera:
    """`times` are the embedding and the modulation of every step. `pictures`: see `rope_tables`."""
    made = iter(_modulations(model, [time[0] for time, acts in zip(times, acting, strict=True) if acts]))
    modulations = [next(made) if acts else None for acts in acting]
    rope = rope_tables(model.config, model.plan, pictures, model.config.camera.head_dim)
    placed = model.place(np.array([strength], np.float32))
    return PreparedCamera(modulations, (model.place(rope[0]), model.place(rope[1])), placed)


def _modulations(model: Model, embeddings: Sequence[Array]) -> list[list[Array]]:
    """By embedding and block. A call takes many embeddings, for on a GPU its weights pass anew each time."""
    rows = np.concatenate([np.asarray(embedding) for embedding in embeddings])
    made: list[list[Array]] = [[] for _ in embeddings]
    for n in range(model.config.camera.layers):
        for first in range(0, len(rows), STEPS):
            batch = rows[first : first + STEPS]
            filled = np.concatenate((batch, np.repeat(batch[-1:], STEPS - len(batch), axis=0)))
            (result,) = model.run(MODULATION, filled, n=n)
            for k, modulation in enumerate(np.asarray(result)[: len(batch)], first):
                made[k].append(model.place(np.ascontiguousarray(modulation)))
    model.release(MODULATION)
    return made


class CameraResiduals:
    """A `Control`. `passes` is how many times the transformer runs with it; each asks for every block."""

    def __init__(
        self,
        model: Model,
        camera: PreparedCamera,
        step: int,
        video: tuple[Array, Array, Array],
        passes: int,
    ) -> None:
        """`video` are the noisy latent, the condition and the render."""
        modulation = camera.modulations[step]
        assert modulation is not None, f"the camera does not act in step {step}"
        self._model, self._camera, self._modulation = model, camera, modulation
        self._passes = passes
        self._z: Array | None = model.run("uni3c_patch", *video)[0]
        self._features: list[Array | None] = []  # by block, as far as they are made
        self._asked = [0] * len(modulation)

    def added(self, x: Array, n: int) -> Array:
        if n >= len(self._modulation):
            return x
        if n == len(self._features):
            self._features.append(self._next(n))
        features = self._features[n]
        assert features is not None, f"block {n} was asked for more than {self._passes} times"
        self._asked[n] += 1
        if self._asked[n] == self._passes:
            self._features[n] = None
        return self._model.run("uni3c_add", x, features, self._camera.strength, n=n)[0]

    def _next(self, n: int) -> Array:
        """The features of block n, after those of the block before it."""
        model, z, modulation = self._model, self._z, self._modulation[n]
        assert z is not None, "all blocks are made"
        heads = model.run("uni3c_in", z, modulation, *self._camera.rope, n=n)
        (attended,) = model.run("uni3c_attention", *heads)
        del heads
        z, features = model.run("uni3c_out", z, attended, modulation, n=n)
        self._z = None if n + 1 == len(self._modulation) else z
        return features
