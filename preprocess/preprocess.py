"""From a picture and any clip to the folder of prepared clips, as one function that reads from top to bottom.

Two passes over the clip. The first finds the followed person in every frame and keeps only numbers, about
10 KB a frame. The second (drawing.py) draws, crops, cuts and writes frame by frame. Both hold a few frames at
a time, however long the clip is.
"""

from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from trt_wan.errors import InputError
from trt_wan.preprocess.clips import artifacts
from trt_wan.preprocess.clips.artifacts import ArtifactFolder, require_new
from trt_wan.preprocess.clips.keypoints import (
    FoundPeople,
    read_keypoints,
    require_fit,
    rounded,
    write_keypoints,
)
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.clips.streams import READ_AHEAD, ahead, counted
from trt_wan.preprocess.drawing import Drawing, write_clips
from trt_wan.preprocess.footage import Footage, Sizes, plan_footage
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.observe import observed, unobserved
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.fill import fill_gaps
from trt_wan.preprocess.people.notes import about_frames, is_seen
from trt_wan.preprocess.people.person import PersonFrame
from trt_wan.preprocess.people.skeleton import Skeleton, from_keypoints
from trt_wan.preprocess.pictures.paint import Paint, read_paint
from trt_wan.preprocess.retarget.rules import retarget
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.pictures import read_picture, read_transparent, write_picture
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.transparency import colour, transparency_note

MAX_GAP = Fraction(1, 2)  # s: longer gaps of a joint or a person are not filled
FIND = "find person"


def video_size(job: PreprocessJob) -> Size:
    """Width and height of the video. Raises every error of `preprocess` that needs no network."""
    require_new(job.output, job.overwrite)
    footage, sizes = plan_footage(job, read_picture(job.reference), unobserved)
    if job.keypoints is not None:
        found = read_keypoints(job.keypoints, len(footage.indices))
        require_fit(job.keypoints, found, len(footage.indices), sizes.clip)
    _paint_of(job, sizes)
    return sizes.canvas


def preprocess(job: PreprocessJob, stages: Stages, progress: Progress = silent) -> Path:
    """Makes the folder `job.output` and returns it. After a TrtWanError nothing is left of it."""
    # 1. Plan: every refusal that needs no network.
    picture = read_transparent(job.reference)
    reference = picture.over(colour(job.behind))
    if picture.opacity is not None:
        option = "--reference-background"
        progress(transparency_note(job.reference, picture.opacity, job.behind, option))
    footage, sizes = plan_footage(job, reference, stages.observe, progress)
    paint = _paint_of(job, sizes)

    with ArtifactFolder(job.output, job.overwrite) as folder:
        # 2. Find the people. Clips are drawn from the rounded numbers in keypoints.json, so that a job with
        # --keypoints makes the same clips.
        found = rounded(_people_of(job, footage, sizes, reference, stages, progress))
        write_keypoints(folder.making / artifacts.KEYPOINTS, found)
        if not any(is_seen(person, sizes.clip) for person in found.frames):
            raise InputError(
                f"No person was found in any of the {len(footage.indices)} frames of {job.clip}.",
                "Use a clip in which the person can be seen, or with --detector and --pose say where: "
                "--box x0,y0,x1,y1.",
            )
        for note in about_frames(found.frames, sizes.clip):
            progress(note)

        # 3. Skeletons of the driving person, and the poses to draw.
        people = [sizes.placed(person) for person in found.frames]
        skeletons = [from_keypoints(person.keypoints, *sizes.frame) for person in people]
        poses = _retargeted(job, skeletons, found, stages)

        # 4. Draw and write all clips, frame by frame.
        drawing = Drawing(job, sizes, found.frames, people, skeletons, poses, stages.observe, paint)
        write_clips(drawing, footage, folder.making, stages, progress)
        if picture.opacity is None:
            (folder.making / artifacts.REFERENCE).write_bytes(job.reference.read_bytes())
        else:
            write_picture(folder.making / artifacts.REFERENCE, reference)
            write_picture(folder.making / artifacts.REFERENCE_MASK, picture.opacity)
        return folder.publish()


def _paint_of(job: PreprocessJob, sizes: Sizes) -> Paint | None:
    return None if job.mask_paint is None else read_paint(job.mask_paint, sizes.frame)


def _people_of(
    job: PreprocessJob,
    footage: Footage,
    sizes: Sizes,
    reference: Picture,
    stages: Stages,
    progress: Progress,
) -> FoundPeople:
    """From a file or by searching; for retargeting with the character in the reference."""
    if job.keypoints is None:
        found = _find_people(job, footage, sizes, stages, progress)
    else:
        found = read_keypoints(job.keypoints, len(footage.indices))
        require_fit(job.keypoints, found, len(footage.indices), sizes.clip)
    if job.retarget is not None and (found.reference is None or found.reference_size != sizes.canvas):
        canvas = letterbox(reference, *sizes.canvas)
        found = replace(found, reference=_person_in(canvas, stages), reference_size=sizes.canvas)
    return found


def _find_people(
    job: PreprocessJob,
    footage: Footage,
    sizes: Sizes,
    stages: Stages,
    progress: Progress,
) -> FoundPeople:
    assert stages.people is not None, "without keypoints from a file, people must be searched for"
    progress(Note(f"People are found by {stages.people.name}."))
    with closing(ahead(footage, READ_AHEAD)) as read:
        coming = observed(read, "wait for frames and masks", stages.observe)
        frames = counted(coming, len(footage.indices), FIND, progress)
        people = list(stages.people.follow(frames, job.choice, progress))
    return FoundPeople(
        fill_gaps(people, max_gap=round(MAX_GAP * footage.rate)), sizes.clip, None, sizes.canvas
    )


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
