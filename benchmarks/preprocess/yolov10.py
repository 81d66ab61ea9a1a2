"""YOLOv10 as an ONNX graph with random weights: the genuine topology and widths ("YOLOv10: Real-Time
End-to-End Object Detection", its yolov10m.yaml), batch norms folded into the convolutions as an export has
them, and the one-to-one head that needs no suppression. What it finds is planted.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_wan.benchmarks.preprocess import planted
from trt_wan.benchmarks.preprocess.graph import GraphBuilder

CLASSES, BINS, ROWS = 80, 16, 300  # COCO; places per side of a box; boxes that are handed on
GAIN = 1.3  # of weights before SiLU: at 1.0 all but the biases dies out on the way, at 1.6 fp16 overflows
OWN_PART = 1e-6  # of the network's own result in the output: too little to be seen, too much to be left out


@dataclass(frozen=True)
class Yolov10:
    """`depth` and `width` multiply the repeats and channels of the largest model."""

    name: str
    depth: float
    width: float
    most_channels: int
    side: int = 640

    def channels(self, full: int) -> int:
        return math.ceil(min(full, self.most_channels) * self.width / 8) * 8

    def repeats(self, full: int) -> int:
        return max(1, round(full * self.depth))


MEDIUM = Yolov10("yolov10m", 0.67, 0.75, 768)
TINY = Yolov10("yolov10-tiny", 0.33, 0.0625, 1024, side=320)


@dataclass(frozen=True)
class Grid:
    """Features: the tensor's name and its channels."""

    name: str
    channels: int


