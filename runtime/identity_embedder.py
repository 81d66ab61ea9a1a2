"""A face embedder from a user's ONNX file: 512 numbers of length 1 for an aligned face.

Lynx was made for ArcFace IR-SE50 (facexlib's recognition_arcface_ir_se50). Other embedders have the same
shapes and other numbers; the file cannot tell. It runs once per job, on the CPU.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.engines.lynx import EMBEDDING
from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.identity import ARCFACE_SIDE, embedder_input
from trt_wan.runtime.video.reader import Picture

WANTED = "Give ArcFace IR-SE50 as ONNX: it takes 1 x 3 x 112 x 112 and gives 512 numbers."


def require_embedder(embedder: Path) -> None:
    """Raises WeightsError for a file that is no network, or one of other shapes. Computes nothing."""
    _opened(embedder, optimised=False)


def face_embedding(embedder: Path, face: Picture) -> Array:
    """float32 [512] of a face that is aligned to 112x112. Raises WeightsError."""
    session = _opened(embedder)
    try:
        made: Any = session.run(None, {session.get_inputs()[0].name: embedder_input(face)})[0]
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
        raise _refused(embedder, str(error)) from error
    found = np.asarray(made, np.float32).reshape(-1)
    if found.shape != (EMBEDDING,):
        raise _other_size(embedder, found.size)
    length = float(np.linalg.norm(found))
    if not np.isfinite(length) or length == 0:
        raise WeightsError(f"{embedder} gives numbers that are not finite, or all 0.", WANTED)
    return np.asarray(found / np.float32(length), np.float32)


def _opened(embedder: Path, optimised: bool = True) -> Any:
    """A session of ONNX Runtime, whose shapes fit as far as the file states them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(embedder, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise _refused(embedder, str(error)) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    face = (1, 3, ARCFACE_SIDE, ARCFACE_SIDE)
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not _fits(inputs[0].shape, face):
        taken = " and ".join(f"{' x '.join(map(str, each.shape))} of {each.type}" for each in inputs)
        raise _refused(embedder, f"it takes {taken}")
    made = outputs[0].shape[1:]
    if made and all(isinstance(length, int) for length in made) and math.prod(made) != EMBEDDING:
        raise _other_size(embedder, math.prod(made))
    return session


def _fits(shape: Sequence[Any], wanted: Sequence[int]) -> bool:
    """A length that the file leaves open is a name or None."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(not isinstance(s, int) or s == want for s, want in pairs)


def _refused(embedder: Path, reason: str) -> WeightsError:
    first = (reason.splitlines() or ["no reason"])[0][:200]
    return WeightsError(f"{embedder} cannot be run as a face embedder ({first}).", WANTED)


def _other_size(embedder: Path, count: int) -> WeightsError:
    return WeightsError(f"{embedder} gives {count} numbers for a face, not {EMBEDDING}.", WANTED)
