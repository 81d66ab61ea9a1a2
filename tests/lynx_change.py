"""What Lynx's adapters change in the velocity, and what a step costs with them. By hand.

    python tests/lynx_change.py --random-weights 14b                 noise of full size, on a GPU
    python tests/lynx_change.py --weights models/ --inputs prepared/ --face-embedder arcface.onnx
    python tests/lynx_change.py --random-weights tiny --size 64x48 --window 13 --steps 2

For the first window: the relative change of the velocity of every step by the IP adapter alone, the ref
adapter alone, and both, on the latents of the run without; and the median time of a step. Without --inputs
the clips are made up, without --face-embedder the embedding is. `tests/full_size.py FOLDER --lynx full`
writes files to load.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from test_identity import POINTS, embedder
from tiny_job import write_clip

from trt_wan.cli.missing import require_graphs
from trt_wan.engines.contract import Network
from trt_wan.engines.lynx import Lynx
from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, Note, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.identity import FaceIdentity
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.model import Basis, OpenModel, open_basis
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips


class Tape(ForwardingExecutor):
    """Keeps the velocities of a run. The first run's latents are given to all later ones."""

    latents: list[Array] = []  # noqa: RUF012  (one script)
    velocities: list[Array] = []  # noqa: RUF012

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        if network.name == "patch_embed":
            step = len(Tape.velocities)
            if step == len(Tape.latents):
                Tape.latents.append(np.array(inputs["latent"], np.float32))
            inputs = {**inputs, "latent": Tape.latents[step]}
        outputs = self.executor.run(network, n, inputs)
        if network.name == "head":
            Tape.velocities.append(np.array(outputs[0], np.float32))
        return outputs


def velocities(model: OpenModel, job: Job) -> tuple[list[Array], float]:
    """Of every step of the first window, and the median seconds of a step."""
    Tape.velocities, seconds = [], []

    def progress(event: Event) -> None:
        if isinstance(event, Note) and event.code == "identity":
            print(event.text, file=sys.stderr)
        if isinstance(event, StepDone):
            seconds.append(event.seconds)
            if event.step == event.steps:
                raise Stopped("The first window is there.")

    try:
        for _ in model.pieces(job, progress=progress):
            pass
    except Stopped:
        pass
    return Tape.velocities, median(seconds[1:] or seconds)


def made_up(folder: Path, size: tuple[int, int], frames: int) -> Inputs:
    cv2.imwrite(str(folder / "src_ref.png"), np.full((size[1], size[0], 3), 90, np.uint8))
    write_clip(folder / "src_pose.mp4", size, frames)
    write_clip(folder / "src_face.mp4", (512, 512), frames)
    return Inputs(folder / "src_ref.png", folder / "src_pose.mp4", folder / "src_face.mp4")


def face(folder: Path, asked: Any) -> FaceIdentity:
    picture, landmarks = asked.picture, tuple(asked.landmarks or ())
    if picture is None:
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        picture = folder / "face.png"
        cv2.imwrite(str(picture), cv2.resize(noise, (256, 256), interpolation=cv2.INTER_CUBIC))
    net = asked.face_embedder
    if net is None:
        weights = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
        net = embedder(folder / "embedder.onnx", weights)
    return FaceIdentity(picture, landmarks or POINTS, net, asked.ip_scale, asked.ref_scale)


def measure(basis: Basis, job: Job, identity: FaceIdentity) -> None:
    variants: dict[str, FaceIdentity | None] = {
        "without": None,
        "ip": replace(identity, ref_scale=0.0),
        "ref": replace(identity, ip_scale=0.0),
        "both": identity,
    }
    with open_clips(job.inputs, job.history) as clips:
        width, height = clips.width, clips.height
    with_identity = replace(job, identity=identity)
    require_graphs(lambda _: None, basis, width, height, with_identity, build=True)()

    def watch(executor: Executor) -> Executor:
        return Tape(executor)

    gpu = None if basis.place is None else basis.place[0]
    free = 0 if gpu is None else gpu.free_bytes()
    with basis.open(watch) as model:
        found = {}
        for name, one in variants.items():
            found[name] = velocities(model, replace(job, identity=one))
            if gpu is not None:
                print(f"{name}: {(free - gpu.free_bytes()) / 1e9:.2f} GB of GPU memory", file=sys.stderr)
    plain, seconds = found["without"]
    print(f"{'':8} {'s/step':>8}  relative change of the velocity, by step")
    for name, (made, took) in found.items():
        changes = [float(np.linalg.norm(v - u) / np.linalg.norm(u)) for v, u in zip(made, plain, strict=True)]
        print(f"{name:8} {took:8.3f}  " + " ".join(f"{change:.2e}" for change in changes))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, action="append", default=[])
    parser.add_argument("--random-weights", choices=("14b", "tiny"))
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--landmarks", type=float, nargs=10)
    parser.add_argument("--face-embedder", type=Path)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--window", type=int, default=77)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vram", type=float, help="GB")
    parser.add_argument("--ip-scale", type=float, default=1.0)
    parser.add_argument("--ref-scale", type=float, default=1.0)
    asked = parser.parse_args()
    width, height = map(int, asked.size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = (
            made_up(folder, (width, height), asked.window)
            if asked.inputs is None
            else Inputs.from_folder(asked.inputs, "animate")
        )
        job = Job(inputs, window=asked.window, steps=asked.steps)
        files = WeightFiles(tuple(asked.weights), random=asked.random_weights)
        basis = open_basis(files, Settings(vram=asked.vram), lambda event: None)
        from trt_wan.engines.shape import Plan

        plan = Plan(width, height, asked.window, basis.precision)
        for lynx in (None, Lynx(True, True)):
            arena = activation_bytes(basis.weights.config, plan, replace(job.load, lynx=lynx))
            print(f"activations {'with' if lynx else 'without'} Lynx: {arena / 1e9:.2f} GB", file=sys.stderr)
        measure(basis, job, face(folder, asked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
