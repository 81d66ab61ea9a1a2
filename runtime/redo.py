"""Renders windows of a finished video again, each from another seed. The other windows' packets are copied.

A window begins with the last frames of the one before, as in the loop, but as they are in the video: decoded.
The window after it was made to go on from its old last frames, so the model is given these as known frames at
its end, and they stay in the video. The model was not trained for known frames at the end. The last window
has nothing after it, and of two neighbours that are rendered again the second goes on from the first.

Windows are numbered from 1 in options and records, and from 0 (j) in the code. Frames are numbered from 0 in
the video; negative numbers are those of the frames that it continues.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.colour import Matching
from trt_wan.runtime.conditioning import Pixels, to_signal
from trt_wan.runtime.context.settings import LATENT
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, StepDone, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.kept.record import Record, write_sidecar
from trt_wan.runtime.paste_back import pasted_back
from trt_wan.runtime.pipeline import ShouldStop, noise_before, to_pixels, window_clips
from trt_wan.runtime.render import ROOM, Rendered, Streaming
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.container import measure
from trt_wan.runtime.video.continued import frames_before, shifted
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.splice import require_cuts, require_same_encoder, splice
from trt_wan.runtime.video.target import check_target, claimed, explained, redo_folder
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.video.writer_thread import Beside
from trt_wan.runtime.window_state import WindowState

# Frames over which a new window fades into the old frames at its end: those of one latent, the shortest span
# that the model itself changes by.
FADE = LATENT
OF_ALL = {"short_last_window", "unused_prompts"}  # codes of notes about all windows
AT_A_TIME = 16  # frames of the video that are read together


class Opened(Streaming, Protocol):
    """An open model (opening/model.py)."""

    config: ModelConfig


@dataclass(frozen=True)
class Again:
    """A window that is rendered again."""

    j: int
    frames: range
    seed: int
    tied: int  # old frames at its end that stay: the next window goes on from them

    @property
    def text(self) -> str:
        first, last = self.frames[0], self.frames[-1]
        made = f"window {self.j + 1}, frames {first} to {last}, from seed {self.seed}"
        if not self.tied:
            return made
        stays = "its last frame stays" if self.tied == 1 else f"its last {self.tied} frames stay"
        return f"{made}; {stays}, for the next window goes on from there"


def windows_again(job: Job, seeds: Mapping[int, int], frames: int, known: int) -> list[Again]:
    """The windows with the numbers in `seeds`, in order. `frames` are those of the clips, and `known` come
    before them. Raises UsageError for a window that is not there or has nothing to render.
    """
    windows = job.windows(known + frames)
    made = []
    for number in sorted(seeds):
        j, start = number - 1, (number - 1) * windows.stride
        if not 0 <= j < windows.total:
            there = f"windows 1 to {windows.total}" if windows.total > 1 else "one window"
            raise UsageError(
                f"There is no window {number}: the video has {there}.", "Use --redo with one of those."
            )
        kept = windows.keep(j)
        span = range(max(start + kept.start, known) - known, start + kept.stop - known)
        tied = 0 if j == windows.total - 1 or number + 1 in seeds else job.overlap
        if len(span) <= tied:
            raise UsageError(
                f"Window {number} has {len(span)} new frames, and the next window goes on from {tied}: none "
                "of them can change alone.",
                f"Render both again: --redo {number},{number + 1}",
            )
        made.append(Again(j, span, seeds[number], tied))
    return made


def require_redoable(job: Job, video: Path, again: Sequence[Again], clips: Clips, known: int) -> None:
    """Raises InputError for a video that is not the whole one of `job`, or cannot be cut at its windows."""
    whole = job.windows(known + clips.frames).kept_frames - known
    if (count := len(measure(video).used)) != whole:
        raise InputError(
            f"{video} has {count} frames, and a video made as its record says has {whole}.",
            "Name the whole video, as trt-wan wrote it.",
        )
    require_cuts(video, {place for one in again for place in (one.frames.start, one.frames.stop)}, clips.rate)


def redo(
    job: Job,
    model: Opened,
    output: Path,
    video: Path,
    again: Sequence[Again],
    *,
    clips: Clips,
    overwrite: bool = False,
    paste_back: bool = False,
    record: Record | None = None,
    sidecar: bool = True,
    quality: Quality | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Rendered:
    """Writes `output`, which may be `video` itself: the finished video of `job`, with the windows `again`
    rendered anew. Its sound, rate and length stay, and the frames of other windows bit for bit.

    When the job fails or is stopped, nothing is written. `require_redoable` has passed. Raises TrtWanError.
    """
    check_target(output, overwrite)
    quality = quality or Quality()
    seconds = 0.0
    with ExitStack() as stack:
        stack.enter_context(claimed(output, progress))
        folder = redo_folder(output.resolve())
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with explained(output):
            folder.mkdir()
        _require_same_encoder(video, folder, clips, quality)
        finished = _Finished(job, video, clips)
        windows = finished.windows.total
        told = _told(job, windows, progress)
        for one in again:
            part = folder / f"window-{one.j + 1}{output.suffix}"
            with VideoWriter(part, clips.width, clips.height, clips.rate, quality=quality) as writer:
                seconds += _render(job, model, one, finished, clips, paste_back, writer, told, should_stop)
                writer.finish()
            finished.parts[one.frames] = part
            progress(WindowDone(one.j + 1, windows, len(one.frames)))
        progress(StageStarted("write"))
        comment = record.text(with_paths=False) if record is not None else ""
        parts = {span.start: part for span, part in finished.parts.items()}
        with explained(output):
            splice(video, parts, output, folder, clips.rate, comment)
            if record is not None and sidecar:
                write_sidecar(output, record, progress)
    return Rendered(output, finished.count, clips.width, clips.height, float(clips.rate), seconds)


def _render(
    job: Job,
    model: Opened,
    one: Again,
    finished: "_Finished",
    clips: Clips,
    paste_back: bool,
    writer: VideoWriter,
    told: Progress,
    should_stop: ShouldStop,
) -> float:
    """Writes one window. Returns the seconds that the writing thread was busy."""
    state, span = finished.state_before(one, model.config.vae.latent_channels), one.frames
    old = finished.frames(max(span.stop - one.tied - FADE, span.start), span.stop) if one.tied else None
    if old is not None:
        clips = replace(clips, endings={one.j: to_signal(old[-one.tied :])})

    def write(items: Iterator[Array]) -> None:
        frames: Iterable[Picture] = (frame for piece in items for frame in to_pixels(piece))
        if paste_back:
            background, mask = job.inputs.background, job.inputs.mask
            assert background is not None and mask is not None, "not the mode replace"
            frames = pasted_back(frames, background, mask, clips.cut, span.start)
        for frame in frames if old is None else faded(frames, len(span), old, one.tied):
            writer.write(frame)

    with Beside(write, ROOM) as beside:

        def stop() -> bool:
            beside.check()
            writer.check()
            return should_stop()

        def end(state: WindowState) -> None:
            raise _WindowEnds

        pieces = model.pieces(job, clips=clips, progress=told, should_stop=stop, begin_from=state, keep=end)
        with suppress(_WindowEnds):
            for piece in pieces:
                beside.put(piece)
    return beside.busy_seconds


class _WindowEnds(Exception):
    """Ends a stream with its first window."""


def faded(frames: Iterable[Picture], count: int, old: Pixels, tied: int) -> Iterator[Picture]:
    """`count` frames that end with `old` [n, H, W, 3]: after a linear fade, its last `tied` frames alone."""
    fade = len(old) - tied
    for k, frame in enumerate(frames, len(old) - count):
        if k < 0:
            yield frame
        elif k >= fade:
            yield old[k]
        else:
            part = (k + 1) / (fade + 1)
            yield np.rint(frame * (1 - part) + old[k] * part).astype(np.uint8)


@dataclass
class _Finished:
    """The frames of the finished video, with the windows that are rendered again as they come."""

    job: Job
    video: Path
    clips: Clips
    parts: dict[range, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job, clips = self.job, self.clips
        before = frames_before(job.inputs, job.overlap, clips.width, clips.height, clips.rate)
        self.before = before if before is not None else np.empty((0, clips.height, clips.width, 3), np.uint8)
        self.windows = job.windows(len(self.before) + clips.frames)
        self.count = self.windows.kept_frames - len(self.before)

    def frames(self, start: int, stop: int) -> Pixels:
        """[n, H, W, 3]."""
        return np.concatenate(list(self._pieces(start, stop)))

    def state_before(self, one: Again, channels: int) -> WindowState:
        """The state from which the loop makes that window."""
        start = one.j * self.windows.stride - len(self.before)
        carried: Array | None = None
        if one.j or len(self.before):
            count = self.job.overlap if one.j else len(self.before)
            carried = to_signal(self.frames(start, start + count))
        slot = channels, self.clips.height // 8, self.clips.width // 8
        frames = len(self.before) + self.clips.frames
        generator = noise_before(self.job, one.j, one.seed, frames, slot)
        return WindowState(one.j, carried, generator.state(), np.empty(0, np.float32), self._colours())

    def _colours(self) -> Array | None:
        """The colours of the first window, if others are matched to them."""
        job = self.job
        if job.colour is None or job.colour.anchor != "first" or self.windows.total == 1:
            return None
        known, person = len(self.before), None
        with open_clips(job.inputs, job.history) as clips:
            if clips.mask is not None:
                indices, masked = (
                    shifted(numbers, known, clips.lead)
                    for numbers in (self.windows.indices(0), self.windows.mask_indices(0))
                )
                person = window_clips(clips, indices, False, masked).person
            matching = Matching(job.colour, clips.reference)
            pieces = map(to_signal, self._pieces(-known, self.windows.length(0) - known))
            for _ in matching.window(pieces, None, person):
                pass
        return matching.state

    def _pieces(self, start: int, stop: int) -> Iterator[Pixels]:
        """A few frames at a time."""
        if start < 0:
            yield self.before[start + len(self.before) : min(stop, 0) + len(self.before)]
        for (path, first), numbers in groupby(range(max(start, 0), stop), self._place):
            wanted = [number - first for number in numbers]
            with Clip(path, cut=Cut.frames(range(wanted[0], wanted[-1] + 1), False)) as clip:
                for k in range(0, len(wanted), AT_A_TIME):
                    yield clip.window(range(k, min(k + AT_A_TIME, len(wanted))))

    def _place(self, number: int) -> tuple[Path, int]:
        """The file with that frame, and the number of the file's first."""
        spans = ((path, span.start) for span, path in self.parts.items() if number in span)
        return next(spans, (self.video, 0))


def _require_same_encoder(video: Path, folder: Path, clips: Clips, quality: Quality) -> None:
    """Raises InputError before anything is rendered that could not be put into `video`."""
    sample = folder / f"sample{video.suffix}"
    with VideoWriter(sample, clips.width, clips.height, clips.rate, quality=quality) as writer:
        writer.write(np.zeros((clips.height, clips.width, 3), np.uint8))
        writer.finish()
    require_same_encoder(video, sample)
    sample.unlink()


def _told(job: Job, windows: int, progress: Progress) -> Progress:
    """Counts no time for later windows, which are not rendered, and gives each note once."""
    notes = set[str]()

    def told(event: Event) -> None:
        if isinstance(event, Note):
            if event.text in notes or event.code in OF_ALL:
                return
            notes.add(event.text)
        if isinstance(event, StepDone):
            left, whole = sum(job.computed[event.step :]), sum(job.computed)
            counted = left + (windows - event.window) * whole
            event = replace(event, eta=event.eta * left / counted if counted else 0.0)
        progress(event)

    return told
