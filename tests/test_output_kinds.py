"""Codecs, GIFs and folders of frames: lengths, colours and tags as of the H.264 in test_video.py."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import click
import numpy as np
import pytest
from click.testing import CliRunner
from lengths import faults, make_sound, measured, windows
from lengths import write as write_greys
from test_video import SOLIDS, difference, numbered, read_all

from trt_wan.cli import output_options
from trt_wan.cli.main import cli
from trt_wan.cli.run import run
from trt_wan.errors import LONGEST_MESSAGE, InputError, OutputError, UsageError
from trt_wan.runtime.device.driver import has_nvidia_gpu
from trt_wan.runtime.video.encoder import CODECS, NVENC, Codec, Quality, usable
from trt_wan.runtime.video.frame_folder import FrameFolder
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.splice import require_same_encoder
from trt_wan.runtime.video.writer import VideoWriter

# Codec of the pictures and ending, but for those of test_video.py; the name that ffmpeg reads.
FILES = [
    ("hevc", ".mp4"),
    ("hevc", ".mov"),
    ("hevc", ".mkv"),
    ("av1", ".mp4"),
    ("av1", ".mkv"),
    ("av1", ".webm"),
]
FILES += [("prores", ".mov")]


@pytest.fixture(scope="module")
def clicking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound") / "clicks.mp4", 3)


def write(path: Path, frames: Picture, quality: Quality, rate: Fraction = Fraction(25)) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], rate, quality=quality) as writer:
        for frame in frames:
            writer.write(frame)
        return writer.finish()


@pytest.mark.parametrize(("codec", "suffix"), FILES)
@pytest.mark.parametrize(("count", "rate"), [(1, "25"), (2, "30000/1001"), (9, "12"), (40, "24000/1001")])
def test_every_codec_has_exact_lengths(
    tmp_path: Path, clicking: Path, codec: str, suffix: str, count: int, rate: str
) -> None:
    """As PyAV, ffmpeg and OpenCV read it, with windows that end inside, and sound."""
    path, ends = tmp_path / f"out{suffix}", windows(count, 13, 1)
    write_greys(path, count, Fraction(rate), clicking, ends, quality=Quality(codec))
    wrong = faults(measured(path), count, Fraction(rate), exact=suffix in (".mp4", ".mov"))
    assert [fault for fault in wrong if codec != "av1" or "OpenCV" not in fault] == []  # it has no AV1


@pytest.mark.parametrize(("codec", "suffix"), FILES)
def test_every_codec_keeps_colours_and_has_their_tags(tmp_path: Path, codec: str, suffix: str) -> None:
    solids = np.stack([np.full((64, 96, 3), solid, np.uint8) for solid in SOLIDS])
    path = write(tmp_path / f"out{suffix}", solids, Quality(codec))
    assert difference(read_all(path), solids) <= 4
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert (context.codec.canonical_name, context.pix_fmt) == (codec, CODECS[codec].pixels)
        assert tags == (1, 1, 1) and context.color_range in (1, 0 if codec == "prores" else 1)
        if codec == "hevc" and suffix != ".mkv":
            assert context.codec_tag == "hvc1"


def test_a_lower_crf_is_a_larger_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3)).astype(np.uint8)
    for codec, suffix in (("h264", ".mp4"), ("hevc", ".mp4"), ("av1", ".mp4"), ("vp9", ".webm")):
        sizes = [
            write(tmp_path / f"{codec}{crf}{suffix}", noise, Quality(codec, crf)).stat().st_size
            for crf in (10, None, 40)
        ]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[2], codec


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs of a process can be chosen on Linux")
def test_the_number_of_cpus_makes_no_difference(tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from fractions import Fraction
        from pathlib import Path
        import numpy as np
        from trt_wan.runtime.video.encoder import Quality
        from trt_wan.runtime.video.writer import VideoWriter
        if sys.argv[2] == "1":
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        frames = np.random.default_rng(0).normal(128, 40, (12, 240, 320, 3)).clip(0, 255).astype(np.uint8)
        for codec, suffix in (("hevc", ".mp4"), ("av1", ".mp4"), ("prores", ".mov")):
            path = Path(sys.argv[1]) / f"{codec}-{sys.argv[2]}{suffix}"
            with VideoWriter(path, 320, 240, Fraction(25), quality=Quality(codec)) as writer:
                for frame in frames:
                    writer.write(frame)
                writer.finish()
    """
    for cpus in ("1", "all"):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), cpus], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), "the encoders print nothing"
    for one in tmp_path.glob("*-1.*"):
        assert one.read_bytes() == one.with_name(one.name.replace("-1.", "-all.")).read_bytes(), one.name


