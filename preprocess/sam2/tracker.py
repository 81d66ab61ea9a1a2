"""Follows objects through a clip, frame by frame: prompts in, masks out.

    tracker = Sam2Tracker(model)
    tracker.add_points(0, PERSON, points, labels)
    for masks in tracker.propagate(frames): ...       # {PERSON: bool [H, W]}

A prompt for a later frame waits for that frame. With the frame's picture it is answered at once, and earlier
frames see it too, as in the official code. Frames before an object's first prompt have no mask of it. Frames
are encoded in batches ahead of the tracker, and memory does not grow with the clip's length. On a GPU a few
frames are tracked ahead of the returned one: a frame needs the memory and the pointer of earlier frames,
which stay on the device, and never their masks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.sam2.config import pointers_of
from trt_wan.engines.sam2.contracts import LABELS, MASK_DOWNSAMPLE, NO_POINTER, TIME_ROWS
from trt_wan.errors import UsageError
from trt_wan.preprocess.sam2.bank import MemoryBank, View
from trt_wan.preprocess.sam2.model import Sam2Model
from trt_wan.preprocess.sam2.position_tables import tables
from trt_wan.preprocess.sam2.resample import InputRule, resize_antialiased
from trt_wan.runtime.executors import Array
from trt_wan.runtime.video.reader import Picture

Mask = NDArray[np.bool_]
Logits = NDArray[np.float32]

MASKED = -30000.0
PRESENT = 10.0  # the object score, and the logits, of a mask that the user gave
HOLE_VALUE = 0.1
BACKGROUND, OBJECT, CORNER_1, CORNER_2 = 0, 1, 2, 3  # labels of points


@dataclass(frozen=True)
class Features:
    """Features of one frame. `owner` keeps the batch's memory alive while a part of it is in use."""

    feat: Array
    high1: Array
    high0: Array
    owner: object


@dataclass(frozen=True)
class Prompt:
    """Either points in pixels of the frame, with labels, or a mask of 0 and 1 at the model's size."""

    points: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    mask: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Found:
    """One object in one frame."""

    logits: Logits  # [S/4, S/4]
    score: float  # above 0: the object is there
    prompted: bool


@dataclass(frozen=True)
class TrackedFrame:
    frame: int
    height: int
    width: int
    objects: dict[int, Found]

    def logits(self, number: int) -> Logits:
        """At the frame's size, [H, W]."""
        found = self.objects[number].logits
        return np.asarray(
            cv2.resize(found, (self.width, self.height), interpolation=cv2.INTER_LINEAR), np.float32
        )

    def mask(self, number: int) -> Mask:
        return self.logits(number) > 0


@dataclass
class _Object:
    bank: MemoryBank
    waiting: dict[int, Prompt] = field(default_factory=dict)
    answers: dict[int, Found] = field(default_factory=dict)  # for later frames that were prompted


