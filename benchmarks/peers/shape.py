"""The work of every peer: forward passes of the denoiser at one shape."""

import argparse
from dataclasses import dataclass

from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.shape import Plan


@dataclass(frozen=True)
class Shape:
    """A model by name and the window it denoises. Batch 1, no classifier-free guidance: one pass a step."""

    model: str
    width: int
    height: int
    window: int

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def plan(self) -> Plan:
        return Plan(self.width, self.height, self.window)

    @property
    def title(self) -> str:
        return f"{self.model} {self.width}x{self.height}x{self.window}"

    def arguments(self) -> list[str]:
        """Returns the command line that `shape_from` reads."""
        return [
            "--model",
            self.model,
            "--size",
            f"{self.width}x{self.height}",
            "--window",
            str(self.window),
        ]


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT")
    parser.add_argument("--window", type=int, default=77, help="frames")


def shape_from(options: argparse.Namespace) -> Shape:
    width, height = (int(side) for side in options.size.split("x"))
    return Shape(options.model, width, height, options.window)
