"""The frames of the driving clip that are used, and the sizes that everything is made in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from trt_wan.preprocess.clips.sampling import SamplingRule, frame_indices
from trt_wan.preprocess.clips.sizes import Size, fit, output_size, resize_by_area
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.observe import Observe, unobserved
from trt_wan.preprocess.people.person import Box, PersonFrame
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.stills import RATE as PICTURES_RATE
from trt_wan.runtime.video.stills import open_clip

RATES = {"official": Fraction(30), "kijai": Fraction(16)}  # frames per second; the default is the clip's rate


@dataclass(frozen=True)
class Footage:
    """The used frames, in order, at the clip's own size. A frame that is shown twice is the same object.

    Each iteration decodes the clip anew and holds one frame in memory.
    """

    path: Path
    indices: Sequence[int]
    rate: Fraction  # frames per second of the clips to make
    has_sound: bool
    observe: Observe = unobserved
    cut: Cut | None = None  # `indices` are those of the clip that it leaves
    start: Fraction = Fraction(0)  # seconds that it cuts off before the first frame

    def __iter__(self) -> Iterator[Picture]:
        with open_clip(self.path, cut=self.cut) as clip:
            last, picture = -1, None
            for index in self.indices:
                if picture is None or index != last:
                    last = index
                    with self.observe("decode"):
                        picture = clip.window([index])[0]
                yield picture


@dataclass(frozen=True)
class Sizes:
    """Width and height of the clip, of the video to make (`canvas`), and of the frames that are cut, masked
    and shown; `fitted` makes such a frame from the clip's.

    People are searched for in the clip's own frames: places in messages, options and keypoints.json are in
    the clip's pixels.
    """

    clip: Size
    canvas: Size
    frame: Size
    fitted: Callable[[Picture], Picture] = lambda picture: picture
    scale: tuple[float, float] = (1, 1)  # across, down
    offset: tuple[float, float] = (0, 0)  # pixels of the frame

    def placed_box(self, box: Box) -> Box:
        """From the clip's pixels to the frame's."""
        (sx, sy), (dx, dy) = self.scale, self.offset
        return Box(box.x0 * sx + dx, box.y0 * sy + dy, box.x1 * sx + dx, box.y1 * sy + dy, box.score)

    def placed(self, person: PersonFrame) -> PersonFrame:
        """From the clip's pixels to the frame's."""
        (sx, sy), (dx, dy), keypoints = self.scale, self.offset, person.keypoints
        box = None if person.box is None else self.placed_box(person.box)
        if keypoints is not None:
            moved = keypoints * np.asarray((sx, sy, 1), np.float32) + np.asarray((dx, dy, 0), np.float32)
            keypoints = np.where(keypoints[:, 2:] > 0, moved, np.float32(0))
        return PersonFrame(box, keypoints)


def plan_footage(
    job: PreprocessJob, reference: Picture, observe: Observe, progress: Progress = silent
) -> tuple[Footage, Sizes]:
    """Reports the clip's notes. Raises InputError or UsageError for a clip or a size that cannot be used.

    Numbered pictures have no rate: they are taken as they come, at the rate of the clips to make.
    """
    wanted = job.rate or (RATES[job.compat] if job.compat else None)
    with open_clip(job.clip, rate=wanted or PICTURES_RATE, cut=job.cut) as clip:
        for note in clip.notes:
            progress(note)
        rate = wanted or clip.rate
        rule: SamplingRule = "kijai" if job.compat == "kijai" else "official"
        times = None if job.compat else clip.times  # the others know no uneven frames
        indices = frame_indices(clip.frames, clip.rate, rate, rule, times)
        job.choice.require_inside(clip.width, clip.height)
        footage = Footage(job.clip, indices, rate, clip.has_sound, observe, job.cut, clip.start)
        return footage, plan_sizes(job, reference, clip)


class HasSize(Protocol):
    """A clip or a live source."""

    width: int
    height: int


def plan_sizes(job: PreprocessJob, reference: Picture, clip: HasSize) -> Sizes:
    """In mode replace the video has the clip's shape, and frames are scaled to the video's size. In mode
    animate it has the reference's shape, and frames keep their size. The wrapper scales frames in both modes.

    A size by area has sides that are multiples of 16 pixels, so its shape differs a little from the clip's.
    The official code pads with black, which shows as black bars in the video. By default we crop those few
    pixels.
    """
    how = job.fit or ("crop" if job.compat == "kijai" else "area")
    old = (clip.width, clip.height)
    shape = old if job.mode == "replace" else (reference.shape[1], reference.shape[0])
    width, height = canvas = output_size(shape, job.size, "official" if how == "area" else "kijai")
    if job.mode == "animate" and job.compat != "kijai":
        return Sizes(old, canvas, old)
    ratios = (width / old[0], height / old[1])
    if how == "stretch":
        return Sizes(old, canvas, canvas, lambda picture: fit(picture, height, width, "stretch"), ratios)
    padded = how == "pad" or (how == "area" and job.compat == "official")
    scale = min(ratios) if padded else max(ratios)
    offset = ((width - old[0] * scale) / 2, (height - old[1] * scale) / 2)

    def fitted(picture: Picture) -> Picture:
        if not padded:
            return fit(picture, height, width, "crop")
        if how == "pad":
            return letterbox(picture, width, height)
        return resize_by_area(picture, job.size[0] * job.size[1])

    return Sizes(old, canvas, canvas, fitted, (scale, scale), offset)
