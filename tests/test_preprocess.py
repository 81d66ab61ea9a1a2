"""The whole preparation with people and outlines that are known: what the files hold, and what broken input
ends in.

Every case of broken input ends in prepared clips or in one sentence, and then nothing is left behind.
"""

import json
import os
import threading
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any, get_args

import av
import numpy as np
import pytest
from made_clips import (
    RATE,
    SIZE,
    FakePeople,
    FakeSegmenter,
    box_of,
    damaged,
    make,
    outline_of,
    standing,
    textured,
    write_clip,
    write_reference,
)
from waits import until

from trt_wan.errors import InputError, OutputError, TrtWanError, UsageError
from trt_wan.preprocess.clips.sizes import Fit, fit, resize_by_area
from trt_wan.preprocess.clips.streams import BATCH, ahead, batches, split
from trt_wan.preprocess.footage import plan_sizes
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.observe import Part
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.onnx_people import OnnxPeople
from trt_wan.preprocess.people.person import Box, PersonFrame
from trt_wan.preprocess.pictures.masks import Compat, Mask, MaskShape
from trt_wan.preprocess.preprocess import preprocess
from trt_wan.preprocess.sam2.segmenter import Sam2Segmenter
from trt_wan.preprocess.stages import BoxSegmenter, Stages
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.job import Inputs, Mode
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.writer import VideoWriter

