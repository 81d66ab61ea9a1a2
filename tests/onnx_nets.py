"""Small ONNX files with the inputs and outputs of the users' networks, made by the tests that run them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Dimension = int | str


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Array],
    frame: Sequence[Dimension],
    result: Sequence[Dimension],
    batch: Dimension = "batch",
    dtype: int = TensorProto.FLOAT,
    external: str | None = None,
) -> Path:
    """Takes `images`, gives `output`; `frame` and `result` are their shapes without the batch."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("images", dtype, [batch, *frame])],
        [helper.make_tensor_value_info("output", dtype, [batch, *result])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=bool(external), location=external, size_threshold=0)
    return path


def detector(path: Path, rows: Array, batch: Dimension = "batch", side: Dimension = 640) -> Path:
    """Gives `rows` [300, 6] for every frame, the scores times the mean of the frame's red channel."""
    nodes = [
        helper.make_node("Gather", ["images", "first"], ["red"], axis=1),
        helper.make_node("ReduceMean", ["red"], ["mean"], axes=[1, 2], keepdims=1),
        helper.make_node("Mul", ["scores", "mean"], ["scaled"]),
        helper.make_node("Add", ["rest", "scaled"], ["output"]),
    ]
    scores = np.zeros((1, 300, 6), np.float32)
    scores[0, : len(rows), 4] = rows[:, 4]
    rest = np.zeros((1, 300, 6), np.float32)
    rest[0, : len(rows)] = rows
    rest[..., 4] = 0
    weights = {"first": np.array(0, np.int64), "scores": scores, "rest": rest}
    return save(path, nodes, weights, (3, side, side), (300, 6), batch)


def pose(
    path: Path, kernel: Array, batch: Dimension = "batch", joints: int = 133, external: str | None = None
) -> Path:
    """One convolution: kernel [joints, 3, 4, 4], stride 4, from [3, 256, 192] to [joints, 64, 48]."""
    nodes = [helper.make_node("Conv", ["images", "kernel"], ["output"], strides=[4, 4])]
    return save(path, nodes, {"kernel": kernel}, (3, 256, 192), (joints, 64, 48), batch, external=external)


def standing_pose(path: Path) -> Path:
    """Finds the same standing person in every box, with a 1x1 convolution that adds next to nothing."""
    joints = np.zeros((133, 2), np.float32)  # x from the person's right to left, y from head to feet, 0 to 1
    sides = (
        (0.46, 0.08),
        (0.41, 0.09),
        (0.28, 0.2),
        (0.18, 0.36),
        (0.14, 0.5),
        (0.38, 0.52),
        (0.37, 0.74),
        (0.36, 0.94),
    )
    joints[0] = (0.5, 0.1)
    joints[1:17:2] = [(1 - x, y) for x, y in sides]  # COCO names the left one first
    joints[2:17:2] = sides
    joints[17:23] = [(0.69, 0.99), (0.73, 0.98), (0.62, 0.96), (0.31, 0.99), (0.27, 0.98), (0.38, 0.96)]
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    joints[23:91] = np.stack([0.5 + 0.085 * np.cos(angles), 0.095 + 0.055 * np.sin(angles)], 1)
    joints[91:112] = joints[9] + np.linspace(0, 0.05, 21)[:, None]
    joints[112:133] = joints[10] + np.linspace(0, 0.05, 21)[:, None]
    x, y = ((joints * (0.6, 0.8) + (0.2, 0.1)) * (48, 64)).T
    across = np.exp(-np.square(np.arange(48) - x[:, None]) / 8)
    down = np.exp(-np.square(np.arange(64) - y[:, None]) / 8)
    maps = (0.9 * down[:, :, None] * across[:, None, :])[None].astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["images"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["small", "kernel"], ["own"]),
        helper.make_node("Add", ["own", "maps"], ["output"]),
    ]
    weights: dict[str, Array] = {"kernel": np.full((133, 3, 1, 1), 1e-7, np.float32), "maps": maps}
    return save(path, nodes, weights, (3, 256, 192), (133, 64, 48))


def attention_net(path: Path, seed: int) -> Path:
    """Convolution, one attention with its projections, an upsampling and a convolution: a pose network's
    parts, from [3, 256, 192] to [133, 64, 48], batch open.
    """
    rng = np.random.default_rng(seed)
    width, tokens = 64, 192

    def tensor(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)

    weights: dict[str, Array] = {
        "patch": tensor(width, 3, 16, 16),
        **{name: tensor(width, width) for name in ("q_w", "k_w", "v_w", "o_w")},
        "tokens_shape": np.array([0, width, tokens], np.int64),
        "scale": np.array(width**-0.5, np.float32),
        "map_shape": np.array([0, width, 16, 12], np.int64),
        "up": tensor(width, 32, 4, 4),
        "up_again": tensor(32, 32, 4, 4),
        "head": tensor(133, 32, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["images", "patch"], ["patches"], strides=[16, 16]),
        helper.make_node("Reshape", ["patches", "tokens_shape"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["x"], perm=[0, 2, 1]),
        *(helper.make_node("MatMul", ["x", f"{name}_w"], [name]) for name in ("q", "k", "v")),
        helper.make_node("Transpose", ["k"], ["k_t"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["q", "scale"], ["q_s"]),
        helper.make_node("MatMul", ["q_s", "k_t"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "o_w"], ["y"]),
        helper.make_node("Transpose", ["y"], ["y_t"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["y_t", "map_shape"], ["map"]),
        helper.make_node("ConvTranspose", ["map", "up"], ["m1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["m1", "up_again"], ["m2"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["m2", "head"], ["output"]),
    ]
    return save(path, nodes, weights, (3, 256, 192), (133, 64, 48))
