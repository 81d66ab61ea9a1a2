"""The picture encoder: a Hiera trunk and the part of the feature pyramid that video uses (preprocess_spec.md
B1.1).

Grids are [batch, height, width, channels]. The residual stream, norms and the pyramid's sum are float32;
matrices, convolutions and attention have their weights' type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, attend_any, layer_norm, linear
from trt_wan.engines.sam2.config import Block, Sam2Config, trunk_blocks
from trt_wan.engines.sam2.contracts import POSITION

EPS = 1e-6
TRUNK = "image_encoder.trunk"


def encoder(pixels: Tensor, *, w: Weights, config: Sam2Config) -> tuple[Tensor, ...]:
    """Pictures [batch, 3, S, S], normalised, to feat, high1, high0."""
    weight, bias = w[f"{TRUNK}.patch_embed.proj.weight"], w[f"{TRUNK}.patch_embed.proj.bias"]
    patches = F.conv2d(pixels.to(weight.dtype), weight, bias.to(weight.dtype), stride=4, padding=3)
    x = patches.permute(0, 2, 3, 1).float() + w[POSITION]
    stages = []
    for block in trunk_blocks(config):
        x = _block(x, w, block)
        if block.ends_stage:
            stages.append(x)

    fine, middle, coarse, coarsest = (
        conv1x1(stage, w, f"image_encoder.neck.convs.{len(stages) - 1 - i}.conv")
        for i, stage in enumerate(stages)
    )
    feat = coarse.float() + _twice(coarsest.float())
    high1 = conv1x1(middle, w, "sam_mask_decoder.conv_s1")
    high0 = conv1x1(fine, w, "sam_mask_decoder.conv_s0")
    return tuple(grid.float().flatten(1, 2) for grid in (feat, high1, high0))


def conv1x1(x: Tensor, w: Weights, name: str) -> Tensor:
    """A 1x1 convolution over the last axis."""
    weight = w[f"{name}.weight"].flatten(1)
    return F.linear(x.to(weight.dtype), weight, w[f"{name}.bias"].to(weight.dtype))


def norm(x: Tensor, w: Weights, name: str, eps: float = EPS) -> Tensor:
    return layer_norm(x, eps, w[f"{name}.weight"], w[f"{name}.bias"])


def _block(x: Tensor, w: Weights, block: Block) -> Tensor:
    name = f"{TRUNK}.blocks.{block.n}"
    half = w[f"{name}.attn.qkv.weight"].dtype
    h = norm(x, w, f"{name}.norm1").to(half)
    if block.pool:
        x = _pool(linear(h, w, f"{name}.proj").float())
    x = x + _attention(h, w, f"{name}.attn", block).float()
    h = F.gelu(linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.layers.0"))
    return x + linear(h, w, f"{name}.mlp.layers.1").float()


def _attention(h: Tensor, w: Weights, name: str, block: Block) -> Tensor:
    """Within windows. A grid that they do not divide is filled up with zeros, which take part."""
    batch, height, width = h.shape[:3]
    side = block.window or height
    rows, columns = -(-height // side), -(-width // side)
    h = F.pad(h, (0, 0, 0, columns * side - width, 0, rows * side - height))
    h = h.reshape(batch, rows, side, columns, side, -1).transpose(2, 3)
    h = h.reshape(batch * rows * columns, side * side, -1)

    qkv = linear(h, w, f"{name}.qkv").reshape(len(h), side * side, 3, block.dim)
    q, k, v = qkv.unbind(2)
    if block.pool:
        q, side, height, width = _pool_window(q, side), side // 2, height // 2, width // 2
    q, k, v = (
        t.reshape(len(h), -1, block.heads, block.dim // block.heads).transpose(1, 2) for t in (q, k, v)
    )
    h = attend_any(q * (block.dim // block.heads) ** -0.5, k, v)

    h = linear(h.transpose(1, 2).flatten(2), w, f"{name}.proj")
    h = h.reshape(batch, rows, columns, side, side, block.dim).transpose(2, 3)
    return h.reshape(batch, rows * side, columns * side, block.dim)[:, :height, :width]


def _pool_window(q: Tensor, side: int) -> Tensor:
    return _pool(q.reshape(len(q), side, side, -1)).flatten(1, 2)


def _pool(x: Tensor) -> Tensor:
    """The largest of every 2x2 cells of [batch, height, width, channels].

    TensorRT-RTX 1.6 takes ten times as long for one maximum over two axes as for these of two tensors each.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = torch.maximum(x[:, :, 0], x[:, :, 1])
    return torch.maximum(x[:, :, :, 0], x[:, :, :, 1])


def _twice(x: Tensor) -> Tensor:
    """Every cell four times."""
    batch, height, width, channels = x.shape
    x = x[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return x.reshape(batch, 2 * height, 2 * width, channels)
