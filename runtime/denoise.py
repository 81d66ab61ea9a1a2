"""The denoising loop of one window, with classifier-free guidance when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass

from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, WindowCondition, velocity
from trt_wan.runtime.schedulers import SAMPLERS, Schedule

BetweenSteps = Callable[[int], None]  # called with the number of finished steps; may raise to end the run


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: the context of a prompt and the window with its face (or a black one)."""

    context: PerLayer
    window: WindowCondition


def denoise(
    model: Model,
    noise: Array,
    conditional: Branch,
    unconditional: Branch | None,
    guidance: float,
    sampler: str,
    schedule: Schedule,
    times: list[tuple[Array, Array]],
    rope: tuple[Array, Array],
    between_steps: BetweenSteps,
) -> Array:
    """Noise [16, T1, h, w] to the clean latent of the same shape; without `unconditional` there is no
    guidance.

    `times` holds the time embedding of every step of `schedule`.
    """
    solver = SAMPLERS[sampler](schedule, model.executor.combine)
    latent = noise
    for i, time in enumerate(times):
        v = velocity(model, latent, time, conditional.context, conditional.window, rope)
        if unconditional is not None:
            blank = velocity(model, latent, time, unconditional.context, unconditional.window, rope)
            v = model.executor.combine([(1 - guidance, blank), (guidance, v)])
        latent = solver.step(i, latent, v)
        between_steps(i + 1)
    return latent
