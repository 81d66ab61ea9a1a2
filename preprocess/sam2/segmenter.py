"""Outlines by SAM2: prompted with the pose on key frames, and again if the mask loses the pose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from trt_wan.preprocess.people.person import PersonFrame
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.preprocess.sam2 import prompts
from trt_wan.preprocess.sam2.model import ExecutorName, Sam2Model, open_sam2
from trt_wan.preprocess.sam2.tracker import Sam2Tracker
from trt_wan.preprocess.sam2.weights import load_sam2
from trt_wan.runtime.events import Progress
from trt_wan.runtime.video.reader import Picture

PERSON = 1  # SAM2's number of the object
PATIENCE = 3  # frames in which mask and pose disagree before a new prompt: one may be a wrong pose


class Sam2Segmenter:
    """`official`: prompts by the official rule, and no new prompts."""

    def __init__(
        self,
        model: Sam2Model,
        name: str,
        official: bool = False,
        new_tracker: Callable[..., Sam2Tracker] = Sam2Tracker,
    ) -> None:
        self.model, self.name, self.official, self.new_tracker = model, name, official, new_tracker

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        coming = iter(frames)
        first = next(coming)
        height, width = first.shape[:2]
        bodies = [from_keypoints(person.keypoints, width, height).body for person in people]
        chunk = prompts.CHUNK if self.official else None
        tracker = self.new_tracker(self.model, chunk=chunk, frames=len(people))
        for key in prompts.key_prompts(bodies, width, height, "official" if self.official else "safe"):
            tracker.add_points(key.frame, PERSON, key.points, key.labels)
        lost = 0
        for k, tracked in enumerate(tracker.track(chain([first], coming))):
            here = PERSON in tracked.objects
            mask = tracked.mask(PERSON) if here else np.zeros((height, width), bool)
            lost = lost + 1 if prompts.wants_prompt(mask, bodies[k]) else 0
            following = tracker.next_frame  # on a GPU, earlier frames are under way already
            if lost >= PATIENCE and following < len(bodies) and not self.official:
                points = prompts.safe_points(bodies[following], width, height)
                if len(points) >= prompts.MIN_JOINTS:
                    tracker.add_points(following, PERSON, points, np.ones(len(points), np.int64))
                    lost = 0
            yield mask


def open_segmenter(
    weights: Path, executor: ExecutorName, official: bool, progress: Progress
) -> Sam2Segmenter:
    model = open_sam2(load_sam2(weights), executor, progress=progress)
    return Sam2Segmenter(model, f"SAM2 ({weights.name})", official)
