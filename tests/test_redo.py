"""`run --redo`: windows of a finished video rendered again, with the tiny model. Other windows' frames, times
and sound stay bit for bit; the known frames at the end are in the condition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from test_conditioning import official_mask
from tiny_job import FRAMES, PLAN, RATE, prepare, read_frames, write_clip, write_reference, write_sound

from trt_wan.errors import InputError, Stopped, UsageError
from trt_wan.runtime import pipeline
from trt_wan.runtime import redo as redo_module
from trt_wan.runtime.colour import Colour
from trt_wan.runtime.colour_transfer import Statistics
from trt_wan.runtime.conditioning import WindowLatents, known_mask, to_signal
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.events import Event, Note, StepDone, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.vae import encode
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.pipeline import Keep
from trt_wan.runtime.redo import (
    FADE,
    Again,
    _Finished,
    faded,
    noise_before,
    redo,
    require_redoable,
    windows_again,
)
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.splice import require_cuts, require_same_encoder, splice
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState

LONG = 27  # frames: windows of 13, 12 and 2 new ones
SPANS = [range(13), range(13, 25), range(25, 27)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("redo")
    prepare(made, write_sound(made / "tone.m4a", 2), LONG)
    write_tiny_weights(made / "weights", seed=0)
    return made


@pytest.fixture(scope="module")
def model(folder: Path, tiny_home: Path) -> Iterator[OpenModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        files = WeightFiles((folder / "weights",))
        with open_model(files, Settings(executor="onnxruntime", text_cache=False)) as opened:
            yield opened


def job_of(folder: Path, mode: Any = "animate", **options: Any) -> Job:
    """Without faces, which take most of a job's time on the CPU."""
    of_inputs = {name: options.pop(name) for name in ("extend", "cut") if name in options}
    inputs = replace(Inputs.from_folder(folder, mode), face=None, **of_inputs)
    return Job(inputs, mode=mode, **{"window": PLAN.frames, "steps": 1, **options})


def few(folder: Path, frames: int, sound: Path | None = None) -> None:
    """A clip of poses alone."""
    write_reference(folder / "src_ref.png")
    write_clip(folder / "src_pose.mp4", frames=frames, sound=sound)


@pytest.fixture(scope="module")
def video(folder: Path, model: OpenModel) -> Path:
    return render(job_of(folder), model, folder / "out.mp4").path


def again(
    model: OpenModel, job: Job, video: Path, output: Path, seeds: dict[int, int], **options: Any
) -> Picture:
    with open_clips(job.inputs, job.history) as clips:
        known = len(_Finished(job, video, clips).before)
        planned = windows_again(job, seeds, clips.frames, known)
        require_redoable(job, video, planned, clips, known)
        redo(job, model, output, video, planned, clips=clips, **options)
    return read_frames(output)


def packets(path: Path) -> dict[str, list[Any]]:
    """Times of the pictures; times and bytes of the sound, in order."""
    with av.open(str(path)) as container:
        found: dict[str, list[Any]] = {"video": [], "audio": []}
        for packet in container.demux():
            if packet.pts is not None:
                times = packet.pts * packet.time_base, packet.duration
                data = [bytes(packet)] if packet.stream.type == "audio" else []
                found[packet.stream.type].append([*times, *data])
        return {**{kind: sorted(rows) for kind, rows in found.items()}, "duration": [container.duration]}


