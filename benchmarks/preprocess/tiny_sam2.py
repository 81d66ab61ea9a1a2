"""A SAM2 that a CPU tracks with in a fraction of a second: 256 pixels wide, one layer of each kind.

It is no model that anybody has, so the table of models does not name it. What should know it in another
process is run by this module:

    python -m trt_wan.benchmarks.preprocess.tiny_sam2 MODULE [ARGUMENTS]
"""

import runpy
import sys
from dataclasses import replace

from trt_wan.engines.sam2.config import SAM2_MODELS

TINY_SAM2 = replace(
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
SELF = "trt_wan.benchmarks.preprocess.tiny_sam2"


def make_known() -> None:
    """In this process, files of its shapes are told from others, and its graphs can be built."""
    SAM2_MODELS[TINY_SAM2.name] = TINY_SAM2


if __name__ == "__main__":
    make_known()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
