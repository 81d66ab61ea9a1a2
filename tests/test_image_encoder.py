"""CLIP's vision tower and its preprocessing against transformers and torch."""

import math

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from oracles import clip_config
from transformers import CLIPVisionModelWithProjection

from trt_wan.build.export import export
from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.image_encoder import MEAN, STD, clip_pixels, encode_image
from trt_wan.runtime.weights.random import random_tensor


@pytest.fixture(scope="module")
def clip():
    clip = CLIPVisionModelWithProjection(clip_config(TINY.image)).eval().requires_grad_(False)
    rng = np.random.default_rng(1)
    for name, parameter in clip.named_parameters():
        parameter.copy_(torch.from_numpy(random_tensor(name, tuple(parameter.shape), rng)))
    return clip


def test_features_equal_transformers(make_model, clip):
    rng = np.random.default_rng(2)
    weights = {name: value.numpy() for name, value in clip.state_dict().items()}
    assert required_tensors(TINY, "image_encoder").items() <= {n: w.shape for n, w in weights.items()}.items()

    canvas = rng.uniform(-1, 1, (3, 48, 80)).astype(np.float32)
    features = encode_image(make_model(TINY, Plan(), {"image_encoder": weights}), canvas)

    pixels = torch.from_numpy(clip_pixels(canvas))[None]
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2][0].numpy()
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-5)
    assert 0.5 < expected.std() < 4  # the tolerance is relative to values of order 1


@pytest.mark.parametrize("tiles", [2, 3])
def test_tiles_equal_torch(make_model, clip, tiles):
    """kijai_semantics.md 1.7: a grid of views, their patches averaged down to the grid of the whole."""
    weights = {name: value.numpy() for name, value in clip.state_dict().items()}
    canvas = np.random.default_rng(3).uniform(-1, 1, (3, 48, 80)).astype(np.float32)
    model = make_model(TINY, Plan(), {"image_encoder": weights})
    features = encode_image(model, canvas, tiles, 0.25)

    large = torch.from_numpy(torch_pixels(canvas, torch.float64, 224 * tiles)).float()[None]
    views = F.unfold(large, 224, stride=224)[0].T.reshape(-1, 3, 224, 224)  # row by row
    hidden = clip(views, output_hidden_states=True).hidden_states[-2]
    grid = hidden[:, 1:].transpose(1, 2).reshape(tiles, tiles, -1, 16, 16)
    joined = torch.cat([torch.cat(list(row), dim=2) for row in grid], dim=1)  # [dim, 16·tiles, 16·tiles]
    pooled = F.avg_pool2d(joined, tiles).flatten(1).T
    expected = torch.cat((hidden[:, :1].mean(0), pooled)).numpy()
    whole = encode_image(model, canvas)
    np.testing.assert_allclose(features, (0.25 * whole + expected) / 1.25, rtol=0, atol=2e-5)
    assert np.abs(features - whole).max() > 0.1


SIZES = [(480, 832), (832, 480), (224, 224), (223, 225), (720, 1280), (100, 130), (64, 16), (1080, 1920)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_equal_torch(height, width):
    canvas = np.random.default_rng(height).uniform(-1, 1, (3, height, width)).astype(np.float32)
    pixels = clip_pixels(canvas)
    assert pixels.dtype == np.float32
    # In fp64: in fp32 torch rounds the positions themselves and is off by up to 3e-4 on this noise.
    np.testing.assert_allclose(pixels, torch_pixels(canvas, torch.float64), rtol=0, atol=2e-6)
    np.testing.assert_allclose(pixels, torch_pixels(canvas, torch.float32), rtol=0, atol=2e-3)


def torch_pixels(canvas: Array, dtype: torch.dtype, size: int = 224) -> Array:
    squashed = F.interpolate(
        torch.from_numpy(canvas).to(dtype)[None],
        (size, size),
        mode="bicubic",
        align_corners=False,
        antialias=False,
    )
    return ((squashed[0].numpy() * 0.5 + 0.5) - MEAN) / STD


def test_pixels_are_normalised_as_clip_was_trained():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    grey = clip_pixels(np.zeros((3, 32, 32), np.float32))[:, 100, 100]
    np.testing.assert_allclose(
        grey, (0.5 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD), rtol=1e-6
    )


def test_full_size_has_the_parameters_of_vit_h():
    with torch.device("meta"):
        clip = CLIPVisionModelWithProjection(clip_config(ANIMATE_14B.image))
    shapes = {name: tuple(p.shape) for name, p in clip.named_parameters()}
    assert sum(map(math.prod, shapes.values())) == 632_076_800
    required = required_tensors(ANIMATE_14B, "image_encoder")
    assert required.items() <= shapes.items()
    unused = set(shapes) - set(required)
    assert {name for name in unused if not name.startswith("vision_model.encoder.layers.31.")} == {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
        "visual_projection.weight",
    }


@pytest.mark.parametrize(("name", "products"), [("image_encoder_embed", 1), ("image_encoder_layer", 8)])
def test_full_size_exports(name, products, tmp_path):
    path = tmp_path / "graph.onnx"
    export(networks(ANIMATE_14B, Plan())[name], ANIMATE_14B, Plan(), path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("MatMul") + operators.count("Gemm") == products
