"""The VAE without TensorRT: channels-last bf16 convolutions, and native kernels between them.

The arithmetic is that of the graphs in build/models/vae.py: norms, sums and the softmax in float32, tensors
in bf16. The layers are walked once, which yields a list of steps. A convolution reads `taken`, where the pass
before it put its input behind the frames of the cache, and writes `made`; `kept` is the residual stream.
Weights come in the checkpoint's layout and are turned into the convolutions' just before each use: 0.15 GB a
network.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trt_wan.engines.config import ModelConfig, VaeConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.contracts.vae_layers import LATENT_MEAN, LATENT_STD, Layer
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import MOST_BLOCKS, Gpu
from trt_wan.runtime.device.kernels import Module, read_source
from trt_wan.runtime.segments.native.conv_hopper import UP, HopperConvolution, Kernel, fused, tiling
from trt_wan.runtime.segments.native.convolution import ConvShape, convolution
from trt_wan.runtime.segments.native.gemm import WORKSPACE_BYTES, Bf16Gemm, CublasLt, Product

VECTOR = 8  # channels; of fewer there are zeros
THREADS = 256
GATHERED = 32  # channels that vae.cu makes of the encoder's three
TILE = 64  # side of the squares that are transposed
SCORES_BYTES = 128 << 20  # the attention's, computed for some queries at a time
BF16, FLOAT32 = 2, 4  # bytes

KERNELS = (
    "transpose",
    "zero",
    "repack",
    "gather",
    "gather_weight",
    "frames_out",
    "latent_in",
    "latent_out",
    "enlarge",
    "add_bias",
    "softmax",
)


def source(vae: VaeConfig, threads: int = THREADS) -> tuple[str, tuple[str, ...]]:
    """The CUDA source for a VAE, and the names of its kernels."""
    widths = sorted({vae.base_dim * m for m in vae.multipliers})
    numbers = {"LATENT_MEAN": LATENT_MEAN, "LATENT_STD": LATENT_STD}
    lines = [f"constexpr int THREADS = {threads}, LATENT = {vae.latent_channels};"]
    for name, values in numbers.items():
        listed = ", ".join(f"{value}f" for value in values)
        lines.append(f"__device__ const float {name}[LATENT] = {{{listed}}};")
    text = "\n".join(lines) + "\n" + read_source(__package__, "vae.cu")
    text += "".join(f"FINISH({width})\n" for width in widths)
    return text, (*KERNELS, *(f"finish_{width}" for width in widths))


@dataclass(frozen=True)
class At:
    """An address: a part of the scratch or a tensor of the contract, by name, and bytes behind its start."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Step:
    run: Callable[..., None]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Own:
    """A convolution by our kernel, with its input."""

    shape: ConvShape
    parts: int
    x: At
    weight: At


@dataclass(frozen=True)
class Unfinished:
    """A convolution without its bias; perhaps with something to be added to it. Its result is in `made`. If
    `own` is set, it will run with the pass that finishes it.
    """

    bias: At
    added: At | None = None
    added_bias: At | None = None
    own: Own | None = None


