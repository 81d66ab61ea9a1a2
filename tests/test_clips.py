"""Prepared clips that fit together are opened as one; those that do not are refused by name, with the fix."""

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tiny_job import FRAMES, PLAN, RATE, prepare, write_clip, write_reference, write_sound

from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.job import Inputs, Mode, unused_clips
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.pictures import read_picture

SIZE = (PLAN.width, PLAN.height)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(folder / "clips", write_sound(folder / "tone.m4a", 1))


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(prepared, tmp_path / "clips")


def opened(folder: Path, mode: Mode) -> Clips:
    return open_clips(Inputs.from_folder(folder, mode), PLAN.frames)


def test_all_clips_of_replace(folder: Path) -> None:
    clips = opened(folder, "replace")
    assert (clips.width, clips.height, clips.frames, clips.rate) == (*SIZE, FRAMES, RATE)
    assert np.array_equal(clips.reference, read_picture(folder / "src_ref.png"))
    by_name = {
        "src_pose": clips.pose,
        "src_face": clips.face,
        "src_bg": clips.background,
        "src_mask": clips.mask,
    }
    for name, clip in by_name.items():
        assert clip is not None and clip.path == folder / f"{name}.mp4"
        assert clip.window(range(PLAN.frames)).shape[0] == clip.window(range(PLAN.frames)).shape[0] == 13


def test_animate_leaves_background_and_mask_aside(folder: Path) -> None:
    clips = opened(folder, "animate")
    assert clips.background is clips.mask is None
    assert unused_clips(folder, "animate") == ["src_bg.mp4", "src_mask.mp4"]
    assert unused_clips(folder, "replace") == []
    (folder / "src_bg.mp4").unlink()
    assert unused_clips(folder, "animate") == ["src_mask.mp4"]


def test_rate_and_length_are_the_driving_clips(folder: Path) -> None:
    """The pose clip's where there is one, else the face clip's; never the background's."""
    write_clip(folder / "src_bg.mp4", rate=Fraction(50))
    write_clip(folder / "src_face.mp4", (512, 512), rate=Fraction(24))
    assert opened(folder, "replace").rate == RATE
    (folder / "src_pose.mp4").unlink()
    assert opened(folder, "replace").rate == 24


def test_without_a_pose_clip_the_canvas_is_the_backgrounds_else_the_references(folder: Path) -> None:
    (folder / "src_pose.mp4").unlink()
    write_reference(folder / "src_ref.png", (96, 32))
    replaced, animated = opened(folder, "replace"), opened(folder, "animate")
    assert (replaced.width, replaced.height) == SIZE
    assert (animated.width, animated.height) == (96, 32)
    assert animated.pose is None and animated.frames == FRAMES


def test_with_a_pose_clip_the_reference_may_have_any_size(folder: Path) -> None:
    write_reference(folder / "src_ref.png", (71, 53))
    assert (opened(folder, "animate").width, opened(folder, "animate").height) == SIZE


def reference_as_canvas(folder: Path) -> None:
    (folder / "src_pose.mp4").unlink()
    write_reference(folder / "src_ref.png", (71, 53))


# what is changed, then what the message and the hint must say
MISFITS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "pose not of 16": (
        lambda folder: write_clip(folder / "src_pose.mp4", (60, 42)),
        ["src_pose.mp4", "60x42", "multiples of 16"],
        "64x48",
    ),
    "reference not of 16": (reference_as_canvas, ["src_ref.png", "71x53", "multiples of 16"], "64x48"),
    "background of another size": (
        lambda folder: write_clip(folder / "src_bg.mp4", (48, 64)),
        ["src_bg.mp4", "48x64", "64x48"],
        "scale=64:48",
    ),
    "mask of another size": (
        lambda folder: write_clip(folder / "src_mask.mp4", (32, 32)),
        ["src_mask.mp4", "32x32", "64x48"],
        "scale=64:48",
    ),
    "face of another size": (
        lambda folder: write_clip(folder / "src_face.mp4", (256, 256)),
        ["src_face.mp4", "256x256", "512x512"],
        "scale=512:512",
    ),
    "face is shorter": (
        lambda folder: write_clip(folder / "src_face.mp4", (512, 512), FRAMES - 1),
        ["src_pose.mp4 has 20", "src_face.mp4 has 19", "src_mask.mp4 has 20"],
        "same length",
    ),
    "mask is longer": (
        lambda folder: write_clip(folder / "src_mask.mp4", frames=FRAMES + 1),
        ["src_pose.mp4 has 20", "src_mask.mp4 has 21"],
        "same length",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_clips_that_do_not_fit_are_refused(folder: Path, misfit: str) -> None:
    change, says, fix = MISFITS[misfit]
    change(folder)
    mode: Mode = "animate" if misfit == "reference not of 16" else "replace"
    with pytest.raises(InputError) as caught:
        opened(folder, mode)
    assert all(piece in caught.value.message for piece in says), caught.value.message
    assert fix in caught.value.hint


@pytest.mark.parametrize(
    ("gone", "mode", "says"),
    [
        (["src_ref.png"], "animate", "no src_ref.png"),
        (["src_bg.mp4"], "replace", "lacks src_bg.mp4."),
        (["src_mask.mp4"], "replace", "lacks src_mask.mp4."),
        (["src_bg.mp4", "src_mask.mp4"], "replace", "lacks src_bg.mp4 and src_mask.mp4."),
        (["src_pose.mp4", "src_face.mp4"], "animate", "neither a pose clip nor a face clip"),
    ],
)
def test_a_folder_that_lacks_what_the_mode_needs_is_refused(
    folder: Path, gone: list[str], mode: Mode, says: str
) -> None:
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(UsageError, match=says):
        Inputs.from_folder(folder, mode)
