"""UniPC, the sampler of the official command line, of diffusers and of LightX2V."""

import math

from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.stepping import Combine, Draw, Latent, Stepping, half_log_snr, pull


class UniPC(Stepping):
    """UniPC (Zhao et al. 2023), B2(h), order 2 with corrector, on the clean latents m_i of the model.

    With a = 1 - sigma and lambda = log(a/sigma), the published form multiplies by a·expm1(-h) and divides by
    differences of lambda, which is infinite at both ends. For flow matching, -a_t·expm1(-h) from s to t is
    1 - sigma_t/sigma_s, finite everywhere. A slope of m over an infinite distance is 0 (`pull`).
    """

    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        super().__init__(schedule, combine, draw)
        self._lambdas = [half_log_snr(sigma) for sigma in self.sigmas]
        self._latent: Latent = None  # at the last step's sigma, corrected
        self._clean: list[Latent] = []  # m of the last three steps, oldest first

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, _ = self.begin(i)
        # From the latent the model saw, not from the corrected one.
        self._clean = [*self._clean[-2:], self.clean(sigma, latent, velocity)]
        self._latent = self._correct(i) if i else latent
        return self._predict(i)

    def _predict(self, i: int) -> Latent:
        ratio = self.sigmas[i + 1] / self.sigmas[i]
        gain = 1 - ratio
        if i in (0, self.last):
            return self.combine([(ratio, self._latent), (gain, self._clean[-1])])
        half = gain * 0.5 * pull(self._lambdas, i, i + 1)
        return self.combine([(ratio, self._latent), (gain - half, self._clean[-1]), (half, self._clean[-2])])

    def _correct(self, i: int) -> Latent:
        """Repeats the step from i-1 to i with m_i, which is known now."""
        ratio = self.sigmas[i] / self.sigmas[i - 1]
        gain = 1 - ratio
        if i == 1:
            m0, m1 = self._clean
            return self.combine([(ratio, self._latent), (gain * 0.5, m0), (gain * 0.5, m1)])
        old, new = self._corrector_weights(i)
        m0, m1, m2 = self._clean
        return self.combine(
            [(ratio, self._latent), (gain * old, m0), (gain * (1 - old - new), m1), (gain * new, m2)]
        )

    def _corrector_weights(self, i: int) -> tuple[float, float]:
        """Weights of m_{i-2} - m_{i-1} and m_i - m_{i-1}: the 2x2 system of model_spec.md 4.2, solved."""
        h = self._lambdas[i] - self._lambdas[i - 1]
        e = math.expm1(-h)
        phi = -e / h - 1
        b1, b2 = phi / e, 2 * (-phi / h - 0.5) / e
        reach = pull(self._lambdas, i - 1, i)
        r0 = (b2 - b1) * reach / (1 - reach)
        return r0 * reach, b1 - r0
