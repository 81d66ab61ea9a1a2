"""Merged weights against the merges of diffusers and of PEFT, on the same files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from lora_files import FAMILIES, Array
from oracles import diffusers_transformer
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict

from trt_wan.engines.config import TINY
from trt_wan.runtime.events import silent
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.loras import Loras
from trt_wan.runtime.weights.random import RandomWeights, random_weights

STRENGTH = 0.7
# What diffusers leaves out (files_and_loras.md 6.2): norms, modulation, whole deltas of the patch embedding.
DROPPED = ("norm", "scale_shift_table", "patch_embedding")


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return random_weights(TINY, "transformer", 1)


class InMemory(RandomWeights):
    """The weights as `Tensors`."""

    def __init__(self, weights: dict[str, Array]) -> None:
        super().__init__(TINY, "transformer", 1)
        self.weights = weights

    def __getitem__(self, name: str) -> Array:
        return self.weights[name] if name in self.weights else super().__getitem__(name)


def ours(weights: dict[str, Array], path: Path, strength: float) -> dict[str, Array]:
    merged = Loras(TINY, InMemory(weights)).merging([Lora(path, strength)], silent)
    assert merged.changed
    return {name: merged.tensors[name] for name in weights}


def as_diffusers(weights: dict[str, Array]) -> dict[str, Array]:
    named = {name: torch.from_numpy(values.copy()) for name, values in weights.items()}
    return {name: values.numpy() for name, values in convert_wan_transformer_to_diffusers(named).items()}


@pytest.mark.parametrize(
    "family",
    ["diffusers", "relight", "lightx2v_kijai", "lightx2v_own", "high_noise", "lightning", "kohya", "pusa"],
)
def test_a_merge_equals_that_of_diffusers(weights: dict[str, Array], tmp_path: Path, family: str) -> None:
    path = FAMILIES[family]().save(tmp_path / "lora.safetensors")
    transformer = diffusers_transformer(TINY, weights)
    loaded = WanLoraLoaderMixin.lora_state_dict(str(path))
    transformer.load_lora_adapter(loaded, prefix="transformer")
    transformer.fuse_lora(lora_scale=STRENGTH)
    transformer.unload_lora()
    theirs = {name: values.numpy() for name, values in transformer.state_dict().items()}
    merged, base = as_diffusers(ours(weights, path, STRENGTH)), as_diffusers(weights)
    same = 0
    for name, values in theirs.items():
        if np.array_equal(values, base[name]) and any(part in name for part in DROPPED):
            continue
        assert np.abs(merged[name] - values).max() <= 2e-6, name
        same += not np.array_equal(values, base[name])
    assert same >= 40


class Tree(torch.nn.Module):
    """Linears under the official names, for PEFT to wrap."""

    def __init__(self, weights: dict[str, Array], names: list[str]) -> None:
        super().__init__()
        for name in names:
            values = torch.from_numpy(weights[f"{name}.weight"].copy())
            *parents, last = name.split(".")
            module: Any = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            linear = torch.nn.Linear(values.shape[1], values.shape[0])
            linear.weight.data = values
            linear.bias.data = torch.from_numpy(weights[f"{name}.bias"].copy())
            module.add_module(last, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


TARGETS = r"blocks\.\d\.\w+\.\w+"
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS),
    "dora": LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, use_dora=True),
    "bias": LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, lora_bias=True),
    "loha": LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
    "lokr": LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
    "alpha": LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS),
    "rslora": LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, use_rslora=True, use_dora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=TARGETS,
        rank_pattern={"self_attn.q": 2, r"^base_model\.never": 3, "ffn.0|ffn.2": 6},
        alpha_pattern={r"blocks\.\d+\.self_attn\.q": 7, "k": 3},
    ),
    "loha alpha": LoHaConfig(r=4, alpha=10, target_modules=TARGETS, rank_pattern={"self_attn.q": 2}),
    "lokr alpha": LoKrConfig(r=4, alpha=10, target_modules=TARGETS),
    "lokr in two": LoKrConfig(r=4, alpha=4, target_modules=TARGETS, decompose_both=True, decompose_factor=8),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_equals_that_of_peft(weights: dict[str, Array], tmp_path: Path, kind: str) -> None:
    """PEFT keeps alpha in another file, which is left out where alpha = rank, as by the relighting LoRA."""
    names = [f"blocks.0.{part}.{n}" for part in ("self_attn", "cross_attn") for n in "qkvo"]
    names += ["blocks.1.ffn.0", "blocks.1.ffn.2"]
    wrapped: Any = get_peft_model(Tree(weights, names), CONFIGS[kind])  # type: ignore[arg-type]
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data.normal_(0, 0.1)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    path = tmp_path / "lora.safetensors"
    if any(word in kind for word in ("alpha", "rs", "patterns")):
        wrapped.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
    else:
        saved = {name: values.contiguous() for name, values in get_peft_model_state_dict(wrapped).items()}
        safetensors.torch.save_file(saved, path)
    merged = ours(weights, path, 1.0)
    theirs = wrapped.merge_and_unload().state_dict()
    for name, values in theirs.items():
        changed = np.abs(values.numpy() - weights[name]).max()
        assert changed > 1e-3 or ("bias" in name and kind != "bias"), name
        assert np.abs(merged[name] - values.numpy()).max() <= 2e-5 * max(1, np.abs(values.numpy()).max()), (
            name
        )
