"""Peak host memory of whole jobs by the number of frames: a table, made by hand.

    python tests/memory_by_length.py 100,300,1000
    python tests/memory_by_length.py 9000 --modes loop,hybrid
    python tests/memory_by_length.py 100,1000 --networks tiny     (64x48; the graphs must exist)

Everything runs as in a job, with real clips and a real output, but for the networks: their results are made
up, so that 832x480 takes no GPU. With `--networks tiny` they are those of the tiny model, and windows are
short. Each row is a process of its own. `peak` is what test_long_memory.py uses.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.pipeline import stream_pieces
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.weights.tiny import write_tiny_weights

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


def run(folder: Path, changes: Mapping[str, Any], written: bool, tiny: bool) -> None:
    job = Job(Inputs.from_folder(folder, "replace"), "replace", steps=2, **changes)
    with _tiny(folder) if tiny else nullcontext(Opened()) as model:
        if written:
            render(job, model, folder / "out.mp4", overwrite=True)
        else:
            assert sum(piece.shape[1] for piece in model.pieces(job)) > 0
    print(peak_bytes())


def _tiny(folder: Path) -> OpenModel:
    write_tiny_weights(folder / "weights", seed=0)
    return open_model(WeightFiles((folder / "weights",)), Settings(executor="onnxruntime", text_cache=False))


def peak(folder: Path, mode: str, *options: str) -> int:
    """Bytes of a process that renders the clips in `folder`. Options: `--unwritten` only makes the frames,
    `--short` takes short windows, `--tiny` the networks of the tiny model.
    """
    command = [sys.executable, __file__, "child", str(folder), mode, *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "child":
        _, folder, mode, *options = arguments
        changes = (SHORT if "--short" in options else MODES)[mode]
        run(Path(folder), changes, "--unwritten" not in options, "--tiny" in options)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("frames", help="such as 100,300,1000")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--size")
    parser.add_argument("--networks", choices=("made-up", "tiny"), default="made-up")
    given = parser.parse_args(arguments)
    tiny = given.networks == "tiny"
    width, height = map(int, (given.size or ("64x48" if tiny else "832x480")).split("x"))
    for frames in map(int, given.frames.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = write_clips(Path(name), frames, width, height)
            for mode in given.modes.split(","):
                start = time.perf_counter()
                size = peak(folder, mode, *(("--short", "--tiny") if tiny else ()))
                seconds = time.perf_counter() - start
                print(f"{frames:6} frames  {mode:8} {size / 1e6:8.0f} MB  {seconds:6.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
