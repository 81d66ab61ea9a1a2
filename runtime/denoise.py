"""The denoising loop of one window, with classifier-free guidance in the steps above a guidance of 1."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from trt_wan.runtime.executors import Array
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.networks.lynx import LynxKeys
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, WindowCondition, velocity
from trt_wan.runtime.networks.uni3c import CameraResiduals
from trt_wan.runtime.preparation import Prepared
from trt_wan.runtime.sampling.stepping import Combine, Sampler
from trt_wan.runtime.step_cache import Residual

# The first steps attend to everything: they decide what is where, and the others need little but detail.
DENSE_SHARE = 0.25  # this share of the steps

BetweenSteps = Callable[[int], None]  # called with the number of finished steps; may raise to end the run
Predict = Callable[[int, Array], Array]  # number of the step from 0, latent -> velocity


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: the context of a prompt, and the window with its face or a black one."""

    context: PerLayer
    window: WindowCondition
    cross_attention: str = "cross_attention"  # the network that attends to the context
    identity: LynxKeys | None = None


def predict_window(
    model: Model,
    prepared: Prepared,
    branches: Sequence[Branch],
    steps: Sequence[StepSettings],
    cfg_zero_star: bool = False,
    caches: Sequence[Residual] = (),
) -> Predict:
    """The velocity of one window. `branches` are the conditional one, and with guidance the unconditional.
    `caches` are theirs, or none.
    """
    executor = model.executor
    no_pose = None if all(step.pose for step in steps) else model.place(np.zeros(1, np.float32))
    keep = None if model.keep is None else model.place(np.array([model.keep], np.float32))

    def acting(window: WindowCondition, now: StepSettings) -> WindowCondition:
        if not now.pose:
            assert no_pose is not None
            window = replace(window, pose_strength=no_pose)
        return window if now.face else replace(window, face=None)

    def control(step: int, latent: Array, now: StepSettings, passes: int) -> CameraResiduals | None:
        """One for all `passes` through the blocks: both sides of the guidance have the same residuals."""
        if not now.camera or not passes:
            return None
        window = branches[0].window
        assert prepared.camera is not None and window.render is not None, "a camera without its render"
        video = latent, window.condition, window.render
        return CameraResiduals(model, prepared.camera, step, video, passes)

    def predict(step: int, latent: Array) -> Array:
        now = steps[step]
        sides = branches[: now.passes]
        held = [caches[side].at(step) if caches else None for side in range(len(sides))]
        # Split by sides, rank k has side k, also in steps without another: the step cache holds each apart.
        own = held[model.ranks.rank :][:1] if model.split == "sides" else held
        computed = sum(cache is None or not cache.skips for cache in own)
        controlled = control(step, latent, now, computed)

        def one_side(branch: Branch, cache: Residual | None) -> Array:
            return velocity(
                model,
                latent,
                prepared.times[step],
                branch.context,
                acting(branch.window, now),
                prepared.rope,
                branch.cross_attention,
                None if step < dense_steps(len(steps)) else keep,
                control=controlled,
                identity=branch.identity if now.identity else None,
                cache=cache,
            )

        forwards = [partial(one_side, *side) for side in zip(sides, held, strict=True)]
        if model.split == "sides":
            v, *blank = model.ranks.divide([(1.0, forward) for forward in forwards])
        else:
            v, *blank = (forward() for forward in forwards)
        if not blank:
            return v
        (u,) = blank
        # CFG-Zero* (addons_spec.md 6): u is scaled to the part of v that points its way.
        scale = executor.dot(v, u) / (executor.dot(u, u) + 1e-8) if cfg_zero_star else 1.0
        return executor.combine([((1 - now.guidance) * scale, u), (now.guidance, v)])

    return predict


def dense_steps(steps: int) -> int:
    """How many of the steps attend to everything in the tier `turbo`. A single step does not."""
    return min(math.ceil(DENSE_SHARE * steps), steps - 1)


def noised(combine: Combine, noise: Array, init: Array | None, sigma: float) -> Array:
    """The first latent: `noise`, or `init` noised to the level `sigma`."""
    return noise if init is None else combine([(sigma, noise), (1 - sigma, init)])


class NotFiniteLatent(Exception):
    """Step `step`, from 0, made a latent that is not finite out of `latent`, a host array."""

    def __init__(self, step: int, latent: Array) -> None:
        super().__init__(step)
        self.step, self.latent = step, latent


def denoise(
    predict: Predict,
    latent: Array,
    solver: Sampler,
    steps: int,
    between_steps: BetweenSteps,
    is_finite: Callable[[Array], bool],
) -> Array:
    """The first `latent` [16, T1, h, w] to the last, of the same shape. Raises NotFiniteLatent."""
    for step in range(steps):
        before, latent = latent, solver.step(step, latent, predict(step, latent))
        between_steps(step + 1)
        if not is_finite(latent):
            raise NotFiniteLatent(step, np.asarray(before))
    return latent
