"""ViTPose for whole bodies as an ONNX graph with random weights: a plain vision transformer and two
deconvolutions. Widths, depth and head are the genuine ones ("ViTPose: Simple Vision Transformer Baselines",
its configuration ViTPose_huge_wholebody_256x192); what it finds is planted.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_wan.benchmarks.preprocess import planted
from trt_wan.benchmarks.preprocess.graph import GraphBuilder
from trt_wan.preprocess.people.person import JOINTS

HEIGHT, WIDTH = 256, 192
PATCH, PADDING = 16, 2
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
TOKENS = GRID[0] * GRID[1]
MAP = (HEIGHT // 4, WIDTH // 4)
NORM_EPSILON = 1e-6
OWN_PART = 1e-6  # of the network's own result in the output: too little to be seen, too much to be left out


@dataclass(frozen=True)
class VitPose:
    name: str
    dim: int
    depth: int
    heads: int
    head_channels: int = 256
    mlp: int = 4


HUGE = VitPose("vitpose-h-wholebody", 1280, 32, 16)
TINY = VitPose("vitpose-tiny", 48, 2, 2, head_channels=16)


def build(c: VitPose, aspect: float) -> tuple[Any, GraphBuilder]:
    """The model without weights, and what knows them. `aspect` is that of the frames: width / height."""
    g = GraphBuilder()
    kernel = g.weight(c.dim, 3, PATCH, PATCH)
    bias = g.weight(c.dim, deviation=0.1)
    patches = g.op("Conv", "images", kernel, bias, strides=[PATCH] * 2, pads=[PADDING] * 4)
    tokens = g.op("Transpose", g.reshaped(patches, 0, c.dim, TOKENS), perm=[0, 2, 1])
    x = g.op("Add", tokens, g.weight(1, TOKENS, c.dim, deviation=0.3))
    for _ in range(c.depth):
        x = g.op("Add", x, _attention(g, c, _norm(g, c.dim, x)))
        x = g.op("Add", x, _mlp(g, c, _norm(g, c.dim, x)))
    x = g.op("Transpose", _norm(g, c.dim, x), perm=[0, 2, 1])
    x = g.reshaped(x, 0, c.dim, *GRID)
    for inner in (c.dim, c.head_channels):
        x = _upsampled(g, inner, c.head_channels, x)
    own = g.op("Conv", x, g.weight(JOINTS, c.head_channels, 1, 1), g.weight(JOINTS, deviation=0.1))
    found = g.constant(planted.heat_maps(MAP[1], MAP[0], aspect)[None])
    output = g.op("Add", g.op("Mul", own, g.constant(OWN_PART)), found)
    return g.model((3, HEIGHT, WIDTH), output, (JOINTS, *MAP)), g


def _norm(g: GraphBuilder, dim: int, x: str) -> str:
    scale, shift = g.weight(dim, mean=1, deviation=0.1), g.weight(dim, deviation=0.1)
    name: str = g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=NORM_EPSILON)
    return name


def _linear(g: GraphBuilder, inner: int, out: int, x: str) -> str:
    product = g.op("MatMul", x, g.weight(inner, out, deviation=1 / math.sqrt(inner)))
    name: str = g.op("Add", product, g.weight(out, deviation=0.1))
    return name


def _attention(g: GraphBuilder, c: VitPose, x: str) -> str:
    """The three of q, k, v as [batch, heads, tokens, size]."""
    size = c.dim // c.heads
    qkv = g.reshaped(_linear(g, c.dim, 3 * c.dim, x), 0, TOKENS, 3, c.heads, size)
    stacked = g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (g.op("Gather", stacked, g.constant(i, np.int64), axis=0) for i in range(3))
    q = g.op("Mul", q, g.constant(size**-0.5))
    logits = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = g.op("MatMul", g.op("Softmax", logits, axis=-1), v)
    joined = g.reshaped(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, TOKENS, c.dim)
    return _linear(g, c.dim, c.dim, joined)


def _mlp(g: GraphBuilder, c: VitPose, x: str) -> str:
    """With GELU by the error function, written out as every exporter does."""
    wide = _linear(g, c.dim, c.mlp * c.dim, x)
    bent = g.op("Erf", g.op("Div", wide, g.constant(math.sqrt(2))))
    active = g.op("Mul", g.op("Mul", wide, g.op("Add", bent, g.constant(1))), g.constant(0.5))
    return _linear(g, c.mlp * c.dim, c.dim, active)


def _upsampled(g: GraphBuilder, inner: int, out: int, x: str) -> str:
    """Twice as high and wide; a kernel of 4 and stride 2 lets four of its numbers meet in each result."""
    kernel = g.weight(inner, out, 4, 4, deviation=1 / math.sqrt(4 * inner))
    x = g.op("ConvTranspose", x, kernel, strides=[2, 2], pads=[1] * 4)
    scale, shift, mean = g.weight(out, mean=1, deviation=0.1), g.weight(out), g.weight(out, deviation=0.1)
    variance = g.weight(out, mean=1, deviation=0.05)
    name: str = g.op("Relu", g.op("BatchNormalization", x, scale, shift, mean, variance))
    return name
