"""The two LoRA files that most people have, as layouts of full_size.py, with random deltas of 1 % of the
weights.

lightx2v's own distill LoRA (rank 64, bf16, 487 low-rank pairs and 775 whole deltas, files_and_loras.md 6.1),
and the relight LoRA (rank 128, fp16, 480 pairs).
"""

import math

from full_size import Layout, Stored
from lora_files import Maker

from trt_wan.engines.config import ModelConfig

PREFIX = "diffusion_model."
RELATIVE = 0.01  # deviation of a delta against that of its weight


def lora_layouts(model: ModelConfig, distill_rank: int = 64, relight_rank: int = 128) -> dict[str, Layout]:
    """The files by name."""
    return {
        "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors": _distill(model, distill_rank),
        "WanAnimate_relight_lora_fp16.safetensors": _relight(model, relight_rank),
    }


def _pair(maker: Maker, layer: str, rank: int, dtype: str) -> dict[str, Stored]:
    out, inner = maker.shape(layer)
    rank = min(rank, out, inner)
    return {
        f"{PREFIX}{layer}.lora_down.weight": Stored(dtype, (rank, inner), 0.0, 1.0),
        f"{PREFIX}{layer}.lora_up.weight": Stored(
            dtype, (out, rank), 0.0, RELATIVE / math.sqrt(inner * rank)
        ),
    }


def _distill(model: ModelConfig, rank: int) -> Layout:
    maker, tensors = Maker(0, model), dict[str, Stored]()
    embeddings = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    low_rank = [*maker.linears(), *embeddings, "time_projection.1", "img_emb.proj.1", "img_emb.proj.3"]
    for layer in low_rank:
        tensors |= _pair(maker, layer, rank, "BF16")
    whole = {f"{layer}.bias": "diff_b" for layer in [*low_rank, "patch_embedding", "head.head"]}
    whole |= {f"{layer}.weight": "diff" for layer in [*maker.norms(), "patch_embedding", "head.head"]}
    whole |= {f"{layer}.bias": "diff_b" for layer in maker.norms() if f"{layer}.bias" in maker.shapes}
    for tensor, suffix in whole.items():
        layer = tensor.rpartition(".")[0]
        shape = maker.shapes[tensor]
        deviation = RELATIVE / math.sqrt(math.prod(shape[1:]))
        tensors[f"{PREFIX}{layer}.{suffix}"] = Stored("BF16", shape, 0.0, deviation)
    return Layout(tensors)


def _relight(model: ModelConfig, rank: int) -> Layout:
    maker, tensors = Maker(0, model), dict[str, Stored]()
    for layer in maker.linears():
        tensors |= _pair(maker, layer, rank, "F16")
    return Layout(tensors)