@dataclass(frozen=True)
class Cut:
    """A place between two steps where only the tensors `live` (with bytes) are needed later: a finished
    convolution, and the residual stream around it.
    """

    name: str  # the layer's, and its number in the layer
    step: int  # the first one behind it
    live: tuple[tuple[At, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.live)


class Vae:
    """One of the VAE's four networks. Nothing in the scratch survives a call."""

    def __init__(self, network: Network, model: ModelConfig, gpu: Gpu, own: bool = False) -> None:
        """`own`: our kernel computes the convolutions that it knows (conv_hopper.py)."""
        walk = _Walk(network, model, gpu, own)
        with ThreadPoolExecutor() as pool:  # NVRTC takes a second for each
            list(pool.map(Kernel.compile, walk.kernels))
        self.steps, self.cuts = walk.steps, walk.cuts
        self._offsets, self.scratch_bytes = laid_out(walk.parts)
        self._scratch = 0

    def start(self, scratch: int) -> None:
        self._scratch = scratch

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        self.enqueue_steps(range(len(self.steps)), addresses, self._scratch)

    def enqueue_steps(self, steps: range, addresses: Mapping[str, int], scratch: int) -> None:
        """A part of the network, in a scratch of its own."""
        at = {**addresses, **{name: scratch + offset for name, offset in self._offsets.items()}}
        for step in self.steps[steps.start : steps.stop]:
            step.run(*(at[a.name] + a.offset if isinstance(a, At) else a for a in step.arguments))

    def offset(self, at: At) -> int:
        """Where a part of the scratch lies in it."""
        return self._offsets[at.name] + at.offset

    def settle(self) -> None:
        pass


KEPT, SHORTCUT = At("scratch.kept"), At("scratch.shortcut")
WEIGHT, WORKSPACE = At("scratch.weight"), At("scratch.workspace")
GATHERED_WEIGHT = At("scratch.gathered_weight")


class _Walk:
    """Lists the steps of a network. The picture has `frames`, `height`, `width` and `channels` by now."""

    def __init__(self, network: Network, model: ModelConfig, gpu: Gpu, own: bool) -> None:
        self.steps: list[Step] = []
        self.cuts: list[Cut] = []
        self.parts: dict[str, int] = {}  # bytes, of the scratch
        self.kernels = set[Kernel]()
        self.taken, self.made = At("scratch.taken"), At("scratch.made")
        self._gpu, self._own = gpu, own
        self._first = network.name.endswith("_first")
        text, names = source(model.vae)
        module = gpu.once((__name__, model.vae), lambda: Module(gpu.device, text, names))
        self._kernel = partial(module.launch, gpu.stream)
        self._last: Unfinished | None = None

        given = network.inputs[0]
        self.frames, self.height, self.width = given.shape[1:]
        self.channels = given.shape[0]
        decodes = given.name == "latent"
        for layer in vae_layers.decoder(model.vae) if decodes else vae_layers.encoder(model.vae):
            self._name, self._cuts_before, self._kept_bytes = layer.name, len(self.cuts), 0
            self._layer(layer, decodes)

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width

    def _layer(self, layer: Layer, decodes: bool) -> None:
        match layer.kind:
            case "pointwise" if decodes:
                self._latent_in(layer)
            case "pointwise":
                self._latent_out(layer)
            case "conv":
                self._first_conv(layer, decodes)
            case "residual":
                self._residual(layer)
            case "attention":
                self._attention(layer)
            case "down2d" | "down3d":
                self._down(layer)
            case "up2d" | "up3d":
                self._up(layer)
            case "head":
                self._head(layer, decodes)

    # The layers

    def _latent_in(self, layer: Layer) -> None:
        weights = At(f"{layer.name}.weight"), At(f"{layer.name}.bias")
        to = self._taken(2, layer.out)
        count = self.pixels * layer.out
        self._each("latent_in", count, At("latent"), *weights, to, np.int64(count))

    def _first_conv(self, layer: Layer, decodes: bool) -> None:
        """The decoder's input is there already. The encoder's has three channels: kernel `gather`."""
        if decodes:
            self._history(layer.name, 2)
            self._conv(layer.name, layer.inner, layer.out, (3, 3, 3))
            return
        name, out = layer.name, layer.out
        cache = 0 if self._first else At(f"{name}.cache")
        addresses = At("frames"), cache, self._taken(0, GATHERED), At(f"{name}.cache_out")
        size = np.int64(self.frames), np.uint32(self.height), np.uint32(self.width)
        self._each("gather", self.pixels, *addresses, *size)
        self._need(GATHERED_WEIGHT, out * GATHERED * 3 * BF16)
        self._each("gather_weight", out * GATHERED * 3, At(f"{name}.weight"), GATHERED_WEIGHT, np.int64(out))
        kernel, pad = (1, 3, 1), (1, 1, 0, 0)
        if not self._defer(name, GATHERED, out, kernel, pad, weight=GATHERED_WEIGHT):
            self._conv(name, GATHERED, out, kernel, pad=pad, weight=GATHERED_WEIGHT)

    def _residual(self, layer: Layer) -> None:
        name = layer.name
        self._norm_conv(f"{name}.residual.0", f"{name}.residual.2", layer.inner, layer.out, keep=True)
        self._norm_conv(f"{name}.residual.3", f"{name}.residual.6", layer.out, layer.out)
        added, bias = KEPT, None
        if layer.inner != layer.out:
            size = self.frames, self.height, self.width
            shape = ConvShape(*size, layer.inner, layer.out, (1, 1, 1), pad=(0, 0, 0, 0))
            self._need(SHORTCUT, self.pixels * layer.out * BF16)
            self._multiply(shape, KEPT, At(f"{name}.shortcut.weight"), SHORTCUT)
            added, bias = SHORTCUT, At(f"{name}.shortcut.bias")
        assert self._last is not None
        self._last = replace(self._last, added=added, added_bias=bias)

    def _attention(self, layer: Layer) -> None:
        """One head over the positions of each frame. The scores lie where shortcuts do."""
        name, c, tokens = layer.name, layer.inner, self.height * self.width
        self._finish(f"{name}.norm.gamma", self._taken(0, c), silu=False, keep=True)
        self._need(self.made, 3 * self.pixels * c * BF16)
        self._gemm(Product(self.pixels, 3 * c, c), self.taken, At(f"{name}.to_qkv.weight"), self.made)
        bias = At(f"{name}.to_qkv.bias"), np.int64(self.pixels), np.uint32(3 * c)
        self._each("add_bias", self.pixels * 3 * c // VECTOR, self.made, *bias)
        rows = _share(tokens, SCORES_BYTES // (tokens * (FLOAT32 + BF16)))
        self._need(SHORTCUT, rows * tokens * (FLOAT32 + BF16))
        weights = At(SHORTCUT.name, rows * tokens * FLOAT32)
        scored = Product(rows, tokens, c, x_pitch=3 * c, w_pitch=3 * c, factor=c**-0.5)
        mixed = Product(rows, c, tokens, turned=True, w_pitch=3 * c)
        for frame in range(self.frames):
            q, k, v = (At(self.made.name, (frame * tokens * 3 + part) * c * BF16) for part in range(3))
            for row in range(0, tokens, rows):
                self._gemm(scored, At(q.name, q.offset + row * 3 * c * BF16), k, SHORTCUT, float32=True)
                self._launch("softmax", rows, SHORTCUT, weights, np.int64(tokens))
                self._gemm(mixed, weights, v, At(self.taken.name, (frame * tokens + row) * c * BF16))
        self._gemm(Product(self.pixels, c, c), self.taken, At(f"{name}.proj.weight"), self.made)
        self._last = Unfinished(At(f"{name}.proj.bias"), KEPT)

    def _down(self, layer: Layer) -> None:
        conv, time_conv = f"{layer.name}.resample.1", f"{layer.name}.time_conv"
        self._finish(None, self._taken(0, layer.inner))
        self.height, self.width = self.height // 2, self.width // 2
        self._conv(conv, layer.inner, layer.out, (1, 3, 3), stride=(1, 2, 2), pad=(0, 1, 0, 1))
        if layer.kind == "down2d":
            return
        if self._first:  # goes on with the same picture
            self._finish(None, self._taken(0, layer.out))
            self.cuts.pop()  # `made` lives on: the next layer finishes it once more
            self._to_cache(time_conv, self.frames - 1, 1)
            return
        self._finish(None, self._taken(1, layer.out))
        self._history(time_conv, 1)
        self.frames //= 2
        self._conv(time_conv, layer.out, layer.out, (3, 1, 1), stride=(2, 1, 1))

    def _up(self, layer: Layer) -> None:
        conv, time_conv, c = f"{layer.name}.resample.1", f"{layer.name}.time_conv", layer.inner
        pairs = layer.kind == "up3d" and not self._first
        self._finish(None, self._taken(2 if pairs else 0, c))
        if pairs:
            self._history(time_conv, 2)
            if self._defer(time_conv, c, c, (3, 1, 1), (0, 0, 0, 0), parts=2):
                self.frames *= 2
                self._finish(None, self._taken(0, c))
                pairs = False
            else:
                self._conv(time_conv, c, 2 * c, (3, 1, 1))
        elif layer.kind == "up3d":  # the second chunk sees zeros before it, not the first frame
            self._zero(At(f"{time_conv}.cache_out"), 2 * self.height * self.width * c * BF16)
        if not pairs and self._defer(conv, c, layer.out, *UP, parts=4):
            self.height, self.width = 2 * self.height, 2 * self.width
        else:
            self._enlarge(c, f"{time_conv}.bias" if pairs else None)
            self._conv(conv, c, layer.out, (1, 3, 3), pad=(1, 1, 1, 1))

    def _head(self, layer: Layer, decodes: bool) -> None:
        conv = f"{layer.name}.2"
        self._finish(f"{layer.name}.0.gamma", self._taken(2, layer.inner))
        self._history(conv, 2)
        if not (decodes and self._narrow(conv, layer.inner, layer.out)):
            self._conv(conv, layer.inner, layer.out, (3, 3, 3))
        if decodes:
            addresses = self.made, At(f"{conv}.bias"), At("frames")
            self._each("frames_out", self.pixels, *addresses, np.int64(self.pixels))

    def _latent_out(self, layer: Layer) -> None:
        assert self._last is not None
        weights = self._last.bias, At(f"{layer.name}.weight"), At(f"{layer.name}.bias")
        self._each("latent_out", self.pixels, self.made, *weights, At("latent"), np.int64(self.pixels))

    # Parts of layers

    def _norm_conv(self, norm: str, conv: str, inner: int, out: int, keep: bool = False) -> None:
        """RMS norm, SiLU, and a causal convolution. `keep`: the input is needed later."""
        self._finish(f"{norm}.gamma", self._taken(2, inner), keep=keep)
        self._history(conv, 2)
        if not self._defer(conv, inner, out, (3, 3, 3), (1, 1, 1, 1)):
            self._conv(conv, inner, out, (3, 3, 3))

    def _finish(self, gamma: str | None, to: At, *, silu: bool = True, keep: bool = False) -> None:
        """Writes the finished convolution to `to`, normalised where there is a gamma, and to `kept`."""
        last, c = self._last, self.channels
        assert last is not None
        if keep:
            self._kept_bytes = self.pixels * c * BF16
            self._need(KEPT, self._kept_bytes)
        raw = to if gamma is None else KEPT if keep else 0
        by, normed = (0, 0) if gamma is None else (At(gamma), to)
        added, added_bias = last.added or 0, last.added_bias or 0
        if last.own is not None:
            self._run_own(last.own, (last.bias, added_bias), added, raw, by, normed, silu)
            self._last = None
        else:
            lanes = math.gcd(c // VECTOR, 32)
            blocks = min(-(-self.pixels * lanes // THREADS), MOST_BLOCKS)
            rest = np.int64(self.pixels), np.int32(silu)
            self._launch(
                f"finish_{c}", blocks, self.made, last.bias, added, added_bias, raw, by, normed, *rest
            )
        live = (to, self.pixels * c * BF16), (KEPT, self._kept_bytes)
        name = f"{self._name} {len(self.cuts) - self._cuts_before}"
        self.cuts.append(Cut(name, len(self.steps), live if self._kept_bytes else live[:1]))

    def _defer(
        self,
        name: str,
        inner: int,
        out: int,
        kernel: tuple[int, int, int],
        pad: tuple[int, int, int, int],
        parts: int = 1,
        weight: At | None = None,
    ) -> bool:
        """Has our kernel compute the convolution with the pass that finishes it. False if it cannot."""
        shape = ConvShape(self.frames, self.height, self.width, inner, out, kernel, pad=pad)
        if not self._own or tiling(shape) is None:
            return False
        own = Own(shape, parts, self.taken, weight or At(f"{name}.weight"))
        self._last, self.channels = Unfinished(At(f"{name}.bias"), own=own), out
        return True

    def _run_own(
        self, own: Own, biases: tuple[Any, ...], added: Any, y: Any, gamma: Any, *normed: Any
    ) -> None:
        made = fused(self._gpu, own.shape, own.parts, norm=gamma != 0)
        self._fused(made, (own.weight, *biases), own.x, added, y, gamma, *normed)

    def _fused(
        self, made: HopperConvolution | None, weights: tuple[Any, ...], x: At, *arguments: Any
    ) -> None:
        assert made is not None
        self.kernels.add(made.kernel)
        self._need(WEIGHT, made.weight_bytes)
        self.steps.append(Step(made.repack, (*weights, WEIGHT)))
        self.steps.append(Step(made.enqueue, (x, WEIGHT, *arguments)))

    def _narrow(self, name: str, inner: int, out: int) -> bool:
        """From `taken` to `made`, which has a vector of channels. The bias is not added. False if our kernel
        does not know the shape.
        """
        shape = ConvShape(self.frames, self.height, self.width, inner, VECTOR, (3, 3, 3), pad=(1, 1, 1, 1))
        if not self._own or tiling(shape, out) is None:
            return False
        self._need(self.made, self.pixels * VECTOR * BF16)
        made = fused(self._gpu, shape, 1, norm=False, given=out)
        self._fused(made, (At(f"{name}.weight"), 0, 0), self.taken, 0, self.made, 0, 0, False)
        return True

    def _turn(self) -> None:
        self.taken, self.made = self.made, self.taken

    def _conv(
        self,
        name: str,
        inner: int,
        out: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        pad: tuple[int, int, int, int] | None = None,
        weight: At | None = None,
    ) -> None:
        """From `taken` to `made`. The picture has the size of the result already, but for its channels."""
        if pad is None:
            pad = (1, 1, 1, 1) if kernel == (3, 3, 3) else (0, 0, 0, 0)
        wide_inner, wide_out = (-(-channels // VECTOR) * VECTOR for channels in (inner, out))
        shape = ConvShape(
            self.frames, self.height, self.width, wide_inner, wide_out, kernel, stride=stride, pad=pad
        )
        taps = math.prod(kernel)
        count = wide_out * taps * wide_inner
        self._need(WEIGHT, count * BF16)
        sizes = np.uint32(out), np.uint32(inner), np.uint32(taps), np.int64(wide_out), np.uint32(wide_inner)
        self._each("repack", count // VECTOR, weight or At(f"{name}.weight"), WEIGHT, *sizes)
        self._need(self.made, self.pixels * wide_out * BF16)
        self._multiply(shape, self.taken, WEIGHT, self.made)
        self._last, self.channels = Unfinished(At(f"{name}.bias")), out

    def _multiply(self, shape: ConvShape, x: At, w: At, y: At) -> None:
        made = convolution(self._gpu, shape)
        self._need(WORKSPACE, made.workspace_bytes)
        self.steps.append(Step(made.enqueue, (x, w, y, WORKSPACE)))

    def _gemm(self, product: Product, x: At, w: At, y: At, float32: bool = False) -> None:
        gpu = self._gpu
        library = gpu.once(CublasLt, CublasLt)
        gemm = gpu.once((product, float32), lambda: Bf16Gemm(gpu, library, product, float32))
        self._need(WORKSPACE, WORKSPACE_BYTES)
        self.steps.append(Step(gemm.enqueue, (x, w, y, WORKSPACE)))

    def _enlarge(self, channels: int, bias: str | None) -> None:
        """From `taken` to the same. With a bias from `made`, whose frames have two each in their channels."""
        parts = 2 if bias else 1
        source, added = (self.made, At(bias)) if bias else (self.taken, 0)
        sizes = np.int64(self.pixels), *map(np.uint32, (self.height, self.width, channels, parts))
        count = self.pixels * parts * channels // VECTOR
        if not bias:
            self._turn()
        self.frames, self.height, self.width = self.frames * parts, 2 * self.height, 2 * self.width
        self._take(0, channels)
        self._each("enlarge", count, source, added, self.taken, *sizes)

    def _history(self, name: str, frames: int) -> None:
        """Puts a convolution's cache before the frames in `taken`; the last frames go to the cache."""
        count = frames * self.height * self.width
        if self._first:
            self._zero(self.taken, count * self.channels * BF16)
        else:
            self._transpose(At(f"{name}.cache"), self.taken, self.channels, count)
        self._to_cache(name, self.frames, frames)

    def _to_cache(self, name: str, start: int, frames: int) -> None:
        """`frames` frames of `taken`."""
        picture = self.height * self.width
        source = At(self.taken.name, start * picture * self.channels * BF16)
        self._transpose(source, At(f"{name}.cache_out"), frames * picture, self.channels)

    def _taken(self, frames: int, channels: int) -> At:
        """Where the input of a convolution begins that has `frames` frames before it. Our convolution that is
        still to run reads `taken`, so the two buffers change places first.
        """
        if self._last is not None and self._last.own is not None:
            self._turn()
        self._take(frames, channels)
        self.channels = channels
        return At(self.taken.name, frames * self.height * self.width * channels * BF16)

    def _take(self, before: int, channels: int) -> None:
        self._need(self.taken, (before + self.frames) * self.height * self.width * channels * BF16)

    def _need(self, part: At, size: int) -> None:
        self.parts[part.name] = max(size, self.parts.get(part.name, 0))

    # Launches

    def _transpose(self, source: At, to: At, rows: int, columns: int) -> None:
        tiles = -(-rows // TILE) * -(-columns // TILE)
        self._launch("transpose", tiles, source, to, np.int64(rows), np.int64(columns))

    def _zero(self, to: At, size: int) -> None:
        self._each("zero", size // 16, to, np.int64(size // 16))

    def _each(self, kernel: str, count: int, *arguments: Any) -> None:
        assert count < 1 << 32, f"{kernel} of {count} vectors"
        self._launch(kernel, min(-(-count // THREADS), MOST_BLOCKS), *arguments)

    def _launch(self, kernel: str, blocks: int, *arguments: Any) -> None:
        self.steps.append(Step(partial(self._kernel, kernel, blocks, THREADS), arguments))


def _share(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`."""
    return next(share for share in range(min(count, max(most, 1)), 0, -1) if count % share == 0)
