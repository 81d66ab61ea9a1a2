"""Notes to users about the people that were found: a sentence with numbers, and the same for programs.

Each note is said once per clip and names the option that decides. Frames count from 0, as in keypoints.json.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.people.choice import Person
from trt_wan.preprocess.people.person import Box, Keypoints, PersonFrame, iou
from trt_wan.runtime.events import Note

DRAWN = 0.5  # least score of a joint that is drawn
FAR = 0.5  # times the picture's sides: distance from the picture that no pose has
APART = 0.1  # IoU of the boxes of one person in two frames, at least
MOST_PLACES = 4  # in a sentence

EDIT = "edit keypoints.json and give it back with --keypoints"


def several_people(frame: int, people: Sequence[Person], followed: int | None, text: str) -> Note:
    boxes = [[round(side) for side in (p.box.x0, p.box.y0, p.box.x1, p.box.y1)] for p in people]
    return Note(text, "several_people", {"frame": frame, "boxes": boxes, "followed": followed})


def several_later(crowded: Sequence[int], most: int, frames: int, followed: str) -> Note:
    """For people who come into view after the choice was made; `crowded`: frames with more than one."""
    return Note(
        f"{_share(len(crowded), frames)} show more than one person ({places(crowded)}; at most {most}); "
        f"{followed}.",
        "several_people",
        {"frames": len(crowded), "of": frames, "most": most, "ranges": ranges(crowded)},
    )


def person_changed(
    back: Sequence[int], cut: Sequence[int], jumped: Sequence[int], advice: str
) -> Note | None:
    """For a person who was taken up again after being out of sight, cuts, and jumps of a person who is not
    tracked. All are numbers of frames.
    """
    what = [
        f"{text} in {_frames(frames)}"
        for frames, text in (
            (back, "someone is taken for the person that was out of sight"),
            (cut, "others are seen, as after a cut, and the largest is followed,"),
            (jumped, "the person jumps, as at a cut or to another person,"),
        )
        if frames
    ]
    if not what:
        return None
    return Note(
        f"The person may have changed: {'; '.join(what)}. {advice}",
        "person_changed",
        {"back": list(back), "cut": list(cut), "jumped": list(jumped)},
    )


def about_frames(people: Sequence[PersonFrame], size: Size) -> Iterator[Note]:
    """About the people as they are drawn, in a clip of this size."""
    empty = [k for k, person in enumerate(people) if not is_seen(person, size)]
    if empty:
        yield Note(
            f"{_share(len(empty), len(people))} show no person ({places(empty)}), so no pose is drawn there. "
            f"Choose the person with --person, --point or --box, or {EDIT}.",
            "no_person",
            {"frames": len(empty), "of": len(people), "first": empty[0], "ranges": ranges(empty)},
        )
    outside = [
        (k, joint) for k, person in enumerate(people) if (joint := _far_joint(person, size)) is not None
    ]
    if outside:
        k, joint = outside[0]
        keypoints = people[k].keypoints
        assert keypoints is not None
        x, y = (round(float(value)) for value in keypoints[joint, :2])
        yield Note(
            f"{_share(len(outside), len(people))} have joints far outside of the picture (in frame {k} joint "
            f"{joint} at {x},{y}, in a picture of {size[0]}x{size[1]}). If that is wrong, {EDIT}.",
            "joints_outside",
            {"frames": len(outside), "of": len(people), "first": k, "joint": joint, "x": x, "y": y},
        )


def no_face(seen: Sequence[bool], instead: str) -> Note | None:
    """`seen`: whether a frame has a face. `instead`: the content of the face clip in a frame without one."""
    missing = [k for k, face in enumerate(seen) if not face]
    if not missing:
        return None
    where = f"{_share(len(missing), len(seen))} ({places(missing)}), where {instead}"
    if len(missing) == len(seen):
        where = "any frame, so the face clip is black"
    return Note(
        f"No face was found in {where}. Leave the face clip out with --no-face, or {EDIT}.",
        "no_face",
        {"frames": len(missing), "of": len(seen), "first": missing[0], "ranges": ranges(missing)},
    )


def is_seen(person: PersonFrame, size: Size) -> bool:
    """Whether a joint that is drawn is inside the picture."""
    if person.keypoints is None:
        return False
    x, y, score = person.keypoints.T
    return bool(((score >= DRAWN) & (x >= 0) & (y >= 0) & (x < size[0]) & (y < size[1])).any())


def jumps(boxes: Sequence[Box | None]) -> list[int]:
    """Frames in which the person is elsewhere than in the frame before."""
    return [
        k
        for k, (before, here) in enumerate(pairwise(boxes), 1)
        if before is not None and here is not None and iou(before, here) < APART
    ]


def ranges(frames: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of the frames in a row."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if found and frame == found[-1][1] + 1:
            found[-1] = (found[-1][0], frame)
        else:
            found.append((frame, frame))
    return found


def places(frames: Sequence[int]) -> str:
    """12 to 40, 61, 70 to 77, and 3 more"""
    found = ranges(frames)
    texts = [f"{first}" if first == last else f"{first} to {last}" for first, last in found[:MOST_PLACES]]
    if len(found) > MOST_PLACES:
        texts.append(f"and {len(found) - MOST_PLACES} more")
    return "frame " * (len(frames) == 1) + ", ".join(texts)


def _frames(frames: Sequence[int]) -> str:
    return places(frames) if len(frames) == 1 else f"{len(frames)} frames ({places(frames)})"


def _share(count: int, frames: int) -> str:
    return f"{count} of {frames} frames"


def _far_joint(person: PersonFrame, size: Size) -> int | None:
    """The first drawn joint that is far outside of the picture."""
    keypoints: Keypoints | None = person.keypoints
    if keypoints is None:
        return None
    sides = np.asarray(size, np.float32)
    far = (keypoints[:, :2] < -FAR * sides) | (keypoints[:, :2] > (1 + FAR) * sides)
    joints = np.flatnonzero(far.any(axis=1) & (keypoints[:, 2] >= DRAWN))
    return int(joints[0]) if len(joints) else None
