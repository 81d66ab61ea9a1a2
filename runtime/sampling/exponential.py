"""res_multistep and er_sde, the multistep samplers of ComfyUI."""

import math

from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.stepping import Combine, Draw, Latent, Stepping

POINTS = 200  # in the sums that stand for two integrals in er_sde


class ResMultistep(Stepping):
    """RES (Zhang et al. 2023, arXiv:2308.02157), order 2 from the step before, in the time -log sigma.

    With h the step in that time and c = -(the step before)/h, x = e^-h·x + h·(b1·m_i + b2·m_{i-1}), with
    b2 = phi2(-h)/c, b1 = phi1(-h) - b2, phi1(z) = (e^z - 1)/z, phi2(z) = (phi1(z) - 1)/z. The first step is
    Euler's, and so is the one to 0.
    """

    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        super().__init__(schedule, combine, draw)
        self._before: Latent = None  # m of the step before

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        clean = self.clean(sigma, latent, velocity)
        before, self._before = self._before, clean
        ratio = after / sigma
        if i == 0 or after == 0:
            return self.sum((ratio, latent), (1 - ratio, clean))
        h = math.log(sigma / after)
        phi1 = math.expm1(-h) / -h
        phi2 = (phi1 - 1) / -h
        b2 = phi2 * h / math.log(sigma / self.sigmas[i - 1])
        return self.sum((ratio, latent), (h * (phi1 - b2), clean), (h * b2, before))


class ErSde(Stepping):
    """ER-SDE-Solver-3 (Cui et al. 2023, arXiv:2309.06169) in lambda = sigma/(1 - sigma), as ComfyUI.

    The noise scale is lambda·(e^(lambda^0.3) + 10). The second step takes one slope of m into account, later
    ones two. ComfyUI lowers a first level of 1 a little; here it is the limit, in which the first latent is
    forgotten. ComfyUI-WanVideoWrapper's er_sde takes sigma for lambda, so that the clean part of its latents
    is larger than 1 - sigma. No noise is drawn for the step to 0.
    """

    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        super().__init__(schedule, combine, draw)
        self._lambdas = [s / (1 - s) if s < 1 else math.inf for s in self.sigmas]
        self._before: list[Latent] = []  # m of the last two steps, the latest first

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        clean = self.clean(sigma, latent, velocity)
        before, self._before = self._before, [clean, *self._before[:1]]
        if after == 0:
            return clean
        start, end = self._lambdas[i], self._lambdas[i + 1]
        kept = _scale(end) / _scale(start)
        spread = end if math.isinf(start) else math.sqrt(max(end**2 - (start * kept) ** 2, 0))
        keep = 0.0 if math.isinf(start) else (1 - after) / (1 - sigma) * kept
        weights = self._slopes(i)
        weights[0] += 1 - kept
        return self.sum(
            (keep, latent),
            *(((1 - after) * w, m) for w, m in zip(weights, [clean, *before], strict=False)),
            ((1 - after) * spread, self.draw()),
        )

    def _slopes(self, i: int) -> list[float]:
        """Weights of m_i, m_{i-1}, m_{i-2} in the terms of second and third order."""
        now, end = self._lambdas[i], self._lambdas[i + 1]
        if i == 0 or math.isinf(self._lambdas[i - 1]):
            return [0.0, 0.0, 0.0]
        width = (now - end) / POINTS
        points = [end + k * width for k in range(POINTS)]
        second = end - now + _scale(end) * width * sum(1 / _scale(p) for p in points)
        slope = 1 / (now - self._lambdas[i - 1])
        if i == 1 or math.isinf(self._lambdas[i - 2]):
            return [second * slope, -second * slope, 0.0]
        third = (end - now) ** 2 / 2 + _scale(end) * width * sum((p - now) / _scale(p) for p in points)
        curve = third * 2 / (now - self._lambdas[i - 2])
        older = curve / (self._lambdas[i - 1] - self._lambdas[i - 2])
        return [(second + curve) * slope, -(second + curve) * slope - older, older]


def _scale(level: float) -> float:
    return math.inf if math.isinf(level) else level * (math.exp(level**0.3) + 10)
