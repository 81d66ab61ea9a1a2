"""A SAM2 that a CPU tracks with in a fraction of a second: 256 pixels wide, one layer of each kind.

The table of models does not name it: a process calls `make_known` first.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from trt_wan.engines.sam2.config import SAM2_MODELS
from trt_wan.preprocess.sam2.weights import random_sam2_weights

MASK_BIAS = 1.0  # so far above zero that a mask is nearly the whole picture, and the person is not lost
SMALL = replace(
    SAM2_MODELS["sam2.1_tiny"],
    name="sam2.1_bench_tiny",
    dim=32,
    blocks=(1, 1, 1, 1),
    global_blocks=(2,),
    image_size=256,
    memory_layers=1,
    decoder_layers=1,
    fuser_layers=1,
)


def make_known() -> None:
    SAM2_MODELS[SMALL.name] = SMALL


def small_weights() -> dict[str, np.ndarray[Any, Any]]:
    tensors = random_sam2_weights(SMALL, 0)
    for i in range(SMALL.mask_tokens):
        tensors[f"sam_mask_decoder.output_hypernetworks_mlps.{i}.layers.2.bias"] += np.float32(MASK_BIAS)
    return tensors
