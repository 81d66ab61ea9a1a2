"""DPM-Solver++ (Lu et al. 2022), multistep, order 2, midpoint: as an ODE and as an SDE.

Both work on the clean latents m_i of the model. The first and the last step are of first order, and so is the
one after a first level of exactly 1, over whose infinite distance in lambda no slope reaches.
"""

import math

from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.stepping import Combine, Draw, Latent, Stepping, half_log_snr, pull


class _Multistep(Stepping):
    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        super().__init__(schedule, combine, draw)
        self._lambdas = [half_log_snr(sigma) for sigma in self.sigmas]
        self._before: Latent = None  # m of the step before

    def towards(self, i: int, gain: float, clean: Latent) -> list[tuple[float, Latent]]:
        """gain · (m_i + half the slope's share of this step), and keeps m_i."""
        before, self._before = self._before, clean
        if i in (0, self.last):
            return [(gain, clean)]
        half = gain * 0.5 * pull(self._lambdas, i, i + 1)
        return [(gain - half, clean), (half, before)]


class DpmPlusPlus(_Multistep):
    """x = ratio·x + (1 - ratio)·(m_i + …) with the ratio of the two sigmas (model_spec.md 4.2)."""

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        ratio = after / sigma
        return self.sum((ratio, latent), *self.towards(i, 1 - ratio, self.clean(sigma, latent, velocity)))


class DpmPlusPlusSde(_Multistep):
    """The SDE's solution: e^-h more of the latent is forgotten than by the ODE, and replaced by fresh noise.

    Noise is drawn in every step, also in the last, which has no use for it: so does diffusers.
    """

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        ratio, noise = after / sigma, self.draw()
        decay = ratio * (1 - sigma) / (1 - after)  # e^-h
        gain = (1 - after) * (1 - decay**2)
        return self.sum(
            (ratio * decay, latent),
            *self.towards(i, gain, self.clean(sigma, latent, velocity)),
            (after * math.sqrt(1 - decay**2), noise),
        )
