"""The work of a job by network, computed from the model's sizes: FLOPs, and bytes to move.

A multiplication of a matrix product or convolution counts as two FLOPs, as in the ONNX graphs (a test counts
those). Norms, softmax, RoPE and activation functions count nothing. Bytes are the least for a network alone:
every input, weight and output once, in the contract's types.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8_e4m3fn with numpy)

from trt_wan.engines.config import FACE_TOKENS, ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks, vae_layers
from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES
from trt_wan.engines.contracts.vae_layers import Layer
from trt_wan.engines.precision import PRECISIONS
from trt_wan.engines.shape import Plan
from trt_wan.runtime.weights.pack import nbytes

Unit = Literal["linear fp8", "linear", "attention", "convolution"]


@dataclass(frozen=True)
class Work:
    """FLOPs of one call, by the unit that computes them, and the least bytes it moves."""

    linear: int = 0
    attention: int = 0  # q kᵀ and probabilities times v
    convolution: int = 0
    bytes: int = 0
    fp8: bool = False  # whether its linear layers have 8 bits; int8 counts as FP8, whose peak is the same

    @property
    def flops(self) -> int:
        return self.linear + self.attention + self.convolution

    @property
    def units(self) -> dict[Unit, int]:
        linear: Unit = "linear fp8" if self.fp8 else "linear"
        return {linear: self.linear, "attention": self.attention, "convolution": self.convolution}


@dataclass(frozen=True)
class Calls:
    """Calls of a network: per step without guidance, per window outside steps, per job outside windows."""

    step: int = 0
    window: int = 0
    job: int = 0


def works(model: ModelConfig, plan: Plan) -> dict[str, Work]:
    """Returns the work of one call of every network."""
    return {name: _work(network, model, plan) for name, network in networks(model, plan).items()}


def step_flops(model: ModelConfig, plan: Plan) -> int:
    """Returns FLOPs of one step without guidance. Cost laws are fitted against them."""
    counts = calls(model, plan, steps=1)
    return sum(work.flops * counts[name].step for name, work in works(model, plan).items())


def calls(model: ModelConfig, plan: Plan, steps: int) -> dict[str, Calls]:
    """Returns calls by network for a job without guidance and NAG, in the mode animate with pose and face."""
    c = model.transformer
    vae_chunks = (plan.latent_frames - 1) // plan.vae_chunk
    return {
        "text_encoder_layer": Calls(job=model.text.layers),
        "image_encoder_embed": Calls(job=1),
        "image_encoder_layer": Calls(job=model.image.layers_used),
        "vae_encode_first": Calls(window=2, job=1),  # the condition and the pose; the reference
        "vae_encode_next": Calls(window=2 * vae_chunks),
        "text_embed": Calls(job=1),
        "image_embed": Calls(job=1),
        "context_kv": Calls(job=c.layers),
        "motion_encoder": Calls(window=-(-plan.frames // plan.face_batch)),
        "face_encoder": Calls(window=1),
        "fuser_kv": Calls(window=c.fusers),
        "time_embed": Calls(job=steps),
        "patch_embed": Calls(step=1),
        "attn_in": Calls(step=c.layers),
        "attention": Calls(step=c.layers),
        "sparse_attention": Calls(),
        "attn_out": Calls(step=c.layers),
        "cross_attention": Calls(step=c.layers),
        "cross_attention_nag": Calls(),
        "ffn": Calls(step=c.layers),
        "fuser": Calls(step=c.fusers),
        "head": Calls(step=1),
        "vae_decode_first": Calls(window=1),
        "vae_decode_next": Calls(window=vae_chunks),
    }


def seconds_at_best(work: Work, rates: Mapping[Unit, float], bytes_per_second: float) -> float | None:
    """Returns the lower bound of a call's time: the longer of its products one after the other at `rates`
    (FLOP/s), and its bytes. None if a rate is unknown.
    """
    needed = {unit: flops for unit, flops in work.units.items() if flops}
    if not needed.keys() <= rates.keys():
        return None
    products = sum(flops / rates[unit] for unit, flops in needed.items())
    return max(products, work.bytes / bytes_per_second)


def _work(network: Network, model: ModelConfig, plan: Plan) -> Work:
    linear, attention, convolution = _flops(network.name, model, plan)
    moved = sum(nbytes(t) for t in (*network.inputs, *network.weights, *network.outputs))
    eight_bits = network.quantised and PRECISIONS[plan.precision].quantised != ""
    return Work(linear, attention, convolution, moved, eight_bits)


def _flops(name: str, model: ModelConfig, plan: Plan) -> tuple[int, int, int]:
    """Returns FLOPs of linear layers, attention and convolutions."""
    c, text, image = model.transformer, model.text, model.image
    tokens, d = plan.tokens, c.dim
    image_keys = -(-image.tokens // 8) * 8  # filled up, or TensorRT does not fuse the attention
    match name:
        case "text_encoder_layer":
            inner = text.heads * text.head_dim
            products = 4 * text.dim * inner + 3 * text.dim * text.ffn_dim
            return 2 * text.length * products, 4 * text.length**2 * inner, 0
        case "image_encoder_embed":
            return 2 * (image.tokens - 1) * 3 * image.patch**2 * image.dim, 0, 0
        case "image_encoder_layer":
            products = 4 * image.dim**2 + 2 * image.dim * image.ffn_dim
            return 2 * image.tokens * products, 4 * image.tokens**2 * image.dim, 0
        case "text_embed":
            return 2 * text.length * (text.dim * d + d * d), 0, 0
        case "image_embed":
            return 2 * image.tokens * (image.dim**2 + image.dim * d), 0, 0
        case "context_kv":
            return 2 * 2 * (text.length + image.tokens) * d * d, 0, 0
        case "motion_encoder":
            return _motion_encoder(model, plan)
        case "face_encoder":
            return _face_encoder(model, plan)
        case "fuser_kv":
            return 2 * plan.slots * FACE_TOKENS * d * 2 * d, 0, 0
        case "time_embed":
            return 2 * (c.frequency_dim * d + d * d + 6 * d * d), 0, 0
        case "patch_embed":
            latent, pose = 4 * (c.latent_channels + c.condition_channels), 4 * c.latent_channels
            posed = tokens - plan.tokens_per_slot  # the reference slot has no pose
            return 2 * tokens * latent * d + 2 * posed * pose * d, 0, 0
        case "attn_in":
            return 2 * tokens * 3 * d * d, 0, 0
        case "attention":
            return 0, 4 * tokens**2 * d, 0
        case "sparse_attention":  # its graph attends to everything, and to the means of all blocks
            blocks, rows = -(-tokens // BLOCK), -(-tokens // QUERIES)
            return 0, (4 * tokens * (tokens + blocks) + 2 * rows * blocks) * d, 0
        case "attn_out":
            return 2 * tokens * 2 * d * d, 0, 0
        case "cross_attention":
            return 0, 4 * tokens * (text.length + image_keys) * d, 0
        case "cross_attention_nag":
            return 0, 4 * tokens * (2 * text.length + image_keys) * d, 0
        case "ffn":
            return 2 * tokens * (d * d + 2 * d * c.ffn_dim), 0, 0
        case "fuser":
            return 2 * tokens * 2 * d * d, 4 * tokens * FACE_TOKENS * d, 0
        case "head":
            return 2 * tokens * d * 4 * c.latent_channels, 0, 0
        case "vae_encode_first" | "vae_encode_next":
            frames = 1 if name.endswith("first") else 4 * plan.vae_chunk
            return _vae(vae_layers.encoder(model.vae), plan, frames, first=name.endswith("first"))
        case "vae_decode_first" | "vae_decode_next":
            frames = 1 if name.endswith("first") else plan.vae_chunk
            return _vae(vae_layers.decoder(model.vae), plan, frames, first=name.endswith("first"))
    raise AssertionError(f"the work of {name} is not known")


def _motion_encoder(model: ModelConfig, plan: Plan) -> tuple[int, int, int]:
    m = model.motion
    side = m.size
    convolution = 2 * side**2 * 3 * m.channels[0]
    for inner, out in zip(m.channels, m.channels[1:], strict=False):
        half = side // 2
        convolution += 2 * side**2 * inner * inner * 9
        convolution += 2 * 16 * inner * ((side + 1) ** 2 + (side - 1) ** 2)  # the blurs, depthwise 4x4
        convolution += 2 * half**2 * inner * out * (9 + 1)
        side = half
    convolution += 2 * m.channels[-1] * m.style_dim * 16
    products = 4 * m.style_dim**2 + 2 * m.style_dim * m.motion_dim
    return plan.face_batch * 2 * products, 0, plan.face_batch * convolution


def _face_encoder(model: ModelConfig, plan: Plan) -> tuple[int, int, int]:
    face, hidden = model.face, model.face.hidden_dim
    half = (plan.frames - 1) // 2 + 1
    quarter = (half - 1) // 2 + 1
    convolution = 2 * plan.frames * model.motion.style_dim * face.heads * hidden * 3
    convolution += 2 * face.heads * (half + quarter) * hidden * hidden * 3
    return 2 * face.heads * quarter * hidden * model.transformer.dim, 0, convolution


def _vae(layers: tuple[Layer, ...], plan: Plan, frames: int, first: bool) -> tuple[int, int, int]:
    """`frames` go in; the first chunk skips the temporal convolutions."""
    linear = attention = convolution = 0
    for layer in layers:
        inner, out = layer.inner, layer.out
        area = (plan.height // layer.cell) * (plan.width // layer.cell)
        positions = frames * area
        match layer.kind:
            case "pointwise":
                convolution += 2 * positions * inner * out
            case "conv" | "head":
                convolution += 2 * positions * inner * out * 27
            case "residual":
                shortcut = inner * out if inner != out else 0
                convolution += 2 * positions * (27 * (inner * out + out * out) + shortcut)
            case "attention":
                linear += 2 * positions * 4 * inner * inner
                attention += 4 * frames * area**2 * inner
            case "down2d" | "down3d":
                convolution += 2 * positions // 4 * inner * out * 9
                if layer.kind == "down3d" and not first:
                    frames //= 2
                    convolution += 2 * frames * area // 4 * out * out * 3
            case "up2d" | "up3d":
                if layer.kind == "up3d" and not first:
                    convolution += 2 * positions * inner * 2 * inner * 3
                    frames *= 2
                convolution += 2 * frames * area * 4 * inner * out * 9
    return linear, attention, convolution
