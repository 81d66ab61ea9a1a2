"""The prepared clips of a job, opened together: same length, right sizes, one canvas."""

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.job import Inputs
from trt_wan.runtime.video.reader import Clip, read_picture

FACE_SIZE = 512  # pixels, both sides of every Wan-Animate face clip


@dataclass(frozen=True)
class Clips:
    """Open clips, None for those not given. Frames and rate are the driving clip's. A context manager."""

    reference: Pixels  # [h, w, 3], as in the file
    pose: Clip | None
    face: Clip | None
    background: Clip | None
    mask: Clip | None
    width: int
    height: int
    frames: int
    rate: Fraction

    def close(self) -> None:
        for clip in (self.pose, self.face, self.background, self.mask):
            if clip is not None:
                clip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_clips(inputs: Inputs, window: int) -> Clips:
    """Opens every clip, to be read in windows of `window` frames. Raises InputError, with every file closed,
    if they do not fit together.
    """
    reference = read_picture(inputs.reference)
    paths = {"pose": inputs.pose, "face": inputs.face, "background": inputs.background, "mask": inputs.mask}
    with ExitStack() as files:
        clips = {
            name: files.enter_context(Clip(path, history=window)) if path else None
            for name, path in paths.items()
        }
        made = _fitted(inputs, reference, clips)
        files.pop_all()
    return made


def _fitted(inputs: Inputs, reference: Pixels, clips: Mapping[str, Clip | None]) -> Clips:
    opened = [clip for clip in clips.values() if clip is not None]
    if len({clip.frames for clip in opened}) > 1:
        lengths = ", ".join(f"{clip.path.name} has {clip.frames}" for clip in opened)
        raise InputError(
            f"The clips have different numbers of frames: {lengths}.",
            "Cut them to the same length; frame k of each must belong to frame k of the driving clip.",
        )
    canvas = next((clips[name] for name in ("pose", "background", "mask") if clips[name] is not None), None)
    size = (canvas.width, canvas.height) if canvas else (reference.shape[1], reference.shape[0])
    _require_multiple_of_16(canvas.path if canvas else inputs.reference, *size)
    for name, clip in clips.items():
        if clip is not None:
            _require_size(clip, *((FACE_SIZE, FACE_SIZE) if name == "face" else size))
    return Clips(
        reference, **clips, width=size[0], height=size[1], frames=opened[0].frames, rate=opened[0].rate
    )


def _require_multiple_of_16(path: Path, width: int, height: int) -> None:
    if width % 16 or height % 16:
        w, h = (max(16, (side + 8) // 16 * 16) for side in (width, height))
        raise InputError(
            f"{path.name} is {width}x{height}; both sides must be multiples of 16.",
            with_commands(
                f"Scale or crop it and the clips that go with it, to {w}x{h} for example:",
                _scaled(path, w, h),
            ),
        )


def _require_size(clip: Clip, width: int, height: int) -> None:
    if (clip.width, clip.height) != (width, height):
        raise InputError(
            f"{clip.path.name} is {clip.width}x{clip.height} where {width}x{height} is needed.",
            with_commands("Scale it:", _scaled(clip.path, width, height)),
        )


def _scaled(path: Path, width: int, height: int) -> str:
    """The ffmpeg command that writes the clip or picture at that size, beside it."""
    made = path.with_name(f"{path.stem}.{width}x{height}{path.suffix}")
    return f"ffmpeg -i {shlex.quote(str(path))} -vf scale={width}:{height} {shlex.quote(str(made))}"
