"""The table of samplers: the one place that names them, for the command line, jobs and tests."""

from collections.abc import Callable
from dataclasses import dataclass

from trt_wan.runtime.sampling.adams import SaOdeStable
from trt_wan.runtime.sampling.dpm import DpmPlusPlus, DpmPlusPlusSde
from trt_wan.runtime.sampling.exponential import ErSde, ResMultistep
from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.stepping import Combine, Draw, Latent, Sampler, Stepping
from trt_wan.runtime.sampling.unipc import UniPC


class Euler(Stepping):
    """x += (sigma_{i+1} - sigma_i)·velocity."""

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        return self.combine([(1.0, latent), (after - sigma, velocity)])


class Lcm(Stepping):
    """The clean latent, noised anew to the next level. Noise is drawn in every step, also in the last."""

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        sigma, after = self.begin(i)
        return self.sum((1 - after, self.clean(sigma, latent, velocity)), (after, self.draw()))


@dataclass(frozen=True)
class SamplerRow:
    """A stochastic sampler draws noise in its steps, and its `order` is the formal one. That of the others is
    measured between the levels 0.95 and 0.2: to 0, 2 becomes 1.3 to 1.9, and sa_ode_stable never arrives.
    """

    make: Callable[[Schedule, Combine, Draw], Sampler]
    order: int
    stochastic: bool
    about: str


SAMPLERS = {
    "unipc": SamplerRow(UniPC, 2, False, "official command line, diffusers"),
    "euler": SamplerRow(Euler, 1, False, "ComfyUI, diffusers"),
    "dpm++": SamplerRow(DpmPlusPlus, 2, False, "DPM++ 2M, official code"),
    "dpm++_sde": SamplerRow(DpmPlusPlusSde, 2, True, "DPM++ 2M SDE, ComfyUI-WanVideoWrapper"),
    "lcm": SamplerRow(Lcm, 1, True, "ComfyUI"),
    "er_sde": SamplerRow(ErSde, 3, True, "ComfyUI"),
    "res_multistep": SamplerRow(ResMultistep, 2, False, "ComfyUI"),
    "sa_ode_stable": SamplerRow(SaOdeStable, 2, False, "ComfyUI-WanVideoWrapper"),
}
