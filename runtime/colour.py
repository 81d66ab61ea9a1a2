"""Colour between windows: decoded frames are matched to an anchor, against drift.

Frames are float32 [3, n, H, W] in [-1, 1], not yet clamped. The next window continues matched frames.
Anchors:

- `first`: the first window, which stays as it is. A later window gets one map, made of all its frames, so it
  cannot flicker. Its frames wait in host memory until all are decoded.
- `carried`: the frames carried over. The map takes the window's copies of them back to the originals, and
  holds for the whole window: a map that faded would end in drifted colours, which the next window continues.
- `reference`: the reference picture, each frame by itself, as in the ComfyUI wrapper.

For `first` and `carried` a colour is the mean of a latent cell of 8x8 pixels: fine detail, of which the VAE
loses some, does not count as contrast. With a mask only cells of the person count, and the known background
stays as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.colour_transfer import METHODS, Array, Statistics, Transfer, fit
from trt_wan.runtime.events import Note
from trt_wan.runtime.fields import check_fields

Anchor = Literal["first", "carried", "reference"]
CELL = 8  # pixels
SOFT_EDGE = 16  # pixels outside the person over which the change fades


@dataclass(frozen=True)
class Colour:
    method: str
    strength: float = 1.0  # above 0, and 1 for the whole change
    anchor: Anchor = "first"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method not in METHODS:
            raise UsageError(
                f"There is no colour match called {shown(self.method)}.", f"Use one of {', '.join(METHODS)}."
            )
        if not 0 < self.strength <= 1:
            raise UsageError(
                f"A colour match of strength {shown(self.strength)} is not possible.",
                "Use a strength above 0 and up to 1: --colour-match mkl:0.5",
            )


def unused_match(colour: Colour | None, windows: int, continues: bool) -> Note | None:
    """A note for a match to another window where there is none. `continues`: there are carried frames."""
    if colour is None or colour.anchor == "reference" or windows > 1:
        return None
    if continues and colour.anchor == "carried":
        return None
    text = "The video is one window: there is no other to match its colours to."
    return Note(text, "colour_unused", {"anchor": colour.anchor})


class Matching:
    """The colours of one job's windows, which must come in order."""

    def __init__(
        self, colour: Colour | None, reference: NDArray[np.uint8], state: Array | None = None
    ) -> None:
        """`reference` [h, w, 3] is of any size. `state` is that of an earlier process, to go on from."""
        self._colour = colour
        self.wanted: Statistics | None = None  # those of the first window, once it is decoded
        if state is not None:
            self.wanted = Statistics.unpacked(state)
        if colour is not None and colour.anchor == "reference":
            self.wanted = Statistics()
            planes = np.ascontiguousarray(reference.reshape(-1, 3).T)
            self.wanted.add(planes.astype(np.float32) / np.float32(127.5) - 1)

    @property
    def state(self) -> Array | None:
        """All that later windows take from earlier ones, beside the frames carried over: float64.

        Call after a window.
        """
        return None if self.wanted is None else self.wanted.packed()

    def window(
        self, pieces: Iterable[Array], carried: Array | None, person: Array | None = None
    ) -> Iterator[Array]:
        """The window's frames, piece by piece, matched. `carried` [3, r, H, W] are the frames that its first
        r continue; `person` [F, H/8, W/8] is 1 where frames are made, None: everywhere.
        """
        if self._colour is None:
            return iter(pieces)
        placed = _placed(pieces, person)
        if self._colour.anchor == "reference":
            return self._each(placed)
        if self._colour.anchor == "carried":
            return self._as_carried(placed, carried)
        return self._as_first(placed)

    def _each(self, pieces: "Iterable[_Piece]") -> Iterator[Array]:
        for piece in pieces:
            single = [piece.part(k, k + 1) for k in range(piece.frames.shape[1])]
            matched = [one.matched(self._fit(one.pixels(), self.wanted)) for one in single]
            yield np.concatenate(matched, axis=1)

    def _as_carried(self, pieces: "Iterable[_Piece]", carried: Array | None) -> Iterator[Array]:
        coming, head = iter(pieces), list[_Piece]()
        transfer: Transfer | None = None
        if carried is not None:
            count = carried.shape[1]
            while sum(piece.frames.shape[1] for piece in head) < count:
                head.append(next(coming))
            copies = _joined(head).part(0, count)
            wanted = Statistics()
            wanted.add(replace(copies, frames=carried).cells())
            transfer = self._fit(copies.cells(), wanted)
        for piece in chain(head, coming):
            yield piece.matched(transfer)

    def _as_first(self, pieces: "Iterable[_Piece]") -> Iterator[Array]:
        if self.wanted is None:
            wanted = Statistics()
            for piece in pieces:
                yield piece.frames  # first: the caller stops at a frame that is not finite
                wanted.add(piece.cells())
            self.wanted = wanted
            return
        waiting = list(pieces)
        transfer = self._fit(np.concatenate([p.cells() for p in waiting], axis=1), self.wanted)
        for piece in waiting:
            yield piece.matched(transfer)

    def _fit(self, colours: Array, wanted: Statistics | None) -> Transfer | None:
        """None where there is nothing to compare, or no number: the caller finds and explains that."""
        assert self._colour is not None and wanted is not None, "no anchor"
        if not colours.size or not wanted.count or not np.isfinite(colours.sum()):
            return None
        return fit(self._colour.method, self._colour.strength, colours, wanted)


