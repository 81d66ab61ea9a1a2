"""The bytes that a job's activations need: the pipeline's functions, called with arrays that have no numbers.

The rehearsal takes spans of an arena and gives them back exactly as the GPU executor does. Its highest byte
plus a margin is the size of the GPU's arena. It computes nothing and takes about half a second.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.lynx import EMBEDDING, FACE_SIDE, FacePlan, LynxPlan
from trt_wan.engines.shape import CameraPlan, Plan, VaeTile
from trt_wan.runtime.conditioning import Strengths, WindowClips, WindowRender, encode_window
from trt_wan.runtime.context.parts import ContextPlan, Part
from trt_wan.runtime.context.predict import predict_latents
from trt_wan.runtime.denoise import Predict, denoise, predict_window
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.executors import Array, BlendPart
from trt_wan.runtime.guidance import ClipVision, Nag, StepSettings, Texts
from trt_wan.runtime.identity import FACE_PROMPT
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.lynx_keys import FaceInputs
from trt_wan.runtime.networks.model import LynxModel, Model
from trt_wan.runtime.networks.transformer import WindowCondition
from trt_wan.runtime.networks.vae import decode
from trt_wan.runtime.pipeline import branches
from trt_wan.runtime.preparation import CameraActs, Pictures, prepare
from trt_wan.runtime.sampling.grids import schedule
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.step_cache import Residuals

UNBOUNDED = 1 << 50
STEPS = 4  # enough for every sampler to reach its full memory of earlier steps
WINDOWS = 3
KEEP = 0.5  # block-sparse attention takes one number more than dense attention, in its inputs
PARTS = 2  # context windows of a step: each frees its memory before the next
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

    def dot(self, x: Array, y: Array) -> float:
        return 0.0

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        return self._like(array, len(slots), str(array.dtype))

    def join(self, arrays: Sequence[Array]) -> Array:
        return self._like(arrays[0], sum(array.shape[1] for array in arrays), str(arrays[0].dtype))

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        return self._like(parts[0][2], slots, "float32") if onto is None else onto

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        return onto

    def is_finite(self, array: Array) -> bool:
        return True

    def fetch(self, array: Array) -> Callable[[], Array]:
        return partial(np.asarray, array)

    def wait(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self, names: set[str]) -> None:
        pass

    def _like(self, array: Array, slots: int, dtype: str) -> Array:
        return cast(Array, _Shape(self.arena, (array.shape[0], slots, *array.shape[2:]), dtype))

    def _held(self, value: Any, dtype: str) -> _Shape:
        return value if isinstance(value, _Shape) else _Shape(self.arena, value.shape, dtype)


@cache
def activation_bytes(
    config: ModelConfig,
    plan: Plan,
    load: Load,
    context: ContextPlan | None = None,
    tile: VaeTile | None = None,
) -> int:
    """Bytes of the arena that a job needs with all its clips. `context` is of its longest window; with `tile`
    the VAE computes in tiles.
    """
    executor = _Rehearsal()
    model = Model(config, plan, executor, {}, tile, KEEP)
    if load.camera_ffn:
        model.take(CameraPlan.beside(plan, load.camera_ffn))
    if load.lynx is not None:
        model.take(LynxPlan.of(plan, load.lynx.kind))
        face = Model(config, FacePlan(precision=plan.precision), executor, {}) if load.lynx.ref else None
        model.lynx = LynxModel(load.lynx, face)
    few = context if load.cached else context and _few(context)  # every part holds its residuals
    _rehearse(model, load, few)
    return int(executor.arena.peak * (1 + MARGIN))


class _Few(ContextPlan):
    def parts(self, step: int) -> tuple[Part, ...]:
        return super().parts(step)[:PARTS]


def _few(plan: ContextPlan) -> ContextPlan:
    return _Few(plan.context, plan.slots, plan.size, plan.compat, plan.shared)


def _rehearse(model: Model, load: Load, context: ContextPlan | None, sampler: str = "unipc") -> None:
    """A job of WINDOWS windows. Every time embedding is taken, but only the first STEPS steps are. Prompts
    that travel change in every window.
    """
    config, plan = model.config, model.plan
    text = np.zeros((config.text.length, config.text.dim), np.float32)
    windows = [_texts(load, j if load.travels else 0) for j in range(WINDOWS)]
    more = [f"more {k}" for k in range(load.contexts - len(windows[0].all))]
    features = {name: text for texts in windows for name in (*texts.all, *more, FACE_PROMPT)}
    picture = np.zeros((plan.height, plan.width, 3), np.uint8)
    pictures = Pictures(picture, None, (picture,) * (load.pictures - 1), load.use, _face(model))
    nag, first = Nag("") if load.nag else None, (*windows[0].all, *more)
    camera = CameraActs([True] * load.steps, 1.0) if load.camera_ffn else None
    times = [0.0] * load.steps
    prepared = prepare(model, features, first, pictures, ClipVision(), nag, times, load.guided, camera)
    zero = np.float32(0)
    slots = plan.slots if context is None else context.slots
    count, size = 4 * (slots - prepared.pictures - 2) + 1, config.motion.size

    def frames(start: int, stop: int) -> Array:
        return np.broadcast_to(zero, (3, stop - start, plan.height, plan.width))

    def faces(start: int, stop: int) -> Array:
        return np.broadcast_to(zero, (stop - start, 3, size, size))

    noise = np.zeros((config.vae.latent_channels, slots, plan.latent_height, plan.latent_width), zero.dtype)
    steps = min(load.steps, STEPS)
    acts = StepSettings(1.0 + load.guided, True, True, camera is not None, load.lynx is not None)
    settings = [acts] * steps
    render = None if camera is None else WindowRender(lambda numbers: frames(0, len(numbers)))
    skips = [[step % 2 == 1 for step in range(steps)]] * (1 + load.guided) if load.cached else []
    levels = schedule("official", steps, 5.0)
    for texts in windows:
        clips = WindowClips(count, frames, faces, render=render)
        known = prepared.reference, clips, frames(0, 1), Strengths(), prepared.prefix
        window = encode_window(model, *known)
        prepared.contexts.use((*texts.all, *more))
        residuals = Residuals(model.executor.combine, skips)

        def under(
            window: WindowCondition, part: Part | None, texts: Texts = texts, held: Residuals = residuals
        ) -> Predict:
            sides, caches = branches(prepared, texts, window), held.of(part and part.slots)
            return predict_window(model, prepared, sides, settings, caches=caches)

        predict = predict_latents(model, window, context, under)
        solver = SAMPLERS[sampler].make(levels, model.executor.combine, lambda: noise)
        start = noise if context is None else model.place(noise)
        latents = np.asarray(
            denoise(predict, start, solver, steps, lambda step: None, model.executor.is_finite)
        )[:, 1:]
        del solver, predict, start
        for _ in decode(model, latents):
            pass


def _face(model: Model) -> FaceInputs | None:
    if model.lynx is None:
        return None
    noise = np.zeros((model.config.vae.latent_channels, 1, FACE_SIDE // 8, FACE_SIDE // 8), np.float32)
    return FaceInputs(
        np.zeros(EMBEDDING, np.float32), np.zeros((3, 1, FACE_SIDE, FACE_SIDE), np.float32), noise
    )


def _texts(load: Load, window: int) -> Texts:
    negative, nag = (
        f"{name} {window}" if used else None for name, used in (("no", load.guided), ("nag", load.nag))
    )
    return Texts(f"{window}", negative, nag)
