"""Clips and pictures are read as other readers read them; what the writer makes is read back.

cv2's own video reader is the independent one: it decodes the same file with its own copy of ffmpeg.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from lengths import faults, grey, make_sound, measured, windows
from lengths import write as write_greys
from numpy.typing import NDArray

import trt_wan
from trt_wan.errors import InputError, OutputError, TrtWanError, UsageError
from trt_wan.runtime.video.encoder import encoders
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.working_file import Settled
from trt_wan.runtime.video.writer import VideoWriter

WIDTH, HEIGHT = 96, 64
RATES = (Fraction(12), Fraction(30000, 1001), Fraction(25))
SOLIDS = (
    (200, 30, 40),
    (20, 180, 60),
    (30, 60, 220),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (250, 240, 20),
)


def numbered(count: int) -> Picture:
    """Frames that can be told apart: the number is a grey level, the corners are told apart by colour."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    frames += (16 + 200 * np.arange(count) // max(count - 1, 1)).astype(np.uint8)[:, None, None, None]
    frames[:, :16, :32] = (220, 40, 40)
    frames[:, -16:, :32] = (40, 60, 220)
    return frames


def clicks(seconds: float, rate: int = 48_000) -> NDArray[np.float32]:
    """A click of 4 ms at 0.25, 0.75, 1.25, … s."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.8 * ((t + 0.25) % 0.5 < 0.004) * np.sin(2 * np.pi * 2000 * t)).astype(np.float32)


def make_clip(
    path: Path,
    frames: Picture,
    rate: Fraction = Fraction(25),
    sound: str = "",
    matrix: Sequence[int] = (),
    times: Sequence[int] = (),
    colorspace: int = 0,
) -> Path:
    """A clip made with PyAV alone; `times` are frame times in ms, `sound` is the codec of the clicks."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        video.options = {"crf": "4", "g": "8", "bf": "2"}
        if times:
            video.codec_context.time_base = Fraction(1, 1000)
        if matrix:
            video.set_display_matrix(matrix)
        if colorspace:
            video.codec_context.colorspace = colorspace
        if sound:
            audio = container.add_stream(sound, rate=48_000)
            audio.codec_context.layout = "mono"
        container.start_encoding()
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=colorspace or None)
            picture.pts = times[number] if times else number
            picture.time_base = Fraction(1, 1000) if times else 1 / rate
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if sound:
            wave = clicks(float(len(frames) / rate) + 0.5)
            samples = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 48_000, 0, Fraction(1, 48_000)
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))
    return path


def read_by_cv2(path: Path) -> Picture:
    reader, frames = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (step := reader.read())[0]:
        frames.append(step[1][..., ::-1])
    return np.stack(frames)


def read_all(path: Path) -> Picture:
    with Clip(path) as clip:
        return clip.window(range(clip.frames))


def difference(a: NDArray[Any], b: NDArray[Any]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(np.int32) - b).max())


def heard(path: Path) -> tuple[str, float, list[float]]:
    """Codec, end and times of the clicks, in seconds from the first picture."""
    with av.open(str(path)) as container:
        audio, video = container.streams.audio[0], container.streams.video[0]
        assert video.start_time is not None and video.time_base is not None
        zero = float(video.start_time * video.time_base)
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=48_000)
        end, loud = 0.0, []
        for decoded in container.decode(audio):
            for frame in resampler.resample(decoded):
                assert frame.time is not None
                start = frame.time - zero
                end = start + frame.samples / 48_000
                loud += list(start + np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2) / 48_000)
        times = [t for before, t in zip([-1.0, *loud], loud, strict=False) if t - before > 0.25]
        return audio.codec_context.codec.canonical_name, end, times


