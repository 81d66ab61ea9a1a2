"""sa_ode_stable of ComfyUI-WanVideoWrapper: Adams-Bashforth on velocities, held back near the end."""

from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.stepping import Combine, Draw, Latent, Stepping

ADAMS = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12]}  # the latest velocity first
FEW = 8  # steps up to which the order is 2 and nothing is held back
EARLY, LATE, LAST = 0.7, 0.15, 0.05  # levels where its rules change
SMOOTHING = 0.8


class SaOdeStable(Stepping):
    """Adams-Bashforth with the weights of equal steps: order 3 from level 0.7 to 0.15, elsewhere order 2.

    With more than 8 steps, those below 0.15 follow a mean of this and earlier velocities and are shortened by
    up to a half. By this rule of its origin the latent stops short of the clean one.
    """

    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        super().__init__(schedule, combine, draw)
        self._velocities: list[Latent] = []  # from the last three steps, the latest first
        self._smooth: Latent = None

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        self._velocities = [velocity, *self._velocities[:2]]
        few = self.last < FEW
        order = 3 if not few and LATE < sigma <= EARLY else 2
        adams = list(zip(ADAMS[min(order, len(self._velocities))], self._velocities, strict=False))
        step = after - sigma
        if few:
            return self.sum((1.0, latent), *((step * weight, v) for weight, v in adams))
        if sigma >= LATE or self._smooth is None:
            self._smooth = self.combine(adams)
        else:
            fresh = [((1 - SMOOTHING) * weight, v) for weight, v in adams]
            self._smooth = self.combine([(SMOOTHING, self._smooth), *fresh])
        if sigma < LATE:
            step *= 0.5 + 0.5 * sigma / LATE
        share = sigma / LAST if sigma < LAST and len(self._velocities) == 3 else 1.0
        mean = [(step * (1 - share) / 3, v) for v in self._velocities]
        return self.sum((1.0, latent), (step * share, self._smooth), *mean)
