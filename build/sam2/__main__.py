"""python -m trt_wan.build.sam2 MODEL [PRECISION [BATCH]]: exports SAM2's graphs into the store."""

import argparse

from trt_wan.build.sam2 import build_sam2_graphs
from trt_wan.engines.sam2.config import HALVES, SAM2_MODELS, Sam2Plan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trt_wan.build.sam2")
    parser.add_argument("model", choices=SAM2_MODELS)
    parser.add_argument("precision", choices=HALVES, nargs="?", default="fp32")
    parser.add_argument("batch", type=int, nargs="?", default=1, help="frames per call of the encoder")
    chosen = parser.parse_args()
    plan = Sam2Plan(chosen.precision, chosen.batch)
    folder = build_sam2_graphs(
        SAM2_MODELS[chosen.model], plan, lambda name, seconds: print(f"{name} {seconds:.1f} s", flush=True)
    )
    print(folder)


if __name__ == "__main__":
    main()