# Reading


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".mov"])
def test_every_container_gives_the_same_frames_as_cv2(tmp_path: Path, suffix: str) -> None:
    path = make_clip(tmp_path / f"clip{suffix}", numbered(30))
    with Clip(path) as clip:
        assert (clip.width, clip.height, clip.frames, clip.rate) == (WIDTH, HEIGHT, 30, 25)
        assert not clip.has_sound
        assert difference(clip.window(range(30)), read_by_cv2(path)) == 0


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),
        ((-1, 0, 0, -1), lambda f: f[:, ::-1, ::-1]),
        ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),
        ((0, 1, 1, 0), lambda f: f.transpose(0, 2, 1, 3)),
    ],
    ids=["clockwise", "counter-clockwise", "half", "mirrored", "transposed"],
)
def test_rotation_is_applied(tmp_path: Path, matrix: tuple[int, ...], upright: Any) -> None:
    frames = numbered(4)
    a, b, c, d = (value << 16 for value in matrix)
    path = make_clip(tmp_path / "turned.mp4", frames, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    plain = read_all(make_clip(tmp_path / "plain.mp4", frames))
    read = read_all(path)
    assert difference(read, upright(plain)) == 0
    if matrix in (
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (-1, 0, 0, -1),
    ):  # cv2 takes mirrored pictures for turned ones
        assert difference(read, read_by_cv2(path)) == 0
    with Clip(path) as clip:
        assert (clip.height, clip.width) == read.shape[1:3]


def test_a_rotation_by_no_quarter_turn_is_refused(tmp_path: Path) -> None:
    half = 46341  # 65536·√½
    matrix = (half, half, 0, -half, half, 0, 0, 0, 1 << 30)
    with pytest.raises(InputError, match="not a quarter turn"):
        Clip(make_clip(tmp_path / "turned.mp4", numbered(2), matrix=matrix))


@pytest.mark.parametrize("space", [Colorspace.ITU709, Colorspace.ITU601, 0])
def test_the_tagged_matrix_is_used(tmp_path: Path, space: int) -> None:
    """Untagged (0) is written and read as BT.601. With the wrong matrix the difference is above 20."""
    frames = np.stack([np.full((HEIGHT, WIDTH, 3), solid, np.uint8) for solid in SOLIDS])
    path = make_clip(tmp_path / "clip.mp4", frames, colorspace=int(space))
    assert difference(read_all(path), frames) <= 3


def test_windows_overlap_and_run_back(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", numbered(30))
    frames = read_by_cv2(path)
    with Clip(path, history=18) as clip:
        for indices in (range(0, 9), range(8, 17), range(8, 17), [*range(16, 30), *range(28, 20, -1)]):
            assert difference(clip.window(indices), frames[list(indices)]) == 0
        with pytest.raises(AssertionError, match="frame 11 is gone: 12 is the oldest kept"):
            clip.window([11])
        with pytest.raises(AssertionError, match="frame 30 of 30"):
            clip.window([30])


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path: Path) -> None:
    """The usual cut without re-encoding: the file starts at a key frame, its edit list a few frames later."""
    whole, cut = make_clip(tmp_path / "whole.mp4", numbered(30)), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
                hidden = round(Fraction(5, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - hidden, packet.dts - hidden, video
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 30, "the container's own count includes the hidden frames"
    with Clip(cut) as clip:
        assert clip.frames == 25
        assert difference(clip.window(range(25)), read_by_cv2(whole)[5:]) == 0


def test_rate_of_uneven_frames_is_their_mean(tmp_path: Path) -> None:
    """A phone that drops to 10 frames per second in the dark: the mean keeps the sound in step."""
    times = [40 * i for i in range(20)] + [800 + 100 * i for i in range(20)]
    with Clip(make_clip(tmp_path / "clip.mkv", numbered(40), times=times)) as clip:
        assert clip.frames == 40
        assert abs(39 / clip.rate - Fraction(times[-1], 1000)) < Fraction(1, 1000)


@pytest.mark.parametrize("rate", RATES)
def test_rates_survive_the_milliseconds_of_mkv(tmp_path: Path, rate: Fraction) -> None:
    with Clip(make_clip(tmp_path / "clip.mkv", numbered(30), rate=rate)) as clip:
        assert clip.rate == rate


def zeroed_packets(source: Path, target: Path, start: int) -> Path:
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        video = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.dts is not None:
                if number >= start:
                    packet.update(bytes(packet.size))
                packet.stream = video
                writer.mux(packet)
    return target


def test_damage_inside_a_clip_is_named_with_its_place(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mp4", numbered(30))
    damaged = zeroed_packets(whole, tmp_path / "damaged.mp4", 16)
    with Clip(damaged, history=30) as clip:
        assert clip.frames == 30
        assert difference(clip.window(range(8)), read_by_cv2(whole)[:8]) == 0
        with pytest.raises(InputError, match=r"damaged.* 30") as caught:
            clip.window(range(8, 30))
        assert "ffmpeg -i" in caught.value.hint


def index_first(source: Path, target: Path) -> Path:
    """The same pictures in an mp4 whose index precedes them."""
    with av.open(str(source)) as given, av.open(str(target), "w", options={"movflags": "+faststart"}) as made:
        video = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                made.mux(packet)
    return target


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_clip_cut_short_is_refused_on_opening(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, HEIGHT, WIDTH, 3), np.uint8)
    whole = make_clip(tmp_path / f"whole{suffix}", noise)
    if suffix == ".mp4":  # its index must come first for the beginning to be readable at all
        whole = index_first(whole, tmp_path / "fast.mp4")
    short = tmp_path / f"short{suffix}"
    short.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Clip(whole).close()
    with pytest.raises(InputError, match="cut short") as caught:
        Clip(short)
    assert "ffmpeg -i" in caught.value.hint


def test_what_is_no_clip_is_refused_with_its_reason(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            Clip(path)
        assert caught.value.hint
        return caught.value.message

    assert "There is no file" in refused(tmp_path / "missing.mp4")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in refused(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    assert "cannot be read as a video" in refused(tmp_path / "text.mp4")
    for name in ("picture.png", "picture.jpg"):
        cv2.imwrite(str(tmp_path / name), numbered(1)[0])
        assert "is a picture" in refused(tmp_path / name)
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        audio = container.add_stream("aac", rate=48_000)
        audio.codec_context.layout = "mono"
        samples = av.AudioFrame.from_ndarray(clicks(1)[None], format="fltp", layout="mono")
        samples.sample_rate = 48_000
        container.mux(audio.encode(samples) + audio.encode(None))
    assert "has no video" in refused(tmp_path / "sound.m4a")
    assert "has no frames" in refused(make_clip(tmp_path / "none.avi", numbered(0)))


def test_awkward_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = numbered(3)
    os.rename(make_clip(tmp_path / "plain.mp4", frames), "señor: 人 %03d.mp4")
    assert len(read_all(Path("señor: 人 %03d.mp4"))) == 3
    with VideoWriter(Path("a:b ü.mp4"), WIDTH, HEIGHT, Fraction(12)) as writer:
        writer.write(frames[0])
        writer.finish()
    assert len(read_all(Path("a:b ü.mp4"))) == 1


# Pictures


def test_pictures_are_rgb_and_upright(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "bild-人.png"

    def save(pixels: NDArray[Any], suffix: str = ".png") -> bytes:
        data = cv2.imencode(suffix, pixels)[1].tobytes()
        path.write_bytes(data)
        return data

    save(picture[..., ::-1])
    assert difference(read_picture(path), picture) == 0
    save(picture[..., 0])
    assert difference(read_picture(path), np.repeat(picture[..., :1], 3, axis=2)) == 0

    jpeg = save(cv2.resize(picture, (96, 64)), ".jpg")
    upright = read_picture(path)
    orientation_6 = bytes.fromhex(
        "ffe1 0022 457869660000 4d4d002a00000008 0001 0112 0003 00000001 0006 0000 00000000"
    )
    path.write_bytes(jpeg[:2] + orientation_6 + jpeg[2:])
    assert difference(read_picture(path), np.rot90(upright, -1)) == 0


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    clip = make_clip(tmp_path / "clip.mp4", numbered(2))
    for path in (tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "missing.png", tmp_path, clip):
        with pytest.raises(InputError) as caught:
            read_picture(path)
        assert caught.value.hint


# Writing


def write(path: Path, frames: Picture, rate: Fraction = Fraction(25), sound: Path | None = None) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], rate, sound) as writer:
        for frame in frames:
            writer.write(frame)
        return writer.finish()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, rate: Fraction) -> None:
    solids = np.stack([np.full((HEIGHT, WIDTH, 3), solid, np.uint8) for solid in SOLIDS])
    x, y = np.arange(WIDTH) * 255 // (WIDTH - 1), np.arange(HEIGHT) * 255 // (HEIGHT - 1)
    gradient = np.broadcast_arrays(x[None, :], y[:, None], np.uint8(90))
    frames = np.concatenate([solids, np.stack(gradient, axis=-1)[None].astype(np.uint8)])
    path = write(tmp_path / f"out{suffix}", frames, rate)
    with Clip(path) as clip:
        assert (clip.frames, clip.rate, clip.width, clip.height) == (len(frames), rate, WIDTH, HEIGHT)
        read = clip.window(range(clip.frames))
    assert difference(read[:-1], frames[:-1]) <= 3
    assert np.abs(read[-1].astype(int) - frames[-1]).mean() < 2.5
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        tags = (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range)
        name = "vp9" if suffix == ".webm" else "h264"
        assert (codec.name, codec.pix_fmt, tags) == (name, "yuv420p", (1, 1, 1, 1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "the partial file is gone"


@pytest.mark.parametrize(
    ("codec", "source", "suffix", "expected"),
    [
        ("aac", ".mp4", ".mp4", "aac"),
        ("aac", ".ts", ".mp4", "aac"),
        ("aac", ".mp4", ".mkv", "aac"),
        ("libmp3lame", ".mp4", ".mp4", "mp3"),
        ("libopus", ".mkv", ".mp4", "opus"),
        ("libopus", ".mkv", ".mov", "aac"),
        ("pcm_s16le", ".mkv", ".mp4", "aac"),
        ("flac", ".mkv", ".mp4", "aac"),
        ("flac", ".mkv", ".mkv", "flac"),
        ("ac3", ".mkv", ".mp4", "ac3"),
        ("eac3", ".mkv", ".mov", "eac3"),
        ("aac", ".ts", ".mkv", "aac"),
        ("aac", ".mp4", ".webm", "opus"),
        ("libopus", ".mkv", ".webm", "opus"),
    ],
)
def test_sound_keeps_its_time_and_ends_with_the_pictures(
    tmp_path: Path, codec: str, source: str, suffix: str, expected: str
) -> None:
    """The source's sound is 0.5 s longer than its pictures, and twice as long as what is written."""
    sound = make_clip(tmp_path / f"source{source}", numbered(50), sound=codec)
    path = write(tmp_path / f"out{suffix}", numbered(25), sound=sound)
    name, end, times = heard(path)
    assert name == expected
    least = 1.0 - 312 / 48_000 if suffix == ".webm" else 1.0  # Opus' codec delay lies within the length
    assert least - 0.001 <= end < 1.0 + 4608 / 48_000, "one second and a packet at most (flac's is longest)"
    assert times == pytest.approx([0.25, 0.75], abs=0.002)
    with Clip(path) as clip:
        assert clip.has_sound and clip.frames == 25 and clip.rate == 25
        assert difference(clip.window(range(25)), numbered(25)) < 40, "pictures in order beside the sound"


def test_copied_sound_is_the_same_bits(tmp_path: Path) -> None:
    def packets(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    sound = make_clip(tmp_path / "source.mp4", numbered(25), sound="aac")
    copied = packets(write(tmp_path / "out.mp4", numbered(25), sound=sound))
    assert len(copied) >= 47 and copied == packets(sound)[: len(copied)]


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30), Fraction(24000, 1001)])
def test_sound_of_our_own_video_at_another_rate_does_not_move_the_pictures(
    tmp_path: Path, rate: Fraction
) -> None:
    """mp4 stretches the packet before the first picture to two frames' time; copied so, it delayed all."""
    sound = Path(trt_wan.__file__).parent / "sample" / "driving.mp4"
    black = np.zeros((20, HEIGHT, WIDTH, 3), np.uint8)
    slow = write(tmp_path / "slow.mp4", black, Fraction(12), sound)
    with Clip(write(tmp_path / "out.mp4", black, rate, slow)) as clip:
        assert (clip.rate, clip.frames) == (rate, 20)


def test_a_source_without_sound_gives_a_silent_video(tmp_path: Path) -> None:
    sound = make_clip(tmp_path / "source.mp4", numbered(4))
    with Clip(write(tmp_path / "out.mp4", numbered(4), sound=sound)) as clip:
        assert not clip.has_sound


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc fills new memory for this test")
def test_the_same_frames_give_the_same_file_whatever_was_in_memory_on_any_number_of_cpus(
    tmp_path: Path,
) -> None:
    """x264 takes its own number of threads from the CPUs that a process may use, unless it is told."""
    script = """if True:
        import os
        import sys
        from fractions import Fraction
        from pathlib import Path
        import cv2
        import numpy as np
        from trt_wan.runtime.video.writer import VideoWriter
        if sys.argv[1].endswith("85.mp4"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        rng = np.random.default_rng(0)
        base = rng.normal(128, 60, (60, 40, 3))
        with VideoWriter(Path(sys.argv[1]), 320, 480, Fraction(25)) as writer:
            for _ in range(12):
                base += rng.normal(0, 15, base.shape)
                frame = cv2.resize(base, (320, 480), interpolation=cv2.INTER_CUBIC)
                writer.write((frame + rng.normal(0, 8, frame.shape)).clip(0, 255).astype(np.uint8))
            writer.finish()
    """
    files = [tmp_path / f"{fill}.mp4" for fill in (1, 85, 170)]
    for file in files:
        environment = {**os.environ, "MALLOC_PERTURB_": file.stem}
        subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True)
    assert len({file.read_bytes() for file in files}) == 1
    said = re.search(rb"x264 - core.* threads=(\d+) .*sliced_threads=(\d+)", files[0].read_bytes())
    assert said and said.groups() == (b"4", b"0"), "a number of its own, whole pictures in parallel"


@pytest.mark.parametrize(("height", "threads"), [(48, 1), (240, 2), (480, 4), (720, 6), (832, 6), (2160, 8)])
def test_x264s_threads_come_from_the_picture_alone(height: int, threads: int) -> None:
    assert encoders(height) == threads


@pytest.fixture(scope="module")
def clicking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AAC in an mp4: its first packet lies before the picture."""
    return make_sound(tmp_path_factory.mktemp("sound") / "clicks.mp4", 3)


# (frames, rate): lengths.py has every length and rate.
LENGTHS = [(1, "25"), (2, "30000/1001"), (3, "12"), (9, "25"), (31, "60000/1001"), (40, "24000/1001")]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize(("count", "rate"), LENGTHS)
def test_a_video_starts_at_0_and_lasts_as_long_as_its_frames(
    tmp_path: Path, clicking: Path, suffix: str, count: int, rate: str
) -> None:
    """As PyAV, ffmpeg and OpenCV read it, with the sound in sync by time stamps and back to back."""
    for sound in (None, clicking):
        path = write_greys(tmp_path / f"out{suffix}", count, Fraction(rate), sound, windows(count, 13, 1))
        assert not faults(measured(path), count, Fraction(rate), exact=suffix in (".mp4", ".mov"))


@pytest.mark.parametrize("start", [0.5, 2.0])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_sound_that_begins_later_stays_in_sync(tmp_path: Path, suffix: str, start: float) -> None:
    """In the second window, or after the last picture: then there is none."""
    sound = make_sound(tmp_path / "late.mp4", 3, start=start)
    path = write_greys(tmp_path / f"out{suffix}", 31, Fraction(25), sound, windows(31, 5, 1))
    found = measured(path)
    assert not faults(found, 31, Fraction(25), exact=suffix == ".mp4")
    assert found.sound_start is None if start > 1 else found.by_time is not None
    assert start > 1 or found.sound_start == pytest.approx(start, abs=0.025)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("count", [1, 5, 9, 40, 77])
def test_settled_frames_play_after_a_kill(tmp_path: Path, clicking: Path, suffix: str, count: int) -> None:
    """A window of 5 frames settles before the encoder has given one. The file starts at 0 and has no hole."""
    settled = [*windows(count, 5, 1), count]
    path = write_greys(tmp_path / f"out{suffix}", count, Fraction(25), clicking, settled, finish=False)
    found = measured(path)
    assert set(found.frames.values()) == {count} and found.in_order and found.start == 0
    assert found.by_time is not None and found.by_time < 0.002
    assert found.back_to_back is not None and found.back_to_back < 0.002


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "aac"), (".mov", "flac"), (".mkv", "aac"), (".webm", "aac")]
)
def test_a_video_that_is_gone_on_with_is_that_of_one_process(tmp_path: Path, suffix: str, codec: str) -> None:
    """Stopped at the end of a window, inside the next, and at the very end; sound is copied or encoded."""
    sound = make_sound(tmp_path / "sound.mkv", 3, codec)

    def part(path: Path, settled: Settled | None, last: int) -> Settled | None:
        made: list[Settled] = []
        with VideoWriter(
            path, WIDTH, HEIGHT, Fraction(25), sound, settled=settled, comment="made by a test"
        ) as writer:
            for frame in range(writer.frames, last):
                writer.write(np.full((HEIGHT, WIDTH, 3), grey(frame), np.uint8))
                if frame + 1 in (13, 25, 37, 40):
                    writer.settle(made.append)
            if last == 40:
                writer.finish()
        return made[-1] if made else None

    part(whole := tmp_path / f"whole{suffix}", None, 40)
    assert not faults(measured(whole), 40, Fraction(25), exact=suffix in (".mp4", ".mov"))
    with av.open(str(whole)) as container:
        metadata = {name.lower(): value for name, value in container.metadata.items()}
        assert metadata["comment"] == "made by a test"
    for stop in (13, 19, 39):
        path = tmp_path / f"{stop}{suffix}"
        part(path, part(path, None, stop), 40)
        assert path.read_bytes() == whole.read_bytes()


def test_a_settled_window_needs_no_other_one(tmp_path: Path) -> None:
    """Each begins with a key frame, and nothing refers over the seam: packets of one window decode alone."""
    path = write_greys(tmp_path / "out.mp4", 40, Fraction(25), None, (13, 25, 37))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        decoder = av.CodecContext.create("h264", "r")
        decoder.extradata = container.streams.video[0].codec_context.extradata
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    assert keys == [0, 13, 25, 37]
    shown = [frame for packet in [*packets[13:25], None] for frame in decoder.decode(packet)]
    assert [round(float(frame.to_ndarray(format="gray").mean())) for frame in shown] == pytest.approx(
        [grey(number) for number in range(13, 25)], abs=3
    )


def test_a_stopped_job_leaves_a_partial_file_that_plays(tmp_path: Path) -> None:
    sound = make_clip(tmp_path / "source.mp4", numbered(50), sound="aac")
    path = tmp_path / "out.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, WIDTH, HEIGHT, Fraction(25), sound) as writer:
        for frame in numbered(25):
            writer.write(frame)
        raise KeyboardInterrupt
    assert not path.exists()
    assert len(read_all(tmp_path / "out.partial.mp4")) == 25
    assert heard(tmp_path / "out.partial.mp4")[2] == pytest.approx([0.25, 0.75], abs=0.002)


def test_abandoning(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, WIDTH, HEIGHT, Fraction(25)) as writer:
        assert writer.abandon(keep=True) is None, "nothing was written"
    for keep in (False, True):
        with VideoWriter(path, WIDTH, HEIGHT, Fraction(25)) as writer:
            writer.write(numbered(1)[0])
            kept = writer.abandon(keep=keep)
        assert (kept, writer.kept) == ((tmp_path / "out.partial.mp4", 1) if keep else (None, 0))
        assert [p.name for p in tmp_path.iterdir()] == (["out.partial.mp4"] if keep else [])


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        VideoWriter(path, WIDTH, HEIGHT, Fraction(25))
    assert path.read_text() == "mine"
    path.unlink()
    with (
        pytest.raises(OutputError, match="appeared"),
        VideoWriter(path, WIDTH, HEIGHT, Fraction(25)) as writer,
    ):
        writer.write(numbered(1)[0])
        path.write_text("mine")
        writer.finish()
    assert path.read_text() == "mine" and len(read_all(tmp_path / "out.partial.mp4")) == 1
    with VideoWriter(path, WIDTH, HEIGHT, Fraction(25), overwrite=True) as writer:
        writer.write(numbered(1)[0])
        writer.finish()
    assert len(read_all(path)) == 1


def test_a_bad_target_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    def refused(path: Path, kind: type[TrtWanError]) -> str:
        with pytest.raises(kind) as caught:
            VideoWriter(path, WIDTH, HEIGHT, Fraction(25))
        assert caught.value.hint
        return caught.value.message

    assert ".avi" in refused(tmp_path / "out.avi", UsageError)
    assert "nothing" in refused(tmp_path / "out", UsageError)
    assert "no folder" in refused(tmp_path / "missing" / "out.mp4", OutputError)
    (tmp_path / "folder.mp4").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.mp4", OutputError)
    assert "cannot be written" in refused(tmp_path / f"{'x' * 252}.mp4", OutputError)
    bad = tmp_path / "bad.mp4"
    bad.write_text("not a video")
    with pytest.raises(InputError, match="The sound of"):
        VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, Fraction(25), sound=bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.mp4", "folder.mp4"], "nothing is left behind"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root on Linux")
    yield folder
    if subprocess.run(["umount", folder], capture_output=True).returncode:
        subprocess.run(["umount", "--lazy", folder], check=True)
        pytest.fail("a file on the full disk was left open: its space is not free again")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_a_full_disk_keeps_every_settled_frame(small_disk: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    settled = 0

    def settle(end: Settled) -> None:
        nonlocal settled
        settled = end.pictures

    writer = VideoWriter(small_disk / f"out{suffix}", 64, 64, Fraction(25))
    with pytest.raises(OutputError, match="disk is full") as caught:
        for shift in range(600):
            writer.write(np.roll(noise, 17 * shift, axis=shift % 2))
            if writer.frames % 12 == 0:
                writer.settle(settle)
        writer.finish()
    assert "Free some space" in caught.value.hint
    partial = writer.abandon(keep=True)
    assert partial is not None and list(small_disk.iterdir()) == [partial]
    assert settled > 12 and playable_frames(partial) == writer.kept >= settled
    assert all(abs(number - k) < 2 for k, number in enumerate(decode_times(partial)))


def test_a_disk_too_small_for_the_final_file_keeps_the_partial_one(small_disk: Path) -> None:
    """The working file has every frame, and the final file does not fit beside it."""
    noise = np.random.default_rng(0)
    with VideoWriter(small_disk / "out.mp4", 64, 64, Fraction(25)) as writer:
        for _ in range(50):
            writer.write(noise.integers(0, 256, (64, 64, 3), np.uint8))
        with pytest.raises(OutputError, match="disk is full"):
            writer.finish()
        assert writer.abandon(keep=True) == writer.partial and writer.kept == 50
    assert list(small_disk.iterdir()) == [writer.partial] and playable_frames(writer.partial) == 50
    assert writer.partial.stat().st_size > 2**17, "more than half of the disk"


def test_a_killed_job_leaves_a_file_that_plays(tmp_path: Path) -> None:
    script = (
        "import os, numpy as np; from fractions import Fraction; from pathlib import Path;"
        "from trt_wan.runtime.video.writer import VideoWriter;"
        f"w = VideoWriter(Path({str(tmp_path / 'out.mp4')!r}), 64, 64, Fraction(25));"
        "noise = np.random.default_rng(0);"
        "[w.write(noise.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(300)];"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial.mp4"]
    assert playable_frames(tmp_path / "out.partial.mp4") > 100


def playable_frames(path: Path) -> int:
    """Pictures a player gets to see before the file breaks off."""
    frames = 0
    with av.open(str(path)) as container:
        with contextlib.suppress(av.FFmpegError):
            for _ in container.decode(video=0):
                frames += 1
    return frames


def decode_times(path: Path) -> list[float]:
    """Times of the pictures, in frames at 25 per second."""
    with av.open(str(path)) as container:
        return [float(frame.time or 0) * 25 for frame in container.decode(video=0)]


def test_a_disk_that_is_full_from_the_start_is_named_at_once(small_disk: Path) -> None:
    with pytest.raises(OSError):
        (small_disk / "big").write_bytes(bytes(300 * 1024))
    with pytest.raises(OutputError, match="disk is full"):
        VideoWriter(small_disk / "out.mp4", WIDTH, HEIGHT, Fraction(25))
    assert [p.name for p in small_disk.iterdir()] == ["big"]


def test_a_folder_that_cannot_be_written_is_named_at_once(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="cannot be written to"):
        VideoWriter(small_disk / "out.mp4", WIDTH, HEIGHT, Fraction(25))


# The sample


def test_the_sample_is_consistent() -> None:
    folder = Path(trt_wan.__file__).parent / "sample"
    clips = {}
    for name in ("driving", "src_pose", "src_face", "src_bg", "src_mask"):
        with Clip(folder / f"{name}.mp4") as clip:
            assert (clip.frames, clip.rate) == (21, 12)
            assert clip.has_sound == (name == "driving")
            assert (clip.width, clip.height) == ((512, 512) if name == "src_face" else (320, 192))
            clips[name] = clip.window(range(21)).astype(np.int32)
    inside = clips["src_mask"] > 127
    grown = np.stack([cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) for mask in inside]).astype(bool)
    assert 0.1 < inside.mean() < 0.8
    assert clips["src_bg"][inside].mean() < 5, "black where the person is"
    assert np.abs(clips["src_bg"] - clips["driving"])[~grown].mean() < 5, "the driving clip elsewhere"
    assert (clips["src_pose"].max(axis=-1) > 60)[grown[..., 0]].mean() > 0.01, "a skeleton on the person"
    assert read_picture(folder / "src_ref.png").shape[2] == 3
    assert sum(file.stat().st_size for file in folder.iterdir()) < 600_000


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_a_long_comment(tmp_path: Path, suffix: str) -> None:
    """From 32 kB on the header of an mp4 had no length, and looking through it took for ever."""
    path, comment = tmp_path / f"long{suffix}", "é" * 100_000
    with VideoWriter(path, 64, 48, Fraction(12), comment=comment) as writer:
        for k in range(30):
            writer.write(np.full((48, 64, 3), k, np.uint8))
        writer.wait()
        for finished in (False, True):
            if finished:
                writer.finish()
            with av.open(str(path if finished else writer.partial)) as container:
                assert {name.lower(): text for name, text in container.metadata.items()}["comment"] == comment
                assert sum(1 for _ in container.decode(video=0)) == 30
