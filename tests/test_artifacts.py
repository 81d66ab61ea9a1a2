"""The folder of prepared clips: whole or not at all; keypoints that come back as they were."""

import json
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from made_clips import box_of, standing, textured

from trt_wan.errors import InputError, OutputError
from trt_wan.preprocess.clips.artifacts import ALL, CRF, PRESET, REFERENCE, ArtifactFolder
from trt_wan.preprocess.clips.keypoints import (
    FoundPeople,
    read_keypoints,
    require_fit,
    rounded,
    write_keypoints,
)
from trt_wan.preprocess.people.person import NOBODY, PersonFrame
from trt_wan.preprocess.pictures.background import cut_hole
from trt_wan.preprocess.pictures.masks import grid_blocks
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.video.writer import VideoWriter

# --- The folder ------------------------------------------------------------------------------------------


def fill(folder: ArtifactFolder, names: tuple[str, ...] = ALL, content: str = "new") -> None:
    for name in names:
        (folder.making / name).write_text(content)


def test_everything_appears_at_once_and_the_reference_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with ArtifactFolder(tmp_path / "a" / "b") as folder:
        fill(folder)
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [folder.making.name]
        assert folder.publish() == tmp_path / "a" / "b"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == set(ALL) == set(order)
    assert order[-1] == REFERENCE


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(type(error)), ArtifactFolder(tmp_path / "a" / "b") as folder:
        fill(folder)
        raise error
    with pytest.raises(type(error)), ArtifactFolder(tmp_path) as folder:
        fill(folder)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_clips_that_are_there_are_kept_without_leave(tmp_path: Path) -> None:
    (tmp_path / "src_bg.mp4").write_text("old")
    with pytest.raises(OutputError, match="has src_bg.mp4 already") as caught:
        ArtifactFolder(tmp_path)
    assert f"--inputs {tmp_path}" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["src_bg.mp4"]


