"""The frames that the first window continues: a picture (`--start-frame`) or a video's end (`--extend`).

They come before the clip's first frame and are not in the output, which has as many frames as the clip. Their
pose, face and background are those of the frames that `--start` cuts off, else those of the first frame.
"""

import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.job import Inputs
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip

SAME_RATE = Fraction(1, 1000)  # part by which the rates of one video may differ


def frames_before(
    inputs: Inputs, overlap: int, width: int, height: int, rate: Fraction | None = None
) -> Pixels | None:
    """uint8 [r, H, W, 3], None if the video begins with its clip. r is 1 for a picture, else the overlap, or
    for a shorter video the largest 4k+1. `rate` is that of the clips, if it is known already.

    Raises InputError for another size or rate.
    """
    if inputs.start_frame is not None:
        picture = read_picture(inputs.start_frame)
        _require_size(inputs.start_frame, picture.shape[1], picture.shape[0], width, height, ".png")
        return picture[None]
    if inputs.extend is None:
        return None
    with Clip(inputs.extend) as clip:
        _require_size(inputs.extend, clip.width, clip.height, width, height, inputs.extend.suffix)
        if rate is not None and abs(clip.rate / rate - 1) > SAME_RATE:
            raise InputError(
                f"{inputs.extend} has {float(clip.rate):g} frames per second, and the clips that continue it "
                f"have {float(rate):g}.",
                f"Prepare the clip with --rate {float(clip.rate):g}.",
            )
        frames = clip.frames
    count = (min(overlap, frames) - 1) // 4 * 4 + 1
    with Clip(inputs.extend, cut=Cut.frames(range(frames - count, frames), to_the_end=True)) as clip:
        return np.concatenate([clip.window([k]) for k in range(count)])


def shifted(indices: list[int], before: int, lead: int) -> list[int]:
    """From numbers that count the `before` frames to those of the clips, of which `lead` frames come before
    the first that is used.
    """
    return [max(index - before + lead, 0) for index in indices]


def _require_size(path: Path, width: int, height: int, to_width: int, to_height: int, suffix: str) -> None:
    if (width, height) != (to_width, to_height):
        source, made = (
            shlex.quote(str(file)) for file in (path, path.with_name(f"{path.stem}.scaled{suffix}"))
        )
        raise InputError(
            f"{path} is {width}x{height}, and the video is to be {to_width}x{to_height}.",
            with_commands(
                "Scale it, or give --size:",
                f"ffmpeg -i {source} -vf scale={to_width}:{to_height},setsar=1 {made}",
            ),
        )
