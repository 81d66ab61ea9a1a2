"""The settings of context windows, in pixel frames as users of ComfyUI-WanVideoWrapper know them."""

from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.shape import require_possible_frames
from trt_wan.errors import UsageError, shown
from trt_wan.runtime.fields import check_fields

Compat = Literal["kijai"]
Schedule = Literal["static_standard", "uniform_standard", "uniform_looped"]
Fuse = Literal["linear", "pyramid"]

SCHEDULES: dict[Schedule, str] = {
    "static_standard": "the same windows in every step",
    "uniform_standard": "their seams move with every step",
    "uniform_looped": "the same, and the last frame leads to the first",
}
FUSES: dict[Fuse, str] = {
    "linear": "windows fade into each other where they overlap",
    "pyramid": "a window counts most in its middle",
}
LATENT = 4  # pixel frames of a latent frame


@dataclass(frozen=True)
class Context:
    """Raises UsageError for settings that no video can have."""

    schedule: Schedule = "static_standard"
    frames: int = 77  # one forward of the model
    stride: int = 4  # from one latent to the next: consecutive ones
    overlap: int = 16  # frames that neighbours share at least, whole latents of 4
    fuse: Fuse = "linear"
    freenoise: bool = True  # later frames start from the noise of earlier ones, in another order
    whole: bool = True  # one window of the loop holds the whole video; else Job.window says how long it is

    def __post_init__(self) -> None:
        check_fields(self)
        require_possible_frames(self.frames, "context window")
        if not LATENT <= self.stride < 2 * LATENT:
            raise UsageError(
                f"A context stride of {shown(self.stride)} frames is not possible: 4 to 7 stand for "
                "consecutive latents, and the model was trained with no others.",
                "Leave --context-stride out, or use --context-stride 4.",
            )
        if self.schedule == "uniform_looped" and not self.whole:
            raise UsageError(
                "uniform_looped joins the end of the video to its beginning, so it needs the whole video.",
                "Leave out --window, or use --context uniform_standard.",
            )
        most = (self.latents - 1) * LATENT
        if self.overlap % LATENT and LATENT < self.overlap < most + LATENT:
            raise UsageError(
                f"A context overlap of {self.overlap} frames is not possible: a latent is {LATENT} frames.",
                f"Use --context-overlap {self.overlap // LATENT * LATENT}.",
            )
        if not LATENT <= self.overlap < most + LATENT:
            another = f", or another from {LATENT} to {most}" if most > LATENT else ""
            raise UsageError(
                f"A context overlap of {shown(self.overlap)} frames is not possible: windows have "
                f"{self.frames}.",
                f"Use --context-overlap {min(16, most)}{another}.",
            )

    @property
    def latents(self) -> int:
        """Latents of `frames`."""
        return (self.frames - 1) // LATENT + 1

    @property
    def latent_overlap(self) -> int:
        return self.overlap // LATENT
