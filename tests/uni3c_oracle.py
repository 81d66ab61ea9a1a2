"""Uni3C by addons_spec.md 1.2 and 1.4, in torch float64, written from the specification alone.

It has the mask and camera branch that we do not run. `fill` is H of the specification's head.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.runtime.executors import Array

SHAPES = {  # the tiny model of addons_spec.md 9
    "controlnet_patch_embedding.weight": (32, 36, 1, 2, 2),
    "controlnet_patch_embedding.bias": (32,),
    "proj_in.weight": (24, 32),
    "proj_in.bias": (24,),
    **{
        f"controlnet_blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            **{f"norm{n}.linear.weight": (72, 20) for n in (1, 2)},
            **{f"norm{n}.linear.bias": (72,) for n in (1, 2)},
            **{f"norm{n}.norm.{kind}": (24,) for n in (1, 2) for kind in ("weight", "bias")},
            **{f"self_attn.{name}.weight": (24, 24) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            **{f"self_attn.{name}.bias": (24,) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            **{f"self_attn.norm_{name}.weight": (24,) for name in "qk"},
            "ffn.0.weight": (40, 24),
            "ffn.0.bias": (40,),
            "ffn.2.weight": (24, 40),
            "ffn.2.bias": (24,),
        }.items()
    },
    **{f"proj_out.{i}.weight": (48, 24) for i in range(2)},
    **{f"proj_out.{i}.bias": (48,) for i in range(2)},
    "controlnet_mask_embedding.mask_proj.0.weight": (16, 7, 4, 8, 8),
    "controlnet_mask_embedding.mask_proj.0.bias": (16,),
    "controlnet_mask_embedding.mask_proj.1.weight": (16,),
    "controlnet_mask_embedding.mask_proj.1.bias": (16,),
    "controlnet_mask_embedding.mask_zero_proj.weight": (32, 16, 1, 2, 2),
    "controlnet_mask_embedding.mask_zero_proj.bias": (32,),
}
BASE_1 = (".norm.weight", "norm_q.weight", "norm_k.weight", "mask_proj.1.weight")


def fill(k: int, shape: Sequence[int], amp: float = 1.0, base: float = 0.0) -> Tensor:
    most = 2**32 - 1
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    u = (i * 2654435761 + np.uint64(k * 2246822519 % 2**32) + 374761393) & most
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        u = ((u ^ (u >> np.uint64(shift))) * np.uint64(factor)) & most
    u ^= u >> np.uint64(16)
    return torch.from_numpy(base + amp * (u.astype(np.float64) / 2**32 - 0.5)).reshape(*shape)


def golden_weights() -> dict[str, Tensor]:
    return {
        name: fill(k, SHAPES[name], 0.5, 1.0 if name.endswith(BASE_1) else 0.0)
        for k, name in enumerate(sorted(SHAPES))
    }


def residuals(
    weights: Mapping[str, Tensor],
    video: Tensor,
    e: Tensor,
    heads: int,
    mask_and_camera: Tensor | None = None,
) -> list[Tensor]:
    """r_0, r_1, … [tokens, out] for the 36 channels of `video` [36, T1, h, w] and the time embedding e
    [1, d]. `mask_and_camera` is [7, frames, H, W].
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    z = _patches(video.double(), w, "controlnet_patch_embedding")
    if mask_and_camera is not None:
        m = F.pad(mask_and_camera.double(), (0, 0, 0, 0, 3, 0))
        name = "controlnet_mask_embedding.mask_proj"
        m = F.conv3d(m[None], w[f"{name}.0.weight"], w[f"{name}.0.bias"], stride=(4, 8, 8))
        m = F.silu(F.group_norm(m, m.shape[1] // 8, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))
        z = z + _patches(m[0], w, "controlnet_mask_embedding.mask_zero_proj")
    z = F.linear(z, w["proj_in.weight"], w["proj_in.bias"])
    grid = video.shape[1], video.shape[2] // 2, video.shape[3] // 2
    turns = _turns(grid, z.shape[1] // heads)
    s, made = F.silu(e.double())[0], []
    for i in range(sum(name.startswith("proj_out.") and name.endswith("bias") for name in w)):
        b = f"controlnet_blocks.{i}"

        def layer(name: str, x: Tensor, b: str = b) -> Tensor:
            return F.linear(x, w[f"{b}.{name}.weight"], w[f"{b}.{name}.bias"])

        def normed(n: int, x: Tensor, shift: Tensor, scale: Tensor, b: str = b) -> Tensor:
            name = f"{b}.norm{n}.norm"
            x = F.layer_norm(x, (x.shape[1],), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
            return x * (1 + scale) + shift

        shift, scale, gate = layer("norm1.linear", s).chunk(3)
        h = normed(1, z, shift, scale)
        q, k = (_rms(layer(f"self_attn.to_{n}", h), w[f"{b}.self_attn.norm_{n}.weight"]) for n in "qk")
        q, k, v = (t.reshape(len(t), heads, -1) for t in (q, k, layer("self_attn.to_v", h)))
        q, k = (_turned(t, turns) for t in (q, k))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        z = z + gate * layer("self_attn.to_out.0", o)
        shift, scale, gate = layer("norm2.linear", s).chunk(3)
        h = F.gelu(layer("ffn.0", normed(2, z, shift, scale)), approximate="tanh")
        z = z + gate * layer("ffn.2", h)
        made.append(F.linear(z, w[f"proj_out.{i}.weight"], w[f"proj_out.{i}.bias"]))
    return made


def _patches(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """[c, t, h, w] to [tokens, out]."""
    made = F.conv3d(x[None], w[f"{name}.weight"], w[f"{name}.bias"], stride=(1, 2, 2))
    return made[0].flatten(1).transpose(0, 1)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def _turns(grid: tuple[int, int, int], head: int) -> Tensor:
    """Unit complex numbers [tokens, head/2]: pairs of time, then of rows, then of columns."""
    side = 2 * (head // 6)
    axes = (head - 2 * side, side, side)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(-1, 3)
    angles = [
        places[:, [axis]] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        for axis, size in enumerate(axes)
    ]
    return torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, 1))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def of_numpy(weights: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(weights[name])) for name in weights}
