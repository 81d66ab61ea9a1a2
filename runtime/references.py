"""Several pictures of one character: how they are given to the model (addons_spec.md 5.1).

The first picture is the job's reference, the main one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trt_wan.errors import UsageError
from trt_wan.runtime.context.settings import LATENT
from trt_wan.runtime.fields import check_fields

Use = Literal["composite", "prefix", "slots"]
USES: dict[Use, str] = {
    "composite": "all on one canvas, which the model takes as its reference",
    "prefix": "known frames in front of every window, which are cut off again",
    "slots": "every picture is a reference of its own, for which the model was not trained",
}
MOST = 4  # pictures, with the main one
MOST_PREFIX = 17  # frames: five latents


@dataclass(frozen=True)
class References:
    """Raises UsageError for settings that no job can have."""

    pictures: tuple[Path, ...] = ()  # beside the main one
    use: Use = "composite"

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.pictures) >= MOST:
            raise UsageError(
                f"{len(self.pictures) + 1} reference pictures are too many: {MOST} is the most, the main one "
                "included.",
                f"Give --reference {MOST - 1} times at most.",
            )
        if not self.pictures and self.use != "prefix":
            raise UsageError(
                f"The main picture alone is no different as {self.use!r}.",
                "Add --reference PICTURE, or leave out --reference-as.",
            )

    def require_others(self, main: Path) -> None:
        """Raises UsageError for a picture that is given twice."""
        seen = {main.resolve()}
        for path in self.pictures:
            if path.resolve() in seen:
                raise UsageError(
                    f"The reference picture {path} is given twice.",
                    "Leave out one: the first picture counts too.",
                )
            seen.add(path.resolve())

    @property
    def slots(self) -> int:
        """Slots of pictures behind the main one's."""
        return len(self.pictures) if self.use == "slots" else 0

    @property
    def prefix(self) -> int:
        """Latents of the known frames in front of every window."""
        return 1 + len(prefix_order(len(self.pictures) + 1)) if self.use == "prefix" else 0

    @property
    def latents(self) -> int:
        """Latents by which a forward of the model is longer."""
        return self.slots + self.prefix


def prefix_order(count: int) -> tuple[int, ...]:
    """The pictures of the prefix, by number from 0, the main one. It is nearest to the video, and also the
    first where MOST_PREFIX frames have room for it twice.
    """
    order = (*range(1, count), 0)
    return (0, *order) if count > 1 and 1 + LATENT * (count + 1) <= MOST_PREFIX else order
