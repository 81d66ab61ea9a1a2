"""Everything a user decides about one preprocessing."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from trt_wan.engines.shape import require_possible_size
from trt_wan.errors import UsageError
from trt_wan.preprocess.clips.sizes import Fit, Size
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.pictures.masks import Compat, MaskShape
from trt_wan.preprocess.retarget.rules import RetargetRule
from trt_wan.runtime.job import Mode
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.transparency import colour

SIZE = (832, 480)
MOST_RATE = 1000  # frames per second
MOST_PADDING = 1024  # pixels


@dataclass(frozen=True)
class PreprocessJob:
    """Raises UsageError on construction for settings that are invalid for every file."""

    reference: Path
    clip: Path
    output: Path  # a folder
    mode: Mode = "animate"
    size: Size = SIZE  # width, height
    fit: Fit | Literal["area"] | None = None  # area: as many pixels as `size`, in the picture's own shape
    rate: Fraction | None = None  # frames per second
    compat: Compat | None = None
    choice: PersonChoice = field(default_factory=PersonChoice)
    retarget: RetargetRule | None = None
    edited_reference: Path | None = None  # the same people in a better posture, for their proportions alone
    edited_driving: Path | None = None
    mask: MaskShape = field(default_factory=MaskShape)
    mask_paint: Path | None = None  # a picture that corrects the mask of every frame (pictures/paint.py)
    hands: bool = True
    head: bool = True
    face: bool = True
    face_padding: int = 0  # pixels of the clip; with `compat`, of the scaled frame
    behind: str = "white"  # the colour behind a transparent reference: a name or #rrggbb
    keypoints: Path | None = None  # edited by hand: these replace the search for people
    overwrite: bool = False
    cut: Cut | None = None  # the frames of the clip that are used

    def __post_init__(self) -> None:
        if self.mode == "replace" and self.retarget is not None:
            raise UsageError(
                "In the mode replace the new person stands where the old one was: nothing is retargeted.",
                "Leave out --retarget, or use --mode animate.",
            )
        if self.retarget is None and (self.edited_reference or self.edited_driving):
            raise UsageError(
                "Edited pictures are read for retargeting only.",
                "Add --retarget safe or --retarget official.",
            )
        colour(self.behind)
        require_possible_size(*self.size)
        if self.rate is not None and not 0 < self.rate <= MOST_RATE:
            raise UsageError(
                f"A rate of {self.rate} makes no video.",
                f"Give a rate such as 16 or 30, and at most {MOST_RATE} frames per second.",
            )
        if not 0 <= self.face_padding <= MOST_PADDING:
            raise UsageError(
                f"A face padding of {self.face_padding} pixels is not possible.",
                f"Use --face-padding 0 to --face-padding {MOST_PADDING}.",
            )
        self._refuse_what_does_nothing()

    def _refuse_what_does_nothing(self) -> None:
        mask = {"grow": self.mask.grow, "block": self.mask.block, "fill": self.mask.fill or None}
        given = [name for name, value in mask.items() if value is not None]
        given += ["mask-paint"] if self.mask_paint is not None else []
        if self.mode == "animate" and given:
            raise UsageError(
                f"In the mode animate there is no mask, so --{given[0]} would do nothing.",
                f"Leave out --{given[0]}, or use --mode replace.",
            )
        if self.face_padding and not self.face:
            raise UsageError(
                "No face clip is made, so --face-padding would do nothing.",
                "Leave out --face-padding or --no-face.",
            )
        if self.keypoints is not None and (choice := self.choice.option):
            raise UsageError(
                f"The person is in {self.keypoints}, so {choice} would do nothing.",
                f"Leave out {choice} or --keypoints.",
            )

    @property
    def needs_people(self) -> bool:
        """Whether people must be found, in the clip or in a picture."""
        return self.keypoints is None or self.retarget is not None
