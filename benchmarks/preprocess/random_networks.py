"""The three networks of the preprocessing with random weights, for whoever has no files at hand: the genuine
shapes, or tiny ones for a machine without a GPU. Their speed is that of the real ones, what they find is not:
the person is planted, and the outline is nearly the whole picture.

    home()/random/<name>-<hash>/    made once; the hash covers everything that the files are made from
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trt_wan.benchmarks.measure.graph_flops import counted_flops
from trt_wan.benchmarks.preprocess import graph, vitpose, yolov10
from trt_wan.benchmarks.preprocess.tiny_sam2 import TINY_SAM2
from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Config
from trt_wan.engines.sam2.contracts import required_tensors
from trt_wan.engines.store.home import home
from trt_wan.preprocess.sam2.weights import random_sam2_weights
from trt_wan.runtime.events import Note, Progress, silent

ModelName = Literal["full", "tiny"]
SEED = 0
ABOUT = "about.json"  # in a finished folder
# Of the last layer that makes a mask out of features: so far above zero that the mask is nearly everything.
MASK_BIAS = 1.0
DETECTORS = {"full": yolov10.MEDIUM, "tiny": yolov10.TINY}
POSES = {"full": vitpose.HUGE, "tiny": vitpose.TINY}
SAM2 = {"full": SAM2_MODELS["sam2.1_base_plus"], "tiny": TINY_SAM2}


@dataclass(frozen=True)
class RandomNetwork:
    path: Path
    flops: int | None  # of one frame; None where it is not counted


def random_detector(model: ModelName, progress: Progress = silent) -> RandomNetwork:
    """One file, its weights inside."""
    arch = DETECTORS[model]

    def make(folder: Path) -> int:
        built, g = yolov10.build(arch)
        graph.write(built, g.weights, folder / f"{arch.name}.onnx", SEED, beside=None)
        return sum(counted_flops(built))

    return _kept(arch.name, f"{arch.name}.onnx", repr(arch), make, progress)


def random_pose(model: ModelName, aspect: float, progress: Progress = silent) -> RandomNetwork:
    """A folder of a graph and its weights, 2.5 GB of the full size; for frames of that aspect."""
    arch = POSES[model]

    def make(folder: Path) -> int:
        built, g = vitpose.build(arch, aspect)
        flops = sum(counted_flops(built))
        graph.write(built, g.weights, folder / "end2end.onnx", SEED, beside="end2end.weights")
        return flops

    return _kept(arch.name, "end2end.onnx", f"{arch!r} {aspect:.6f}", make, progress)


def random_sam2(model: ModelName, progress: Progress = silent) -> RandomNetwork:
    """safetensors with the official names."""
    config = SAM2[model]

    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        save_file(sam2_tensors(config), folder / f"{config.name}.safetensors")

    return _kept(config.name, f"{config.name}.safetensors", repr(config), make, progress)


def sam2_tensors(config: Sam2Config) -> dict[str, np.ndarray[Any, Any]]:
    """Random, with the object in sight and a mask that holds the person: else tracking would be prompted anew
    every few frames, which costs what it does not cost with real weights.
    """
    tensors = random_sam2_weights(config, SEED)
    for i in range(config.mask_tokens):
        tensors[f"sam_mask_decoder.output_hypernetworks_mlps.{i}.layers.2.bias"] += np.float32(MASK_BIAS)
    assert tensors.keys() == required_tensors(config).keys()
    return tensors


def _kept(
    name: str, file: str, described: str, make: Callable[[Path], int | None], progress: Progress
) -> RandomNetwork:
    """`make` fills a folder, which gets its name when it is whole; an older one of the name goes."""
    from filelock import FileLock

    root = home() / "random"
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{described} {_source_hash()}".encode()).hexdigest()[:12]
    final = root / f"{name}-{digest}"
    with FileLock(root / f"{name}.lock"):
        if not (final / ABOUT).exists():
            progress(Note(f"making {name} with random weights"))
            making = root / f"{name}.partial"
            for stale in (making, *root.glob(f"{name}-{'?' * 12}")):
                shutil.rmtree(stale, ignore_errors=True)
            making.mkdir()
            flops = make(making)
            (making / ABOUT).write_text(json.dumps({"made from": described, "flops": flops}))
            making.rename(final)
        about = json.loads((final / ABOUT).read_text())
    return RandomNetwork(final / file, about["flops"])


def _source_hash() -> str:
    """Of the modules that the files are made by."""
    here = Path(__file__).parent
    modules = [here / f"{name}.py" for name in ("graph", "planted", "vitpose", "yolov10", "random_networks")]
    modules.append(here.parents[1] / "preprocess" / "sam2" / "weights.py")
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()
