"""The prepared clips of a job, opened together: same length, right sizes, one canvas."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.closing import Closing
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Note
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.pictures import read_transparent
from trt_wan.runtime.video.stills import AnyClip, open_clip
from trt_wan.runtime.video.transparency import colour, transparency_note

FACE_SIZE = 512  # pixels, both sides of every Wan-Animate face clip
PERSON = 128  # levels of a mask from here on are the person
MOST_LEAD = 33  # frames before the first used one, for a video that goes on from another
MASK_NOISE = 6  # levels that compression adds to black and takes from white


@dataclass(frozen=True)
class Clips(Closing):
    """Open clips, None for those not given. Frames and rate are the driving clip's. A context manager."""

    reference: Pixels  # [h, w, 3], of the size in the file
    pose: AnyClip | None
    face: AnyClip | None
    background: AnyClip | None
    mask: AnyClip | None
    width: int
    height: int
    frames: int
    rate: Fraction
    notes: Sequence[Note] = ()  # about unusual files
    start: Fraction = Fraction(0)  # seconds of the driving clip that are cut off before its first frame
    cut: Cut | None = None  # by numbers of frames
    lead: int = 0  # frames before the first that is used, which can be read too: numbers begin with them
    init: AnyClip | None = None
    # By window, known frames [3, r, H, W] at its end (redo.py).
    endings: Mapping[int, Array] = field(default_factory=dict)
    # Of a live source: waits for that many frames, and returns how many there are; fewer: no more come. Until
    # it is called, `frames` is made up.
    coming: Callable[[int], int] | None = None

    def until(self, frames: int) -> "Clips":
        """With that many frames of a live source, or all that it has had."""
        return self if self.coming is None else replace(self, frames=self.coming(frames))

    def close(self) -> None:
        for clip in (self.pose, self.face, self.background, self.mask, self.init):
            if clip is not None:
                clip.close()


def open_clips(inputs: Inputs, window: int) -> Clips:
    """Opens every clip, to be read in windows of `window` frames. Raises InputError, with every file closed,
    if they do not fit together.
    """
    picture = read_transparent(inputs.reference)
    reference = picture.over(colour(inputs.behind))
    notes = []
    if picture.opacity is not None:
        option = "--reference-background"
        notes.append(transparency_note(inputs.reference, picture.opacity, inputs.behind, option))
    cut, lead, used, to_the_end = inputs.cut, 0, range(0), True
    names = ("pose", "face", "background", "mask", "init")
    paths: dict[str, Path | None] = {name: getattr(inputs, name) for name in names}
    with ExitStack() as files:
        clips: dict[str, AnyClip | None] = dict.fromkeys(paths)
        for name, path in paths.items():
            if path is not None:
                clip = open_clip(path, window, one=name in ("background", "mask"), cut=cut)
                files.callback(clip.close)
                if cut is not None and not any(clips.values()):  # the driving clip: the others follow it
                    used, to_the_end = clip.used, cut.end is None
                    lead = min(used.start, MOST_LEAD) if inputs.continues else 0
                    cut = Cut.frames(range(used.start - lead, used.stop), to_the_end)
                    clip = open_clip(path, window, cut=cut)
                    files.callback(clip.close)
                clips[name] = clip
        made = _fitted(inputs, reference, clips)
        if cut is not None:
            start = made.start + lead / made.rate
            cut = Cut.frames(used, to_the_end)
            made = replace(made, frames=made.frames - lead, lead=lead, start=start, cut=cut)
        files.pop_all()
    return replace(made, notes=_once([*notes, *made.notes]))


def frames_of(clip: AnyClip, indices: Sequence[int]) -> Pixels:
    """The clip's frames `indices`, [n, H, W, 3]. The frame of a clip of one stands for all."""
    return clip.window([0] * len(indices) if clip.frames == 1 else indices)


def people_of(masks: Pixels) -> NDArray[np.bool_]:
    """True on the person: frames of a mask clip [n, H, W, 3] by the threshold PERSON."""
    return masks[..., 0] >= PERSON


def soft_pixels(masks: Pixels) -> int:
    """How many pixels are neither black nor white, compression noise aside."""
    return int(((masks[..., 0] > MASK_NOISE) & (masks[..., 0] < 255 - MASK_NOISE)).sum())


