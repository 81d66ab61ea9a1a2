"""Wan2.2-Animate on TensorRT: one picture of a character and a driving video in, a finished video out."""

import os

__version__ = "0.1.0"

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "runtime")):  # a checkout: the subpackages lie beside this folder
    __path__.append(os.path.dirname(_here))
