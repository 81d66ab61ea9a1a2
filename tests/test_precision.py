"""The type of every tensor at every precision, against lists written out here (model_spec.md 1.2, 1.9)."""

import re
from itertools import pairwise

import pytest

from trt_wan.engines.config import ANIMATE_14B, TINY, ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.int8 import GROUP
from trt_wan.engines.precision import PRECISIONS, Precision
from trt_wan.engines.shape import Plan

BLOCK_LINEARS = {
    f"{part}.weight"
    for part in (
        *(f"self_attn.{x}" for x in "qkvo"),
        *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")),
        "ffn.0",
        "ffn.2",
    )
}
# Whatever else is not float32 where the precision is not: matrices and convolutions outside the blocks.
OTHER_LINEARS = (
    r"text_embedding\.[02]\.weight|img_emb\.proj\.[13]\.weight"
    r"|face_adapter\.fuser_blocks\.\d+\.linear(1_q|1_kv|2)\.weight"
    r"|encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.w(i_0|i_1|o))\.weight"
    r"|vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
)
# What is passed on in the activation's type: everything else that goes in or out is float32 (or an index).
ACTIVATIONS = {
    "q",
    "k",
    "v",
    "attended",
    "text_k",
    "text_v",
    "image_k",
    "image_v",
    "face_k",
    "face_v",
    "nag_k",
    "nag_v",
} | {
    "cross_q",
    "cross_attended",
}

every_model = pytest.mark.parametrize("model", [TINY, ANIMATE_14B], ids=lambda model: model.name)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def weight_types(model: ModelConfig, precision: Precision) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every weight by its name in the checkpoint."""
    return {
        network.weight_key(w.name, n): (w.dtype, w.shape)
        for network in networks(model, Plan(precision=precision)).values()
        for n in range(network.repeats)
        for w in network.weights
    }


@every_model
def test_fp8_are_the_linear_weights_of_the_blocks(model: ModelConfig) -> None:
    fp8 = {name for name, (dtype, _) in weight_types(model, "fp8").items() if dtype == "float8_e4m3fn"}
    layers = model.transformer.layers
    assert fp8 == {f"blocks.{n}.{name}" for n in range(layers) for name in BLOCK_LINEARS}
    assert len(fp8) == 12 * layers
    for precision in ("fp32", "bf16", "int8"):
        assert "float8_e4m3fn" not in {dtype for dtype, _ in weight_types(model, precision).values()}
    int8 = {name for name, (dtype, _) in weight_types(model, "int8").items() if dtype == "int8"}
    assert int8 == fp8


@every_model
@pytest.mark.parametrize(("precision", "dtype"), [("fp8", "float8_e4m3fn"), ("int8", "int8")])
def test_every_weight_of_8_bits_is_followed_by_a_scale_per_output_channel(
    model: ModelConfig, precision: Precision, dtype: str
) -> None:
    for network in networks(model, Plan(precision=precision)).values():
        for weight, after in pairwise((*network.weights, None)):
            if weight is not None and weight.dtype == dtype:
                assert after is not None and after.name == weight.name.removesuffix("weight") + "scale"
                assert (after.dtype, after.shape) == ("float32", weight.shape[:1])
                assert precision != "int8" or weight.shape[1] % GROUP == 0
    scales = [name for name in weight_types(model, precision) if name.endswith(".scale")]
    assert len(scales) == 12 * model.transformer.layers
    assert not [name for name in weight_types(model, "bf16") if name.endswith(".scale")]


@every_model
@every_precision
def test_the_types_of_weights(model: ModelConfig, precision: Precision) -> None:
    for name, (dtype, _) in weight_types(model, precision).items():
        block = re.fullmatch(r"blocks\.\d+\.(.*)", name)
        if block and block[1] in BLOCK_LINEARS:
            expected = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}[
                precision
            ]
        elif re.fullmatch(OTHER_LINEARS, name) or _is_vae_convolution(name):
            expected = "float32" if precision == "fp32" else "bfloat16"
        else:
            expected = "float32"
        assert dtype == expected, name


def _is_vae_convolution(name: str) -> bool:
    umt5 = name.startswith("encoder.block.")
    return bool(re.match(r"(encoder|decoder|conv[12])\.", name)) and name.endswith(".weight") and not umt5


@every_model
@every_precision
def test_the_types_of_inputs_and_outputs(model: ModelConfig, precision: Precision) -> None:
    activation = "float32" if precision == "fp32" else "bfloat16"
    for network in networks(model, Plan(precision=precision)).values():
        for tensor in (*network.inputs, *network.outputs):
            if tensor.name == "position_buckets":
                expected = "int64"
            elif tensor.name in ACTIVATIONS or "cache" in tensor.name:
                expected = activation
            else:
                expected = "float32"
            assert tensor.dtype == expected, f"{network.name}.{tensor.name}"


@every_model
def test_precision_changes_types_and_no_shapes(model: ModelConfig) -> None:
    exact = {name: shape for name, (_, shape) in weight_types(model, "fp32").items()}
    for precision in ("bf16", "fp8", "int8"):
        types = weight_types(model, precision)
        assert {name: shape for name, (_, shape) in types.items() if not name.endswith(".scale")} == exact