def _fitted(inputs: Inputs, reference: Pixels, clips: Mapping[str, AnyClip | None]) -> Clips:
    opened = [clip for clip in clips.values() if clip is not None]
    driving = opened[0]  # the pose clip, else the face clip
    one = [clip for clip in (clips["background"], clips["mask"]) if clip is not None and clip.frames == 1]
    moving = [clip for clip in opened if clip not in one or driving.frames == 1]
    frames = min(clip.frames for clip in moving)
    notes = [note for name, clip in clips.items() if clip for note in clip.notes if _matters(name, note)]
    if len({clip.frames for clip in moving}) > 1:
        lengths = ", ".join(f"{clip.path.name} has {clip.frames}" for clip in moving)
        if not inputs.trim_to_shortest:
            raise InputError(
                f"The clips have different numbers of frames: {lengths}.",
                "Cut them to the same length; frame k of each must belong to frame k of the driving clip. "
                "--trim-to-shortest cuts the longer ones at their ends.",
            )
        data = {"frames": frames, "lengths": {str(clip.path): clip.frames for clip in moving}}
        notes.append(Note(f"The clips are cut to {frames} frames: {lengths}.", "trimmed", data))
    if frames > 1:
        notes += [
            Note(
                f"{clip.path.name} is one picture; it stands for all {frames} frames.",
                "repeated",
                {"file": str(clip.path), "frames": frames},
            )
            for clip in one
        ]
    canvas = next((clips[name] for name in ("pose", "background", "mask") if clips[name] is not None), None)
    size = (canvas.width, canvas.height) if canvas else (reference.shape[1], reference.shape[0])
    if canvas:
        _require_multiple_of_16(canvas.path, _shown(canvas), *size)
    else:
        _require_multiple_of_16(inputs.reference, f"{size[0]}x{size[1]}", *size)
    for name, clip in clips.items():
        if clip is not None:
            _require_size(clip, *((FACE_SIZE, FACE_SIZE) if name == "face" else size))
    return Clips(
        reference,
        pose=clips["pose"],
        face=clips["face"],
        background=clips["background"],
        mask=clips["mask"],
        init=clips["init"],
        width=size[0],
        height=size[1],
        frames=frames,
        rate=driving.rate,
        notes=notes,
        start=driving.start,
    )


def _matters(name: str, note: Note) -> bool:
    """The colours of a mask do not, as grey is grey in all of them; the video has the driving clip's rate."""
    return not (name == "mask" and note.code == "untagged_colour")


def _once(notes: Sequence[Note]) -> list[Note]:
    """Notes of one kind as one, which names the other files."""
    kinds: dict[str, list[Note]] = {}
    for note in notes:
        kinds.setdefault(note.code, []).append(note)
    return [_joined(same) for same in kinds.values()]


def _joined(same: Sequence[Note]) -> Note:
    first, *more = same
    if not more:
        return first
    files = [str(note.data["file"]) for note in same]
    names = ", ".join(Path(file).name for file in files[1:])
    return Note(f"{first.text} The same kind: {names}.", first.code, {**first.data, "files": files})


def _shown(clip: AnyClip) -> str:
    """The clip's size, and where its pixels are not square, that in the file."""
    tagged = next((note.data for note in clip.notes if note.code == "pixel_aspect"), None)
    coded = f" ({tagged['coded']}, with pixels of {tagged['pixels']})" if tagged else ""
    return f"{clip.width}x{clip.height}{coded}"


def _require_multiple_of_16(path: Path, shown: str, width: int, height: int) -> None:
    if width % 16 or height % 16:
        w, h = (max(16, (side + 8) // 16 * 16) for side in (width, height))
        raise InputError(
            f"{path.name} is {shown}; both sides must be multiples of 16.",
            with_commands("Scale or crop it and the clips that go with it, for example:", _scale(path, w, h)),
        )


def require_init_size(init: Path, width: int, height: int, frames: int) -> None:
    """Raises InputError unless the init clip has the size and the length of the video."""
    with open_clip(init) as clip:
        _require_size(clip, width, height)
        if clip.frames != frames:
            raise InputError(
                f"{init} has {clip.frames} frames, and the clips will have {frames}.",
                "Frame k of each must belong to frame k of the driving clip: cut it with --start and --end.",
            )


def _require_size(clip: AnyClip, width: int, height: int) -> None:
    if (clip.width, clip.height) != (width, height):
        raise InputError(
            f"{clip.path.name} is {_shown(clip)} where {width}x{height} is needed.",
            with_commands("Scale it:", _scale(clip.path, width, height)),
        )


def _scale(path: Path, width: int, height: int) -> str:
    """ffmpeg's scale keeps the shape of the picture by pixels that are not square, unless it is told to."""
    scaled = path.with_name(f"{path.stem}.{width}x{height}{path.suffix}")
    source, made = (shlex.quote(str(file)) for file in (path, scaled))
    return f"ffmpeg -i {source} -vf scale={width}:{height},setsar=1 {made}"
