"""Clips that are not plain: pixels that are not square, HDR, interlaced, uneven, transparent; and clips that
are no video files. The right values come from formulas, from PIL and from the plain clip.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_video import difference, make_clip, numbered

from trt_wan.errors import InputError
from trt_wan.runtime.events import Note
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.stills import AnyClip, Stills, open_clip

SIZE = (96, 64)
DISC = (48, 32, 20)  # centre and radius


def disc(k: int = 0) -> Picture:
    picture = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
    return cv2.circle(picture, (DISC[0] + k, DISC[1]), DISC[2], (220, 120, 60), -1)  # type: ignore[return-value]


def lossless(path: Path, frames: Sequence[Picture], **stream_options: Any) -> Path:
    """PNG in a .mov; the options are attributes of the codec context."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for name, value in stream_options.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def noted(clip: AnyClip, code: str) -> Note:
    (note,) = [note for note in clip.notes if note.code == code]
    return note


def everything(path: Path) -> tuple[Picture, AnyClip]:
    with open_clip(path, 8) as clip:
        return clip.window(range(clip.frames)), clip


# --- pixels that are not square --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aspect", "shown"), [(Fraction(2), (192, 64)), (Fraction(4, 3), (128, 64)), (Fraction(1, 2), (96, 128))]
)
def test_pixels_become_square(tmp_path: Path, aspect: Fraction, shown: tuple[int, int]) -> None:
    path = lossless(tmp_path / "c.mov", [disc(), disc(4)], sample_aspect_ratio=aspect)
    frames, clip = everything(path)
    assert (clip.width, clip.height) == shown and frames.shape[1:3] == shown[::-1]
    for k in (0, 1):
        want = cv2.resize(disc(4 * k), shown, interpolation=cv2.INTER_CUBIC)
        assert np.abs(frames[k].astype(int) - want).mean() < 2
    note = noted(clip, "pixel_aspect")
    pixels = f"{aspect.numerator}:{aspect.denominator}"
    assert note.data["pixels"] == pixels and note.data["coded"] == "96x64"
    assert note.data["shown"] == f"{shown[0]}x{shown[1]}" and pixels in note.text


def test_pixels_are_widened_along_the_lines_of_the_file_also_where_it_is_turned(tmp_path: Path) -> None:
    """2:1 in a file that is turned by a quarter: the upright picture gets higher."""
    frames = numbered(2)
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path, wide = tmp_path / "turned.mp4", tmp_path / "wide.mp4"
    make_clip(path, frames, matrix=turned)
    with av.open(str(path)) as source, av.open(str(wide), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        video.set_display_matrix(turned)
        video.sample_aspect_ratio = Fraction(2)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
    square, plain = everything(path)
    read, clip = everything(wide)
    assert (plain.width, plain.height) == (64, 96) and (clip.width, clip.height) == (64, 192)
    want = cv2.resize(square[1], (64, 192), interpolation=cv2.INTER_CUBIC)
    assert np.abs(read[1].astype(int) - want).mean() < 2


def test_square_pixels_are_not_touched(tmp_path: Path) -> None:
    path = lossless(tmp_path / "c.mov", [disc()], sample_aspect_ratio=Fraction(1))
    frames, clip = everything(path)
    assert difference(frames[0], disc()) == 0 and clip.notes == []


@pytest.mark.parametrize("aspect", [Fraction(1, 9), Fraction(9)])
def test_pixels_that_no_clip_has_are_refused(tmp_path: Path, aspect: Fraction) -> None:
    path = lossless(tmp_path / "c.mov", [disc()], sample_aspect_ratio=aspect)
    with pytest.raises(InputError, match=f"pixels of {aspect.numerator}:{aspect.denominator}") as caught:
        Clip(path)
    assert caught.value.hint.splitlines()[1].startswith("ffmpeg -i") and "setsar=1" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "says"), [((8, 64), "at least 16 pixels a side"), ((17_000, 16), "at most 16384 pixels a side")]
)
def test_sizes_are_bounded(tmp_path: Path, size: tuple[int, int], says: str) -> None:
    path = lossless(tmp_path / "c.mov", [np.zeros((size[1], size[0], 3), np.uint8)])
    with pytest.raises(InputError, match=f"is {size[0]}x{size[1]}.*{says}"):
        Clip(path)


