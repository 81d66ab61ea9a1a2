"""The second pass: every clip of the folder is drawn, cropped, cut and encoded, frame by frame.

Frames are read, masks made, and each clip drawn and encoded in separate threads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, repeat
from pathlib import Path
from typing import NamedTuple

from trt_wan.errors import InputError
from trt_wan.preprocess.clips import artifacts
from trt_wan.preprocess.clips.streams import READ_AHEAD, ahead, counted, split
from trt_wan.preprocess.clips.writers import BEHIND, ClipSet
from trt_wan.preprocess.footage import Footage, Sizes
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.observe import Observe, observed
from trt_wan.preprocess.people.notes import no_face
from trt_wan.preprocess.people.person import Box, PersonFrame
from trt_wan.preprocess.people.skeleton import Skeleton, from_keypoints
from trt_wan.preprocess.pictures.background import cut_hole
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.pictures.face import SIDE as FACE_SIDE
from trt_wan.preprocess.pictures.face import FaceCropper, PixelBox
from trt_wan.preprocess.pictures.masks import Mask, as_picture
from trt_wan.preprocess.pictures.paint import Paint
from trt_wan.preprocess.pictures.preview import draw_preview, preview_size
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.writer import VideoWriter

MASKS_AHEAD = 2  # in addition to the frames that share a mask
WRITE = "write clips"


class Shot(NamedTuple):
    frame: Picture
    face: Picture | None  # the pixels of the face, as they are cut


@dataclass(frozen=True)
class Drawing:
    """Draws the person into the pictures of every frame. Lists have one entry per frame."""

    job: PreprocessJob
    sizes: Sizes
    found: list[PersonFrame]  # in pixels of the clip
    people: list[PersonFrame]  # the same, in pixels of the frame
    skeletons: list[Skeleton]  # the driving person's, in pixels of the frame
    poses: list[Skeleton]  # as drawn: retargeted, or the same
    observe: Observe
    paint: Paint | None = None

    @cached_property
    def cropper(self) -> FaceCropper:
        return FaceCropper(padding=self.job.face_padding, compat=self.job.compat)

    @cached_property
    def faces_seen(self) -> list[Skeleton]:
        """In pixels of the pictures that faces are cropped from. Those are the clip's own: a small face keeps
        its detail. The official code and the wrapper crop from frames that they have scaled.
        """
        if self.job.compat is not None:
            return self.skeletons
        return [from_keypoints(person.keypoints, *self.sizes.clip) for person in self.found]

    @cached_property
    def faces(self) -> list[PixelBox | None]:
        """Boxes of the faces, in the same pixels as `faces_seen`."""
        return self.cropper.boxes(self.faces_seen)

    def shots(self, footage: Footage) -> Iterator[Shot]:
        """Every frame and its face. At most two of the clip's own pictures are in memory at a time."""
        pairs = self._fitted(footage)
        if not self.job.face:
            yield from (Shot(frame, None) for _, frame in pairs)
            return
        shown, looked_at = split(pairs, 2)
        pictures = (source if self.job.compat is None else frame for source, frame in looked_at)
        for (_, frame), face in zip(shown, self.cropper.cuts(pictures, self.faces_seen), strict=True):
            yield Shot(frame, face)

    def _fitted(self, footage: Footage) -> Iterator[tuple[Picture, Picture]]:
        """The clip's pictures and the frames made of them."""
        last = frame = None
        for source in footage:
            if frame is None or source is not last:
                with self.observe("scale frames"):
                    frame = self.sizes.fitted(source)
                last = source
            yield source, frame

    def pictures(
        self, k: int, frame: Picture, mask: Mask | None, faces: Iterator[Picture] | None
    ) -> dict[str, Callable[[], Picture]]:
        """Functions that make the pictures of frame `k`, by the name of their clip."""
        made: dict[str, Callable[[], Picture]] = {
            artifacts.POSE: partial(self._pose, k),
            artifacts.PREVIEW: partial(self._preview, k, frame, mask),
        }
        if faces is not None:
            made[artifacts.FACE] = partial(next, faces)
        if mask is not None:
            made[artifacts.BACKGROUND] = partial(self._background, frame, mask)
            made[artifacts.MASK] = partial(as_picture, mask)
        return made

    def _pose(self, k: int) -> Picture:
        pose = self.poses[k]
        with self.observe("draw skeleton"):
            drawn = draw_skeleton(pose, pose.width, pose.height, hands=self.job.hands, head=self.job.head)
        return letterbox(drawn, *self.sizes.canvas)

    def _preview(self, k: int, frame: Picture, mask: Mask | None) -> Picture:
        number = self.job.choice.number
        label = "person" if number is None else f"person {number}"
        face = None if (box := self.faces[k]) is None else Box(*box)
        if face is not None and self.job.compat is None:
            face = self.sizes.placed_box(face)
        with self.observe("draw preview"):
            return draw_preview(frame, self.skeletons[k], self.people[k].box, face, mask, label)

    def _background(self, frame: Picture, mask: Mask) -> Picture:
        with self.observe("cut background"):
            return cut_hole(frame, mask)


