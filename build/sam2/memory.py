"""A tracked frame: attention to memories, the decoder, and the frame's own memory (preprocess_spec.md B1.3,
B1.4).

Memories are [cells, memory channels]. Their keys are rotated slot by slot with the one table of the grid,
pointers' keys are not: so nothing depends on how many there are, and no slice has a length of run time.

The weights of attention add up to 1, so a layer's projection of the values is one of what was attended to:
attention is to the memories themselves, with a quarter of the channels, the same ones in every layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, linear
from trt_wan.build.sam2.decoder import best_mask, decode
from trt_wan.build.sam2.encoder import EPS, conv1x1, norm
from trt_wan.engines.sam2.config import Sam2Config
from trt_wan.engines.sam2.contracts import CROSS, layer_scope

NORM_EPS = 1e-5  # memory attention's
MASK_SCALE, MASK_BIAS = 20.0, -10.0
ENCODER = "memory_encoder"


def track(
    feat: Tensor,
    high1: Tensor,
    high0: Tensor,
    memory_bias: Tensor,
    pointer_bias: Tensor,
    *looked_at: Tensor,
    w: Weights,
    config: Sam2Config,
) -> tuple[Tensor, ...]:
    """All of it; `looked_at` is what `track_start` takes."""
    bias = torch.cat(
        (
            memory_bias[:, None].expand(-1, config.tokens).reshape(-1),
            pointer_bias[:, None].expand(-1, config.pointer_tokens).reshape(-1),
        )
    )
    turns = looked_at[2:4]
    x, keys, values = track_start(feat, *looked_at, w=w, config=config)
    for n in range(config.memory_layers):
        layer = _layer(w, n)
        x, q = track_query(x, *turns, w=layer, config=config)
        (x,) = track_read(x, _one_head(q, keys[n], values, bias.to(q.dtype)), w=layer, config=config)
    return track_end(x, feat, high1, high0, w=w, config=config)


def track_start(
    feat: Tensor,
    position: Tensor,
    memory_position: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    memory_time: Tensor,
    pointers: Tensor,
    *rest: Tensor,
    w: Weights,
    config: Sam2Config,
) -> tuple[Tensor, ...]:
    """The frame's tokens; every layer's keys, and the values, of memories and then pointers. `rest` is the
    pointers' ages, for 2.1, and the memories.
    """
    age = rest[0] if config.new else None
    memories = torch.stack(rest[1:] if config.new else rest).float()
    split = pointers.reshape(-1, config.memory_channels)
    of_memories = memories + memory_position + memory_time[:, None]
    of_pointers = split + _age(age, w, config)
    keys = []
    for n in range(config.memory_layers):
        layer = _layer(w, n)
        rotated = _rotated(linear(of_memories, layer, f"{CROSS}.k_proj"), rope_cos, rope_sin)
        k = linear(of_pointers, layer, f"{CROSS}.k_proj")
        keys.append(torch.cat((rotated.to(k.dtype).flatten(0, 1), k)))
    values = torch.cat((memories.flatten(0, 1), split)).to(keys[0].dtype)
    return feat + 0.1 * position, torch.stack(keys), values


def track_query(
    x: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, w: Weights, config: Sam2Config
) -> tuple[Tensor, Tensor]:
    """The first half of a layer: tokens after attention to themselves, and their queries to memories."""
    half = w["self_attn.q_proj.weight"].dtype
    scale = config.channels**-0.5
    h = norm(x, w, "norm1", NORM_EPS).to(half)
    q, k = (_rotated(linear(h, w, f"self_attn.{part}_proj"), rope_cos, rope_sin) for part in "qk")
    v = linear(h, w, "self_attn.v_proj")
    attended = _one_head((q * scale).to(half), k.to(half), v)
    x = x + linear(attended, w, "self_attn.out_proj").float()
    q = _rotated(linear(norm(x, w, "norm2", NORM_EPS), w, f"{CROSS}.q_proj"), rope_cos, rope_sin)
    return x, (q * scale).to(half)


def track_read(x: Tensor, attended: Tensor, *, w: Weights, config: Sam2Config) -> tuple[Tensor]:
    """The second half: `attended` [cells, memory channels] is what the queries found."""
    x = x + linear(linear(attended, w, f"{CROSS}.v_proj"), w, f"{CROSS}.out_proj").float()
    h = F.relu(linear(norm(x, w, "norm3", NORM_EPS), w, "linear1"))
    return (x + linear(h, w, "linear2").float(),)


def track_end(
    x: Tensor, feat: Tensor, high1: Tensor, high0: Tensor, *, w: Weights, config: Sam2Config
) -> tuple[Tensor, ...]:
    pixels = norm(x, w, "memory_attention.norm", NORM_EPS)
    nothing = w["sam_prompt_encoder.not_a_point_embed.weight"].expand(2, -1)
    pixels = pixels + w["sam_prompt_encoder.no_mask_embed.weight"]
    found = decode(pixels, high1, high0, nothing, None, w, config)
    mask, pointer = best_mask(found, w, config)
    memory = _memory(feat, torch.sigmoid(_enlarged(mask, config)), found.score, w, config)
    return mask, pointer, found.score, memory


def memory_encoder(
    feat: Tensor, mask: Tensor, object_score: Tensor, *, w: Weights, config: Sam2Config
) -> tuple[Tensor]:
    """The memory of a prompted frame, whose mask is taken as yes or no."""
    return (_memory(feat, (_enlarged(mask, config) > 0).float(), object_score, w, config),)


def _age(age: Tensor | None, w: Weights, config: Sam2Config) -> Tensor | float:
    """Of each pointer's tokens: sines and cosines of how far back it is, projected; 2.0 has none."""
    if age is None:
        return 0.0
    half = config.channels // 2
    pairs = (torch.arange(half) // 2).float()
    angles = age[:, None] / 10000.0 ** (2 * pairs / half)
    encoded = linear(torch.cat((angles.sin(), angles.cos()), dim=-1), w, "obj_ptr_tpos_proj")
    return encoded[:, None].expand(-1, config.pointer_tokens, -1).reshape(-1, config.memory_channels)


def _layer(w: Weights, n: int) -> Weights:
    """The weights of a layer of memory attention, by their names in it."""
    scope = layer_scope(n)
    return {name.removeprefix(scope): tensor for name, tensor in w.items() if name.startswith(scope)}


def _rotated(t: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """Turns pairs of channels; a sum of two products, which TensorRT fuses (build/models/block.py)."""
    by_even = torch.stack((rope_cos, rope_sin), dim=-1)
    by_odd = torch.stack((-rope_sin, rope_cos), dim=-1)
    pairs = t.float().reshape(*t.shape[:-1], -1, 2)
    return (pairs[..., :1] * by_even + pairs[..., 1:] * by_odd).flatten(-2)


def _one_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of one head, over [tokens, channels].

    TensorRT-RTX 1.6 fuses attention of two heads and of more, not of one, which writes all 4096 x 45,000
    logits. So each half of the queries is made a head, with the same keys.
    """
    q = q.reshape(1, 2, -1, q.shape[-1])
    k, v = (t.expand(1, 2, *t.shape) for t in (k, v))
    logits = q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return (torch.softmax(logits, dim=-1) @ v).flatten(0, 2)


def _enlarged(mask: Tensor, config: Sam2Config) -> Tensor:
    """Logits at the input's size, [1, 1, S, S]."""
    size = (config.image_size, config.image_size)
    return F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)


def _memory(feat: Tensor, shown: Tensor, score: Tensor, w: Weights, config: Sam2Config) -> Tensor:
    """`shown` is 1 where the object is, 0 where not, or between."""
    grid, d = config.grid, config.channels
    down = f"{ENCODER}.mask_downsampler.encoder"
    h = shown * MASK_SCALE + MASK_BIAS
    for i in range(4):
        h = _conv(h, w, f"{down}.{3 * i}", stride=2, padding=1)
        h = F.gelu(_norm_channels(h, w, f"{down}.{3 * i + 1}"))
    masks = conv1x1(h[0].flatten(1).t(), w, f"{down}.12").float()
    x = conv1x1(feat, w, f"{ENCODER}.pix_feat_proj").float() + masks
    for i in range(config.fuser_layers):
        layer = f"{ENCODER}.fuser.layers.{i}"
        h = x.t().reshape(1, d, grid, grid)
        h = _conv(h, w, f"{layer}.dwconv", padding=config.fuser_kernel // 2, groups=d)
        h = norm(h.reshape(d, -1).t().float(), w, f"{layer}.norm")
        h = linear(F.gelu(linear(h, w, f"{layer}.pwconv1")), w, f"{layer}.pwconv2")
        x = x + w[f"{layer}.gamma"] * h.float()
    memory = conv1x1(x, w, f"{ENCODER}.out_proj").float()
    if config.new:
        memory = memory + (score <= 0).float() * w["no_obj_embed_spatial"]
    rounded = memory.to(torch.bfloat16)
    return rounded.float() if w[f"{ENCODER}.out_proj.weight"].dtype == torch.float32 else rounded


def _conv(x: Tensor, w: Weights, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    bias = w[f"{name}.bias"].to(weight.dtype)
    return F.conv2d(x.to(weight.dtype), weight, bias, stride=stride, padding=padding, groups=groups)


def _norm_channels(x: Tensor, w: Weights, name: str) -> Tensor:
    """Over the channels of [1, channels, height, width], in float32."""
    x = x.float()
    x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
