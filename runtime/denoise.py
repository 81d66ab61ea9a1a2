"""The denoising loop of one window, with classifier-free guidance above a guidance of 1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, WindowCondition, velocity
from trt_wan.runtime.preparation import Prepared
from trt_wan.runtime.sampling.stepping import Combine, Sampler

BetweenSteps = Callable[[int], None]  # called with the number of finished steps; may raise to end the run
Predict = Callable[[int, Array], Array]  # number of the step from 0, latent -> velocity


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: the context of a prompt, and the window with its face or a black one."""

    context: PerLayer
    window: WindowCondition


def predict_window(model: Model, prepared: Prepared, branches: Sequence[Branch], guidance: float) -> Predict:
    """The velocity of one window. `branches` are the conditional one, and with guidance the unconditional."""

    def predict(step: int, latent: Array) -> Array:
        v, *blank = (
            velocity(model, latent, prepared.times[step], branch.context, branch.window, prepared.rope)
            for branch in branches
        )
        return model.executor.combine([(1 - guidance, blank[0]), (guidance, v)]) if blank else v

    return predict


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
