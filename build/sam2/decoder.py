"""Prompts and the mask decoder (preprocess_spec.md B1.1, B1.4), all in float32.

Tokens are [tokens, channels] and cells [cells, channels], row by row. The decoder's tokens are, in order:
object score, IoU, four masks, then the prompt's.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, attend, layer_norm, linear, merge_heads, split_heads
from trt_wan.build.sam2.encoder import norm
from trt_wan.engines.sam2.config import Sam2Config

EPS = 1e-5  # for the transformer's norms; those between the upscaling layers have 1e-6
STABILITY_DELTA, STABILITY_MIN = 0.05, 0.98
NO_OBJECT = -1024.0  # logits of a frame without the object
PROMPTS, DECODER = "sam_prompt_encoder", "sam_mask_decoder"


class Decoded(NamedTuple):
    masks: Tensor  # [4, cells of the finest grid]
    iou: Tensor  # [4]
    score: Tensor  # [1]
    tokens: Tensor  # [4, channels]


def prompt(
    feat: Tensor,
    high1: Tensor,
    high0: Tensor,
    points: Tensor,
    labels: Tensor,
    token_bias: Tensor,
    dense: Tensor,
    use_dense: Tensor,
    use_no_memory: Tensor,
    multimask: Tensor,
    *,
    w: Weights,
    config: Sam2Config,
) -> tuple[Tensor, ...]:
    pixels = feat + use_no_memory * w["no_mem_embed"][0]
    tokens = _embed_points(points, labels, w, config)
    no_mask = w[f"{PROMPTS}.no_mask_embed.weight"]
    filling = use_dense * _embed_mask(dense, w) + (1 - use_dense) * no_mask
    found = decode(pixels + filling, high1, high0, tokens, token_bias, w, config)

    best = _best_of_three(found)
    many = multimask > 0.5
    area = (found.masks[0] > STABILITY_DELTA).float().sum()
    whole = (found.masks[0] > -STABILITY_DELTA).float().sum()
    # area / whole >= 0.98, and stable where both are 0
    stable = area >= STABILITY_MIN * whole
    first = torch.zeros_like(best)
    shown = torch.where(many | ~stable, best, first)
    spoken = torch.where(many, best, first)
    mask, pointer = finish(found, shown, spoken, w, config)
    return mask, pointer, found.score, found.iou.index_select(0, shown)


def best_mask(found: Decoded, w: Weights, config: Sam2Config) -> tuple[Tensor, Tensor]:
    """Mask and pointer of a tracked frame: the best of the three."""
    best = _best_of_three(found)
    return finish(found, best, best, w, config)


def _best_of_three(found: Decoded) -> Tensor:
    """[1]; the arg-max has two axes because TensorRT wants them."""
    return 1 + torch.argmax(found.iou[None, 1:], dim=1)


def finish(
    found: Decoded, shown: Tensor, spoken: Tensor, w: Weights, config: Sam2Config
) -> tuple[Tensor, Tensor]:
    """The mask numbered `shown`, and the pointer from the token `spoken`."""
    there = found.score > 0
    mask = torch.where(there, found.masks.index_select(0, shown)[0], NO_OBJECT)
    pointer = _mlp(found.tokens.index_select(0, spoken), w, "obj_ptr_proj", 3)[0]
    pointer = torch.where(there, pointer, w["no_obj_ptr"][0])
    return mask.reshape(config.mask_size, config.mask_size), pointer


def fourier(coordinates: Tensor, w: Weights) -> Tensor:
    """[..., 2] (x, y in 0..1) to [..., channels]."""
    matrix = w[f"{PROMPTS}.pe_layer.positional_encoding_gaussian_matrix"]
    angles = (2 * math.pi) * ((2 * coordinates - 1) @ matrix)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def decode(
    pixels: Tensor,
    high1: Tensor,
    high0: Tensor,
    prompts: Tensor,
    prompt_bias: Tensor | None,
    w: Weights,
    config: Sam2Config,
) -> Decoded:
    """`prompt_bias` masks prompt tokens as keys; as queries they are not read."""
    c, grid = config, config.grid
    names = ("obj_score_token", "iou_token", "mask_tokens")
    own = torch.cat([w[f"{DECODER}.{name}.weight"] for name in names])
    tokens = torch.cat((own, prompts))
    bias = None
    if prompt_bias is not None:
        bias = torch.cat((torch.zeros(len(own)), prompt_bias))
    steps = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
    y, x = steps[:, None].expand(grid, grid), steps[None].expand(grid, grid)
    position = fourier(torch.stack((x, y), dim=-1), w).reshape(c.tokens, c.channels)

    queries, keys = tokens, pixels
    for n in range(c.decoder_layers):
        layer = f"{DECODER}.transformer.layers.{n}"
        q = queries if n == 0 else queries + tokens
        attended = _attention(q, q, queries, w, f"{layer}.self_attn", c, bias)
        queries = norm(attended if n == 0 else queries + attended, w, f"{layer}.norm1", EPS)
        attended = _attention(
            queries + tokens, keys + position, keys, w, f"{layer}.cross_attn_token_to_image", c
        )
        queries = norm(queries + attended, w, f"{layer}.norm2", EPS)
        queries = norm(queries + _mlp(queries, w, f"{layer}.mlp", 2), w, f"{layer}.norm3", EPS)
        attended = _attention(
            keys + position, queries + tokens, queries, w, f"{layer}.cross_attn_image_to_token", c, bias
        )
        keys = norm(keys + attended, w, f"{layer}.norm4", EPS)
    final = f"{DECODER}.transformer.final_attn_token_to_image"
    attended = _attention(queries + tokens, keys + position, keys, w, final, c)
    queries = norm(queries + attended, w, f"{DECODER}.transformer.norm_final_attn", EPS)

    up = f"{DECODER}.output_upscaling"
    fine = _upscale(keys, w, f"{up}.0", grid) + high1
    fine = F.gelu(layer_norm(fine, 1e-6, w[f"{up}.1.weight"], w[f"{up}.1.bias"]))
    fine = F.gelu(_upscale(fine, w, f"{up}.3", 2 * grid) + high0)
    masks = queries[2 : 2 + c.mask_tokens]
    filters = [
        _mlp(masks[i : i + 1], w, f"{DECODER}.output_hypernetworks_mlps.{i}", 3) for i in range(c.mask_tokens)
    ]
    return Decoded(
        masks=torch.cat(filters) @ fine.t(),
        iou=torch.sigmoid(_mlp(queries[1:2], w, f"{DECODER}.iou_prediction_head", 3))[0],
        score=_mlp(queries[:1], w, f"{DECODER}.pred_obj_score_head", 3)[0],
        tokens=masks,
    )


def _embed_points(points: Tensor, labels: Tensor, w: Weights, config: Sam2Config) -> Tensor:
    """The label "none" has an embedding in place of its position, the others one beside it."""
    kinds = [w[f"{PROMPTS}.not_a_point_embed.weight"]]
    kinds += [w[f"{PROMPTS}.point_embeddings.{i}.weight"] for i in range(4)]
    somewhere = 1 - labels[:, :1]
    return somewhere * fourier((points + 0.5) / config.image_size, w) + labels @ torch.cat(kinds)


def _embed_mask(dense: Tensor, w: Weights) -> Tensor:
    """Logits [S/4, S/4] to [cells, channels]: two 2x2 convolutions of stride 2 and one 1x1."""
    down = f"{PROMPTS}.mask_downscaling"
    h = dense[..., None]
    for conv, after in ((0, 1), (3, 4)):
        side = h.shape[0] // 2
        h = h.reshape(side, 2, side, 2, -1).permute(0, 2, 4, 1, 3).flatten(2)
        h = F.linear(h, w[f"{down}.{conv}.weight"].flatten(1), w[f"{down}.{conv}.bias"])
        h = F.gelu(norm(h, w, f"{down}.{after}"))
    return F.linear(h.flatten(0, 1), w[f"{down}.6.weight"].flatten(1), w[f"{down}.6.bias"])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, w: Weights, name: str, c: Sam2Config, bias: Tensor | None = None
) -> Tensor:
    q, k, v = (
        split_heads(linear(t, w, f"{name}.{part}_proj"), c.decoder_heads)
        for t, part in ((q, "q"), (k, "k"), (v, "v"))
    )
    q = q * q.shape[-1] ** -0.5
    if bias is None:
        attended = attend(q, k, v)
    else:
        attended = torch.softmax(q @ k.transpose(-1, -2) + bias, dim=-1) @ v
    return linear(merge_heads(attended), w, f"{name}.out_proj")


def _mlp(x: Tensor, w: Weights, name: str, layers: int) -> Tensor:
    for i in range(layers):
        x = linear(x, w, f"{name}.layers.{i}")
        x = F.relu(x) if i < layers - 1 else x
    return x


def _upscale(x: Tensor, w: Weights, name: str, side: int) -> Tensor:
    """A transposed 2x2 convolution of stride 2, as a matrix product: each cell becomes four."""
    weight = w[f"{name}.weight"]
    x = (x @ weight.flatten(1)).reshape(side, side, -1, 2, 2).permute(0, 3, 1, 4, 2)
    return x.reshape(4 * side * side, -1) + w[f"{name}.bias"]
