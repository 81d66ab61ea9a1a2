"""Peak host memory of whole jobs by the number of frames: a table, made by hand.

    python tests/memory_by_length.py 100,300,1000
    python tests/memory_by_length.py 9000 --modes loop,hybrid

Everything runs as in a job, with real clips and a real output, but for the networks: their results are made
up, so that 832x480 takes no GPU. Each row is a process of its own. `peak` is what test_long_memory.py uses.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.pipeline import stream_pieces
from trt_wan.runtime.render import render
from trt_wan.runtime.video.writer import VideoWriter

MODES: Mapping[str, Mapping[str, Any]] = {
    "loop": {"overlap": 5},
    "hybrid": {"window": 229, "overlap": 5, "context": Context(whole=False)},
    "context": {"context": Context()},
}
# The same with windows that a small clip has several of.
SHORT: Mapping[str, Mapping[str, Any]] = {
    "loop": {"window": 13, "overlap": 5},
    "hybrid": {"window": 29, "overlap": 5, "context": Context(frames=13, overlap=4, whole=False)},
    "context": {"context": Context(frames=13, overlap=4)},
}


class MadeUp(OnnxRuntimeExecutor):
    """Networks give arrays of ones tenths, every page of them written."""

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        return tuple(np.full(output.shape, 0.1, np.float32) for output in network.outputs)


class Opened:
    def begin(self, job: Job, width: int, height: int, frames: int, progress: Any) -> Model:
        return Model(TINY, Plan(width, height, job.model_window), MadeUp(Path(), BoundWeights({})), {})

    def texts(self, model: Model, job: Job, progress: Any) -> dict[str, Array]:
        return dict.fromkeys(job.texts, np.zeros((TINY.text.length, TINY.text.dim), np.float32))

    def pieces(self, job: Job, **options: Any) -> Iterator[Array]:
        return stream_pieces(job, self, **options)


def write_clips(folder: Path, frames: int, width: int, height: int) -> Path:
    """All clips of the mode replace; a bar moves over them."""
    sizes = {"src_pose": (width, height), "src_bg": (width, height), "src_mask": (width, height)}
    folder.mkdir(exist_ok=True)
    for name, (w, h) in {**sizes, "src_face": (512, 512)}.items():
        with VideoWriter(folder / f"{name}.mp4", w, h, Fraction(25)) as writer:
            for k in range(frames):
                picture = np.zeros((h, w, 3), np.uint8)
                picture[:, k % w : k % w + 32] = 255
                writer.write(picture)
            writer.finish()
    import cv2

    cv2.imwrite(str(folder / "src_ref.png"), np.zeros((height, width, 3), np.uint8))
    return folder


def run(folder: Path, changes: Mapping[str, Any], written: bool) -> None:
    job = Job(Inputs.from_folder(folder, "replace"), "replace", steps=2, **changes)
    if written:
        render(job, Opened(), folder / "out.mp4", overwrite=True)
    else:
        assert sum(piece.shape[1] for piece in Opened().pieces(job)) > 0
    print(peak_bytes())


def peak(folder: Path, mode: str, short: bool = False) -> int:
    """Bytes of a process that renders the clips in `folder`, or with `short` only makes their frames."""
    command = [sys.executable, __file__, "child", str(folder), mode, *(["--short"] if short else [])]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "child":
        short = "--short" in arguments
        run(Path(arguments[1]), (SHORT if short else MODES)[arguments[2]], written=not short)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("frames", help="such as 100,300,1000")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--size", default="832x480")
    given = parser.parse_args(arguments)
    width, height = map(int, given.size.split("x"))
    for frames in map(int, given.frames.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = write_clips(Path(name), frames, width, height)
            for mode in given.modes.split(","):
                print(f"{frames:6} frames  {mode:8} {peak(folder, mode) / 1e6:8.0f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
