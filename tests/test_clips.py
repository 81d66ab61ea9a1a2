"""Prepared clips that fit together are opened as one; those that do not are refused by name, with the fix."""

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from tiny_job import FRAMES, PLAN, RATE, prepare, write_clip, write_reference, write_sound

from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.events import Note
from trt_wan.runtime.job import Inputs, Mode, unused_clips
from trt_wan.runtime.paste_back import pasted_back
from trt_wan.runtime.pipeline import window_clips
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.writer import VideoWriter

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


def notes_of(clips: Clips) -> dict[str, Note]:
    """By code; each is there once."""
    assert len({note.code for note in clips.notes}) == len(clips.notes)
    return {note.code: note for note in clips.notes}


def picture(path: Path, value: Callable[[int], int]) -> Path:
    """A PNG of the canvas's size, whose column x has the grey `value(x)`."""
    row = np.array([value(x) for x in range(PLAN.width)], np.uint8)
    cv2.imwrite(str(path), np.broadcast_to(row[None, :, None], (PLAN.height, PLAN.width, 3)))
    return path


@pytest.mark.parametrize("kind", ["png", "clip"])
def test_one_mask_and_one_background_stand_for_all_frames(folder: Path, kind: str) -> None:
    (folder / "src_mask.mp4").unlink()
    (folder / "src_bg.mp4").unlink()
    if kind == "png":
        picture(folder / "src_mask.png", lambda x: 255 * (x >= 32))
        picture(folder / "src_bg.png", lambda x: 4 * x)
    else:
        write_clip(folder / "src_mask.mp4", frames=1, colour=(255, 255, 255))
        write_clip(folder / "src_bg.mp4", frames=1)
    clips = opened(folder, "replace")
    assert clips.frames == FRAMES
    signals = window_clips(clips, list(range(7, 20)), grey_face=False)
    assert signals.person is not None and signals.background is not None
    assert signals.person.shape == (13, PLAN.latent_height, PLAN.latent_width)
    assert set(np.unique(signals.person)) == {0, 1} and (signals.person == signals.person[0]).all()
    background = signals.background(0, 13)
    assert background.shape[1] == 13 and (background == background[:, :1]).all()
    if kind == "png":
        assert (signals.person[12] == (np.arange(0, PLAN.width, 8) >= 32)).all()
        assert np.allclose(background[0, 12, 0], np.arange(PLAN.width) * 4 / 127.5 - 1, atol=1e-6)
    note = notes_of(clips)["repeated"]
    assert note.data["frames"] == FRAMES and len(note.data["files"]) == 2  # type: ignore[arg-type]
    suffix = ".png" if kind == "png" else ".mp4"
    assert f"src_bg{suffix} is one picture" in note.text and f"src_mask{suffix}" in note.text


def test_paste_back_with_one_mask_and_one_background(folder: Path) -> None:
    mask = picture(folder / "m.png", lambda x: 255 * (x < 16))
    background = picture(folder / "b.png", lambda x: 99)
    painted = np.full((PLAN.height, PLAN.width, 3), 200, np.uint8)
    pasted = list(pasted_back([painted] * 3, background, mask))
    assert len(pasted) == 3
    for frame in pasted:
        assert (frame[:, :16] == 200).all() and (frame[:, 40:] == 99).all()


def test_clips_are_trimmed_where_that_is_asked_for(folder: Path) -> None:
    write_clip(folder / "src_face.mp4", (512, 512), FRAMES - 2)
    write_clip(folder / "src_mask.mp4", frames=FRAMES + 1, colour=(255, 255, 255))
    with pytest.raises(InputError) as caught:
        opened(folder, "replace")
    assert "--trim-to-shortest" in caught.value.hint
    clips = open_clips(Inputs.from_folder(folder, "replace", trim_to_shortest=True), PLAN.frames)
    assert clips.frames == FRAMES - 2 and clips.rate == RATE
    note = notes_of(clips)["trimmed"]
    assert note.data["frames"] == FRAMES - 2 and "cut to 18 frames" in note.text
    assert "src_pose.mp4 has 20" in note.text and "src_face.mp4 has 18" in note.text