@pytest.mark.parametrize(
    ("name", "quality"),
    [
        ("out.mp4", Quality("prores")),
        ("out.mkv", Quality("prores")),
        ("out.webm", Quality("h264")),
        ("out.mov", Quality("av1")),
        ("out.gif", Quality("hevc")),
        ("out.mov", Quality("prores", 20)),
        ("out.mp4", Quality("h264", 52)),
        ("out.mp4", Quality(None, -1)),
        ("out.webm", Quality("av1", 64)),
        ("out.mp4", Quality("av1", encoder="nvenc")),
        ("out.webm", Quality(encoder="nvenc")),
        ("out.gif", Quality(encoder="nvenc")),
        ("out.mov", Quality("prores", encoder="nvenc")),
        ("out.mp4", Quality("hevc", 52, encoder="nvenc")),
    ],
)
def test_what_a_file_cannot_have_is_refused(name: str, quality: Quality) -> None:
    with pytest.raises(UsageError) as caught:
        quality.require_possible(Path(name))
    assert caught.value.hint
    with pytest.raises(UsageError):
        output_options.quality_of(Path(name), quality.codec, quality.crf, quality.encoder or "auto")


def test_without_nvenc_the_cpu_encodes_and_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the card has none, and where PyAV was built without it."""
    for lacks in ("h264_nvenc", "no_such_encoder"):
        if lacks == "h264_nvenc" and has_nvidia_gpu():
            continue
        monkeypatch.setitem(NVENC, "h264", replace(NVENC["h264"], encoder=lacks))
        notes: list[Any] = []
        made = usable(Quality(crf=20, encoder="nvenc"), KINDS[".mp4"], notes.append)
        assert made == Quality(crf=20) and [note.code for note in notes] == ["no_nvenc"]
        assert lacks in notes[0].text and len(notes[0].text) < LONGEST_MESSAGE
    assert usable(Quality("av1"), KINDS[".mp4"], notes.append) == Quality("av1") and len(notes) == 1


def test_the_encoder_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x264 in its place: the options reach the encoder, and the same pictures give the same bytes."""
    for codec in ("h264", "hevc"):
        encoding = Quality(codec, 23, encoder="nvenc").encoding(KINDS[".mp4"], 64, 48, Fraction(25))
        assert (encoding.encoder, encoding.options["qp"]) == (f"{codec}_nvenc", "23")
        assert encoding.options["rc"] == "constqp" and "crf" not in encoding.options
    monkeypatch.setitem(NVENC, "h264", Codec("libx264", 18, 51, {"preset": "ultrafast"}, quality="qp"))
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3)).astype(np.uint8)
    quality = Quality(encoder="nvenc")
    assert usable(quality, KINDS[".mp4"], lambda event: pytest.fail(str(event))) == quality
    card, again, cpu = (
        write(tmp_path / f"{n}.mp4", noise, made) for n, made in enumerate((quality, quality, Quality()))
    )
    assert card.read_bytes() == again.read_bytes() != cpu.read_bytes()
    coarse = write(tmp_path / "coarse.mp4", noise, replace(quality, crf=40))
    assert coarse.stat().st_size < 0.8 * card.stat().st_size
    with pytest.raises(InputError, match="another program, or another version of the encoder"):
        require_same_encoder(cpu, coarse)