@pytest.mark.parametrize("numbers", [(1,), (2,), (3,), (1, 2), pytest.param((1, 3), marks=pytest.mark.long)])
def test_other_windows_stay_and_these_are_others(
    model: OpenModel, folder: Path, video: Path, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    old = read_frames(video)
    events: list[Event] = []
    seeds = dict.fromkeys(numbers, 9)
    new = again(model, job_of(folder), video, tmp_path / "new.mp4", seeds, progress=events.append)
    inside = [k for number in numbers for k in SPANS[number - 1]]
    outside = [k for k in range(LONG) if k not in inside]
    assert (new[outside] == old[outside]).all(), "the first frame after the seam too"
    tied = [SPANS[n - 1][-1] for n in numbers if n < 3 and n + 1 not in numbers]
    fading = [k for last in tied for k in range(last - FADE, last)]
    apart = np.abs(new.astype(float) - old).mean(axis=(1, 2, 3))
    assert all(apart[k] > 5 for k in inside if k not in (*tied, *fading)), apart
    assert all(apart[k] < 8 for k in tied), "encoded once more"
    assert all((np.diff(apart[[last - FADE - 1, *range(last - FADE, last + 1)]]) < 0).all() for last in tied)
    assert packets(tmp_path / "new.mp4") == packets(video)
    assert [event.window for event in events if isinstance(event, WindowDone)] == list(numbers)
    assert all(event.eta == 0 for event in events if isinstance(event, StepDone)), "one step, its last"
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == len(set(notes))
    assert {path.name for path in tmp_path.iterdir()} == {"new.mp4"}


@pytest.mark.parametrize(("number", "overlap"), [(1, 1), (2, 5)])
def test_the_known_frames_are_in_the_condition(
    model: OpenModel,
    folder: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    overlap: int,
) -> None:
    """Both ends of a window, in its mask and in its clip, against the VAE's encoding of that clip."""
    job = job_of(folder, overlap=overlap)
    first = video if overlap == 1 else render(job, model, tmp_path / "out.mp4").path
    old, seen, made = read_frames(first), list[WindowLatents](), list[Array]()
    encode_window = pipeline.encode_window

    def conditioned(model: Any, *arguments: Any) -> WindowLatents:
        seen.append(encode_window(model, *arguments))
        clip = np.zeros((3, PLAN.frames, PLAN.height, PLAN.width), np.float32)
        start = (number - 1) * (PLAN.frames - overlap)
        if number > 1:
            clip[:, :overlap] = to_signal(old[start : start + overlap])
        clip[:, -overlap:] = to_signal(old[start + PLAN.frames - overlap : start + PLAN.frames])
        made.append(encode(model, clip))
        return seen[-1]

    monkeypatch.setattr(pipeline, "encode_window", conditioned)
    again(model, job, first, tmp_path / "new.mp4", {number: 9})
    ((window,), (clip,)) = seen, made
    known = np.zeros((PLAN.frames, PLAN.latent_height, PLAN.latent_width), np.float32)
    known[: overlap if number > 1 else 0] = 1
    known[-overlap:] = 1
    assert (window.condition[:4, 1:] == official_mask(known)).all()
    assert (window.condition[4:, 1:] == clip).all()


@pytest.mark.parametrize("ending", [0, 1, 5])
def test_mask_of_a_window_with_an_end(ending: int) -> None:
    known = np.zeros((13, 6, 4), np.float32)
    known[:1] = 1
    known[13 - ending :] = 1
    np.testing.assert_array_equal(known_mask(1, np.ones((13, 6, 4)), ending), official_mask(known))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 13, "frames": 13},
        pytest.param({"context": Context(frames=13, overlap=4), "window": 77}, marks=pytest.mark.long),
    ],
)
def test_one_window_is_that_of_a_whole_run(model: OpenModel, tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a loop or of context windows: byte for byte, with the sound."""
    few(tmp_path, options.pop("frames", 21), write_sound(tmp_path / "tone.m4a", 2))
    job = job_of(tmp_path, **options)
    first = render(job, model, tmp_path / "first.mp4").path
    whole = render(replace(job, seed=9), model, tmp_path / "whole.mp4").path
    again(model, job, first, tmp_path / "again.mp4", {1: 9})
    assert (tmp_path / "again.mp4").read_bytes() == whole.read_bytes() != first.read_bytes()


@pytest.mark.parametrize("options", [{}, {"compat": "kijai"}, {"overlap": 5}])
def test_the_noise_is_that_of_a_whole_run(
    model: OpenModel, folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    job, drawn = job_of(folder, seed=7, **options), list[Array]()

    class Stop(Exception):
        pass

    def noised(combine: Any, noise: Array, *others: Any) -> Array:
        drawn.append(np.asarray(noise))
        if len(drawn) == 2:
            raise Stop
        return noise

    monkeypatch.setattr(pipeline, "noised", noised)
    with pytest.raises(Stop):
        list(model.pieces(job))
    slot = 16, PLAN.latent_height, PLAN.latent_width
    for j, noise in enumerate(drawn):
        ours = noise_before(job, j, 7, LONG, slot).randn(noise.shape)
        assert (ours == noise).all(), j


def test_hybrid_windows(model: OpenModel, folder: Path, tmp_path: Path) -> None:
    """Windows of 21 frames in context windows of 13: 21 frames, and the last 6."""
    context = Context(frames=13, overlap=4, whole=False)
    job = job_of(folder, window=21, overlap=5, context=context, steps=2)
    video = render(job, model, tmp_path / "out.mp4").path
    old = read_frames(video)
    for number, changed in ((1, range(16)), (2, range(21, LONG))):
        new = again(model, job, video, tmp_path / f"{number}.mp4", {number: 3})
        same = (new == old).all(axis=(1, 2, 3))
        assert same[21:].all() == (number == 1) and same[:21].all() == (number == 2)
        assert not same[list(changed)].any()


def test_replaced_people_colours_and_pixels_put_back(
    model: OpenModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The colours to match are those of the video's first window, as the run itself counted them. Around the
    person the pixels are the background's.
    """
    job = job_of(folder, "replace", colour=Colour("mkl"))
    states: list[WindowState] = []

    class Watched:
        def pieces(self, job: Job, *, keep: Keep, **options: Any) -> Iterator[Array]:
            return model.pieces(job, keep=lambda state: (states.append(state), keep(state))[1], **options)

    video = render(job, Watched(), tmp_path / "out.mp4", paste_back=True).path
    with open_clips(job.inputs, job.history) as clips:
        state = _Finished(job, video, clips).state_before(Again(1, SPANS[1], 5, 1), 16)
    assert state.colours is not None and states[0].colours is not None
    ours, runs = (Statistics.unpacked(colours) for colours in (state.colours, states[0].colours))
    assert ours.count == runs.count and np.abs(ours.mean - runs.mean).max() < 0.2, "decoded, clamped"
    old, background = read_frames(video), read_frames(folder / "src_bg.mp4")
    pasted_back, firsts = redo_module.pasted_back, list[int]()

    def pasted(frames: Any, background: Path, mask: Path, cut: Any, first: int) -> Iterator[Picture]:
        firsts.append(first)
        return pasted_back(frames, background, mask, cut, first)

    monkeypatch.setattr(redo_module, "pasted_back", pasted)
    new = again(model, job, video, tmp_path / "new.mp4", {2: 5}, paste_back=True)
    span = SPANS[1]
    assert (np.delete(new, span, axis=0) == np.delete(old, span, axis=0)).all()
    assert np.abs(new[span].astype(float) - old[span]).mean() > 1
    corner = np.abs(new[span, :4, :4].astype(float) - background[span, :4, :4])  # far from the disc
    assert corner.mean() < 3 and firsts == [span.start], "masks are those of the same frames"


@pytest.mark.long
def test_a_video_that_continues_another(model: OpenModel, folder: Path, tmp_path: Path) -> None:
    """Its first window goes on from the other's frames; the second window's first known frames too, where the
    first has fewer of its own.
    """
    write_clip(tmp_path / "first.mp4", frames=9)
    few(tmp_path, 12)
    job = job_of(tmp_path, window=13, overlap=9, extend=tmp_path / "first.mp4")
    video = render(job, model, tmp_path / "out.mp4").path
    old, before = read_frames(video), read_frames(tmp_path / "first.mp4")
    with open_clips(job.inputs, job.history) as clips:
        finished = _Finished(job, video, clips)
        states = [finished.state_before(Again(j, range(4 * j, 4 * j + 4), 5, 0), 16) for j in range(3)]
    whole = to_signal(np.concatenate((before, old)))
    for j, state in enumerate(states):
        assert state.carried is not None and (state.carried == whole[:, 4 * j : 4 * j + 9]).all()
    new = again(model, job, video, tmp_path / "new.mp4", {1: 5, 2: 5, 3: 5})
    assert new.shape == old.shape and not (new == old).all(axis=(1, 2, 3)).any()
    with pytest.raises(UsageError, match="Window 2 has 4 new frames, and the next window goes on from 9"):
        windows_again(job, {2: 1}, 12, 9)


def test_all_frames_of_the_wrappers_windows(folder: Path) -> None:
    """With compat kijai the video is longer than its clip."""
    job = job_of(folder, compat="kijai")
    spans = windows_again(job, {1: 0, 3: 0, 4: 0}, 45, 0)
    assert [(one.frames, one.tied) for one in spans] == [
        (range(13), 1),
        (range(25, 37), 0),
        (range(37, 49), 0),
    ]


@pytest.mark.parametrize("number", [0, 4, 10**6])
def test_a_window_that_is_not_there(folder: Path, number: int) -> None:
    with pytest.raises(UsageError, match=f"no window {number}: the video has windows 1 to 3"):
        windows_again(job_of(folder), {number: 1}, LONG, 0)
    with pytest.raises(UsageError, match="the video has one window"):
        windows_again(job_of(folder), {2: 1}, 13, 0)


def test_a_stopped_one_leaves_everything_as_it_was(
    model: OpenModel, folder: Path, video: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done: list[Event] = []

    def second() -> bool:
        return any(isinstance(event, WindowDone) for event in done)

    with pytest.raises(Stopped):
        again(
            model,
            job_of(folder),
            video,
            video,
            {1: 5, 3: 5},
            overwrite=True,
            progress=done.append,
            should_stop=second,
        )
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert second() and not list(folder.glob(".out*"))


def test_a_video_in_its_own_place(model: OpenModel, folder: Path, video: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(video.read_bytes())
    (tmp_path / ".copy.mp4.redo").mkdir()  # left over by a process that was killed
    (tmp_path / ".copy.mp4.redo" / "window-3.mp4").touch()
    old = read_frames(video)
    new = again(model, job_of(folder), copy, copy, {3: 5}, overwrite=True)
    assert (new[:25] == old[:25]).all() and not (new[25:] == old[25:]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"copy.mp4"}


@pytest.mark.parametrize(("count", "fade", "tied"), [(12, 4, 1), (12, 4, 5), (7, 2, 5), (3, 0, 1)])
def test_a_window_fades_into_the_old_frames(count: int, fade: int, tied: int) -> None:
    rng = np.random.default_rng(0)
    new, old = (rng.integers(0, 256, (count, 4, 6, 3)).astype(np.uint8) for _ in range(2))
    made = np.stack(list(faded(iter(new), count, old[count - fade - tied :], tied)))
    for k, frame in enumerate(made):
        place = k - (count - tied - fade)
        part = min(max((place + 1) / (fade + 1), 0), 1)
        assert np.abs(frame - (new[k] * (1 - part) + old[k] * part)).max() <= 0.5 + 1e-9
    assert (made[: count - tied - fade] == new[: count - tied - fade]).all()
    assert (made[count - tied :] == old[count - tied :]).all()


def settled(path: Path, frames: Picture, sound: Path | None, ends: Sequence[int], quality: Quality) -> Path:
    with VideoWriter(path, 64, 48, RATE, sound, quality=quality) as writer:
        for k, frame in enumerate(frames, 1):
            writer.write(frame)
            if k in ends:
                writer.settle()
        return writer.finish()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mp4", codec) for codec in ("h264", "hevc", "av1")),
        *(("a.mov", codec) for codec in ("h264", "prores")),
        *(("a.mkv", codec) for codec in ("h264", "hevc")),
        ("a.webm", "vp9"),
    ],
)
def test_packets_of_every_codec_are_replaced(folder: Path, tmp_path: Path, name: str, codec: str) -> None:
    """At the start, inside and at the end; the parts are decoded as if alone."""
    rng, quality = np.random.default_rng(0), Quality(codec)
    frames = rng.integers(0, 256, (30, 3, 4, 3)).astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    video = settled(tmp_path / name, frames, folder / "tone.m4a", (9, 20), quality)
    old = read_frames(video)
    parts = {}
    for first, count in ((0, 9), (20, 10)):
        part = settled(tmp_path / f"{first}{name}", 255 - frames[first : first + count], None, (), quality)
        require_same_encoder(video, part)
        parts[first] = part
    require_cuts(video, {0, 9, 20, 30}, RATE)
    inside = 19 if codec != "prores" else 31  # every frame of that is a key frame
    with pytest.raises(InputError, match=f"frame {inside} begins a window and is no key frame"):
        require_cuts(video, {inside}, RATE)
    (tmp_path / "work").mkdir()
    splice(video, parts, tmp_path / f"new{name}", tmp_path / "work", RATE, "a comment")
    new = read_frames(tmp_path / f"new{name}")
    assert len(new) == 30 and (new[9:20] == old[9:20]).all()
    for first, part in parts.items():
        decoded = read_frames(part)
        assert (new[first : first + len(decoded)] == decoded).all()
    assert packets(tmp_path / f"new{name}") == packets(video)
    with av.open(str(tmp_path / f"new{name}")) as container:
        assert "a comment" in container.metadata.values()


def test_a_video_of_another_program_is_refused(
    model: OpenModel, folder: Path, video: Path, tmp_path: Path
) -> None:
    frames = read_frames(video)
    whole = settled(tmp_path / "whole.mp4", frames, None, (), Quality())
    with pytest.raises(InputError, match="whole.mp4 was encoded by another program: frame 13"):
        again(model, job_of(folder), whole, tmp_path / "new.mp4", {2: 5})
    other = settled(tmp_path / "other.mp4", frames, None, (13, 25), Quality("hevc"))
    with pytest.raises(InputError, match="another version of the encoder"):
        again(model, job_of(folder), other, tmp_path / "new.mp4", {2: 5})
    short = settled(tmp_path / "short.mp4", frames[:FRAMES], None, (13,), Quality())
    with pytest.raises(InputError, match="has 20 frames, and a video made as its record says has 27"):
        again(model, job_of(folder), short, tmp_path / "new.mp4", {2: 5})
    assert not (tmp_path / "new.mp4").exists() and not list(tmp_path.glob(".*"))
