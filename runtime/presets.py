"""Recipes under a name: the one table of `--preset`, `trt-wan pull`, and jobs in Python.

From model_spec.md 4.3 and kijai_semantics.md 6.2. No recipe with res_2s is offered, whose sampler is missing
here. Where a native workflow leaves the shift alone, ComfyUI's is 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from trt_wan.errors import UsageError
from trt_wan.runtime.published.files import FAST4, KIJAI4, NATIVE4, NATIVE8, QUALITY20, UNIPC4

if TYPE_CHECKING:
    from trt_wan.runtime.job import Job

LoraKind = Literal["distill", "relight"]


@dataclass(frozen=True)
class PresetLora:
    kind: LoraKind
    strength: float = 1.0
    mode: str | None = None  # None: both


@dataclass(frozen=True)
class Recipe:
    """Fields of Job of the same names; the defaults are the official recipe's."""

    steps: int = 20
    guidance: float = 1.0
    sampler: str = "unipc"
    grid: str = "official"
    shift: float = 5.0
    window: int = 77
    overlap: int = 1


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))
RELIGHT_TO_REPLACE = PresetLora("relight", mode="replace")
WORKFLOWS = (PresetLora("distill", 1.2), PresetLora("relight"))  # in ComfyUI, in both modes


@dataclass(frozen=True)
class Preset:
    name: str
    about: str
    recipe: Recipe
    loras: tuple[PresetLora, ...]

    def loras_of(self, mode: str) -> tuple[PresetLora, ...]:
        return tuple(lora for lora in self.loras if lora.mode in (None, mode))

    def apply(self, job: "Job") -> "Job":
        """The job with all settings of the recipe; `find_loras` has the LoRAs."""
        return replace(job, **{name: getattr(self.recipe, name) for name in RECIPE_FIELDS})


OFFICIAL = Recipe()
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            FAST4,
            "4 Euler steps with lightx2v's distill LoRA",
            Recipe(steps=4, sampler="euler", grid="simple"),
            (PresetLora("distill"), RELIGHT_TO_REPLACE),
        ),
        Preset(
            UNIPC4,
            "4 UniPC steps with the same LoRA, as LightX2V runs Animate",
            Recipe(steps=4),
            (PresetLora("distill"),),
        ),
        Preset(
            KIJAI4,
            "4 DPM++ SDE steps, as the example workflow of ComfyUI-WanVideoWrapper",
            Recipe(steps=4, sampler="dpm++_sde", grid="kijai"),
            WORKFLOWS,
        ),
        Preset(
            NATIVE4,
            "4 LCM steps, as the native ComfyUI workflow",
            Recipe(steps=4, sampler="lcm", grid="simple", shift=8.0, overlap=5),
            WORKFLOWS,
        ),
        Preset(
            NATIVE8,
            "8 Euler steps on the beta grid, as native ComfyUI workflows for long videos",
            Recipe(steps=8, sampler="euler", grid="beta", shift=8.0),
            WORKFLOWS,
        ),
        Preset(QUALITY20, "the official recipe: 20 UniPC steps", OFFICIAL, (RELIGHT_TO_REPLACE,)),
    )
}


def preset_named(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}.", f"Use one of: {', '.join(PRESETS)}.")
    return PRESETS[name]


def differences(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By field of the recipe the value in `settings` and the official one, where they differ."""
    official = {name: getattr(OFFICIAL, name) for name in RECIPE_FIELDS}
    return {
        name: (settings[name], value)
        for name, value in official.items()
        if name in settings and settings[name] != value
    }
