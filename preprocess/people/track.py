"""Tracks every person from frame to frame and follows one of them. Works on boxes, not on pictures.

A person is expected where the last steps lead, and all boxes are assigned to all persons at once, so that two
who cross keep their identities. A person who is covered or leaves is None for those frames, never another
person. A person who appears after that is assumed to be a missing one. Boxes alone cannot prove it, so
`events` reports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.assignment import UNMATCHED, assign
from trt_wan.preprocess.people.choice import LARGEST, Person, PersonChoice, chosen, listed, people_in
from trt_wan.preprocess.people.person import Box, iou

SURE = 0.25  # least score of a new person. Lower scores only continue a track
PATIENCE = 5  # frames in a row with lesser boxes only, after which they count as sure
COAST = 25  # frames for which an unseen or hidden person moves on at the last speed
# Weight of the last step in the speed. A higher weight follows the noise of the boxes: in 80 slow crossings
# with 5 px of noise, 0.12 confuses 3 pairs and 0.3 confuses 17. A lower weight learns a fast walk too slowly.
SMOOTHING = 0.12
REACH, REACH_PER_FRAME = 0.4, 0.03  # distance from the expected place, in diagonals of the box
SIZE_CHANGE = 1.8  # ratio of heights from one sighting to the next
SIZE_CHANGE_AWAY = 2.5  # between leaving and coming back


@dataclass(frozen=True)
class TrackEvent:
    """`back`: a person who appeared while the followed person was missing is taken for that person.
    `cut`: all people were replaced by others at once, as at a cut, and the largest of them is followed.
    """

    frame: int
    what: Literal["lost", "back", "cut"]


@dataclass(eq=False)
class _Track:
    box: Box  # the last box that updated the track
    born: int  # the frame in which it was first seen
    shown: Box | None = None  # in this frame
    speed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    offset: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))  # walked since `box`
    missed: int = 0  # frames since it was last seen
    hidden: int = 0  # frames in which one box stood for this person and another
    sightings: int = 1

    def __post_init__(self) -> None:
        self.shown = self.box

    @property
    def expected(self) -> Box:
        dx, dy = self.offset + self.speed
        b = self.box
        return Box(b.x0 + dx, b.y0 + dy, b.x1 + dx, b.y1 + dy, b.score)

    def see(self, box: Box) -> None:
        step = (np.array(box.centre) - self.box.centre) / (self.missed + self.hidden + 1)
        elsewhere = self.missed > COAST or _distance(self.box, box) > 1  # came back, or a cut
        self.speed = np.zeros(2) if elsewhere else (1 - SMOOTHING) * self.speed + SMOOTHING * step
        self.box = self.shown = box
        self.missed = self.hidden = 0
        self.sightings += 1
        self.offset = np.zeros(2)

    def hide(self, box: Box) -> None:
        """Seen without an update: box and speed belong to the person in front."""
        self.shown, self.missed = box, 0
        self.hidden += 1
        self.offset = self.offset + self.speed

    def miss(self) -> None:
        self.shown = None
        self.missed += 1
        if self.missed <= COAST:
            self.offset = self.offset + self.speed


class Tracker:
    """`follow` is called once per frame, in order."""

    def __init__(self, choice: PersonChoice = LARGEST) -> None:
        self.choice = choice
        self.people: list[Person] = []  # in the frame in which the choice was made
        self.followed: int | None = None  # number of one of them
        self.first_frame: int | None = None
        self.events: list[TrackEvent] = []
        self._tracks: list[_Track] = []
        self._mine: _Track | None = None
        self._frame = -1
        self._doubtful = 0

    def follow(self, boxes: Sequence[Box]) -> Box | None:
        """The followed person's box, or None if that person is not seen. Raises UsageError if the chosen
        person is not in the first frame with people.
        """
        self._frame += 1
        sure = [box.score >= SURE for box in boxes]
        self._doubtful = self._doubtful + 1 if boxes and not any(sure) else 0
        if self._doubtful > PATIENCE:
            sure = [True] * len(boxes)
        if self._mine is None:
            return self._begin(boxes, sure)
        before = self._mine.shown
        self._update(boxes, sure)
        if before is not None and self._mine.shown is None:
            self.events.append(TrackEvent(self._frame, "lost"))
        return self._mine.shown

    def several_people(self) -> str | None:
        """A sentence for the user if there were several people and no choice."""
        if len(self.people) < 2 or self.choice != LARGEST:
            return None
        return (
            f"{len(self.people)} people are in frame {self.first_frame} ({listed(self.people)}); person "
            f"{self.followed}, the largest, is followed. Choose with --person N, --point x,y or --box."
        )

    def _begin(self, boxes: Sequence[Box], sure: Sequence[bool]) -> Box | None:
        seen = [i for i in range(len(boxes)) if sure[i]]
        if not seen and self.choice.box is None:
            return None
        self.people, self.first_frame = people_in([[boxes[i] for i in seen]]), self._frame
        mine = chosen(self.choice, self.people, boxes, self._frame)
        self._tracks = [_Track(boxes[i], 0) for i in seen]
        self._mine = next((track for track in self._tracks if track.box == mine), None)
        if self._mine is None:
            self._mine = _Track(mine, 0)
            self._tracks.append(self._mine)
        self.followed = next((person.number for person in self.people if person.box == mine), None)
        return mine

    def _update(self, boxes: Sequence[Box], sure: Sequence[bool]) -> None:
        """Assigns sure boxes to fitting tracks, then lesser boxes, then sure boxes to tracks long gone."""
        free = list(range(len(boxes)))
        waiting = list(self._tracks)
        pairs: list[tuple[_Track, int]] = []
        for usable, cost in ((True, _cost), (False, _cost), (True, _cost_of_return)):
            candidates = [i for i in free if sure[i] == usable]
            costs = [[cost(track, boxes[i]) for i in candidates] for track in waiting]
            found = [(waiting[row], candidates[column]) for row, column in assign(np.array(costs))]
            pairs += found
            free = [i for i in free if i not in [i for _, i in found]]
            waiting = [track for track in waiting if track not in [track for track, _ in found]]
        if self._is_cut(waiting) and any(sure[i] for i in free):
            assert self._mine is not None
            largest = max((i for i in free if sure[i]), key=lambda i: boxes[i].area)
            pairs.append((self._mine, largest))
            free.remove(largest)
            waiting.remove(self._mine)
            self.events.append(TrackEvent(self._frame, "cut"))
        for track, i in pairs:
            if track is self._mine and track.missed > COAST:
                self.events.append(TrackEvent(self._frame, "back"))
            if _stands_for_two(track, boxes[i], waiting):
                track.hide(boxes[i])
            else:
                track.see(boxes[i])
        for track in waiting:
            track.miss()
        self._tracks = [track for track in self._tracks if track is self._mine or not _was_nobody(track)]
        self._tracks += [_Track(boxes[i], self._frame) for i in free if sure[i]]
        self._inherit()

    def _is_cut(self, unseen: Sequence[_Track]) -> bool:
        """Whether all people of the last frame are gone, the followed one included."""
        last = [track for track in self._tracks if track.shown is not None]
        return self._mine in last and all(track in unseen for track in last)

    def _inherit(self) -> None:
        """A person who appeared since the followed one was lost, and is still seen long after, is taken for
        that one: a person who moved too fast to be recognised, for example.
        """
        mine = self._mine
        if mine is None or mine.missed <= 2 * COAST:
            return
        since = self._frame - mine.missed
        heirs = [t for t in self._tracks if t.shown is not None and t.born > since and t is not mine]
        costs = [_cost_of_return(mine, heir.box) for heir in heirs]
        if costs and min(costs) < UNMATCHED:
            self._mine = heirs[costs.index(min(costs))]
            self._tracks.remove(mine)
            self.events.append(TrackEvent(self._frame, "back"))


def _stands_for_two(track: _Track, box: Box, unseen: Sequence[_Track]) -> bool:
    rivals = (other for other in unseen if other.missed < COAST and iou(other.expected, box) > 0.3)
    return track.hidden < COAST and any(rivals)


def _was_nobody(track: _Track) -> bool:
    """A false detection: too few sightings to wait for its return."""
    return track.missed > COAST and track.sightings < PATIENCE


def _cost(track: _Track, box: Box) -> float:
    """The cost of taking `box` for the next sighting of `track`: place, size and overlap."""
    expected = track.expected
    distance = _distance(expected, box)
    change = abs(np.log(max(box.height, 1.0) / max(expected.height, 1.0)))
    if track.missed > COAST or change > np.log(SIZE_CHANGE):
        return UNMATCHED
    if distance > REACH + REACH_PER_FRAME * track.missed:
        return UNMATCHED
    return float(distance + 0.5 * change + 1 - iou(expected, box))


def _cost_of_return(track: _Track, box: Box) -> float:
    """The cost of taking `box` for a person long away: at any place, of about the same size."""
    change = abs(np.log(max(box.height, 1.0) / max(track.box.height, 1.0)))
    if track.missed <= COAST or change > np.log(SIZE_CHANGE_AWAY):
        return UNMATCHED
    return float(change + _distance(track.box, box) / 4)


def _distance(a: Box, b: Box) -> float:
    """The distance of the centres, in diagonals of `a`."""
    return float(np.hypot(*np.subtract(a.centre, b.centre)) / max(np.hypot(a.width, a.height), 1.0))
