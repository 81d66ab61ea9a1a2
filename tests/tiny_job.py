"""A tiny job as a user has it: prepared clips with sound, and the command that builds its graphs.

Clips are moving discs, written by our own writer; test_video.py proves that writer against other readers.
"""

import shlex
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from trt_wan.engines.shape import Plan
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.writer import VideoWriter

PLAN = Plan(64, 48, 13)
FRAMES = 20  # two windows: 13 frames, then 7 that need padding
RATE = Fraction(30000, 1001)
TRT_WAN = [sys.executable, "-m", "trt_wan"]
BUILD = "trt-wan build --model tiny --size 64x48 --window 13 --precision fp32"

BUILD_FP8 = BUILD.replace("fp32", "fp8")
BUILD_ENGINES = BUILD.replace("--precision fp32", "--target sm89")  # in FP8, which the target has


def as_argv(command: str) -> list[str]:
    """A command line of ours as a user types it, for subprocess."""
    name, *arguments = shlex.split(command)
    assert name == "trt-wan", command
    return [*TRT_WAN, *arguments]


def write_sound(path: Path, seconds: float) -> Path:
    """A tone, AAC."""
    t = np.arange(int(48_000 * seconds)) / 48_000
    tone = (0.4 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_clip(
    path: Path,
    size: tuple[int, int] = (PLAN.width, PLAN.height),
    frames: int = FRAMES,
    rate: Fraction = RATE,
    sound: Path | None = None,
    colour: tuple[int, int, int] = (220, 120, 60),
) -> None:
    """A disc that crosses a black picture of `size` (width, height)."""
    width, height = size
    with VideoWriter(path, width, height, rate, sound, overwrite=True) as writer:
        for k in range(frames):
            picture = np.zeros((height, width, 3), np.uint8)
            cv2.circle(
                picture, (width // 4 + k * width // (2 * frames), height // 2), height // 3, colour, -1
            )
            writer.write(picture)
        writer.finish()


def write_reference(path: Path, size: tuple[int, int] = (PLAN.width, PLAN.height)) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), np.uint8)
    cv2.imwrite(str(path), picture)


def prepare(folder: Path, sound: Path, frames: int = FRAMES) -> Path:
    """All five prepared files in `folder`; the pose clip has sound."""
    folder.mkdir(parents=True, exist_ok=True)
    write_reference(folder / "src_ref.png")
    write_clip(folder / "src_pose.mp4", frames=frames, sound=sound)
    write_clip(folder / "src_face.mp4", size=(512, 512), frames=frames)
    write_clip(folder / "src_bg.mp4", frames=frames, colour=(30, 90, 160))
    write_clip(folder / "src_mask.mp4", frames=frames, colour=(255, 255, 255))
    return folder


def read_frames(path: Path) -> Picture:
    """All frames [n, H, W, 3] of a video, or an error when it does not play to its end."""
    with Clip(path) as clip:
        return np.concatenate([clip.window([k]) for k in range(clip.frames)])
