"""The Wan2.1 VAE, a chunk at a time: walks the layers of `vae_layers`, caches explicit (model_spec.md 7).

Video tensors are [channels, frames, height, width]. Spatial layers make the frames the batch. Convolutions
pad in space, caches pad in time. Upsampling is `nearest`, which equals `nearest-exact` for a factor of two:
TensorRT has only a slow gather for the latter (trt_facts.md 1.1).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, activation, attend
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.contracts.vae_layers import LATENT_MEAN, LATENT_STD, Layer
from trt_wan.engines.shape import Plan


class _History:
    """The caches by the name of their convolution: `before` this chunk (None on the first) and `after` it."""

    def __init__(self, before: dict[str, Tensor] | None) -> None:
        self.before = before
        self.after: dict[str, Tensor] = {}

    def extend(self, x: Tensor, name: str) -> Tensor:
        """`x` with the two frames before it in front."""
        if self.before is None:
            extended = F.pad(x, (0, 0, 0, 0, 2, 0))
        else:
            extended = torch.cat((self.before[name], x), dim=1)
        self.after[name] = extended[:, -2:]
        return extended


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the channels, in float32."""
    kind, x = x.dtype, x.float()
    scale = torch.rsqrt(x.square().sum(0, keepdim=True).clamp_min(1e-24)) * math.sqrt(x.shape[0])
    return (x * scale * gamma.reshape(-1, 1, 1, 1)).to(kind)


def _conv(
    x: Tensor, w: Weights, name: str, padding: tuple[int, int, int] = (0, 0, 0), time_stride: int = 1
) -> Tensor:
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"].to(x.dtype)
    return F.conv3d(x[None], weight, bias, (time_stride, 1, 1), padding).squeeze(0)


def _causal(x: Tensor, w: Weights, history: _History, name: str) -> Tensor:
    return _conv(history.extend(x, name), w, name, padding=(0, 1, 1))


def _norm_conv(x: Tensor, w: Weights, history: _History, norm: str, conv: str) -> Tensor:
    return _causal(F.silu(_norm(x, w[f"{norm}.gamma"])), w, history, conv)


def _residual(x: Tensor, w: Weights, history: _History, layer: Layer) -> Tensor:
    name = layer.name
    h = _norm_conv(x, w, history, f"{name}.residual.0", f"{name}.residual.2")
    h = _norm_conv(h, w, history, f"{name}.residual.3", f"{name}.residual.6")
    return h + (x if layer.inner == layer.out else _conv(x, w, f"{name}.shortcut"))


def _attention(x: Tensor, w: Weights, name: str) -> Tensor:
    """One head over the positions of each frame."""
    channels, frames, height, width = x.shape

    def pointwise(tokens: Tensor, name: str) -> Tensor:
        return F.linear(tokens, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"].to(x.dtype))

    tokens = _norm(x, w[f"{name}.norm.gamma"]).reshape(channels, frames, height * width).permute(1, 2, 0)
    q, k, v = pointwise(tokens, f"{name}.to_qkv").chunk(3, dim=-1)
    attended = pointwise(attend(q * channels**-0.5, k, v), f"{name}.proj")
    return x + attended.permute(2, 0, 1).reshape(x.shape)


def _down(x: Tensor, w: Weights, history: _History, layer: Layer) -> Tensor:
    conv, time_conv = f"{layer.name}.resample.1", f"{layer.name}.time_conv"
    frames = F.pad(x.transpose(0, 1), (0, 1, 0, 1))  # right and bottom only
    x = F.conv2d(frames, w[f"{conv}.weight"], w[f"{conv}.bias"].to(x.dtype), stride=2).transpose(0, 1)
    if layer.kind == "down2d":
        return x
    history.after[time_conv] = x[:, -1:]
    if history.before is None:
        return x
    return _conv(torch.cat((history.before[time_conv], x), dim=1), w, time_conv, time_stride=2)


def _up(x: Tensor, w: Weights, history: _History, layer: Layer) -> Tensor:
    conv, time_conv = f"{layer.name}.resample.1", f"{layer.name}.time_conv"
    if layer.kind == "up3d":
        if history.before is None:  # the second chunk sees zeros before it, not the first frame
            history.after[time_conv] = x.new_zeros((layer.inner, 2, *x.shape[2:]))
        else:
            pairs = _conv(history.extend(x, time_conv), w, time_conv)
            pairs = pairs.reshape(2, *x.shape).permute(1, 2, 0, 3, 4)
            x = pairs.reshape(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    frames = F.interpolate(x.transpose(0, 1), scale_factor=2.0, mode="nearest")
    return F.conv2d(frames, w[f"{conv}.weight"], w[f"{conv}.bias"].to(x.dtype), padding=1).transpose(0, 1)


def _layer(x: Tensor, w: Weights, history: _History, layer: Layer) -> Tensor:
    match layer.kind:
        case "pointwise":
            return _conv(x, w, layer.name)
        case "conv":
            return _causal(x, w, history, layer.name)
        case "residual":
            return _residual(x, w, history, layer)
        case "attention":
            return _attention(x, w, layer.name)
        case "down2d" | "down3d":
            return _down(x, w, history, layer)
        case "up2d" | "up3d":
            return _up(x, w, history, layer)
        case "head":
            return _norm_conv(x, w, history, f"{layer.name}.0", f"{layer.name}.2")


def walk(
    x: Tensor, caches: Sequence[Tensor] | None, w: Weights, layers: tuple[Layer, ...], plan: Plan
) -> tuple[Tensor, ...]:
    """The result and the caches for the next chunk. `caches` is None on the first chunk."""
    contract = (cache for layer in layers for cache in vae_layers.caches(layer, plan))
    names = [cache.name.removesuffix(".cache") for cache in contract]
    history = _History(None if caches is None else dict(zip(names, caches, strict=True)))
    x = x.to(activation(plan))
    for layer in layers:
        x = _layer(x, w, history, layer)
    return x.float(), *(history.after[name] for name in names)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def normalised(z: Tensor) -> Tensor:
    """The encoder's numbers as latents."""
    return (z - _per_channel(LATENT_MEAN)) / _per_channel(LATENT_STD)


def _encode(
    frames: Tensor, caches: Sequence[Tensor] | None, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, ...]:
    moments, *after = walk(frames, caches, w, vae_layers.encoder(model.vae), plan)
    return normalised(moments[: model.vae.latent_channels]), *after


def _decode(
    latent: Tensor, caches: Sequence[Tensor] | None, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, ...]:
    z = latent * _per_channel(LATENT_STD) + _per_channel(LATENT_MEAN)
    return walk(z, caches, w, vae_layers.decoder(model.vae), plan)


def encode_first(frames: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor, ...]:
    return _encode(frames, None, w, model, plan)


def encode_next(
    frames: Tensor, *caches: Tensor, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, ...]:
    return _encode(frames, caches, w, model, plan)


def decode_first(latent: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor, ...]:
    return _decode(latent, None, w, model, plan)


def decode_next(
    latent: Tensor, *caches: Tensor, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, ...]:
    return _decode(latent, caches, w, model, plan)
