"""Lets a caller time the parts of a preprocessing: each is entered with `with observe(part): ...`.

Parts nest, and run in several threads. The preprocessing itself measures nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

Part = Literal[
    "decode",
    "scale frames",
    "detect",
    "pose",
    "segment",
    "shape masks",
    "crop faces",
    "draw skeleton",
    "draw preview",
    "cut background",
    "encode",
    "wait for frames and masks",
    "wait for a clip",
    "finish clips",
    "wait for the last frames",
]
Observe = Callable[[Part], AbstractContextManager[object]]
Item = TypeVar("Item")


def unobserved(part: Part) -> AbstractContextManager[object]:
    return nullcontext()


def observed(items: Iterable[Item], part: Part, observe: Observe) -> Iterator[Item]:
    """The items. The making of each is in the part, its use is not."""
    coming = iter(items)
    while True:
        with observe(part):
            try:
                item = next(coming)
            except StopIteration:
                return
        yield item
        del item


def begun(part: Part, observe: Observe, begin: Callable[[], Callable[[], Item]]) -> Callable[[], Item]:
    """Begins something at once and returns a function that waits for it. Both are in the part."""
    with observe(part):
        wait = begin()

    def waited() -> Item:
        with observe(part):
            return wait()

    return waited
