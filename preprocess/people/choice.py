"""The user's choice of the person to follow, among the people in a frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trt_wan.errors import UsageError
from trt_wan.preprocess.people.person import Box, iou


@dataclass(frozen=True)
class PersonChoice:
    """The person to follow, as seen in the first frame with people. At most one is set. None: the largest.

    Places are in pixels of the clip. Raises UsageError on construction.
    """

    number: int | None = None  # from 1, from left to right
    point: tuple[float, float] | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("number", "point", "box") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"The person is chosen twice, by {' and '.join(given)}.", "Use one of them.")
        if self.number is not None and self.number < 1:
            raise UsageError(
                f"There is no person {self.number}: people are numbered from 1, from left to right.",
                "Use --person 1.",
            )
        if self.point is not None and not all(map(math.isfinite, self.point)):
            raise UsageError("The point of --point is not two numbers.", "Use --point x,y, in pixels.")
        if (box := self.box) is not None and not (
            all(map(math.isfinite, (box.x0, box.y0, box.x1, box.y1))) and box.x0 < box.x1 and box.y0 < box.y1
        ):
            raise UsageError(
                f"The box {box.x0:g},{box.y0:g},{box.x1:g},{box.y1:g} is empty.",
                "Give the corners top left and bottom right: --box x0,y0,x1,y1, with x0 < x1 and y0 < y1.",
            )

    @property
    def option(self) -> str:
        """The option that makes this choice. Empty for the largest person."""
        given = {"--person": self.number, "--point": self.point, "--box": self.box}
        return next((option for option, value in given.items() if value is not None), "")

    def require_inside(self, width: int, height: int) -> None:
        """Raises UsageError for a place outside of a clip of this size."""
        box = self.box
        if self.point is not None:
            x, y = self.point
            box = Box(x, y, x, y)
        if box is not None and (box.x1 < 0 or box.y1 < 0 or box.x0 >= width or box.y0 >= height):
            raise UsageError(
                f"The place of {self.option} is outside of the clip's picture, which is {width}x{height}.",
                "Give it in pixels of the clip, from its top left corner.",
            )


MOST_LISTED = 8  # people in a sentence
LARGEST = PersonChoice()


@dataclass(frozen=True)
class Person:
    number: int
    box: Box


def people_in(frames: Sequence[Sequence[Box]]) -> list[Person]:
    """The people in the first frame that has any, numbered from left to right."""
    first = next((boxes for boxes in frames if boxes), [])
    ordered = sorted(first, key=lambda box: box.centre[0])
    return [Person(number, box) for number, box in enumerate(ordered, 1)]


def chosen(choice: PersonChoice, people: Sequence[Person], boxes: Sequence[Box], frame: int) -> Box:
    if choice.number is not None:
        if not 1 <= choice.number <= len(people):
            count = "is one person" if len(people) == 1 else f"are {len(people)} people"
            raise UsageError(
                f"There {count} in frame {frame}, and person {choice.number} was asked for.",
                f"They are numbered from left to right: {listed(people)}.",
            )
        return people[choice.number - 1].box
    if choice.point is not None:
        x, y = choice.point
        there = [box for box in boxes if box.contains(x, y)]
        if not there:
            raise UsageError(
                f"Nobody is at {x:g},{y:g} in frame {frame}.", f"The people there: {listed(people)}."
            )
        return min(there, key=lambda box: box.area)
    if choice.box is not None:
        overlaps = [(iou(box, choice.box), box) for box in boxes]
        overlap, best = max(overlaps, key=lambda pair: pair[0], default=(0.0, choice.box))
        return best if overlap >= 0.3 else choice.box
    return max(people, key=lambda person: person.box.area).box


def listed(people: Sequence[Person]) -> str:
    """1 at 40,60 (120x300), …, and 3 more"""
    places = [
        f"{p.number} at {p.box.x0:.0f},{p.box.y0:.0f} ({p.box.width:.0f}x{p.box.height:.0f})"
        for p in people[:MOST_LISTED]
    ]
    if len(people) > MOST_LISTED:
        places.append(f"and {len(people) - MOST_LISTED} more")
    return ", ".join(places) or "nobody"