ANIMATE = {"keypoints.json", "preview.mp4", "src_face.mp4", "src_pose.mp4", "src_ref.png"}
REPLACE = ANIMATE | {"src_bg.mp4", "src_mask.mp4"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mkv", 10)


def read(path: Path) -> Picture:
    with Clip(path) as clip:
        return np.concatenate([clip.window([k]) for k in range(clip.frames)])


# --- What is made ----------------------------------------------------------------------------------------


def test_animate(clip: Path, tmp_path: Path) -> None:
    """The reference's shape; the pose where the person is, letterboxed; readable by the generator."""
    events: list[Event] = []
    out = make(tmp_path, clip, events=events)
    assert {path.name for path in out.iterdir()} == ANIMATE
    clips = open_clips(Inputs.from_folder(out, "animate"), 5)
    assert (clips.width, clips.height, clips.frames, clips.rate) == (112, 160, 10, RATE)
    assert (out / "src_ref.png").read_bytes() == (tmp_path / "character.png").read_bytes()
    pose = read(out / "src_pose.mp4").max(axis=3) > 60
    height = round(112 * 180 / 320)
    top = (160 - height) // 2
    assert not pose[:, : top - 2].any() and not pose[:, top + height + 2 :].any(), (
        "drawn on the black borders"
    )
    for k in range(10):
        columns = np.flatnonzero(pose[k].any(axis=0))
        box = box_of(standing(SIZE, 2 * k))
        assert abs(columns[0] - box.x0 * 112 / 320) < 4 and abs(columns[-1] - box.x1 * 112 / 320) < 4
    assert "People are found by a made-up source." in [e.text for e in events if isinstance(e, Note)]
    with Clip(out / "preview.mp4") as preview:
        assert (preview.width, preview.height, preview.frames) == (*SIZE, 10)


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_replace(clip: Path, tmp_path: Path, compat: Compat | None) -> None:
    """The hole is where the mask is, to the pixel; the person is inside; the rest is untouched."""
    people = FakePeople()
    out = make(
        tmp_path, clip, people, mode="replace", compat=compat, rate=RATE, mask=MaskShape(compat=compat)
    )
    assert {path.name for path in out.iterdir()} == REPLACE
    clips = open_clips(Inputs.from_folder(out, "replace"), 5)
    expected = (192, 112) if compat == "kijai" else (192, 96)
    assert (clips.width, clips.height, clips.frames, clips.rate) == (*expected, 10, RATE)
    assert set(people.seen) == {(*SIZE[::-1], 3)}, "people are looked for in the clip's own frames"
    ratios = (expected[0] / SIZE[0], expected[1] / SIZE[1])
    scale = min(ratios) if compat == "official" else max(ratios)
    offset = [(new - old * scale) / 2 for new, old in zip(expected, SIZE, strict=True)]
    masks, backgrounds = read(out / "src_mask.mp4"), read(out / "src_bg.mp4").astype(int)
    assert set(np.unique(masks)) <= ({0, 255} if compat is None else set(range(6)) | set(range(250, 256)))
    for k in range(10):
        mask = masks[k, ..., 0] > 127
        points = standing(SIZE, 2 * k)
        points[:, :2] = points[:, :2] * scale + offset
        person = outline_of(points, expected)
        assert 0.1 < mask.mean() < 0.9 and not (person & ~mask).any()
        assert backgrounds[k][mask].mean() < 1.5 and np.percentile(backgrounds[k][mask], 99) < 24
        if compat == "official":
            original = resize_by_area(textured(SIZE, k), 192 * 112)
        else:
            original = fit(textured(SIZE, k), expected[1], expected[0], "crop")
        assert abs(backgrounds[k] - original)[~mask].mean() < 2
        assert (original.min() > 0) == (compat != "official"), "black bars"


def test_frame_rate_sound_and_count(clip: Path, tmp_path: Path) -> None:
    """12 to 30 frames per second; the clip's sound lies in the pose clip, where the generator looks."""
    loud = write_clip(tmp_path / "loud.mp4", 10, codec="libx264", sound=True)
    out = make(tmp_path, loud, FakePeople(step=0), rate=Fraction(30))
    for name in ANIMATE - {"keypoints.json", "src_ref.png"}:
        with Clip(out / name) as made:
            assert (made.frames, made.rate) == (25, Fraction(30)), name
            assert made.has_sound == (name == "src_pose.mp4")
    assert len(json.loads((out / "keypoints.json").read_text())["frames"]) == 25


def test_the_rates_of_the_others(clip: Path, tmp_path: Path) -> None:
    with Clip(make(tmp_path, clip, compat="official") / "src_pose.mp4") as made:
        assert (made.frames, made.rate) == (25, 30)
    with Clip(make(tmp_path, clip, compat="kijai", overwrite=True) / "src_pose.mp4") as made:
        assert made.rate == 16 and (made.width, made.height) == (192, 112)


def test_exact_sizes(clip: Path, tmp_path: Path) -> None:
    for mode in ("animate", "replace"):
        out = make(tmp_path, clip, mode=mode, fit="crop", overwrite=True)
        with Clip(out / "src_pose.mp4") as made:
            assert (made.width, made.height) == (192, 112)


def test_without_a_face_clip(clip: Path, tmp_path: Path) -> None:
    out = make(tmp_path, clip, face=False)
    assert {path.name for path in out.iterdir()} == ANIMATE - {"src_face.mp4"}
    assert open_clips(Inputs.from_folder(out, "animate"), 5).face is None


def test_hands_and_head_can_be_left_out(clip: Path, tmp_path: Path) -> None:
    drawn = [
        int(
            (read(make(tmp_path, clip, overwrite=True, **options) / "src_pose.mp4")[0].max(axis=2) > 40).sum()
        )
        for options in ({}, {"hands": False}, {"head": False}, {"hands": False, "head": False})
    ]
    assert drawn[0] > max(drawn[1:3]) and min(drawn[1:3]) > drawn[3] > 0


def test_the_preview_shows_everything(clip: Path, tmp_path: Path) -> None:
    """The mask is tinted, the box and the skeleton are drawn, and one frame says that nobody is there."""
    out = make(tmp_path, clip, FakePeople(away=range(7, 10)), mode="replace")
    preview, masks = read(out / "preview.mp4").astype(int), read(out / "src_mask.mp4")[..., 0] > 127
    original = fit(textured(SIZE, 0), 96, 192, "crop").astype(int)
    change = preview[0] - original
    inside = masks[0]
    assert change[inside][:, 0].mean() > 20 > abs(change[~inside]).mean(), "the mask is not tinted"
    assert (preview[0].min(axis=2) > 225).sum() > 100 and original.max() < 180, "no box, no label"
    assert abs(preview[9] - fit(textured(SIZE, 9), 96, 192, "crop")).max() > 60, "no words on the last frame"


# --- Keypoints -------------------------------------------------------------------------------------------


def test_keypoints_given_back_make_the_same_clips(clip: Path, tmp_path: Path) -> None:
    """No people source is asked. And edited they make other ones."""
    out = make(tmp_path, clip, FakePeople(away=[4]), mode="replace")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    file = tmp_path / "edited.json"
    file.write_bytes(before["keypoints.json"])
    nobody = FakePeople()
    again = make(tmp_path, clip, nobody, mode="replace", keypoints=file, overwrite=True)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before and not nobody.seen
    data = json.loads(file.read_text())
    for joint in data["frames"][0]["keypoints"]:
        joint[0] += 20
    file.write_text(json.dumps(data))
    edited = make(tmp_path, clip, nobody, mode="replace", keypoints=file, overwrite=True)
    old, new = (
        np.flatnonzero((pose[0].max(axis=2) > 60).any(axis=0))
        for pose in map(read, poses(before, edited, tmp_path))
    )
    assert new[0] - old[0] == pytest.approx(20 * 192 / 320, abs=2)


def poses(before: dict[str, bytes], edited: Path, folder: Path) -> list[Path]:
    (folder / "before.mp4").write_bytes(before["src_pose.mp4"])
    return [folder / "before.mp4", edited / "src_pose.mp4"]


def test_keypoints_serve_another_mode_and_size(clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    file.write_bytes((make(tmp_path, clip) / "keypoints.json").read_bytes())
    found = make(tmp_path, clip, mode="replace", size=(96, 64), overwrite=True) / "src_mask.mp4"
    before = found.read_bytes()
    given = (
        make(tmp_path, clip, mode="replace", size=(96, 64), keypoints=file, overwrite=True) / "src_mask.mp4"
    )
    assert (
        given.read_bytes() == before
        and (tmp_path / "out" / "keypoints.json").read_bytes() == file.read_bytes()
    )


def test_keypoints_of_other_frames_are_refused(clip: Path, tmp_path: Path) -> None:
    keypoints = make(tmp_path, clip) / "keypoints.json"
    with pytest.raises(InputError, match=r"keypoints\.json has 10 frames where this clip and rate give 5"):
        make(tmp_path, clip, keypoints=keypoints, overwrite=True, rate=Fraction(6))
    smaller = write_clip(tmp_path / "smaller.mkv", 10, (160, 90))
    with pytest.raises(InputError, match=r"is for a clip of 320x180, and this one is 160x90"):
        make(tmp_path, smaller, keypoints=keypoints, overwrite=True)


@pytest.mark.parametrize("how", ["area", "crop", "pad", "stretch"])
def test_places_are_where_the_pixels_go(tmp_path: Path, how: Fit) -> None:
    """A white square in a tall clip: its box in the clip's pixels is around it in the scaled frame."""
    size, square = (100, 170), Box(60, 30, 80, 50)
    picture = np.full((size[1], size[0], 3), 40, np.uint8)
    picture[30:50, 60:80] = 255
    path = write_clip(tmp_path / "c.mkv", 1, size)
    for compat in ("official", None):
        job = PreprocessJob(Path(), path, Path(), "replace", (192, 112), how, compat=compat)
        with Clip(path) as clip:
            sizes = plan_sizes(job, picture, clip)
        placed = sizes.placed(PersonFrame(square, None)).box
        assert placed is not None and sizes.frame == sizes.canvas
        rows, columns = np.nonzero(sizes.fitted(picture).min(axis=2) > 150)
        if not len(rows):
            assert placed.y1 < 0, "cut off"
            continue
        seen = (columns.min(), max(rows.min(), 0), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(seen, (placed.x0, max(placed.y0, 0), placed.x1, placed.y1))).max() < 1.6


# --- Retargeting -----------------------------------------------------------------------------------------


def test_retargeting_is_drawn_in_the_references_pixels(clip: Path, tmp_path: Path) -> None:
    plain = read(make(tmp_path, clip) / "src_pose.mp4")
    people = FakePeople()
    out = make(tmp_path, clip, people, retarget="safe", overwrite=True)
    assert people.seen[-1] == (160, 112, 3), "the reference at the size of the video"
    moved = read(out / "src_pose.mp4")
    assert moved.shape == plain.shape and not np.array_equal(moved, plain)
    assert json.loads((out / "keypoints.json").read_text())["reference"]["keypoints"]
    with pytest.raises(InputError, match=r"No person was found in .*character\.png"):
        make(tmp_path, clip, Absent(), retarget="safe", overwrite=True)


class Absent(FakePeople):
    """In the clip, but not in the reference."""

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: object
    ) -> Iterator[PersonFrame]:
        given = list(frames)
        self.nobody = len(given) == 1
        return super().follow(given, choice, silent)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "replace", "retarget": "safe"}, "nothing is retargeted"),
        ({"edited_driving": Path("x.png")}, "read for retargeting only"),
        ({"rate": Fraction(-1)}, "A rate of -1 makes no video"),
        ({"rate": Fraction(1001)}, "A rate of 1001 makes no video"),
        ({"face_padding": -1}, "A face padding of -1"),
        ({"face_padding": 1025}, "A face padding of 1025"),
        ({"size": (20_000, 20_000)}, "20000x20000 is too large"),
        ({"mask": MaskShape(grow=3)}, "there is no mask, so --grow"),
        ({"keypoints": Path("k"), "choice": PersonChoice(number=1)}, "so --person would do nothing"),
    ],
)
def test_jobs_that_cannot_be(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PreprocessJob(Path("r"), Path("c"), Path("o"), **options)  # type: ignore[arg-type]


# --- Memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_memory_does_not_grow_with_the_clip(tmp_path: Path, mode: Mode) -> None:
    """60 more frames cost less than 6 frames of memory; what is held at once is less than 16: a busy machine
    lets more of them wait between the threads.
    """
    peaks = []
    for frames in (30, 90):
        clip = write_clip(tmp_path / f"{frames}.mp4", frames, codec="libx264")
        tracemalloc.start()
        make(
            tmp_path, clip, FakePeople(step=0.5), mode=mode, size=SIZE, face=mode == "replace", overwrite=True
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    numbers = 60 * 10_000  # keypoints and skeletons, which are kept
    frame, faces = SIZE[0] * SIZE[1] * 3, 4 * 512 * 512 * 3
    assert peaks[1] - peaks[0] < 6 * frame + numbers and peaks[1] < 16 * frame + faces + numbers, peaks


def test_readers_of_the_same_frames() -> None:
    """Everybody gets all; what all have read is let go; an error reaches whoever reads on."""

    def items() -> Iterator[Picture]:
        for k in range(6):
            yield np.full(1, k)
        raise InputError("damaged")

    before, behind = split(items(), 2)
    seen = [weakref.ref(next(before)) for _ in range(3)]
    assert [int(next(behind)[0]) for _ in range(2)] == [0, 1]
    assert [ref() is None for ref in seen] == [True, True, False]
    assert int(next(before)[0]) == 3 and [int(next(behind)[0]) for _ in range(4)] == [2, 3, 4, 5]
    assert [int(next(before)[0]) for _ in range(2)] == [4, 5]
    for reader in (behind, before):
        with pytest.raises(InputError, match="damaged"):
            next(reader)


def test_items_are_made_ahead_in_another_thread() -> None:
    """As many as asked for and no more; errors come in their place; who stops reading stops the making."""
    made: list[tuple[int, int]] = []
    closed: list[bool] = []

    def items(count: int = 9) -> Iterator[int]:
        try:
            for k in range(count):
                made.append((k, get_ident()))
                yield k
            raise InputError("damaged")
        finally:
            closed.append(True)

    coming = ahead(items(), 2)
    assert not made, "before the first is asked for"
    assert next(coming) == 0
    until(lambda: len(made) == 3)
    assert [next(coming) for _ in range(2)] == [1, 2] and len({thread for _, thread in made}) == 1
    assert made[0][1] != get_ident()
    coming.close()
    assert closed and len(made) <= 5
    rest = ahead(items(3), 5)
    assert [next(rest) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="damaged"):
        next(rest)
    assert list(ahead(range(4), 9)) == [0, 1, 2, 3] and list(ahead([], 1)) == []


def test_readers_in_two_threads_get_the_same() -> None:
    first, second = split(range(3000), 2)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.submit(list, first), threads.submit(list, second)
        assert one.result() == other.result() == list(range(3000))


def test_batches_are_small_for_large_frames() -> None:
    small = [np.zeros((18, 32, 3), np.uint8)] * 35
    assert [len(batch) for batch in batches(small)] == [BATCH, BATCH, 3]
    large = [np.broadcast_to(np.uint8(0), (4320, 7680, 3))] * 3
    assert [len(batch) for batch in batches(large)] == [1, 1, 1]


# --- Broken input ----------------------------------------------------------------------------------------


def no_frames(folder: Path) -> Path:
    path = folder / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def empty(folder: Path) -> Path:
    (folder / "clip.mp4").write_bytes(b"")
    return folder / "clip.mp4"


def cut_short(folder: Path) -> Path:
    path = write_clip(folder / "clip.mp4", 30, codec="libx264")
    os.truncate(path, path.stat().st_size // 2)
    return path


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (lambda folder: folder / "nowhere.mp4", "There is no file"),
    "empty file": (empty, "is empty (0 bytes)"),
    "no frames": (no_frames, "cannot be read as a video|has no"),
    "cut short": (cut_short, "cannot be read as a video|damaged"),
    "damaged packet": (damaged, "is damaged"),
    "a picture": (lambda folder: write_reference(folder / "clip.png"), "is a picture, not a video"),
    "a folder": (lambda folder: folder, "has no numbered pictures"),
    "one row of pixels": (
        lambda folder: write_clip(folder / "c.mkv", 2, (4000, 1)),
        "at least 16 pixels a side",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_clip_ends_in_a_sentence(tmp_path: Path, name: str) -> None:
    broken, says = BROKEN[name]
    clip = broken(tmp_path)
    write_reference(tmp_path / "character.png")
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=says.replace("(", r"\(").replace(")", r"\)")) as caught:
        make(tmp_path, clip, mode="replace")
    assert caught.value.hint and set(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_half_way(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clips are written in threads of their own; what one of them meets ends the whole."""
    write = VideoWriter.write

    def full(writer: VideoWriter, picture: Picture) -> None:
        if writer.path.name == "src_bg.mp4" and writer.frames == 4:
            raise OutputError("The disk is full.", "Free some space.")
        write(writer, picture)

    monkeypatch.setattr(VideoWriter, "write", full)
    with pytest.raises(OutputError, match="The disk is full"):
        make(tmp_path, clip, mode="replace")
    assert {path.name for path in tmp_path.iterdir()} == {"character.png"}


def test_a_broken_reference(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "character.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        make(tmp_path, clip)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_one_frame(tmp_path: Path, mode: Mode) -> None:
    out = make(tmp_path, write_clip(tmp_path / "c.mkv", 1), mode=mode)
    assert open_clips(Inputs.from_folder(out, mode), 5).frames == 1


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_nobody_in_the_clip(clip: Path, tmp_path: Path, mode: Mode) -> None:
    with pytest.raises(InputError, match="No person was found in any of the 10 frames") as caught:
        make(tmp_path, clip, FakePeople(nobody=True), mode=mode)
    assert "--box" in caught.value.hint and not (tmp_path / "out").exists()


def test_no_outline_in_the_clip(clip: Path, tmp_path: Path) -> None:
    class Blind:
        name = "a blind segmenter"

        def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
            return (np.zeros(frame.shape[:2], bool) for frame in frames)

    with pytest.raises(InputError, match="No outline of a person was found") as caught:
        make(tmp_path, clip, segmenter=Blind(), mode="replace")
    assert "--segmenter box" in caught.value.hint and not (tmp_path / "out").exists()


def test_the_person_leaves_and_returns(tmp_path: Path) -> None:
    """For longer than is filled in: no pose, no mask and the whole background there; the face has faded."""
    away = range(10, 24)
    clip = write_clip(tmp_path / "c.mkv", 34)
    out = make(tmp_path, clip, FakePeople(step=0, away=away), mode="replace")
    drawn = (read(out / "src_pose.mp4").max(axis=3) > 60).any(axis=(1, 2))
    assert drawn.tolist() == [k not in away for k in range(34)]
    masked = (read(out / "src_mask.mp4")[..., 0] > 127).any(axis=(1, 2))
    assert masked[:10].all() and masked[24:].all() and not masked[13:21].any(), "4 frames share a mask"
    assert read(out / "src_bg.mp4")[15].min() > 20, "black where nobody is"
    faces = read(out / "src_face.mp4")
    assert faces[12].mean() > 60 and faces[23].max() < 8 and faces[24].mean() > 60


class TwoPeople:
    """A detector and a pose network: two people walk through each other, each with a box of their own."""

    class Net:
        path, reason = Path("made-up.onnx"), "in a test"

        def begin(self) -> None:
            pass

    net = Net()

    def __init__(self) -> None:
        self.frame = 0

    def detect(self, frames: Sequence[Picture]) -> list[list[Box]]:
        found = []
        for _ in frames:
            left = 20 + 8 * self.frame
            boxes = [Box(left, 40, left + 40, 160, 0.8), Box(260 - left, 30, 310 - left, 160, 0.9)]
            found.append(sorted(boxes, key=lambda box: -box.score))
            self.frame += 1
        return found

    def estimate(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> list[np.ndarray]:
        made = []
        for box in boxes:
            points = standing((100, 100))
            low, high = points[:, :2].min(0), points[:, :2].max(0)
            points[:, :2] = (points[:, :2] - low) / (high - low) * (box.width, box.height) + (box.x0, box.y0)
            made.append(points)
        return made

    def detecting(self, frames: Sequence[Picture]) -> Any:
        return partial(self.detect, frames)

    def estimating(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> Any:
        return partial(self.estimate, frames, boxes)


def test_the_next_frames_are_looked_at_while_poses_are_awaited() -> None:
    """What was asked of whom, and who was waited for, in batches; results come in order all the same."""
    told: list[str] = []

    class Slow(TwoPeople):
        begun = {"detect": 0, "pose": 0}

        def begin(self, what: str, work: Any) -> Any:
            k = self.begun[what]
            self.begun[what] += 1
            told.append(f"{what} {k}")

            def wait() -> Any:
                told.append(f"{what} {k} there")
                return work()

            return wait

        def detecting(self, frames: Sequence[Picture]) -> Any:
            return self.begin("detect", partial(self.detect, frames))

        def estimating(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> Any:
            return self.begin("pose", partial(self.estimate, frames, boxes))

    frames = [np.zeros((180, 320, 3), np.uint8)] * (2 * BATCH + 3)
    slow, both = Slow(), TwoPeople()
    source, plain = OnnxPeople(slow, slow), OnnxPeople(both, both)  # type: ignore[arg-type]
    found = list(source.follow(iter(frames), PersonChoice(), silent))
    expected = list(plain.follow(iter(frames), PersonChoice(), silent))
    assert [person.box for person in found] == [person.box for person in expected]
    assert len(found) == len(frames)
    assert told == [
        *("detect 0", "detect 1", "detect 0 there", "pose 0"),
        *("detect 2", "detect 1 there", "pose 1", "pose 0 there"),
        *("detect 2 there", "pose 2", "pose 1 there", "pose 2 there"),
    ]


@pytest.mark.parametrize(("number", "width"), [(1, 40), (2, 50)])
def test_two_people_cross_and_the_followed_one_stays(tmp_path: Path, number: int, width: int) -> None:
    clip = write_clip(tmp_path / "c.mkv", 28)
    both = TwoPeople()
    source = OnnxPeople(both, both)  # type: ignore[arg-type]
    out = make(tmp_path, clip, source, choice=PersonChoice(number=number))  # type: ignore[arg-type]
    frames = json.loads((out / "keypoints.json").read_text())["frames"]
    widths = [round(frame["box"][2] - frame["box"][0]) for frame in frames if frame["box"]]
    assert len(widths) > 20 and set(widths) == {width}


def test_several_people_are_said_once(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mkv", 20)
    both, events = TwoPeople(), list[Event]()
    make(tmp_path, clip, OnnxPeople(both, both), events=events)  # type: ignore[arg-type]
    texts = [event.text for event in events if isinstance(event, Note)]
    assert sum("--person" in text for text in texts) == 1, texts


def test_what_happens_to_the_followed_person_is_said() -> None:
    """Out of sight, and then a cut to somebody else: never a silent jump."""

    class Cut(TwoPeople):
        def detect(self, frames: Sequence[Picture]) -> list[list[Box]]:
            found = []
            for _ in frames:
                scenes = ([Box(20, 40, 60, 160, 0.9)], [], [Box(200, 20, 290, 170, 0.9)])
                found.append(scenes[min(self.frame // 10, 2)])
                self.frame += 1
            return found

    events, both = list[Event](), Cut()
    frames = [np.zeros((180, 320, 3), np.uint8)] * 90
    source = OnnxPeople(both, both)  # type: ignore[arg-type]
    boxes = [person.box for person in source.follow(frames, PersonChoice(), events.append)]
    texts = [event.text for event in events if isinstance(event, Note)]
    (first, *_) = [k for k, box in enumerate(boxes) if box is not None and box.x0 > 100]
    assert texts == [
        f"The person may have changed: someone is taken for the person that was out of sight in frame "
        f"{first}. Cut the clip there if so, or choose with --person, --point or --box."
    ]
    (note,) = [event for event in events if isinstance(event, Note)]
    assert (note.code, note.data) == ("person_changed", {"back": [first], "cut": [], "jumped": []})


def test_every_part_is_observed(clip: Path, tmp_path: Path) -> None:
    """Once per frame and clip, as a benchmark needs it; every part that is entered is left."""
    entered, left, lock = Counter[str](), Counter[str](), threading.Lock()

    @contextmanager
    def observe(part: str) -> Iterator[None]:
        with lock:
            entered[part] += 1
        yield
        with lock:
            left[part] += 1

    both = TwoPeople()
    people = OnnxPeople(both, both, observe=observe)  # type: ignore[arg-type]
    job = PreprocessJob(write_reference(tmp_path / "c.png"), clip, tmp_path / "out", "replace", (192, 112))
    preprocess(job, Stages(people, FakeSegmenter(), observe))
    assert entered == left and set(entered) == set(get_args(Part))
    with Clip(clip) as opened:
        frames = opened.frames
    assert {part: count / frames for part, count in entered.items() if "draw" in part} == {
        "draw skeleton": 1,
        "draw preview": 1,
    }
    assert (entered["encode"], entered["cut background"], entered["finish clips"]) == (5 * frames, frames, 5)


def test_the_official_choice_is_each_frames_largest() -> None:
    both = TwoPeople()
    frames = [np.zeros((180, 320, 3), np.uint8)] * 20
    official = OnnxPeople(both, both, official=True)  # type: ignore[arg-type]
    found = [person.box for person in official.follow(frames, PersonChoice(), silent)]
    assert {round(box.width) for box in found if box} == {50}


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_one_pixel(tmp_path: Path, mode: Mode) -> None:
    clip = write_clip(tmp_path / "c.mkv", 3, (1, 1))
    try:
        out = make(tmp_path, clip, mode=mode)
    except TrtWanError as error:
        assert error.message and error.hint and not (tmp_path / "out").exists()
    else:
        assert open_clips(Inputs.from_folder(out, mode), 5).frames == 3


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_8k(tmp_path: Path, mode: Mode) -> None:
    clip = write_clip(tmp_path / "c.mp4", 2, (7680, 4320), codec="libx264")
    out = make(tmp_path, clip, mode=mode)
    assert open_clips(Inputs.from_folder(out, mode), 5).frames == 2
    with Clip(out / "preview.mp4") as preview:
        assert preview.width * preview.height <= 832 * 480 * 1.01


def test_the_box_as_mask() -> None:
    frame = np.zeros((60, 80, 3), np.uint8)
    points = standing((80, 60))
    people = [PersonFrame(Box(-5, 10, 30.4, 500), None), PersonFrame(None, points), PersonFrame(None, None)]
    one, two, three = BoxSegmenter().outlines([frame] * 3, people)
    assert one[10:, :30].all() and one.sum() == 50 * 30
    around = box_of(points)
    assert two.sum() == pytest.approx(around.area, rel=0.1) and not three.any()


def test_a_segmenter_that_is_known() -> None:
    """The fake one of these tests, so that what they compare with is right."""
    points = standing(SIZE)
    (mask,) = FakeSegmenter().outlines([np.zeros((*SIZE[::-1], 3), np.uint8)], [PersonFrame(None, points)])
    x, y = points[0, :2].astype(int)
    assert mask[y, x] and not mask[:, 0].any()


class FakeTracker:
    """Has the person from the first prompt to frame 5, then a corner until it is prompted again."""

    made: "FakeTracker"

    def __init__(self, model: object, *, chunk: int | None, frames: int) -> None:
        self.before, self.later = list[int](), list[int]()
        self.frames, self.chunk, self.done = frames, chunk, 0
        FakeTracker.made = self

    def add_points(self, frame: int, number: int, points: np.ndarray, labels: np.ndarray) -> None:
        assert number == 1 and (np.asarray(labels) == 1).all() and 4 <= len(labels) == len(points)
        (self.later if self.done else self.before).append(frame)

    @property
    def next_frame(self) -> int:
        return self.done

    def track(self, frames: Iterable[Picture]) -> Iterator[SimpleNamespace]:
        for k, _ in enumerate(frames):
            self.done = k + 1
            lost = k > 5 and not any(frame <= k for frame in self.later)
            found = CORNER if lost else outline_of(standing(SIZE), SIZE)
            objects = {1: None} if k >= min(self.before) else {}
            yield SimpleNamespace(objects=objects, mask=lambda number, found=found: found)


CORNER = np.zeros(SIZE[::-1], bool)
CORNER[:9, :9] = True


@pytest.mark.parametrize("official", [False, True])
def test_sam2_is_prompted_by_the_pose_and_again_where_it_is_lost(official: bool) -> None:
    """Frame 0 shows too little to begin with. Lost for three frames, 6 to 8, it is told again on frame 9."""
    clear = standing(SIZE)
    few = clear.copy()
    few[5:17, 2] = 0.2  # shoulders, arms and legs are guesses
    people = [PersonFrame(None, few)] + [PersonFrame(None, clear)] * 13
    frames = [np.zeros((*SIZE[::-1], 3), np.uint8)] * 14
    segmenter = Sam2Segmenter(None, "x.pt", official, FakeTracker)  # type: ignore[arg-type]
    masks = list(segmenter.outlines(iter(frames), people))
    assert len(masks) == FakeTracker.made.frames == 14
    if official:
        assert FakeTracker.made.chunk == 400 and FakeTracker.made.before == [0, 3, 6, 9, 12]
        assert FakeTracker.made.later == []
    else:
        assert FakeTracker.made.before[0] == 1 and FakeTracker.made.later == [9]
        assert [bool(mask[60:].any()) for mask in masks] == [False] + [True] * 5 + [False] * 3 + [True] * 5
