"""The user's choice of the person to follow, among the people in a frame."""

from collections.abc import Sequence
from dataclasses import dataclass

from trt_wan.errors import UsageError
from trt_wan.preprocess.people.person import Box, iou


@dataclass(frozen=True)
class PersonChoice:
    """The person to follow, as seen in the first frame with people. At most one is set. None: the largest."""

    number: int | None = None  # from 1, from left to right
    point: tuple[float, float] | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("number", "point", "box") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"The person is chosen twice, by {' and '.join(given)}.", "Use one of them.")


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
    """1 at 40,60 (120x300), …"""
    places = (
        f"{p.number} at {p.box.x0:.0f},{p.box.y0:.0f} ({p.box.width:.0f}x{p.box.height:.0f})" for p in people
    )
    return ", ".join(places) or "nobody"