def test_with_leave_the_old_ones_go_and_other_files_stay(tmp_path: Path) -> None:
    for name in (*ALL, "mine.txt"):
        (tmp_path / name).write_text("old")
    made = tuple(name for name in ALL if name not in ("src_bg.mp4", "src_mask.mp4"))
    with ArtifactFolder(tmp_path, overwrite=True) as folder:
        fill(folder, made)
        assert (tmp_path / "src_bg.mp4").read_text() == "old"
        folder.publish()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "mine.txt": "old",
        **dict.fromkeys(made, "new"),
    }


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="cannot be written to"):
        ArtifactFolder(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- The codec -------------------------------------------------------------------------------------------


def test_masks_come_back_exactly_and_holes_stay_black(tmp_path: Path) -> None:
    """Blocks of 16 pixels are the codec's own. Read as the generator reads: channel 0, no threshold."""
    size, random = (192, 112), np.random.default_rng(2)
    masks = [grid_blocks(random.random((112, 192)) < 0.002, 16) for _ in range(9)]
    with (
        VideoWriter(
            tmp_path / "m.mp4", *size, Fraction(25), quality=Quality(crf=CRF, preset=PRESET)
        ) as mask_clip,
        VideoWriter(
            tmp_path / "b.mp4", *size, Fraction(25), quality=Quality(crf=CRF, preset=PRESET)
        ) as background,
    ):
        for k, mask in enumerate(masks):
            mask_clip.write(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
            background.write(cut_hole(textured(size, k), mask))
        mask_clip.finish()
        background.finish()
    with Clip(tmp_path / "m.mp4") as m, Clip(tmp_path / "b.mp4") as b:
        for k, mask in enumerate(masks):
            assert np.array_equal(m.window([k])[0, ..., 0], mask * np.uint8(255))
            read = b.window([k])[0].astype(int)
            assert read[mask].max() <= 24 and read[mask].mean() < 1
            assert abs(read - textured(size, k))[~mask].mean() < 2
    with av.open(str(tmp_path / "m.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.pix_fmt, codec.profile) == ("yuv420p", "High"), "not what every player decodes"


# --- Keypoints -------------------------------------------------------------------------------------------


@pytest.fixture
def found() -> FoundPeople:
    points = standing((320, 180)).round(2)
    unknown = points.copy()
    unknown[3] = 0
    frames = [PersonFrame(box_of(points), points), NOBODY, PersonFrame(None, unknown)]
    return FoundPeople(frames, (320, 180), PersonFrame(box_of(points), points), (192, 112))


def same(a: PersonFrame, b: PersonFrame) -> bool:
    if (a.keypoints is None) != (b.keypoints is None) or (a.box is None) != (b.box is None):
        return False
    if a.box is not None and b.box is not None:
        sides = [[box.x0, box.y0, box.x1, box.y1, box.score] for box in (a.box, b.box)]
        if not np.allclose(*sides, atol=6e-4):
            return False
    return a.keypoints is None or np.allclose(a.keypoints, b.keypoints, atol=6e-4)


def test_keypoints_come_back(tmp_path: Path, found: FoundPeople) -> None:
    path, again = tmp_path / "keypoints.json", tmp_path / "again.json"
    write_keypoints(path, found)
    read = read_keypoints(path)
    assert all(same(a, b) for a, b in zip(read.frames, found.frames, strict=True))
    assert read.size == found.size and read.reference_size == found.reference_size
    assert (
        read.reference is not None and found.reference is not None and same(read.reference, found.reference)
    )
    for a, b in zip(read.frames, rounded(found).frames, strict=True):
        assert a.box == b.box and np.array_equal(a.keypoints, b.keypoints), (
            "clips made from the file would differ"
        )
    write_keypoints(again, read)
    assert again.read_bytes() == path.read_bytes()
    assert len(path.read_text().splitlines()) == 2 + len(found.frames), "a line per frame, to be edited"
    require_fit(path, read, 3, (320, 180))


def test_keypoints_of_another_clip_or_size(tmp_path: Path, found: FoundPeople) -> None:
    with pytest.raises(InputError, match="has 3 frames where this clip and rate give 4") as caught:
        require_fit(tmp_path / "k.json", found, 4, (320, 180))
    assert "--rate" in caught.value.hint
    with pytest.raises(InputError, match="is for a clip of 320x180, and this one is 832x464"):
        require_fit(tmp_path / "k.json", found, 3, (832, 464))


def set_in(*keys: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("schema", to="other/1"), "does not say that it is trt-wan/keypoints/1"),
        (set_in("frames", to=[]), "has no frames"),
        (set_in("size", to=[320, 0]), "what size its frames have"),
        (set_in("frames", 0, to=7), "frame 0 is neither null nor"),
        (set_in("frames", 0, "keypoints", to=[[1, 2, 3]]), "frame 0 does not have 133 keypoints"),
        (set_in("frames", 2, "keypoints", 5, to=[1, 2]), "keypoint 5 of frame 2 is not 3 numbers"),
        (
            set_in("frames", 2, "keypoints", 5, to=[1, 2, float("nan")]),
            "keypoint 5 of frame 2 is not 3 numbers",
        ),
        (set_in("frames", 2, "keypoints", 5, to=[1, "2", 1]), "keypoint 5 of frame 2 is not 3 numbers"),
        (set_in("frames", 0, "box", to=[1, 2, 3, 4]), "the box of frame 0 is not 5 numbers"),
        (set_in("reference", "keypoints", to=3), "the reference does not have 133 keypoints"),
        (set_in("reference_size", to=[10**30, 5]), "what size its frames have"),
        (set_in("frames", 0, "box", to=[9, 2, 3, 4, 1]), "the box of frame 0 ends before it begins"),
        (set_in("frames", 0, "box", to=[1, 2, 1e400, 4, 1]), "the box of frame 0 is not 5 numbers"),
        (set_in("frames", 0, to={"box": None}), "frame 0 is neither null nor"),
        (set_in("frames", 0, to={"box": None, "keypoint": None}), "frame 0 is neither null nor"),
        (set_in("frames", 2, "keypoints", 5, to=[1, True, 1]), "keypoint 5 of frame 2 is not 3 numbers"),
    ],
)
def test_keypoints_edited_into_something_impossible(
    tmp_path: Path, found: FoundPeople, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = tmp_path / "keypoints.json"
    write_keypoints(path, found)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        read_keypoints(path)
    assert says in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{,}", "is not JSON: .* in line 1"),
        (b'{"a":\n"\xff\xfe"}', "line 2 is not UTF-8"),
        (b"[]", "does not say that it is"),
        (b"\xef\xbb\xbf[]", "does not say that it is"),
        (b'{"frames":\n' + b"[" * 5000 + b"]" * 5000 + b"}", "line 2 has more than 32 brackets inside"),
        (b'{"frames":\n' + b'{"a":' * 99_999, "line 2 has more than 32 brackets inside"),
        (b'["' + b'\\"' * 400_000, "is not JSON: Unterminated string .* in line 1"),
        (b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\""}', "does not say that it is"),
        (b'{"size":\n\n[' + b"9" * 10_000 + b", 2]}", "line 3 has a number of more than 64 digits"),
        (b"[" + b"[]," * 400_000 + b"[]]", "has more than 1080576 bytes"),
    ],
    ids=str,
)
def test_what_is_no_keypoints_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "k.json").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(InputError, match=says):
        read_keypoints(tmp_path / "k.json", frames=1)
    assert time.perf_counter() - start < 5
    with pytest.raises(InputError, match="cannot be read"):
        read_keypoints(tmp_path / "nowhere.json")
