"""From a picture and any clip to the folder of prepared clips, as one function that reads from top to bottom.

Two passes over the clip. The first finds the followed person in every frame and keeps only numbers; the
second draws, crops, cuts and writes frame by frame. Neither holds more than a few frames, however long the
clip is; of each frame some 10 KB of numbers stay.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np

from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.clips import artifacts
from trt_wan.preprocess.clips.artifacts import ArtifactFolder, ClipWriter, FoundPeople
from trt_wan.preprocess.clips.sampling import SamplingRule, frame_indices
from trt_wan.preprocess.clips.sizes import Fit, Size, fit, output_size, resize_by_area
from trt_wan.preprocess.clips.streams import ahead, counted, split
from trt_wan.preprocess.clips.writers import ClipSet
from trt_wan.preprocess.people.fill import fill_gaps
from trt_wan.preprocess.people.person import Box, PersonFrame
from trt_wan.preprocess.people.skeleton import Skeleton, from_keypoints
from trt_wan.preprocess.people.track import PersonChoice
from trt_wan.preprocess.pictures.background import cut_hole
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.pictures.face import SIDE as FACE_SIDE
from trt_wan.preprocess.pictures.face import FaceCropper
from trt_wan.preprocess.pictures.masks import Compat, Mask, MaskShape, as_picture
from trt_wan.preprocess.pictures.preview import draw_preview, preview_size
from trt_wan.preprocess.retarget.rules import RetargetRule, retarget
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.job import Mode
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.reader import Clip, Picture, read_picture

SIZE = (832, 480)
RATES = {"official": Fraction(30), "kijai": Fraction(16)}  # frames per second; ours: the clip's own
MAX_GAP = Fraction(1, 2)  # s over which a joint or a person that is lost is filled in
READ_AHEAD = 2  # frames
MASKS_AHEAD = 2  # beyond the frames that share a mask
FIND, WRITE = "find person", "write clips"


@dataclass(frozen=True)
class PreprocessJob:
    """Refuses at once, with a UsageError, whatever is wrong whatever the files are."""

    reference: Path
    clip: Path
    output: Path  # a folder
    mode: Mode = "animate"
    size: Size = SIZE  # width, height
    fit: Fit | Literal["area"] | None = None  # area: of that many pixels in the picture's own shape
    rate: Fraction | None = None  # frames per second
    compat: Compat | None = None
    choice: PersonChoice = field(default_factory=PersonChoice)
    retarget: RetargetRule | None = None
    edited_reference: Path | None = None  # the same people in a better posture, for their proportions alone
    edited_driving: Path | None = None
    mask: MaskShape = field(default_factory=MaskShape)
    hands: bool = True
    head: bool = True
    face: bool = True
    face_padding: int = 0  # pixels
    keypoints: Path | None = None  # edited by hand: nobody is looked for
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.mode == "replace" and self.retarget is not None:
            raise UsageError(
                "In the mode replace the new person stands where the old one was: nothing is retargeted.",
                "Leave out --retarget, or use --mode animate.",
            )
        if self.retarget is None and (self.edited_reference or self.edited_driving):
            raise UsageError(
                "Edited pictures are read for retargeting only.",
                "Add --retarget safe or --retarget official.",
            )
        if self.rate is not None and self.rate <= 0:
            raise UsageError(f"A rate of {self.rate} makes no video.", "Give a rate such as 16 or 30.")
        if self.face_padding < 0:
            raise UsageError(
                f"A face padding of {self.face_padding} pixels is not possible.", "Use 0 or more."
            )

    @property
    def needs_people(self) -> bool:
        """Whether anybody has to be looked for, in the clip or in a picture."""
        return self.keypoints is None or self.retarget is not None


def preprocess(job: PreprocessJob, stages: Stages, progress: Progress = silent) -> Path:
    """Makes the folder `job.output` and returns it. A TrtWanError leaves nothing behind."""
    # 1. Plan: every refusal that needs no network.
    reference = read_picture(job.reference)
    with Clip(job.clip) as clip:
        rate = job.rate or (RATES[job.compat] if job.compat else clip.rate)
        rule: SamplingRule = "kijai" if job.compat == "kijai" else "official"
        indices = frame_indices(clip.frames, clip.rate, rate, rule)
        sizes = _plan_sizes(job, reference, clip)
        sound = job.clip if clip.has_sound else None
    footage = Footage(job.clip, indices)

    with ArtifactFolder(job.output, job.overwrite) as folder:
        # 2. Who is where. What is drawn is what keypoints.json says, which can be edited and given back.
        if job.keypoints is None:
            found = _find_people(job, footage, sizes, rate, stages, progress)
        else:
            found = artifacts.read_keypoints(job.keypoints)
            artifacts.require_fit(job.keypoints, found, len(indices), sizes.clip)
        if job.retarget is not None and (found.reference is None or found.reference_size != sizes.canvas):
            canvas = letterbox(reference, *sizes.canvas)
            found = replace(found, reference=_person_in(canvas, stages), reference_size=sizes.canvas)
        found = artifacts.rounded(found)
        artifacts.write_keypoints(folder.making / artifacts.KEYPOINTS, found)
        if all(person.keypoints is None for person in found.frames):
            raise InputError(
                f"No person was found in any of the {len(indices)} frames of {job.clip}.",
                "Use a clip in which the person can be seen, or with --detector and --pose say where: "
                "--box x0,y0,x1,y1.",
            )

        # 3. Skeletons of the driving person, and what is drawn of them.
        people = [sizes.placed(person) for person in found.frames]
        skeletons = [from_keypoints(person.keypoints, *sizes.frame) for person in people]
        poses = _retargeted(job, skeletons, found, stages)

        # 4. Everything else, frame by frame.
        scaled = replace(footage, fitted=sizes.fitted)
        _write_clips(job, folder, scaled, sizes, rate, sound, people, skeletons, poses, stages, progress)
        (folder.making / artifacts.REFERENCE).write_bytes(job.reference.read_bytes())
        return folder.publish()


@dataclass(frozen=True)
class Footage:
    """The frames that are used, in order, as often as they are asked for; one is in memory at a time."""

    path: Path
    indices: Sequence[int]
    fitted: Callable[[Picture], Picture] = lambda picture: picture

    def __iter__(self) -> Iterator[Picture]:
        with Clip(self.path) as clip:
            last, picture = -1, None
            for index in self.indices:
                if picture is None or index != last:
                    last, picture = index, self.fitted(clip.window([index])[0])
                yield picture


@dataclass(frozen=True)
class Sizes:
    """Width and height of the clip, of the video to make, and of the frames that are cut, masked and shown;
    and how these come from the clip's. People are looked for in the clip's own frames: whatever is said of a
    place, in messages, options and keypoints.json, is in its pixels.
    """

    clip: Size
    canvas: Size
    frame: Size
    fitted: Callable[[Picture], Picture] = lambda picture: picture
    scale: tuple[float, float] = (1, 1)  # across, down
    offset: tuple[float, float] = (0, 0)  # pixels of the frame

    def placed(self, person: PersonFrame) -> PersonFrame:
        """From the clip's pixels to the frame's."""
        (sx, sy), (dx, dy), box, keypoints = self.scale, self.offset, person.box, person.keypoints
        if box is not None:
            box = Box(box.x0 * sx + dx, box.y0 * sy + dy, box.x1 * sx + dx, box.y1 * sy + dy, box.score)
        if keypoints is not None:
            moved = keypoints * np.asarray((sx, sy, 1), np.float32) + np.asarray((dx, dy, 0), np.float32)
            keypoints = np.where(keypoints[:, 2:] > 0, moved, np.float32(0))
        return PersonFrame(box, keypoints)


def _plan_sizes(job: PreprocessJob, reference: Picture, clip: Clip) -> Sizes:
    """In the mode replace the video has the clip's shape and its frames that size; in animate it has the
    reference's shape, and frames stay as they are. The wrapper scales frames in either mode.

    A size by area has sides of 16 pixels and so not quite the clip's shape. The official code fills up with
    black, which comes out as black bars; ours cuts those few pixels off.
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


