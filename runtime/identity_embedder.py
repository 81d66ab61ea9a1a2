"""A face embedder from a user's ONNX file: 512 numbers of length 1 for an aligned face.

Lynx was made for ArcFace IR-SE50 (facexlib's recognition_arcface_ir_se50). Other embedders have the same
shapes and other numbers; the file cannot tell. It runs once per job, on the CPU.
"""

from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.engines.lynx import EMBEDDING
from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.identity import embedder_input
from trt_wan.runtime.video.reader import Picture

WANTED = "Give ArcFace IR-SE50 as ONNX: it takes 1 x 3 x 112 x 112 and gives 512 numbers."


def face_embedding(embedder: Path, face: Picture) -> Array:
    """float32 [512] of a face that is aligned to 112x112. Raises WeightsError."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(embedder, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        made: Any = session.run(None, {name: embedder_input(face)})[0]
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes for a bad file
        raise WeightsError(
            f"{embedder} cannot be run as a face embedder ({str(error).splitlines()[0][:200]}).", WANTED
        ) from error
    found = np.asarray(made, np.float32).reshape(-1)
    if found.shape != (EMBEDDING,):
        raise WeightsError(f"{embedder} gives {found.size} numbers for a face, not {EMBEDDING}.", WANTED)
    length = float(np.linalg.norm(found))
    if not np.isfinite(length) or length == 0:
        raise WeightsError(f"{embedder} gives numbers that are not finite, or all 0.", WANTED)
    return np.asarray(found / np.float32(length), np.float32)
