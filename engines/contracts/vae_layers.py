"""The VAE as two lists of layers, walked by its contracts and by its graphs (model_spec.md 7.1, 7.2).

Video tensors are [channels, frames, height, width]. Encoder and decoder are causal in time and run chunk by
chunk: the first chunk is one frame, every later one has four frames per latent frame. A layer's cache holds
the frames of the previous chunk that it needs: the last two input frames of a causal convolution, the last
frame where time is halved. Frames before the first one are zero, so the first chunk takes no caches.
"""

from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

from trt_wan.engines.config import VaeConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan

Kind = Literal["pointwise", "conv", "residual", "attention", "down2d", "down3d", "up2d", "up3d", "head"]

# Per latent channel (model_spec.md 7.3). Everywhere outside the VAE a latent is (z - mean) / std.
# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True)
class Layer:
    """One layer under its official name. `cell` is the side, in pixels, of one position of its input."""

    kind: Kind
    name: str
    inner: int
    out: int
    cell: int


def _middle(half: str, width: int, cell: int) -> tuple[Layer, ...]:
    kinds: tuple[Kind, ...] = ("residual", "attention", "residual")
    return tuple(Layer(kind, f"{half}.middle.{i}", width, width, cell) for i, kind in enumerate(kinds))


def encoder(vae: VaeConfig) -> tuple[Layer, ...]:
    """Frames to the latent's mean, then log variance. The halving nearest to the pixels keeps the frames."""
    widths = [vae.base_dim * m for m in vae.multipliers]
    names = (f"encoder.downsamples.{i}" for i in count())
    width, cell = widths[0], 1
    layers = [Layer("conv", "encoder.conv1", 3, width, cell)]
    for level, out in enumerate(widths):
        for _ in range(vae.residual_blocks):
            layers.append(Layer("residual", next(names), width, out, cell))
            width = out
        if level < len(widths) - 1:
            layers.append(Layer("down3d" if level else "down2d", next(names), width, width, cell))
            cell *= 2
    moments = 2 * vae.latent_channels
    layers += _middle("encoder", width, cell)
    layers.append(Layer("head", "encoder.head", width, moments, cell))
    layers.append(Layer("pointwise", "conv1", moments, moments, cell))
    return tuple(layers)


def decoder(vae: VaeConfig) -> tuple[Layer, ...]:
    """Latent to frames. The doubling nearest to the pixels keeps the frames. All halve the channels."""
    widths = [vae.base_dim * m for m in reversed(vae.multipliers)]
    names = (f"decoder.upsamples.{i}" for i in count())
    last = len(widths) - 1
    width, cell, latent = widths[0], 2**last, vae.latent_channels
    layers = [
        Layer("pointwise", "conv2", latent, latent, cell),
        Layer("conv", "decoder.conv1", latent, width, cell),
        *_middle("decoder", width, cell),
    ]
    for level, out in enumerate(widths):
        for _ in range(vae.residual_blocks + 1):
            layers.append(Layer("residual", next(names), width, out, cell))
            width = out
        if level < last:
            layers.append(Layer("up3d" if level < last - 1 else "up2d", next(names), width, width // 2, cell))
            width, cell = width // 2, cell // 2
    layers.append(Layer("head", "decoder.head", width, 3, cell))
    return tuple(layers)


def _conv(name: str, out: int, inner: int, *kernel: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (out, inner, *kernel), "linear"), Tensor(f"{name}.bias", (out,))


def _gamma(name: str, channels: int, axes: int = 4) -> Tensor:
    return Tensor(f"{name}.gamma", (channels,) + (1,) * (axes - 1))


def weights(layer: Layer, first: bool) -> tuple[Tensor, ...]:
    """The layer's weights. The first chunk skips the temporal convolutions, so their weights are missing."""
    name, inner, out = layer.name, layer.inner, layer.out
    match layer.kind:
        case "pointwise":
            return _conv(name, out, inner, 1, 1, 1)
        case "conv":
            return _conv(name, out, inner, 3, 3, 3)
        case "residual":
            shortcut = _conv(f"{name}.shortcut", out, inner, 1, 1, 1) if inner != out else ()
            return (
                _gamma(f"{name}.residual.0", inner),
                *_conv(f"{name}.residual.2", out, inner, 3, 3, 3),
                _gamma(f"{name}.residual.3", out),
                *_conv(f"{name}.residual.6", out, out, 3, 3, 3),
                *shortcut,
            )
        case "attention":
            return (
                _gamma(f"{name}.norm", inner, axes=3),
                *_conv(f"{name}.to_qkv", 3 * inner, inner, 1, 1),
                *_conv(f"{name}.proj", out, inner, 1, 1),
            )
        case "down2d" | "up2d" | "down3d" | "up3d":
            spatial = _conv(f"{name}.resample.1", out, inner, 3, 3)
            if first or layer.kind in ("down2d", "up2d"):
                return spatial
            frames = 2 if layer.kind == "up3d" else 1  # doubling puts the second frame in more channels
            return spatial + _conv(f"{name}.time_conv", frames * inner, inner, 3, 1, 1)
        case "head":
            return (_gamma(f"{name}.0", inner), *_conv(f"{name}.2", out, inner, 3, 3, 3))


def caches(layer: Layer, plan: Plan) -> tuple[Tensor, ...]:
    """The tensors that the layer passes to the next chunk, in the order of their use."""
    height, width = plan.height // layer.cell, plan.width // layer.cell

    def last_two(name: str, channels: int) -> Tensor:
        return Tensor(f"{name}.cache", (channels, 2, height, width), "activation")

    match layer.kind:
        case "conv":
            return (last_two(layer.name, layer.inner),)
        case "residual":
            return (
                last_two(f"{layer.name}.residual.2", layer.inner),
                last_two(f"{layer.name}.residual.6", layer.out),
            )
        case "up3d":
            return (last_two(f"{layer.name}.time_conv", layer.inner),)
        case "down3d":  # halved in space before it is halved in time
            halved = (layer.out, 1, height // 2, width // 2)
            return (Tensor(f"{layer.name}.time_conv.cache", halved, "activation"),)
        case "head":
            return (last_two(f"{layer.name}.2", layer.inner),)
        case "pointwise" | "attention" | "down2d" | "up2d":
            return ()


def network(
    name: str, layers: tuple[Layer, ...], plan: Plan, chunk: Tensor, result: Tensor, first: bool
) -> Network:
    """The contract of one chunk through `layers`: chunk and caches in, result and caches out."""
    remembered = [cache for layer in layers for cache in caches(layer, plan)]
    return Network(
        name=name,
        part="vae",
        inputs=(chunk,) if first else (chunk, *remembered),
        weights=tuple(weight for layer in layers for weight in weights(layer, first)),
        outputs=(result, *(replace(cache, name=f"{cache.name}_out") for cache in remembered)),
    )
