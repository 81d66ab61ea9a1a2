"""Clips of any size and length for benchmarks: prepared clips (a moving disc on changing grey), and the
packaged sample as a driving clip with its reference.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

import trt_wan
from trt_wan.runtime.video.clips import FACE_SIZE
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.writer import VideoWriter

RATE = Fraction(30)
CLIPS = ("pose", "face", "bg", "mask")
SAMPLE = Path(trt_wan.__file__).parent / "sample"


def write_clips(folder: Path, width: int, height: int, frames: int, clips: Sequence[str] = CLIPS) -> Path:
    """Writes the prepared picture and `clips` into `folder`."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "src_ref.png"), _picture(width, height, 0.3))
    for name in clips:
        size = (FACE_SIZE, FACE_SIZE) if name == "face" else (width, height)
        with VideoWriter(folder / f"src_{name}.mp4", *size, RATE, None, overwrite=True) as writer:
            for k in range(frames):
                picture = _picture(*size, k / frames)
                writer.write(np.where(picture > 200, 255, 0).astype(np.uint8) if name == "mask" else picture)
            writer.finish()
    return folder


def write_prepared(folder: Path, width: int, height: int, frames: int) -> Path:
    """Writes the sample's prepared clips and reference at that size into `folder`, as `write_driving`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_reference(folder / "src_ref.png", width, height)
    for name in CLIPS:
        size = (FACE_SIZE, FACE_SIZE) if name == "face" else (width, height)
        write_driving(folder / f"src_{name}.mp4", *size, frames, f"src_{name}.mp4")
    return folder


def write_driving(path: Path, width: int, height: int, frames: int, clip: str = "driving.mp4") -> Path:
    """Writes a clip of the sample at that size, played back and forth for `frames` frames."""
    import cv2

    how = cv2.INTER_NEAREST if clip == "src_mask.mp4" else cv2.INTER_LINEAR
    with Clip(SAMPLE / clip) as sample:
        pictures = [
            cv2.resize(sample.window([i])[0], (width, height), interpolation=how)
            for i in range(sample.frames)
        ]
        rate = sample.rate
    around = [*pictures, *pictures[-2:0:-1]]
    with VideoWriter(path, width, height, rate, None, overwrite=True) as writer:
        for k in range(frames):
            writer.write(around[k % len(around)])
        writer.finish()
    return path


def write_reference(path: Path, width: int, height: int) -> Path:
    """Writes the sample's character at that size."""
    import cv2

    picture = cv2.resize(read_picture(SAMPLE / "src_ref.png"), (width, height))
    cv2.imwrite(str(path), picture[..., ::-1])
    return path


def _picture(width: int, height: int, phase: float) -> Picture:
    import cv2

    ramp = np.linspace(40, 120, width) + 40 * phase
    picture = np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=-1).astype(np.uint8)
    centre = (int(width * (0.25 + 0.5 * phase)), height // 2)
    cv2.circle(picture, centre, min(width, height) // 4, (220, 130, 70), -1)
    return picture
