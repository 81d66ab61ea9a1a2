"""Notes about the people in a clip: each once, with numbers and the option that decides, also in --json."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_clips import SIZE, FakePeople, FakeSegmenter, box_of, make, standing, write_clip, write_reference

import trt_wan.preprocess.stages
from trt_wan.cli.main import cli
from trt_wan.errors import InputError
from trt_wan.preprocess.clips.keypoints import FoundPeople, write_keypoints
from trt_wan.preprocess.people.choice import Person, PersonChoice, listed
from trt_wan.preprocess.people.notes import jumps, places, ranges
from trt_wan.preprocess.people.onnx_people import OnnxPeople
from trt_wan.preprocess.people.person import NOBODY, Box, Keypoints, PersonFrame
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.video.reader import Picture


def notes_of(events: Sequence[Event]) -> dict[str, Note]:
    """By code. Two notes of one code are an error."""
    found = [event for event in events if isinstance(event, Note) and event.code]
    assert len({note.code for note in found}) == len(found), found
    return {note.code: note for note in found}


def test_frames_in_a_row() -> None:
    assert ranges([]) == [] and ranges([3]) == [(3, 3)]
    assert ranges([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)]
    assert places([3]) == "frame 3" and places([3, 4, 9]) == "3 to 4, 9"
    assert places(range(0, 20, 2)) == "0, 2, 4, 6, and 6 more"


def test_a_crowd_is_listed_briefly() -> None:
    people = [Person(n, Box(n, 0, n + 10, 20)) for n in range(1, 31)]
    assert listed(people).startswith("1 at 1,0 (10x20), 2 at 2,0") and listed(people).endswith("and 22 more")


def test_frames_without_a_person(tmp_path: Path) -> None:
    events: list[Event] = []
    away = {0, 1, *range(10, 24), 33}
    make(tmp_path, write_clip(tmp_path / "c.mkv", 34), FakePeople(0, away), events=events)
    note = notes_of(events)["no_person"]
    assert note.text.startswith("17 of 34 frames show no person (0 to 1, 10 to 23, 33), so no pose is drawn")
    assert "--person" in note.text and "--keypoints" in note.text and len(note.text) < 400
    data = {"frames": 17, "of": 34, "first": 0, "ranges": [(0, 1), (10, 23), (33, 33)]}
    assert note.data == data and "joints_outside" not in notes_of(events)


@pytest.mark.long
def test_a_short_gap_is_filled_and_not_told(tmp_path: Path) -> None:
    events: list[Event] = []
    make(tmp_path, write_clip(tmp_path / "c.mkv", 12), FakePeople(0, [4, 5]), events=events)
    assert not notes_of(events)


def given(folder: Path, frames: list[PersonFrame]) -> Path:
    write_keypoints(folder / "k.json", FoundPeople(frames, SIZE, None, (192, 112)))
    return folder / "k.json"


def with_joint(joint: int, x: float, y: float, score: float = 0.9) -> PersonFrame:
    points = standing(SIZE)
    points[joint] = x, y, score
    return PersonFrame(box_of(standing(SIZE)), points)


def test_joints_far_outside_of_the_picture(tmp_path: Path) -> None:
    """A little outside is usual, and a joint that is not drawn does not matter."""
    frames = [with_joint(9, -100, 50), with_joint(9, 5000, -300), with_joint(9, 5000, 5, 0.3)]
    frames += [with_joint(10, 50, 1e8), with_joint(9, 400, 200)]
    events: list[Event] = []
    make(tmp_path, write_clip(tmp_path / "c.mkv", 5), keypoints=given(tmp_path, frames), events=events)
    note = notes_of(events)["joints_outside"]
    assert note.text == (
        "2 of 5 frames have joints far outside of the picture (in frame 1 joint 9 at 5000,-300, in a picture "
        "of 320x180). If that is wrong, edit keypoints.json and give it back with --keypoints."
    )
    assert note.data == {"frames": 2, "of": 5, "first": 1, "joint": 9, "x": 5000, "y": -300}


def test_a_person_who_is_outside_in_every_frame_is_refused(tmp_path: Path) -> None:
    points = standing(SIZE)
    points[:, :2] += 1000
    faint = standing(SIZE)
    faint[:, 2] = 0.2
    for k, frame in enumerate((PersonFrame(None, points), PersonFrame(None, faint), NOBODY)):
        clip = write_clip(tmp_path / f"{k}.mkv", 3)
        with pytest.raises(InputError, match="No person was found in any of the 3 frames"):
            make(tmp_path, clip, keypoints=given(tmp_path, [frame] * 3))


def test_frames_without_a_face(tmp_path: Path) -> None:
    hidden = standing(SIZE)
    hidden[23:91, 2] = 0.1
    seen, turned = (PersonFrame(None, points) for points in (standing(SIZE), hidden))
    clip, events = write_clip(tmp_path / "c.mkv", 6), list[Event]()
    make(tmp_path, clip, keypoints=given(tmp_path, [seen, turned, seen, seen, turned, turned]), events=events)
    note = notes_of(events)["no_face"]
    assert note.text == (
        "No face was found in 3 of 6 frames (1, 4 to 5), where the face clip shows the last face for 6 "
        "frames and then fades to black. Leave the face clip out with --no-face, or edit keypoints.json and "
        "give it back with --keypoints."
    )
    assert note.data == {"frames": 3, "of": 6, "first": 1, "ranges": [(1, 1), (4, 5)]}
    events.clear()
    never = given(tmp_path, [turned] * 6)
    make(tmp_path, clip, keypoints=never, events=events, overwrite=True)
    assert notes_of(events)["no_face"].text.startswith(
        "No face was found in any frame, so the face clip is black."
    )
    events.clear()
    make(tmp_path, clip, keypoints=never, events=events, overwrite=True, face=False)
    assert not notes_of(events)


class Scripted:
    """A detector and a pose network that find the boxes of a list, frame by frame."""

    class Net:
        path, reason = Path("made-up.onnx"), "in a test"

    net = Net()

    def __init__(self, frames: Sequence[Sequence[Box]]) -> None:
        self.frames = list(frames)

    def detecting(self, pictures: Sequence[Picture]) -> Any:
        found, self.frames = self.frames[: len(pictures)], self.frames[len(pictures) :]
        return lambda: [list(boxes) for boxes in found]

    def estimating(self, pictures: Sequence[Picture], boxes: Sequence[Box]) -> Any:
        return partial(self.joints, boxes)

    @staticmethod
    def joints(boxes: Sequence[Box]) -> list[Keypoints]:
        return [standing(SIZE) for _ in boxes]


def follow(
    frames: Sequence[Sequence[Box]], choice: PersonChoice | None = None, official: bool = False
) -> dict[str, Note]:
    events: list[Event] = []
    network: Any = Scripted(frames)
    pictures = [np.zeros((SIZE[1], SIZE[0], 3), np.uint8)] * len(frames)
    list(OnnxPeople(network, network, official).follow(pictures, choice or PersonChoice(), events.append))
    return notes_of(events)


ONE, OTHER = Box(20, 40, 60, 160, 0.9), Box(200, 20, 290, 170, 0.8)


def test_several_people_at_the_beginning() -> None:
    note = follow([[], [ONE, OTHER], *[[ONE, OTHER]] * 20])["several_people"]
    assert note.text == (
        "2 people are in frame 1 (1 at 20,40 (40x120), 2 at 200,20 (90x150)); person 2, the largest, is "
        "followed. Choose with --person N, --point x,y or --box."
    )
    assert note.data == {"frame": 1, "boxes": [[20, 40, 60, 160], [200, 20, 290, 170]], "followed": 2}
    assert not follow([[ONE, OTHER]] * 20, PersonChoice(number=1))


def test_people_who_come_later() -> None:
    note = follow([*[[ONE]] * 10, *[[ONE, OTHER]] * 8, *[[ONE]] * 4])["several_people"]
    assert note.text == (
        "8 of 22 frames show more than one person (10 to 17; at most 2); the person of frame 0 is followed. "
        "To follow another, cut the clip."
    )
    assert note.data == {"frames": 8, "of": 22, "most": 2, "ranges": [(10, 17)]}
    assert not follow([*[[ONE]] * 10, [ONE, OTHER], *[[ONE]] * 4]), "one false detection"


def test_the_official_rule_tracks_nobody() -> None:
    """The largest of each frame, another one for a while: that is said, and what follows one person."""
    larger = Box(180, 5, 310, 178, 0.8)
    frames = [*[[ONE]] * 10, *[[ONE, larger]] * 6, *[[ONE]] * 4, *[[]] * 3, [ONE]]
    told = follow(frames, official=True)
    assert "6 of 24 frames show more than one person (10 to 15; at most 2)" in told["several_people"].text
    assert "the largest of each frame is taken. Follow one with --person" in told["several_people"].text
    assert told["person_changed"].data == {"back": [], "cut": [], "jumped": [10, 16]}
    assert "in 2 frames (10, 16)." in told["person_changed"].text


def test_a_cut_to_others() -> None:
    told = follow([*[[ONE]] * 10, *[[Box(250, 10, 300, 100, 0.9)]] * 20])
    assert told["person_changed"].data == {"back": [], "cut": [10], "jumped": []}
    assert told["person_changed"].text == (
        "The person may have changed: others are seen, as after a cut, and the largest is followed, in frame "
        "10. Cut the clip there if so, or choose with --person, --point or --box."
    )


def test_jumps_are_no_motion() -> None:
    walk = [Box(x, 40, x + 40, 160) for x in range(0, 200, 20)]
    assert jumps(walk) == [] and jumps([ONE, None, OTHER]) == [] and jumps([ONE, OTHER, OTHER]) == [1]


def test_programs_get_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(FakePeople(0, range(7, 15)), FakeSegmenter())
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **options: stages)
    write_reference(tmp_path / "c.png", (128, 96))
    clip = write_clip(tmp_path / "c.mkv", 15)
    arguments = ["preprocess", str(tmp_path / "c.png"), str(clip), "-o", str(tmp_path / "o"), "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--size", "64x48"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {line["code"]: line["data"] for line in lines if line.get("event") == "Note" and line["code"]}
    told = {"frames": 8, "of": 15, "first": 7, "ranges": [[7, 14]]}
    assert found == {"no_person": told, "no_face": told}