def test_soft_masks_are_made_hard_and_counted(folder: Path) -> None:
    """Levels 6 and 249 are compression noise; 7 to 248 are soft, and 128 is the first of the person."""
    (folder / "src_mask.mp4").unlink()
    levels = [0, 6, 7, 100, 127, 128, 200, 248, 249, 255]
    picture(folder / "src_mask.png", lambda x: levels[x % 10])
    clips = opened(folder, "replace")
    signals = window_clips(clips, [0, 1], grey_face=False)
    columns = np.array([levels[x % 10] for x in range(PLAN.width)])
    assert signals.person is not None and (signals.person == (columns[::8] >= 128)).all()
    assert signals.soft == 2 * PLAN.height * int(((columns > 6) & (columns < 249)).sum())
    picture(folder / "src_mask.png", lambda x: [0, 6, 249, 255][x % 4])
    assert window_clips(opened(folder, "replace"), [0, 1], grey_face=False).soft == 0


def test_a_transparent_reference_lies_on_the_colour_that_is_asked_for(folder: Path) -> None:
    drawing = np.full((48, 64, 4), (10, 200, 90, 0), np.uint8)
    drawing[10:20, 10:20, 3] = 255
    cv2.imwrite(str(folder / "src_ref.png"), drawing)
    for behind, level in (("white", (255, 255, 255)), ("#0a0b0c", (10, 11, 12))):
        clips = open_clips(Inputs.from_folder(folder, "animate", behind=behind), PLAN.frames)
        assert (clips.reference[0, 0] == level).all() and (clips.reference[15, 15] == (90, 200, 10)).all()
        note = notes_of(clips)["transparent"]
        assert note.data["background"] == behind and "--reference-background" in note.text
    with pytest.raises(UsageError, match="is not a colour"):
        Inputs.from_folder(folder, "animate", behind="hwite")


def test_notes_of_one_kind_are_one(folder: Path) -> None:
    """Prepared clips of other programs are untagged, all of them; the mask's colours are none."""
    for path in folder.glob("*.mp4"):
        with av.open(str(path)) as source, av.open(str(folder / "new.mp4"), "w") as target:
            stream = target.add_stream("libx264", rate=RATE)
            first = source.streams.video[0]
            stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
            for frame in source.decode(video=0):
                plain = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
                target.mux(stream.encode(plain.reformat(format="yuv420p")))
            target.mux(stream.encode(None))
        (folder / "new.mp4").replace(path)
    (note,) = opened(folder, "replace").notes
    files = note.data["files"]
    assert isinstance(files, list) and note.code == "untagged_colour"
    assert [Path(file).name for file in files] == ["src_pose.mp4", "src_face.mp4", "src_bg.mp4"]
    assert "src_pose.mp4 has no colour tags" in note.text and "src_face.mp4, src_bg.mp4" in note.text


def test_a_clip_scaled_by_ffmpeg_may_have_pixels_that_are_not_square(folder: Path) -> None:
    with VideoWriter(folder / "plain.mp4", 64, 48, RATE) as writer:
        for _ in range(FRAMES):
            writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.finish()
    with av.open(str(folder / "plain.mp4")) as source, av.open(str(folder / "src_pose.mp4"), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        video.sample_aspect_ratio = Fraction(5, 4)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
    clips = open_clips(Inputs(folder / "src_ref.png", folder / "src_pose.mp4", None), PLAN.frames)
    assert (clips.width, clips.height) == (80, 48) and "pixel_aspect" in notes_of(clips)
    with pytest.raises(InputError) as caught:
        opened(folder, "replace")
    assert "64x48 where 80x48 is needed" in caught.value.message
    (folder / "src_face.mp4").unlink()
    command = caught.value.hint.splitlines()[1]
    assert command.startswith("ffmpeg -i") and "scale=80:48,setsar=1" in command


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
    with pytest.raises(UsageError, match=says) as caught:
        Inputs.from_folder(folder, mode)
    assert ("Add them" in caught.value.hint) == (mode == "replace" and len(gone) > 1)