def test_a_run_records_the_encoder_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that could be opened, not the one that was asked for."""
    seen: list[Any] = []

    def rendered(*arguments: Any, **options: Any) -> Any:
        seen.append(options["quality"])
        raise UsageError("Here.", "Nothing to do.")

    monkeypatch.setattr("trt_wan.cli.run.render_prepared", rendered)
    for lacks, expected in (("no_such_encoder", None), ("libx264", "nvenc")):
        monkeypatch.setitem(NVENC, "h264", Codec(lacks, 18, 51, {}, quality="qp"))
        output = ("-o", str(tmp_path / "a.mp4"), "--encoder", "nvenc", "--random-weights", "tiny")
        result = CliRunner().invoke(cli, ["run", "--inputs", str(tmp_path), *output])
        assert seen[-1].encoder == expected and "Here." in result.stderr
        assert ("no_such_encoder cannot be opened" in result.stderr) == (expected is None)


def test_the_choices_are_those_of_the_table() -> None:
    assert output_options.CODECS == tuple(CODECS)
    assert {codec for kind in KINDS.values() for codec in kind.codecs} == set(CODECS)
    help_text = " ".join(run.get_help(click.Context(run)).split())
    for name, codec in CODECS.items():
        assert name in help_text and (codec.crf is None or str(codec.crf) in help_text)


# Frames, frames per second, the number of frames in the GIF.
GIFS = [(1, "25", 1), (7, "30000/1001", 7), (40, "12", 40), (31, "60", 16), (9, "50", 9)]


@pytest.mark.parametrize(("count", "rate", "shown"), GIFS)
def test_a_gif_has_the_frames_at_their_times(tmp_path: Path, count: int, rate: str, shown: int) -> None:
    frames, per_second = numbered(count), Fraction(rate)
    path = write(tmp_path / "out.gif", frames, Quality(), per_second)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gif"]
    step = 2 if per_second > 50 else 1
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
        times = [float(frame.time or 0) for frame in decoded]
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert times == pytest.approx([float(k / per_second) for k in range(0, count, step)], abs=0.0051)
    assert len(times) == shown and np.abs(pictures.astype(int) - frames[::step]).mean() < 4
    assert gif_seconds(path) == pytest.approx(float(count / per_second), abs=0.0051)
    assert b"NETSCAPE2.0" in path.read_bytes(), "it plays for ever"


def gif_seconds(path: Path) -> float:
    """The sum of the delays in its graphic control extensions."""
    data = path.read_bytes()
    places = [k for k in range(len(data) - 7) if data[k : k + 3] == b"\x21\xf9\x04" and data[k + 7] == 0]
    return sum(int.from_bytes(data[k + 4 : k + 6], "little") for k in places) / 100


def test_a_stopped_gif_leaves_a_video_that_plays(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.gif", 96, 64, Fraction(25)) as writer:
        for frame in numbered(5):
            writer.write(frame)
        assert writer.abandon(keep=True) == tmp_path / "out.partial.mp4"
    with Clip(tmp_path / "out.partial.mp4") as clip:
        assert clip.frames == 5


def test_a_folder_of_frames_appears_whole(tmp_path: Path) -> None:
    frames, path = numbered(3), tmp_path / "frames"
    folder = FrameFolder(path)
    for frame in frames:
        folder.write(frame)
        assert not path.exists()
    folder.finish()
    assert sorted(os.listdir(path)) == ["00000.png", "00001.png", "00002.png"]
    assert all((read_picture(path / f"{k:05}.png") == frames[k]).all() for k in range(3))
    with pytest.raises(OutputError, match="3 frames"):
        FrameFolder(path)
    again = FrameFolder(path, overwrite=True)
    again.write(frames[0])
    again.finish()
    assert os.listdir(path) == ["00000.png"] and os.listdir(tmp_path) == ["frames"]
    (path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="mine.txt"):
        FrameFolder(path, overwrite=True)
    assert len(os.listdir(path)) == 2
    for place in (tmp_path / "missing" / "frames", path / "mine.txt"):
        with pytest.raises(OutputError):
            FrameFolder(place)


def test_a_folder_of_frames_goes_on(tmp_path: Path) -> None:
    """After the second frame of three that were written: the third is made again."""
    frames, path = numbered(4), tmp_path / "frames"
    stopped = FrameFolder(path)
    for frame in frames[[0, 1, 3]]:
        stopped.write(frame)
    folder = FrameFolder(path, first=2)
    assert sorted(os.listdir(folder.partial)) == ["00000.png", "00001.png"]
    for frame in frames[2:]:
        folder.write(frame)
    folder.finish()
    assert all((read_picture(path / f"{k:05}.png") == frames[k]).all() for k in range(4))
    with pytest.raises(OutputError, match="lacks 00000.png"):
        FrameFolder(tmp_path / "other", first=1)


def test_the_frames_have_another_name_than_the_video(tmp_path: Path) -> None:
    """Before, they ended the job after its last frame."""
    output, model = str(tmp_path / "out.mp4"), ("--random-weights", "tiny")
    result = CliRunner().invoke(run, ["--inputs", str(tmp_path), "-o", output, "--frames", output, *model])
    assert result.exit_code == 2 and "have the same name" in result.stderr