class _Parts:
    """The blocks that the topology is made of; each takes and returns a Grid."""

    def __init__(self, g: GraphBuilder) -> None:
        self.g = g

    def conv(
        self, x: Grid, out: int, k: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> Grid:
        fan_in = x.channels // groups * k * k
        kernel = self.g.weight(out, x.channels // groups, k, k, deviation=GAIN / math.sqrt(fan_in))
        bias = self.g.weight(out, deviation=0.1)
        pads = [k // 2] * 4
        y = self.g.op("Conv", x.name, kernel, bias, strides=[stride] * 2, pads=pads, group=groups)
        return Grid(self.g.op("Mul", y, self.g.op("Sigmoid", y)) if active else y, out)

    def depthwise(self, x: Grid, k: int = 3, stride: int = 1, active: bool = True) -> Grid:
        return self.conv(x, x.channels, k, stride, groups=x.channels, active=active)

    def add(self, a: Grid, b: Grid) -> Grid:
        return Grid(self.g.op("Add", a.name, b.name), a.channels)

    def concat(self, *parts: Grid) -> Grid:
        return Grid(self.g.op("Concat", *(p.name for p in parts), axis=1), sum(p.channels for p in parts))

    def halves(self, x: Grid) -> tuple[Grid, Grid]:
        size = x.channels // 2
        a, b = self.g.op("Split", x.name, self.g.constant([size, size], np.int64), outputs=2, axis=1)
        return Grid(a, size), Grid(b, size)

    def c2f(self, x: Grid, out: int, n: int, shortcut: bool, inverted: bool = False) -> Grid:
        """`inverted`: the large depth-wise bottlenecks (C2fCIB) in the place of two 3x3 convolutions."""
        kept = list(self.halves(self.conv(x, out // 2 * 2)))
        for _ in range(n):
            last = kept[-1]
            y = self.cib(last) if inverted else self.conv(self.conv(last, last.channels, 3), last.channels, 3)
            kept.append(self.add(last, y) if shortcut else y)
        return self.conv(self.concat(*kept), out)

    def cib(self, x: Grid) -> Grid:
        y = self.conv(self.depthwise(x), 2 * x.channels)
        return self.depthwise(self.conv(self.depthwise(y), x.channels))

    def down(self, x: Grid, out: int) -> Grid:
        """SCDown: channels first, then half the grid, depth by depth."""
        return self.depthwise(self.conv(x, out), 3, 2, active=False)

    def pooled(self, x: Grid) -> Grid:
        """SPPF: the same 5x5 maximum three times in a row, all four put together."""
        kept = [self.conv(x, x.channels // 2)]
        for _ in range(3):
            y = self.g.op("MaxPool", kept[-1].name, kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4)
            kept.append(Grid(y, kept[-1].channels))
        return self.conv(self.concat(*kept), x.channels)

    def doubled(self, x: Grid) -> Grid:
        scales = self.g.constant([1, 1, 2, 2])
        name = self.g.op(
            "Resize", x.name, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric"
        )
        return Grid(name, x.channels)

    def attended(self, x: Grid, cells: int) -> Grid:
        """PSA: half of the channels pass through attention and an MLP."""
        a, b = self.halves(self.conv(x, x.channels))
        b = self.add(b, self.attention(b, cells))
        b = self.add(b, self.conv(self.conv(b, 2 * b.channels), b.channels, active=False))
        return self.conv(self.concat(a, b), x.channels)

    def attention(self, x: Grid, cells: int) -> Grid:
        """Keys and queries have half the size of the values."""
        g, heads = self.g, max(1, x.channels // 64)
        size = x.channels // heads
        key = size // 2
        qkv = self.conv(x, x.channels + 2 * heads * key, active=False)
        parts = g.reshaped(qkv.name, 0, heads, 2 * key + size, cells)
        sizes = g.constant([key, key, size], np.int64)
        q, k, v = g.op("Split", parts, sizes, outputs=3, axis=2)
        q = g.op("Mul", g.op("Transpose", q, perm=[0, 1, 3, 2]), g.constant(key**-0.5))
        weights = g.op("Transpose", g.op("Softmax", g.op("MatMul", q, k), axis=-1), perm=[0, 1, 3, 2])
        side = math.isqrt(cells)
        mixed = Grid(g.reshaped(g.op("MatMul", v, weights), 0, x.channels, side, side), x.channels)
        values = Grid(g.reshaped(v, 0, x.channels, side, side), x.channels)
        return self.conv(self.add(mixed, self.depthwise(values, active=False)), x.channels, active=False)


def build(c: Yolov10) -> tuple[Any, GraphBuilder]:
    """The model without weights, and what knows them."""
    g = GraphBuilder()
    p, ch, n = _Parts(g), c.channels, c.repeats
    # Backbone
    x = p.conv(p.conv(Grid("images", 3), ch(64), 3, 2), ch(128), 3, 2)
    x = p.conv(p.c2f(x, ch(128), n(3), True), ch(256), 3, 2)
    eighth = p.c2f(x, ch(256), n(6), True)
    sixteenth = p.c2f(p.down(eighth, ch(512)), ch(512), n(6), True)
    x = p.c2f(p.down(sixteenth, ch(1024)), ch(1024), n(3), True, inverted=True)
    top = p.attended(p.pooled(x), (c.side // 32) ** 2)
    # Neck
    middle = p.c2f(p.concat(p.doubled(top), sixteenth), ch(512), n(3), False)
    fine = p.c2f(p.concat(p.doubled(middle), eighth), ch(256), n(3), False)
    x = p.concat(p.conv(fine, ch(256), 3, 2), middle)
    middle = p.c2f(x, ch(512), n(3), True, inverted=True)
    x = p.concat(p.down(middle, ch(512)), top)
    coarse = p.c2f(x, ch(1024), n(3), True, inverted=True)
    found = _rows(g, c, *_head(p, c, (fine, middle, coarse)))
    # Rows of the network's own, too small to be seen; the class has to be a whole number.
    part = g.constant([[[OWN_PART] * 5 + [0]]])
    rows = g.constant(planted.detector_rows(c.side, ROWS)[None])
    output = g.op("Add", g.op("Mul", found, part), rows)
    return g.model((3, c.side, c.side), output, (ROWS, 6)), g


def _head(p: _Parts, c: Yolov10, grids: tuple[Grid, ...]) -> tuple[str, str]:
    """Distances in bins [n, 64, cells] and class logits [n, 80, cells] over all three grids."""
    g = p.g
    box_width = max(16, grids[0].channels // 4, 4 * BINS)
    class_width = max(grids[0].channels, min(CLASSES, 100))
    boxes, scores = [], []
    for x, stride in zip(grids, (8, 16, 32), strict=True):
        cells = (c.side // stride) ** 2
        b = p.conv(p.conv(p.conv(x, box_width, 3), box_width, 3), 4 * BINS, active=False)
        s = p.conv(p.depthwise(p.conv(p.depthwise(x), class_width)), class_width)
        s = p.conv(s, CLASSES, active=False)
        boxes.append(g.reshaped(b.name, 0, 4 * BINS, cells))
        scores.append(g.reshaped(s.name, 0, CLASSES, cells))
    return g.op("Concat", *boxes, axis=2), g.op("Concat", *scores, axis=2)


def _rows(g: GraphBuilder, c: Yolov10, distances: str, logits: str) -> str:
    """The 300 best as [n, 300, 6], as the official export has them: the best cells, then of those the best
    classes.
    """
    anchors, strides = _anchors(c.side)
    cells = len(anchors)
    bins = g.op("Softmax", g.reshaped(distances, 0, 4, BINS, cells), axis=2)
    places = g.constant(np.arange(BINS).reshape(1, 1, BINS, 1))
    reach = g.op("ReduceSum", g.op("Mul", bins, places), g.constant([2], np.int64), keepdims=0)
    low, high = g.op("Split", reach, g.constant([2, 2], np.int64), outputs=2, axis=1)
    middle = g.constant(anchors.T[None])
    corners = g.op("Concat", g.op("Sub", middle, low), g.op("Add", middle, high), axis=1)
    pixels = g.op("Mul", corners, g.constant(strides[None, None]))
    boxes = g.op("Transpose", pixels, perm=[0, 2, 1])
    scores = g.op("Transpose", g.op("Sigmoid", logits), perm=[0, 2, 1])
    most = g.constant([ROWS], np.int64)
    last = g.constant([-1], np.int64)
    _, cell = g.op("TopK", g.op("ReduceMax", scores, axes=[2], keepdims=0), most, outputs=2, axis=1)
    cell = g.op("Unsqueeze", cell, last)

    def gathered(values: str, index: str, width: int) -> str:
        wide = g.op("Tile", index, g.constant([1, 1, width], np.int64))
        name: str = g.op("GatherElements", values, wide, axis=1)
        return name

    boxes, scores = gathered(boxes, cell, 4), gathered(scores, cell, CLASSES)
    best, at = g.op("TopK", g.reshaped(scores, 0, -1), most, outputs=2, axis=1)
    classes = g.constant(CLASSES, np.int64)
    row, kind = g.op("Div", at, classes), g.op("Mod", at, classes)
    boxes = gathered(boxes, g.op("Unsqueeze", row, last), 4)
    kind = g.op("Unsqueeze", g.op("Cast", kind, to=g.onnx.TensorProto.FLOAT), last)
    name: str = g.op("Concat", boxes, g.op("Unsqueeze", best, last), kind, axis=2)
    return name


def _anchors(side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The middle of every cell [cells, 2] in cells of its grid, and its grid's stride [cells]."""
    middles, strides = [], []
    for stride in (8, 16, 32):
        n = side // stride
        y, x = np.divmod(np.arange(n * n), n)
        middles.append(np.stack([x, y], 1) + 0.5)
        strides.append(np.full(n * n, stride))
    return np.concatenate(middles).astype(np.float32), np.concatenate(strides).astype(np.float32)
