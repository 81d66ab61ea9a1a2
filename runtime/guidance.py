"""How the prompts and pictures of a job act on its steps: guidance, NAG, strengths, and CLIP's pictures.

Percent are of the steps: step i of S is at 100·i/S, and start and end both count (addons_spec.md 0, "Percent
units").
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.fields import check_fields

MOST_GUIDANCE, MOST_STRENGTH = 100, 10  # far beyond any picture; more overflows
MOST_TAU, MOST_TILES = 10, 16


@dataclass(frozen=True)
class Nag:
    """Normalised attention guidance (addons_spec.md 3): a negative prompt that costs no second pass. It acts
    on the attention to the text, in the pass of the prompt.
    """

    prompt: str
    scale: float = 11.0  # how far away from the prompt's negative; 1 does nothing
    tau: float = 2.5  # the most that it may enlarge a token's attention
    alpha: float = 0.25  # the share of the result

    def __post_init__(self) -> None:
        check_fields(self)
        _require("NAG scale", "nag-scale", self.scale, 1, MOST_GUIDANCE, 11)
        _require("NAG tau", "nag-tau", self.tau, 0, MOST_TAU, 2.5)
        _require("NAG alpha", "nag-alpha", self.alpha, 0, 1, 0.25)


@dataclass(frozen=True)
class ClipVision:
    """The pictures that CLIP turns into image tokens (addons_spec.md 5.2). Strengths weigh the tokens:
    weights of CLIP's own features would be lost in the layer norm that follows. Tokens of two pictures are
    added.
    """

    second: Path | None = None  # a second picture
    strength: float | None = None  # the reference's; default 1, and with a second picture 0.5 each
    second_strength: float | None = None
    tiles: int = 0  # the pictures are also seen in tiles x tiles parts
    tile_ratio: float = 0.5  # weight of the whole picture, beside 1 of all tiles together
    off: bool = False  # zeros in place of CLIP's features

    def __post_init__(self) -> None:
        check_fields(self)
        for name, option, value in (
            ("strength of the reference", "clip-strength", self.strength),
            ("strength of the second picture", "clip-strength-2", self.second_strength),
            ("weight of the whole picture", "clip-tile-ratio", self.tile_ratio),
        ):
            if value is not None:
                usual = 1 if self.second is None and option == "clip-strength" else 0.5
                _require(f"CLIP {name}", option, value, 0, MOST_STRENGTH, usual)
        if self.tiles == 1 or not 0 <= self.tiles <= MOST_TILES:
            raise UsageError(
                f"{shown(self.tiles)} CLIP tiles are not possible.",
                f"Use --clip-tiles 2 for 2x2 tiles, up to {MOST_TILES}, or 0 for none.",
            )
        if self.second is None and self.second_strength is not None:
            raise UsageError("There is no second CLIP picture.", "Add --clip-image-2 FILE.")
        if self.off and replace(self, off=False) != ClipVision():
            raise UsageError(
                "Without CLIP's features its other settings would do nothing.",
                "Leave out --no-clip, or the other options of CLIP.",
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each picture's tokens."""
        given = (self.strength,) if self.second is None else (self.strength, self.second_strength)
        return tuple(1 / len(given) if weight is None else weight for weight in given)


@dataclass(frozen=True)
class Texts:
    """The prompts of one window. None: the job computes no such part."""

    prompt: str
    negative: str | None = None
    nag: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(text for text in (self.prompt, self.negative, self.nag) if text is not None)


@dataclass(frozen=True)
class StepSettings:
    """The guidance of one step, and which conditions act there."""

    guidance: float
    pose: bool
    face: bool
    camera: bool = False
    identity: bool = False

    @property
    def passes(self) -> int:
        """How many times the transformer runs."""
        return 1 + (self.guidance > 1)


def per_step(guidance: float | tuple[float, ...], steps: int) -> tuple[float, ...]:
    """The guidance of every step: the last value of a shorter list stays. Raises UsageError."""
    values = guidance if isinstance(guidance, tuple) else (guidance,)
    for value in values:
        if not 1 <= value <= MOST_GUIDANCE:
            raise UsageError(
                f"A guidance of {value} is not possible.", f"Use --guidance 1 (off) to {MOST_GUIDANCE}."
            )
    if not 1 <= len(values) <= steps:
        raise UsageError(
            f"There are {len(values)} values of guidance for {steps} steps.",
            "Give --guidance at least one value and at most one for each step; the last one stays.",
        )
    return values + values[-1:] * (steps - len(values))


def acting(name: str, start: float, end: float, steps: int, off: str = "") -> tuple[bool, ...]:
    """For every step whether start <= percent <= end. Raises UsageError if it is so for none. `off` is the
    option that leaves the condition aside.
    """
    for percent in (start, end):
        if not (math.isfinite(percent) and 0 <= percent <= 100):
            raise UsageError(f"{shown(percent)} percent of the steps is not possible.", "Use 0 to 100.")
        if 0 < percent <= 1:
            raise UsageError(
                f"{percent:g} percent of the steps is less than a step.",
                f"Percent go from 0 to 100: write {percent * 100:g} if that is meant.",
            )
    made = tuple(start <= 100 * step / steps <= end for step in range(steps))
    if not any(made):
        raise UsageError(
            f"Of {steps} steps none is between {start:g} and {end:g} percent, so the {name} would never act.",
            f"Step i is at 100·i/{steps} percent. To leave the {name} aside use "
            f"{off or f'--{name}-strength 0'}.",
        )
    return made


def require_strength(name: str, value: float) -> None:
    if not 0 <= value <= MOST_STRENGTH:
        raise UsageError(
            f"A {name} strength of {value} is not possible.",
            f"Use --{name}-strength 0 (off) to 1, or up to {MOST_STRENGTH} to exaggerate.",
        )


def _require(name: str, option: str, value: float, least: float, most: float, usual: float) -> None:
    if not least <= value <= most:
        raise UsageError(
            f"A {name} of {shown(value)} is not possible.",
            f"Use --{option} {least:g} to {most:g}, mostly {usual:g}.",
        )
