"""Writes a complete set of tiny random weights in the file formats that people have (model_spec.md 5).

The transformer is a scaled-FP8 single file: the linear weights of the blocks in F8_E4M3 with an F32
`scale_weight` each, everything else BF16, the blur kernels of the motion encoder, the marker `scaled_fp8`.
The VAE is BF16 under the official names, umT5 a scaled-FP8 file under Hugging Face names with a real
tokenizer.json beside it, CLIP is F16, and so is Uni3C, under the names of its published file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save

from trt_wan.engines.config import TINY, MotionConfig
from trt_wan.engines.fp8 import E4M3, E4M3_MAX
from trt_wan.engines.lynx import Kind, ip_blocks
from trt_wan.engines.store.files import replace_atomically
from trt_wan.runtime.executors import Array
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny_tokenizer import write_tiny_tokenizer

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)


def write_tiny_weights(folder: Path, seed: int) -> list[Path]:
    """Returns the files written: the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = random_weights(TINY, "transformer", seed)
    text = random_weights(TINY, "text_encoder", seed)
    files = {
        "wan2.2_animate_tiny_fp8_e4m3fn_scaled.safetensors": {
            **_scaled_fp8(transformer, BF16, lambda name: name.startswith("blocks.")),
            **blur_kernels(TINY.motion),
            "scaled_fp8": np.zeros(2, E4M3),
        },
        "wan2.1_vae_tiny_bf16.safetensors": _as(BF16, random_weights(TINY, "vae", seed)),
        "umt5_tiny_fp8_e4m3fn_scaled.safetensors": {
            **_scaled_fp8(text, F16, lambda name: ".layer." in name and "relative" not in name),
            "scaled_fp8": np.zeros(0, E4M3),
        },
        "clip_vision_tiny.safetensors": _as(F16, random_weights(TINY, "image_encoder", seed)),
        "Wan21_Uni3C_controlnet_tiny_fp16.safetensors": _as(
            F16, random_weights(TINY, "camera_control", seed)
        ),
    }
    paths = []
    for name, tensors in files.items():
        _write(folder / name, tensors)
        paths.append(folder / name)
    write_tiny_tokenizer(folder / "tokenizer.json", TINY.text.vocabulary)
    return [*paths, folder / "tokenizer.json"]


def write_tiny_lynx(folder: Path, seed: int, kind: Kind = "full") -> list[Path]:
    """Lynx's files for the tiny model, with Kijai's names: the resampler and both adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    ip = random_weights(TINY, "lynx_ip", seed, kind)
    ref = random_weights(TINY, "lynx_ref", seed)
    blocks = ip_blocks(TINY, kind)
    files: dict[str, Mapping[str, Array]] = {
        f"lynx_{kind}_resampler_tiny.safetensors": random_weights(TINY, "lynx_resampler", seed, kind),
        f"Lynx_{kind}_ip_layers_tiny_fp16.safetensors": _as(
            F16,
            {
                f"blocks.{blocks[int(n)]}.cross_attn.ip_adapter.{rest}": values
                for (n, _, rest), values in ((name.partition("."), values) for name, values in ip.items())
            },
        ),
        "Lynx_full_ref_layers_tiny_fp16.safetensors": _as(
            F16,
            {
                f"blocks.{n}.self_attn.ref_adapter.{rest}": values
                for (n, _, rest), values in ((name.partition("."), values) for name, values in ref.items())
            },
        ),
    }
    for name, tensors in files.items():
        _write(folder / name, tensors)
    return [folder / name for name in files]


def _as(dtype: DTypeLike, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name: values.astype(dtype) for name, values in tensors.items()}


def _scaled_fp8(
    tensors: Mapping[str, NDArray[np.float32]], other: np.dtype[np.generic], chosen: Callable[[str], bool]
) -> dict[str, Array]:
    """Stores chosen matrices as FP8 with the scale max|W|/448, all other tensors as `other`."""
    result: dict[str, Array] = {}
    for name, values in tensors.items():
        if values.ndim == 2 and name.endswith(".weight") and chosen(name):
            scale = np.float32(np.abs(values).max() / E4M3_MAX)
            result[name] = (values / scale).astype(E4M3)
            result[name.removesuffix("weight") + "scale_weight"] = np.asarray(scale)
        else:
            result[name] = values.astype(other)
    return result


def blur_kernels(motion: MotionConfig) -> dict[str, Array]:
    """Buffers of real files that no loader needs; exact in BF16."""
    row = np.array([1, 3, 3, 1], np.float32)
    kernel = (np.outer(row, row) / 64).astype(BF16)
    blocks = range(1, len(motion.channels))
    names = [f"convs.{i}.{part}.0.kernel" for i in blocks for part in ("conv2", "skip")]
    return {f"motion_encoder.enc.net_app.{name}": kernel for name in names}


def _write(path: Path, tensors: Mapping[str, Array]) -> None:
    replace_atomically(path, save(dict(tensors)))