def write_clips(drawing: Drawing, footage: Footage, folder: Path, stages: Stages, progress: Progress) -> None:
    """Raises InputError if a mask is needed in mode replace and no frame has one."""
    job, frames, some_mask = drawing.job, len(footage.indices), False
    if job.face and (note := no_face([box is not None for box in drawing.faces], drawing.cropper.without)):
        progress(note)
    with ExitStack() as opened:
        read = opened.enter_context(closing(ahead(drawing.shots(footage), READ_AHEAD)))
        coming = observed(read, "wait for frames and masks", drawing.observe)
        shown, *more = split(coming, 1 + job.face + (job.mode == "replace"))
        faces: Iterator[Picture] | None = None
        if job.face:
            crops = drawing.cropper.crops(shot.face for shot in more.pop())
            faces = observed(crops, "crop faces", drawing.observe)
        masks: Iterable[Mask | None] = repeat(None)
        if job.mode == "replace":
            made = opened.enter_context(
                closing(ahead(_masks(drawing, (s.frame for s in more.pop()), stages, progress), MASKS_AHEAD))
            )
            masks = observed(made, "wait for frames and masks", drawing.observe)
        writers = {name: opened.enter_context(writer) for name, writer in _writers(drawing, footage, folder)}
        clips = opened.enter_context(ClipSet(writers, drawing.observe))
        for k, shot, mask in zip(count(), counted(shown, frames, WRITE, progress), masks, strict=False):
            clips.write(drawing.pictures(k, shot.frame, mask, faces))
            some_mask = some_mask or (mask is not None and bool(mask.any()))
        if job.mode == "replace" and not some_mask:
            raise InputError(
                f"No outline of a person was found in any of the {frames} frames of {job.clip}.",
                "Use --mode animate, or --segmenter box, or a --mask-paint with less black."
                if drawing.paint
                else "Use --mode animate, or --segmenter box.",
            )
        clips.finish(frames)


def _masks(drawing: Drawing, frames: Iterator[Picture], stages: Stages, progress: Progress) -> Iterator[Mask]:
    assert stages.segmenter is not None, "mode replace needs a segmenter"
    progress(Note(f"Masks are made by {stages.segmenter.name}."))
    outlines = observed(stages.segmenter.outlines(frames, drawing.people), "segment", drawing.observe)
    shape, total = drawing.job.mask, len(drawing.people)
    masks = shape.of(outlines, total, drawing.paint.over) if drawing.paint else shape.of(outlines, total)
    return observed(masks, "shape masks", drawing.observe)


def _writers(drawing: Drawing, footage: Footage, folder: Path) -> Iterator[tuple[str, VideoWriter]]:
    """Opens the writers one by one: the caller must enter each before it asks for the next."""
    job, canvas = drawing.job, drawing.sizes.canvas
    sizes = {artifacts.POSE: canvas, artifacts.PREVIEW: preview_size(drawing.sizes.frame)}
    if job.face:
        sizes[artifacts.FACE] = (FACE_SIDE, FACE_SIDE)
    if job.mode == "replace":
        sizes |= {artifacts.BACKGROUND: canvas, artifacts.MASK: canvas}
    for name, size in sizes.items():
        crf = artifacts.PREVIEW_CRF if name == artifacts.PREVIEW else artifacts.CRF
        sound = job.clip if name == artifacts.POSE and footage.has_sound else None
        writer = VideoWriter(
            folder / name,
            *size,
            footage.rate,
            sound,
            quality=Quality(crf=crf, preset=artifacts.PRESET),
            sound_start=footage.start,
            waiting=BEHIND,
        )
        yield name, writer