# --- colours ---------------------------------------------------------------------------------------------

TO_BT2020 = np.array(  # ITU-R BT.2087
    [[0.627404, 0.329283, 0.043313], [0.069097, 0.919540, 0.011362], [0.016391, 0.088013, 0.895595]]
)
NITS = np.array([0, 1, 5, 10, 25, 50, 100, 150, 203, 400, 1000])
TINTS = np.array([[1, 1, 1], [1, 0.5, 0.2], [0.3, 0.6, 1]])


def pq(nits: NDArray[Any]) -> NDArray[Any]:
    """SMPTE ST 2084."""
    y = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(nits: NDArray[Any]) -> NDArray[Any]:
    """ITU-R BT.2100 for a display of 1000 cd/m², whose system gamma is 1.2."""
    luma = np.maximum(nits @ (0.2627, 0.678, 0.0593), 1e-9) / 1000
    scene = np.minimum(nits / 1000 * luma[..., None] ** (-0.2 / 1.2), 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def tagged(path: Path, signal: NDArray[Any], transfer: int, primaries: int = 9, matrix: int = 9) -> Path:
    """RGB signals in 0…1, as 10-bit YCbCr 4:4:4 by the matrix of BT.2020."""
    r, g, b = np.moveaxis(signal, 2, 0)
    y = 0.2627 * r + 0.678 * g + 0.0593 * b
    planes = (64 + 876 * y, 512 + 896 * (b - y) / 1.8814, 512 + 896 * (r - y) / 1.4746)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = signal.shape[:2]
        stream.pix_fmt = "yuv444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, matrix
        context.color_range = 1
        frame = av.VideoFrame(stream.width, stream.height, "yuv444p10le")
        for plane, values in zip(frame.planes, planes, strict=True):
            rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
            rows[:, : plane.width] = np.rint(values)
            plane.update(rows.tobytes())
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def patches(values: NDArray[Any]) -> NDArray[Any]:
    """Each value as 16x16 pixels."""
    return np.repeat(np.repeat(values, 16, 0), 16, 1)


@pytest.mark.parametrize(("transfer", "name", "encode"), [(16, "PQ", pq), (18, "HLG", hlg)])
def test_hdr_light_up_to_reference_white_is_shown_as_bt709_shows_it(
    tmp_path: Path, transfer: int, name: str, encode: Any
) -> None:
    """203 cd/m² is white, and below the light is that of a BT.1886 display (gamma 2.4): within 3 levels for
    grey, 6 for colours, whose way leads through a table in swscale. Unconverted it is up to 150 off.
    """
    light = NITS[None, :, None] * TINTS[:, None, :]
    frames, clip = everything(tagged(tmp_path / "c.mkv", encode(patches(light) @ TO_BT2020.T), transfer))
    read = frames[0][8::16, 8::16].astype(int)
    want = 255 * np.clip(light / 203, 0, 1) ** (1 / 2.4)
    assert np.abs(read[0] - want[0]).max() <= 3
    in_range = NITS <= 203
    assert np.abs(read - want)[1:, in_range].max() <= 6
    note = noted(clip, "hdr")
    assert note.data == {
        "file": str(clip.path),
        "transfer": name,
        "primaries": "BT.2020",
        "reference_white": 203,
    }
    assert name in note.text and "203" in note.text


def test_wide_gamut_of_standard_range_is_converted_too(tmp_path: Path) -> None:
    light = np.linspace(0.1, 1, 8)[None, :, None] * TINTS[:, None, :]
    signal = (patches(light) @ TO_BT2020.T) ** (1 / 2.4)
    frames, clip = everything(tagged(tmp_path / "c.mkv", signal, transfer=1))
    assert np.abs(frames[0][8::16, 8::16] - 255 * light ** (1 / 2.4)).max() <= 5
    assert noted(clip, "wide_gamut").data["primaries"] == "BT.2020"


def test_untagged_colours_are_noted(tmp_path: Path) -> None:
    _, untagged = everything(make_clip(tmp_path / "u.mp4", numbered(2)))
    _, plain = everything(make_clip(tmp_path / "t.mp4", numbered(2), colorspace=1))
    assert noted(untagged, "untagged_colour").data["read_as"] == "BT.601" and plain.notes == []


# --- time ------------------------------------------------------------------------------------------------


def test_uneven_frames_are_noted_with_numbers(tmp_path: Path) -> None:
    times = [40 * i for i in range(20)] + [800 + 100 * i for i in range(10)]
    _, clip = everything_of(make_clip(tmp_path / "c.mkv", numbered(30), times=times, colorspace=1))
    note = noted(clip, "variable_rate")
    assert (note.data["uneven"], note.data["ms"]) == (9, [40.0, 100.0])
    assert "9 of 29" in note.text and note.data["rate"] == pytest.approx(29 / 1.7)


def everything_of(path: Path) -> tuple[Picture, AnyClip]:
    with open_clip(path, 64) as clip:
        return clip.window(range(clip.frames)), clip


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(60000, 1001), Fraction(240)])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_even_frames_are_even_also_in_whole_milliseconds(tmp_path: Path, rate: Fraction, suffix: str) -> None:
    path = make_clip(tmp_path / f"c{suffix}", numbered(30), rate=rate, colorspace=1)
    with Clip(path) as clip:
        assert "variable_rate" not in {note.code for note in clip.notes}


