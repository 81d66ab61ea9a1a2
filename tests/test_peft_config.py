"""The settings of PEFT beside a LoRA, and in the header of a file of diffusers: read, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trt_wan.engines.config import TINY
from trt_wan.errors import WeightsError
from trt_wan.runtime.loras.describe import describe_lora
from trt_wan.runtime.loras.lora_file import open_lora
from trt_wan.runtime.loras.peft_config import find_config

DIM = TINY.transformer.dim
LORA = {
    "base_model.model.blocks.0.self_attn.q.lora_A.weight": np.ones((4, DIM), np.float32),
    "base_model.model.blocks.0.self_attn.q.lora_B.weight": np.ones((DIM, 4), np.float32),
}


def made(folder: Path, name: str = "adapter_model.safetensors", **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(LORA, folder / name)
    return folder / name


def scale(path: Path) -> float:
    (change,) = open_lora(path, TINY).changes()["blocks.0.self_attn.q.weight"]
    return float(change.scale)  # type: ignore[attr-defined]


def test_the_settings_of_another_name_are_not_read(tmp_path: Path) -> None:
    """A folder of LoRAs may hold one of PEFT's files by chance."""
    assert scale(made(tmp_path, "style.safetensors", r=4, lora_alpha=12)) == 1
    assert scale(made(tmp_path, r=4, lora_alpha=12)) == 3
    assert describe_lora(tmp_path / "adapter_model.safetensors").alphas == {12: 1}


def test_an_alpha_inside_wins(tmp_path: Path) -> None:
    path = made(tmp_path, r=4, lora_alpha=12)
    alpha = {"base_model.model.blocks.0.self_attn.q.alpha": np.float32(2)}
    save_file(LORA | {name: np.asarray(value) for name, value in alpha.items()}, path)
    assert scale(path) == 0.5


def test_the_header_of_diffusers(tmp_path: Path) -> None:
    about = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.use_rslora": True}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(LORA, path, {"lora_adapter_metadata": json.dumps(about)})
    assert scale(path) == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 8, "lora_alpha": 8}, "has rank 8 for blocks.0.self_attn.q, and the LoRA beside it has 4"),
        ({"peft_type": "IA3"}, "has the peft_type IA3, which is not supported"),
        ({"r": 4, "lora_alpha": 0}, "has an alpha that is no positive number"),
        ({"r": 4, "lora_alpha": "8"}, "has an alpha that is no positive number"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"q": float("nan")}}, "has an alpha that is no positive"),
        ({"r": True}, "has a rank that is no positive number"),
        ({"r": 4, "rank_pattern": []} | {"alpha_pattern": [1]}, "has a pattern that is no JSON object"),
        ({"r": 4, "alpha_pattern": {"(a+)+b": 4}}, "has the pattern (a+)+b, which is not supported"),
        ({"r": 4, "alpha_pattern": {".*.*.*": 4}}, "has the pattern .*.*.*, which is not supported"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "which changes the model's own weights"),
        ({"r": 4, "fan_in_fan_out": True}, "has fan_in_fan_out"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    path = made(tmp_path, **config)
    with pytest.raises(WeightsError) as caught:
        open_lora(path, TINY).changes()
    assert says in caught.value.message and "adapter_config.json" in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\0", '{"r": ' + "9" * 5000 + "}"])
def test_no_settings_at_all(tmp_path: Path, text: str) -> None:
    path = made(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(WeightsError, match="adapter_config.json has"):
        find_config(path, {})
