"""--start-frame and --extend: what the first window is given, and the frames of the output."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner
from lengths import make_sound, measured
from test_video import difference, numbered
from tiny_job import FRAMES, PLAN, RATE, prepare, read_frames, write_clip, write_reference

from trt_wan.cli.main import cli
from trt_wan.errors import InputError, UsageError
from trt_wan.runtime import pipeline
from trt_wan.runtime.colour import Colour
from trt_wan.runtime.conditioning import to_signal
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.pipeline import window_clips
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.continued import frames_before, shifted
from trt_wan.runtime.video.cut import Cut, Mark
from trt_wan.runtime.video.pictures import read_picture, write_picture
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState

SIZE = (PLAN.width, PLAN.height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared clips, weights, a start frame and a finished video of 9 frames."""
    made = tmp_path_factory.mktemp("continued")
    prepare(made, make_sound(made / "clicks.mp4", 2))
    write_tiny_weights(made / "weights", seed=0)
    picture = np.random.default_rng(1).integers(0, 256, (PLAN.height, PLAN.width, 3)).astype(np.uint8)
    write_picture(made / "last.png", picture)
    write_clip(made / "first.mp4", frames=9)
    return made


@pytest.fixture(scope="module")
def model(folder: Path, tiny_home: Path) -> Iterator[OpenModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        files = WeightFiles((folder / "weights",))
        with open_model(files, Settings(executor="onnxruntime", text_cache=False)) as opened:
            yield opened


def inputs(folder: Path, **options: Any) -> Inputs:
    """Without faces, which take most of a job's time on the CPU."""
    return Inputs(folder / "src_ref.png", folder / "src_pose.mp4", None, **options)


@pytest.mark.parametrize(("option", "overlap", "lead"), [("start_frame", 5, 1), ("extend", 5, 5)])
def test_the_first_window_goes_on_from_what_is_given(
    monkeypatch: pytest.MonkeyPatch, model: OpenModel, folder: Path, option: str, overlap: int, lead: int
) -> None:
    """Its known frames are those of the file, with the pose of the clip's first frame. They are not in the
    output, which has as many frames as the clip.
    """
    seen, made = [], list[Array]()
    encode_window, decode = pipeline.encode_window, pipeline.decode

    def conditioned(model: Any, reference: Array, clips: Any, carried: Array | None, *more: Any) -> Any:
        seen.append((clips.pose(0, clips.frames), carried))
        return encode_window(model, reference, clips, carried, *more)

    def decoded(*arguments: Any) -> Iterator[Array]:
        for frames in decode(*arguments):
            made.append(frames)
            yield frames

    monkeypatch.setattr(pipeline, "encode_window", conditioned)
    monkeypatch.setattr(pipeline, "decode", decoded)
    file = folder / ("last.png" if option == "start_frame" else "first.mp4")
    task = Job(inputs(folder, **{option: file}), window=PLAN.frames, overlap=overlap, steps=1)
    frames = np.concatenate(list(model.pieces(task)), axis=1)
    assert frames.shape[1] == FRAMES
    given = read_picture(file)[None] if option == "start_frame" else read_frames(file)[-lead:]
    pose, carried = seen[0]
    assert carried is not None and (carried == to_signal(given)).all()
    poses = to_signal(read_frames(folder / "src_pose.mp4"))
    first = [max(k - lead, 0) for k in range(PLAN.frames)]
    assert (pose == poses[:, first]).all()
    second = [k - lead + PLAN.frames - overlap for k in range(PLAN.frames - 4)]
    assert (
        seen[1][0][:, : len(second)] == poses[:, [k if k < FRAMES else 2 * FRAMES - 2 - k for k in second]]
    ).all()
    whole = np.concatenate(made, axis=1)
    kept = [k for k in range(whole.shape[1]) if k % PLAN.frames >= (lead if k < PLAN.frames else overlap)][
        :FRAMES
    ]
    assert (frames == whole[:, kept]).all()


def test_what_cannot_be_continued_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not from both"):
        inputs(folder, start_frame=folder / "last.png", extend=folder / "first.mp4")
    for option, name in (("start_frame", "last.png"), ("extend", "first.mp4")):
        with pytest.raises(InputError, match="is 64x48, and the video is to be 128x48") as caught:
            frames_before(inputs(folder, **{option: folder / name}), 1, 128, 48)
        assert "ffmpeg" in caught.value.hint
    extended = inputs(folder, extend=folder / "first.mp4")
    with pytest.raises(InputError, match="29.97 frames per second") as caught:
        frames_before(extended, 5, *SIZE, Fraction(16))
    assert "--rate 29.97" in caught.value.hint
    assert frames_before(inputs(folder), 5, *SIZE) is None


def test_a_short_video_is_continued_from_fewer_frames(tmp_path: Path) -> None:
    write_reference(tmp_path / "src_ref.png")
    for count, overlap, expected in ((3, 5, 1), (6, 5, 5), (9, 9, 9), (12, 1, 1)):
        frames = np.repeat(numbered(count)[:, :48, :64], 1, axis=0)
        with VideoWriter(tmp_path / "first.mp4", 64, 48, RATE, overwrite=True) as writer:
            for frame in frames:
                writer.write(np.ascontiguousarray(frame))
            writer.finish()
        before = frames_before(inputs(tmp_path, extend=tmp_path / "first.mp4"), overlap, *SIZE, RATE)
        assert before is not None and len(before) == expected
        assert difference(before, read_frames(tmp_path / "first.mp4")[-expected:]) == 0


@pytest.mark.parametrize(("start", "lead"), [(12, 12), (2, 2), (0, 0)])
def test_frames_that_the_cut_leaves_out_are_shown_with_the_known_ones(
    folder: Path, start: int, lead: int
) -> None:
    cut = Cut(Mark(Fraction(start), False), Mark(Fraction(17), False))
    with open_clips(inputs(folder, cut=cut), 13) as plain:
        assert (plain.frames, plain.lead, plain.start) == (17 - start, 0, start / RATE)
    with open_clips(inputs(folder, cut=cut, extend=folder / "first.mp4"), 13) as clips:
        assert (clips.frames, clips.lead, clips.start) == (17 - start, lead, start / RATE)
        indices = shifted(list(range(9)), 5, clips.lead)
        read = window_clips(clips, indices, grey_face=False).pose
        poses = None if read is None else read(0, 9)
    whole = to_signal(read_frames(folder / "src_pose.mp4"))
    assert (
        poses is not None
        and (poses == whole[:, [max(start - 5 + k, 0 if lead else start) for k in range(9)]]).all()
    )
    assert clips.cut == cut


def test_shifted_numbers() -> None:
    assert shifted([0, 1, 2, 3, 2], 1, 0) == [0, 0, 1, 2, 1] and shifted([0, 1], 0, 0) == [0, 1]
    assert shifted([0, 1, 2, 5, 6], 5, 4) == [0, 0, 1, 4, 5] and shifted([0, 1, 2], 1, 4) == [3, 4, 5]


def test_a_match_of_colours_is_what_later_windows_go_on_from(
    monkeypatch: pytest.MonkeyPatch, model: OpenModel, folder: Path
) -> None:
    """The second window, and the frames that it is given, have the matched colours."""
    seen = []
    encode_window = pipeline.encode_window

    def conditioned(model: Any, reference: Array, clips: Any, carried: Array | None, *more: Any) -> Any:
        seen.append(carried)
        return encode_window(model, reference, clips, carried, *more)

    monkeypatch.setattr(pipeline, "encode_window", conditioned)

    def made(colour: Colour, **options: Any) -> Array:
        task = Job(inputs(folder), window=PLAN.frames, steps=1, colour=colour)
        return np.concatenate(list(model.pieces(task, **options)), axis=1)

    states: list[WindowState] = []
    first, reference = made(Colour("mkl"), keep=states.append), made(Colour("mkl", anchor="reference"))
    assert [carried is None for carried in seen] == [True, False] * 2
    for carried, frames in zip(seen[1::2], (first, reference), strict=True):
        assert (carried == frames[:, PLAN.frames - 1 : PLAN.frames].clip(-1, 1)).all()
    wanted = read_picture(folder / "src_ref.png").mean(axis=(0, 1)) / 127.5 - 1
    assert np.abs(reference.mean(axis=(2, 3)) - wanted[:, None]).max() < 1e-3
    assert np.abs(first - reference).max() > 0.1
    assert (made(Colour("mkl"), begin_from=states[0]) == first[:, PLAN.frames :]).all(), (
        "in a later process too"
    )


def test_the_command_with_all_of_them(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tiny_home: Path, tmp_path: Path
) -> None:
    """A cut, a video to go on from, colours, a codec, a folder of frames: lengths, sound, pictures."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    output, frames = tmp_path / "out.mp4", tmp_path / "frames"
    options = ["--inputs", folder, "--weights", folder / "weights", "-o", output, "--json", "--steps", 1]
    options += [
        "--window",
        PLAN.frames,
        "--overlap",
        5,
        "--start",
        3,
        "--end",
        "0.6s",
        "--extend",
        folder / "first.mp4",
    ]
    options += ["--colour-match", "hm:0.5", "--colour-anchor", "carried", "--codec", "hevc", "--crf", 12]
    done = CliRunner().invoke(cli, ["run", *map(str, options), "--frames", str(frames)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["data"]["frames"] == 15
    found = measured(output, clicks_from=float(3 / RATE))
    assert found.frames == {"PyAV": 15, "OpenCV": 15, "ffmpeg": 15} and found.start == 0
    assert found.by_time is not None and found.by_time < 0.002
    pictures = np.stack([read_picture(frames / f"{k:05}.png") for k in range(15)])
    assert len(list(frames.iterdir())) == 15
    greys = [frames.mean(axis=(1, 2, 3)) for frames in (read_frames(output), pictures)]
    assert np.abs(greys[0] - greys[1]).max() < 3
    with av.open(str(output)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "hevc"
    again = CliRunner().invoke(cli, ["run", *map(str, options), "-y", "--frames", str(frames / "00000.png")])
    assert again.exit_code != 0 and output.exists()