@dataclass(frozen=True)
class _Piece:
    frames: Array  # [3, n, H, W]
    person: Array | None  # [n, H/8, W/8], 1 where frames are made

    def part(self, start: int, stop: int) -> "_Piece":
        person = None if self.person is None else self.person[start:stop]
        return _Piece(self.frames[:, start:stop], person)

    def pixels(self) -> Array:
        """The colours [3, N], in the person alone if there is one."""
        if self.person is None:
            return self.frames.reshape(3, -1)
        return self.frames[:, self.person.repeat(CELL, axis=1).repeat(CELL, axis=2) > 0]

    def cells(self) -> Array:
        """The same for means of cells."""
        cells = _shrunk(self.frames)
        return cells.reshape(3, -1) if self.person is None else cells[:, self.person > 0]

    def matched(self, transfer: Transfer | None) -> Array:
        if transfer is None:
            return self.frames
        mapped = transfer(self.frames.reshape(3, -1)).reshape(self.frames.shape)
        if self.person is None:
            return mapped
        mapped -= self.frames
        mapped *= np.stack([_softened(person) for person in self.person])
        mapped += self.frames
        return mapped


def _placed(pieces: Iterable[Array], person: Array | None) -> Iterator[_Piece]:
    done = 0
    for frames in pieces:
        end = done + frames.shape[1]
        yield _Piece(frames, None if person is None else person[done:end].astype(np.float32))
        done = end


def _joined(pieces: Sequence[_Piece]) -> _Piece:
    people = [piece.person for piece in pieces if piece.person is not None]
    frames = np.concatenate([piece.frames for piece in pieces], axis=1)
    return _Piece(frames, np.concatenate(people) if people else None)


def _shrunk(frames: Array) -> Array:
    size = frames.shape[3] // CELL, frames.shape[2] // CELL
    planes = frames.reshape(-1, *frames.shape[2:])
    shrunk = np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
    return shrunk.reshape(*frames.shape[:2], *shrunk.shape[1:])


def _softened(person: Array) -> Array:
    """[H, W]: 1 on the person's cells [H/8, W/8], falling to 0 over the SOFT_EDGE pixels around them."""
    side, size = SOFT_EDGE + 1, (person.shape[1] * CELL, person.shape[0] * CELL)
    pixels = cv2.resize(person, size, interpolation=cv2.INTER_NEAREST)
    grown = cv2.dilate(pixels, np.ones((side, side), np.uint8))
    return np.asarray(cv2.blur(grown, (side, side)), np.float32)