def _find_people(
    job: PreprocessJob,
    footage: Footage,
    sizes: Sizes,
    rate: Fraction,
    stages: Stages,
    progress: Progress,
) -> FoundPeople:
    assert stages.people is not None, "keypoints that are not given have to be found"
    progress(Note(f"People are found by {stages.people.name}."))
    with closing(ahead(footage, READ_AHEAD)) as read:
        frames = counted(read, len(footage.indices), FIND, progress)
        people = list(stages.people.follow(frames, job.choice, progress))
    return FoundPeople(fill_gaps(people, max_gap=round(MAX_GAP * rate)), sizes.clip, None, sizes.canvas)


def _person_in(picture: Picture, stages: Stages) -> PersonFrame:
    assert stages.people is not None, "the people of a picture have to be found"
    return next(iter(stages.people.follow([picture], PersonChoice(), silent)))


def _retargeted(
    job: PreprocessJob, skeletons: list[Skeleton], found: FoundPeople, stages: Stages
) -> list[Skeleton]:
    if job.retarget is None:
        return skeletons
    character = found.reference.keypoints if found.reference else None
    if character is None:
        raise InputError(
            f"No person was found in {job.reference}, so body proportions cannot be compared.",
            "Use a picture in which the person can be seen, or --retarget off.",
        )

    def edited(path: Path | None) -> Skeleton | None:
        if path is None:
            return None
        picture = read_picture(path)
        return from_keypoints(_person_in(picture, stages).keypoints, picture.shape[1], picture.shape[0])

    return retarget(
        from_keypoints(character, *found.reference_size),
        skeletons,
        job.retarget,
        edited_reference=edited(job.edited_reference),
        edited_driving=edited(job.edited_driving),
    )