class Sam2Tracker:
    """Restarts every `chunk` frames (official preprocessing: 400). `frames` is the length of the clip if
    known, which matters below 16. Holes of up to `fill_holes` pixels of the coarse mask are filled.
    """

    def __init__(
        self,
        model: Sam2Model,
        *,
        rule: InputRule = "official",
        chunk: int | None = None,
        frames: int | None = None,
        fill_holes: int = 8,
    ) -> None:
        self.model, self.rule, self.fill_holes = model, rule, fill_holes
        self.chunk, self.frames = chunk, frames
        self.objects: dict[int, _Object] = {}
        self._next = 0  # earlier frames are done or under way
        self._carrier = model.carrier
        self._carrier.begin()
        place = model.executor.place
        self._tables = {name: place(table) for name, table in tables(model.config).items()}
        self._no_dense = place(np.zeros((model.config.mask_size,) * 2, np.float32))
        self._time_rows = model.weights[TIME_ROWS].reshape(-1, model.config.memory_channels)

    def add_points(
        self,
        frame: int,
        number: int,
        points: NDArray[np.floating],
        labels: Sequence[int] | NDArray[np.integer],
        picture: Picture | None = None,
        box: Sequence[float] | None = None,
    ) -> None:
        """`points` [n, 2] are x and y in pixels of the frame. `labels` are 1 on the object and 0 elsewhere.
        `box` is x0, y0, x1, y1. A later prompt for the same frame replaces an earlier one.
        """
        points = np.asarray(points, np.float32).reshape(-1, 2)
        kinds = np.asarray(labels, np.int64).reshape(-1)
        if len(points) != len(kinds) or not np.isin(kinds, (BACKGROUND, OBJECT)).all():
            raise UsageError(
                f"{len(points)} points have {len(kinds)} labels, or other labels than 0 and 1.",
                "Give every point 1 (the object) or 0 (not the object).",
            )
        if box is not None:
            points = np.concatenate((np.asarray(box, np.float32).reshape(2, 2), points))
            kinds = np.concatenate(([CORNER_1, CORNER_2], kinds))
        most = self.model.plan.prompt_tokens - 1
        if not 1 <= len(points) <= most:
            raise UsageError(f"A prompt of {len(points)} points is not possible.", f"Use 1 to {most}.")
        if not np.isfinite(points).all():
            raise UsageError(
                "A prompt's point is not a finite number.", "Leave out points that are not known."
            )
        self._add(frame, number, Prompt(points, kinds), picture)

    def add_box(self, frame: int, number: int, box: Sequence[float], picture: Picture | None = None) -> None:
        """`box` is x0, y0, x1, y1 in pixels of the frame."""
        self.add_points(frame, number, np.zeros((0, 2)), [], picture=picture, box=box)

    def add_mask(self, frame: int, number: int, mask: Mask, picture: Picture | None = None) -> None:
        """`mask` [H, W] becomes the result for that frame."""
        size = self.model.config.image_size
        resized = resize_antialiased(mask.astype(np.float32), size, size)
        self._add(frame, number, Prompt(mask=(resized >= 0.5).astype(np.float32)), picture)

    def propagate(self, frames: Iterable[Picture]) -> Iterator[dict[int, Mask]]:
        """The masks of every frame, in order, by object. A later call continues after the last frame."""
        for tracked in self.track(frames):
            yield {number: tracked.mask(number) for number in tracked.objects}

    @property
    def next_frame(self) -> int:
        """The first frame that still accepts a prompt."""
        return self._next

    def track(self, frames: Iterable[Picture]) -> Iterator[TrackedFrame]:
        """As `propagate`, with logits and scores. While it runs, prompts may be added for `next_frame` and
        later frames. With ONNX Runtime these are all frames that were not yet returned.
        """
        self._carrier.begin()
        under_way: deque[Callable[[], TrackedFrame]] = deque()
        for picture, features in self._encoded(frames):
            under_way.append(self._start(features, picture.shape[0], picture.shape[1]))
            if len(under_way) > self._carrier.ahead:
                yield under_way.popleft()()
        while under_way:
            yield under_way.popleft()()
        if self.model.gpu is not None:
            self.model.executor.settle()

    def _start(self, features: Features, height: int, width: int) -> Callable[[], TrackedFrame]:
        """Starts the next frame and returns a function that gets its result."""
        frame = self._next
        started = {
            number: found
            for number, thing in self.objects.items()
            if (found := self._follow(thing, features, (width, height))) is not None
        }
        self._next += 1
        return lambda: TrackedFrame(frame, height, width, {number: get() for number, get in started.items()})

    def _add(self, frame: int, number: int, prompt: Prompt, picture: Picture | None) -> None:
        if frame < self._next:
            raise UsageError(
                f"A prompt for frame {frame} comes too late: {self._next} frames are done or under way.",
                "Add it before its frame is asked for.",
            )
        room = max(self.model.plan.memories)
        config = self.model.config
        thing = self.objects.setdefault(number, _Object(MemoryBank(config, room, self.chunk, self.frames)))
        if picture is None:
            thing.waiting[frame] = prompt
            return
        self._carrier.begin()
        (features,) = self._encode(self._carrier.pixels([picture], self.rule)(), 1)
        height, width = picture.shape[:2]
        thing.answers[frame] = self._answer(thing, frame, prompt, features, (width, height))

    def _encoded(self, frames: Iterable[Picture]) -> Iterator[tuple[Picture, Features]]:
        """Every picture with its features. The host resizes the next batch while one is tracked. On a GPU the
        next batch is resized and encoded in advance, so that the GPU always has work.
        """
        source = iter(frames)

        def prepare() -> tuple[list[Picture], Callable[[], list[Features]]]:
            pictures = list(islice(source, self.model.plan.batch))
            if not pictures:
                return pictures, list
            pixels = self._carrier.pixels(pictures, self.rule)
            if self._carrier.ahead:
                features = self._encode(pixels(), len(pictures))
                return pictures, lambda: features
            return pictures, lambda: self._encode(pixels(), len(pictures))

        pictures, encoded = prepare()
        while pictures:
            current, features = pictures, encoded()
            pictures, encoded = prepare()
            yield from zip(current, features, strict=True)

    def _encode(self, pixels: Array, count: int) -> list[Features]:
        """Features of the first `count` pictures of a batch."""
        outputs = self.model.run("encoder", {"pixels": pixels})
        feat, high1, high0 = outputs
        part = self._carrier.part
        return [Features(part(feat, i), part(high1, i), part(high0, i), outputs) for i in range(count)]

    def _follow(
        self, thing: _Object, features: Features, size: tuple[int, int]
    ) -> Callable[[], Found] | None:
        """One object in the next frame. None before its first prompt."""
        frame = self._next
        if frame in thing.waiting and frame not in thing.answers:
            thing.answers[frame] = self._answer(thing, frame, thing.waiting.pop(frame), features, size)
        if frame in thing.answers:
            found = thing.answers.pop(frame)
            return lambda: found
        view = thing.bank.view(frame)
        return None if view is None else self._track_frame(thing, frame, features, view)

    def _answer(
        self, thing: _Object, frame: int, prompt: Prompt, features: Features, size: tuple[int, int]
    ) -> Found:
        """The mask of a prompted frame. The same mask goes into the memory."""
        logits, score, pointer = (
            self._from_points(prompt, features, size)
            if prompt.mask is None
            else self._from_mask(prompt.mask, features)
        )
        logits = fill_small_holes(logits, self.fill_holes)
        small = self._carrier.small({"mask": logits, "object_score": np.array([score], np.float32)})
        (memory,) = self.model.run("memory_encoder", {"feat": features.feat, **small})
        thing.bank.add_prompted(frame, memory, pointer)
        return Found(logits, score, prompted=True)

    def _from_points(
        self, prompt: Prompt, features: Features, size: tuple[int, int]
    ) -> tuple[Logits, float, Array]:
        scale = np.float32(self.model.config.image_size) / np.array(size, np.float32)
        points = (prompt.points * scale).astype(np.float32)
        small = self._prompt_inputs(points, prompt.labels) | {
            "use_dense": np.zeros(1, np.float32),
            "use_no_memory": np.ones(1, np.float32),
            "multimask": np.array([len(points) <= 1], np.float32),
        }
        named = {"dense": self._no_dense, **self._carrier.small(small), **_named(features)}
        logits, pointer, score, _ = self.model.run("prompt", named)
        found, seen = self._carrier.fetch((logits, score))()
        return found, float(seen[0]), pointer

    def _from_mask(self, mask: NDArray[np.float32], features: Features) -> tuple[Logits, float, Array]:
        """The mask is the result. The decoder only gives a pointer, and the score comes from the mask."""
        c, weights = self.model.config, self.model.weights
        there = bool(mask.any())
        tiles = mask.reshape(c.mask_size, 4, c.mask_size, 4)
        kernel = weights[f"{MASK_DOWNSAMPLE}.weight"][0, 0]
        dense = np.einsum("yaxb,ab->yx", tiles, kernel) + weights[f"{MASK_DOWNSAMPLE}.bias"]
        nothing = np.zeros((1, 2), np.float32), np.array([-1])
        small = self._prompt_inputs(*nothing) | {
            "dense": dense.astype(np.float32),
            "use_dense": np.ones(1, np.float32),
            "use_no_memory": np.zeros(1, np.float32),
            "multimask": np.zeros(1, np.float32),
        }
        named = {**self._carrier.small(small), **_named(features)}
        _, pointer, _, _ = self.model.run("prompt", named)
        if not there:
            pointer = self.model.executor.place(np.asarray(weights[NO_POINTER][0]))
        logits = resize_antialiased(mask * (2 * PRESENT) - PRESENT, c.mask_size, c.mask_size)
        return logits, PRESENT if there else -PRESENT, pointer

    def _prompt_inputs(
        self, points: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """The points, the token that ends them, and masked places."""
        count, places = len(points) + 1, self.model.plan.prompt_tokens
        coordinates = np.zeros((places, 2), np.float32)
        coordinates[: len(points)] = points
        one_hot = np.zeros((places, len(LABELS)), np.float32)
        for i, label in enumerate((*labels, -1)):
            one_hot[i, LABELS.index(int(label))] = 1
        return {"points": coordinates, "labels": one_hot, "token_bias": _bias(count, places)}

    def _track_frame(self, thing: _Object, frame: int, features: Features, view: View) -> Callable[[], Found]:
        plan, c = self.model.plan, self.model.config
        places = next(n for n in plan.memories if n >= len(view.memories))
        named: dict[str, Array] = _named(features) | self._tables
        times = np.zeros((places, c.memory_channels), np.float32)
        for i in range(places):
            seen = i < len(view.memories)
            memory, row = view.memories[i if seen else 0]  # masked slots: contents are ignored
            named[f"memory_{i}"] = memory
            if seen:
                times[i] = self._time_rows[row]
        count = pointers_of(places)
        ages = np.zeros(count, np.float32)
        ages[: len(view.pointers)] = [age for _, age in view.pointers]
        small: dict[str, NDArray[Any]] = {"memory_time": times, "pointer_time": ages}
        if plan.by_kernel:
            seen_tokens = len(view.memories) * c.tokens, len(view.pointers) * c.pointer_tokens
            small["seen"] = np.array(seen_tokens, np.int64)
        else:
            small["memory_bias"] = _bias(len(view.memories), places)
            small["pointer_bias"] = _bias(len(view.pointers), count)
        named["pointers"] = self._carrier.rows([pointer for pointer, _ in view.pointers], count)
        named |= self._carrier.small(small)
        logits, pointer, score, memory = self.model.track(places, named)
        thing.bank.add_tracked(frame, memory, pointer)
        read = self._carrier.fetch((logits, score))

        def found() -> Found:
            shown, seen = read()
            return Found(fill_small_holes(shown, self.fill_holes), float(seen[0]), prompted=False)

        return found


def fill_small_holes(logits: Logits, largest: int) -> Logits:
    """Background regions (8-connected) of at most `largest` pixels get a small positive logit."""
    if largest <= 0:
        return logits
    background = (logits <= 0).astype(np.uint8)
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(background, connectivity=8)
    small = statistics[:, cv2.CC_STAT_AREA] <= largest
    small[0] = False  # region 0 is the object itself
    return np.where(small[regions], np.float32(HOLE_VALUE), logits)


def _bias(seen: int, places: int) -> NDArray[np.float32]:
    return np.where(np.arange(places) < seen, 0, MASKED).astype(np.float32)


def _named(features: Features) -> dict[str, Array]:
    return {"feat": features.feat, "high1": features.high1, "high0": features.high0}
