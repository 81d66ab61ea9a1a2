"""Wan2.2-Animate on TensorRT: one picture of a character and a driving video in, a finished video out."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "runtime").is_dir():  # a checkout: the subpackages are the folders beside this one
    __path__.append(str(_here.parent))