def _write_clips(
    job: PreprocessJob,
    folder: ArtifactFolder,
    footage: Footage,
    sizes: Sizes,
    rate: Fraction,
    sound: Path | None,
    people: list[PersonFrame],
    skeletons: list[Skeleton],
    poses: list[Skeleton],
    stages: Stages,
    progress: Progress,
) -> None:
    count = len(footage.indices)
    cropper = FaceCropper(padding=job.face_padding, compat=job.compat)
    face_boxes = cropper.boxes(skeletons)
    if job.face and not any(face_boxes):
        progress(Note(f"No face was found in any frame, so {artifacts.FACE} is black."))
    replacing = job.mode == "replace"
    label = "person" if job.choice.number is None else f"person {job.choice.number}"
    some_mask = False

    with ExitStack() as open_files:
        # Frames are read, masks found, and every clip drawn and encoded, in threads of their own.
        read = open_files.enter_context(closing(ahead(footage, READ_AHEAD)))
        frames, *more = split(read, 1 + job.face + replacing)
        faces = cropper.crops(more.pop(), skeletons) if job.face else None
        masks: Iterable[Mask | None] = repeat(None)
        if replacing:
            assert stages.segmenter is not None, "the mode replace needs a segmenter"
            progress(Note(f"Masks are made by {stages.segmenter.name}."))
            found = job.mask.of(stages.segmenter.outlines(more.pop(), people), count)
            masks = open_files.enter_context(closing(ahead(found, MASKS_AHEAD)))

        def clip(name: str, size: Size, crf: int = artifacts.CRF, sound: Path | None = None) -> ClipWriter:
            return open_files.enter_context(ClipWriter(folder.making / name, size, rate, crf, sound))

        writers = {artifacts.POSE: clip(artifacts.POSE, sizes.canvas, sound=sound)}
        writers[artifacts.PREVIEW] = clip(
            artifacts.PREVIEW, preview_size(sizes.frame), crf=artifacts.PREVIEW_CRF
        )
        if job.face:
            writers[artifacts.FACE] = clip(artifacts.FACE, (FACE_SIDE, FACE_SIDE))
        if replacing:
            writers[artifacts.BACKGROUND] = clip(artifacts.BACKGROUND, sizes.canvas)
            writers[artifacts.MASK] = clip(artifacts.MASK, sizes.canvas)
        clips = open_files.enter_context(ClipSet(writers))

        def drawn(pose: Skeleton) -> Picture:
            picture = draw_skeleton(pose, pose.width, pose.height, hands=job.hands, head=job.head)
            return letterbox(picture, *sizes.canvas)

        shown = zip(counted(frames, count, WRITE, progress), masks, strict=False)
        for k, (frame, mask) in enumerate(shown):
            box, face = people[k].box, face_boxes[k]
            pictures: dict[str, Callable[[], Picture]] = {
                artifacts.POSE: partial(drawn, poses[k]),
                artifacts.PREVIEW: partial(draw_preview, frame, skeletons[k], box, face, mask, label),
            }
            if faces is not None:
                pictures[artifacts.FACE] = partial(next, faces)
            if mask is not None:
                pictures[artifacts.BACKGROUND] = partial(cut_hole, frame, mask)
                pictures[artifacts.MASK] = partial(as_picture, mask)
                some_mask = some_mask or bool(mask.any())
            clips.write(pictures)
        if replacing and not some_mask:
            raise InputError(
                f"No outline of a person was found in any of the {count} frames of {job.clip}.",
                "Use --mode animate, or --segmenter box.",
            )
        clips.finish(count)
