"""How much memory a job's activations need: the pipeline's own functions, run with shapes for numbers.

The rehearsal takes and gives back spans of an arena exactly as the GPU executor does, so its highest byte,
and a little more, is what the GPU's arena must have. It computes nothing and takes about half a second.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan
from trt_wan.runtime.denoise import Branch, denoise
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    encode_blank_face,
    encode_context,
    encode_face,
    encode_time,
    rope_tables,
)
from trt_wan.runtime.networks.vae import decode, encode
from trt_wan.runtime.schedulers import schedule

UNBOUNDED = 1 << 50
STEPS = 4  # enough for every sampler to reach its full memory of earlier steps
WINDOWS = 3
# Which gaps remain between arrays depends on the steps and windows before: of 1 to 10 steps and 1 to 3
# windows, none needed more than 0.4 % more (both models, 64x48x5 to 1280x720x81).
MARGIN = 0.02


class _Shape:
    """An array without numbers; numpy sees zeros."""

    def __init__(self, arena: Arena, shape: Sequence[int], dtype: str) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._arena = arena
        self._span: Span = arena.take(int(np.prod(shape)) * self.dtype.itemsize)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.broadcast_to(np.zeros((), self.dtype if dtype is None else dtype), self.shape)

    def __del__(self) -> None:
        self._arena.give(self._span)


class _Rehearsal:
    """The executor of shapes."""

    def __init__(self) -> None:
        self.arena = Arena(UNBOUNDED)

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        dtypes = {t.name: t.dtype for t in network.inputs}
        held = [self._held(value, dtypes[name]) for name, value in inputs.items()]
        outputs = tuple(_Shape(self.arena, t.shape, t.dtype) for t in network.outputs)
        del held
        return cast(tuple[Array, ...], outputs)

    def place(self, array: Array) -> Array:
        return cast(Array, self._held(array, str(array.dtype)))

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        held = [self._held(value, "float32") for _, value in terms]
        return cast(Array, _Shape(self.arena, held[0].shape, "float32"))

    def wait(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self, names: set[str]) -> None:
        pass

    def _held(self, value: Any, dtype: str) -> _Shape:
        return value if isinstance(value, _Shape) else _Shape(self.arena, value.shape, dtype)


def activation_bytes(config: ModelConfig, plan: Plan, guided: bool) -> int:
    """The arena that a job of this model and plan needs, with a face clip, with or without guidance."""
    executor = _Rehearsal()
    model = Model(config, plan, executor, {})
    _rehearse(model, guided)
    return int(executor.arena.peak * (1 + MARGIN))


def _rehearse(model: Model, guided: bool) -> None:
    """What `pipeline.stream_pieces` does, in the same order and with the same names: in every window after
    the first, what the one before used is alive until it is replaced.
    """
    config, plan = model.config, model.plan
    h, w = plan.latent_height, plan.latent_width
    text = np.zeros((config.text.length, config.text.dim), np.float32)
    image = np.zeros((config.image.tokens, config.image.dim), np.float32)
    contexts = [encode_context(model, text, image) for _ in range(1 + guided)]
    levels = schedule("official", STEPS, 5.0)
    times = [encode_time(model, t) for t in levels.timesteps]
    cos, sin = rope_tables(config, plan)
    rope = model.place(cos), model.place(sin)
    blank = encode_blank_face(model) if guided else None
    clip = np.broadcast_to(np.float32(0), (3, plan.frames, plan.height, plan.width))
    faces = np.broadcast_to(np.float32(0), (plan.frames, 3, config.motion.size, config.motion.size))
    unconditioned = np.zeros((config.transformer.condition_channels, plan.slots, h, w), np.float32)
    noise = np.zeros((config.vae.latent_channels, plan.slots, h, w), np.float32)
    for _ in range(WINDOWS):
        encode(model, clip)
        pose = encode(model, clip)
        face = encode_face(model, faces)
        condition, pose = model.place(unconditioned), model.place(pose)
        branches = [
            Branch(context, WindowCondition(condition, pose, 1.0, window_face, 1.0))
            for context, window_face in zip(contexts, (face, blank), strict=False)
        ]
        other = branches[1] if guided else None
        latent = denoise(
            model, noise, branches[0], other, 2.0, "unipc", levels, times, rope, lambda step: None
        )
        for _ in decode(model, np.asarray(latent)[:, 1:]):
            pass