def test_interlaced_frames_are_deinterlaced(tmp_path: Path) -> None:
    """A bar moves 2 pixels from field to field: woven together its edges are combs. x264 tags our frames with
    the lower field first, which is the one that stays.
    """
    fields = [np.full((64, 96), 30, np.uint8) for _ in range(24)]
    for k, field in enumerate(fields):
        field[:, 8 + 2 * k : 40 + 2 * k] = 220
    path = tmp_path / "c.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"crf": "1", "x264-params": "bff=1"}
        for first, second in zip(fields[::2], fields[1::2], strict=True):
            woven = second.copy()
            woven[1::2] = first[1::2]
            frame = av.VideoFrame.from_ndarray(np.repeat(woven[..., None], 3, 2), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    frames, clip = everything_of(path)
    assert clip.frames == 12 and noted(clip, "interlaced")
    for k in range(1, 11):
        assert np.abs(np.diff(frames[k, ..., 0].astype(int), axis=0)).max() < 60, "190 where there are combs"
        assert np.abs(frames[k, 33, :, 0].astype(int) - fields[2 * k][33]).max() < 40


# --- transparency, and pictures in motion ----------------------------------------------------------------


def rgba(k: int) -> Picture:
    """A disc; all else is transparent, with a colour hidden under it."""
    picture = np.full((64, 96, 4), (90, 10, 200, 0), np.uint8)
    return cv2.circle(picture, (30 + 4 * k, 32), 20, (220, 120, 60, 255), -1)  # type: ignore[return-value]


def on_white(picture: Picture) -> Picture:
    part = picture[..., 3:].astype(float) / 255
    return np.rint(picture[..., :3] * part + 255 * (1 - part)).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_animations_are_clips_and_their_transparency_is_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    first, *more = [Image.fromarray(rgba(k)) for k in range(5)]
    options = {"lossless": True} if suffix == ".webp" else {"disposal": 2} if suffix == ".gif" else {}
    first.save(path, save_all=True, append_images=more, duration=100, loop=0, **options)
    frames, clip = everything(path)
    assert (clip.frames, clip.rate, clip.width, clip.height) == (5, 10, 96, 64)
    for k in range(5):
        assert difference(frames[k], on_white(rgba(k))) <= 1
    assert noted(clip, "transparent").data["share"] == pytest.approx((rgba(0)[..., 3] == 0).mean(), abs=1e-5)


def test_an_opaque_animation_has_no_note(tmp_path: Path) -> None:
    first, *more = [Image.fromarray(on_white(rgba(k))) for k in range(3)]
    first.save(tmp_path / "c.webp", save_all=True, append_images=more, duration=50, lossless=True)
    frames, clip = everything(tmp_path / "c.webp")
    assert clip.notes == [] and difference(frames[2], on_white(rgba(2))) == 0 and clip.rate == 20


def test_a_damaged_animation_is_refused(tmp_path: Path) -> None:
    first, *more = [Image.fromarray(rgba(k)) for k in range(5)]
    first.save(tmp_path / "c.webp", save_all=True, append_images=more, duration=50, lossless=True)
    content = (tmp_path / "c.webp").read_bytes()
    (tmp_path / "c.webp").write_bytes(content[:60])
    with pytest.raises(InputError, match="animated WebP") as caught:
        open_clip(tmp_path / "c.webp")
    assert caught.value.hint
    large = bytearray(content)
    large[24:30] = (8_000).to_bytes(3, "little") * 2
    (tmp_path / "c.webp").write_bytes(large)
    with pytest.raises(InputError, match="too long to be read: 5 frames of 8001x8001"):
        open_clip(tmp_path / "c.webp")


def numbered_pictures(folder: Path, name: str, numbers: Sequence[int]) -> list[Picture]:
    folder.mkdir(exist_ok=True)
    pictures = [disc(k) for k in range(len(numbers))]
    for number, picture in sorted(zip(numbers, pictures, strict=True), key=lambda pair: pair[0] * 7 % 5):
        cv2.imwrite(str(folder / name.format(number)), picture[..., ::-1])
    return pictures


@pytest.mark.parametrize("name", ["{:04d}.png", "frame{}.png", "ComfyUI_{:05d}_.png", "1080p_{:03d}.png"])
def test_a_folder_of_numbered_pictures_is_a_clip(tmp_path: Path, name: str) -> None:
    """In the order of their numbers: 10 after 9 also without leading zeros."""
    pictures = numbered_pictures(tmp_path / "dance", name, range(8, 13))
    (tmp_path / "dance" / "notes.txt").touch()
    frames, clip = everything(tmp_path / "dance")
    assert isinstance(clip, Stills) and (clip.rate, clip.has_sound) == (30, False)
    assert difference(frames, np.stack(pictures)) == 0
    note = noted(clip, "pictures")
    assert (note.data["frames"], note.data["missing"], note.data["rate"]) == (5, 0, 30)
    assert "--rate" in note.text


def test_patterns_gaps_and_rates(tmp_path: Path) -> None:
    numbered_pictures(tmp_path / "d", "other_{:04d}.png", range(3))
    pictures = numbered_pictures(tmp_path / "d", "a_{:04d}.png", [1, 2, 5])
    with open_clip(tmp_path / "d" / "a_%04d.png", rate=Fraction(16)) as clip:
        assert (clip.frames, clip.rate) == (3, 16)
        assert difference(clip.window([2, 0, 2]), np.stack([pictures[k] for k in (2, 0, 2)])) == 0
        assert noted(clip, "pictures").data["missing"] == 2 and "2 are missing" in clip.notes[0].text
    with pytest.raises(InputError, match="2 series of numbered pictures: a_%d.png, other_%d.png") as caught:
        open_clip(tmp_path / "d")
    assert str(tmp_path / "d" / "a_%d.png") in caught.value.hint
    assert open_clip(tmp_path / "d" / "a_%d.png").frames == 3
    with pytest.raises(InputError, match="No file fits"):
        open_clip(tmp_path / "d" / "b_%04d.png")


def test_pictures_of_two_sizes_are_refused_by_number(tmp_path: Path) -> None:
    numbered_pictures(tmp_path / "d", "{}.png", range(3))
    cv2.imwrite(str(tmp_path / "d" / "2.png"), np.zeros((64, 64, 3), np.uint8))
    with open_clip(tmp_path / "d") as clip, pytest.raises(InputError, match="frame 2: 96x64 to 64x64"):
        clip.window(range(3))


def test_frames_with_exif_can_be_read(tmp_path: Path) -> None:
    """PyAV 18.1 knows no EXIF beside a frame, and fails with a ValueError."""
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x0112] = 1
    Image.fromarray(disc()).save(jpeg, "JPEG", exif=exif, quality=98)
    path = tmp_path / "c.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for k in range(3):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 25)
            container.mux(packet)
    frames, clip = everything(path)
    assert clip.frames == 3 and np.abs(frames[2].astype(int) - disc()).mean() < 3
