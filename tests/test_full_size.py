"""Full-size checkpoints: the published sizes, and tiny ones that the loader takes."""

from pathlib import Path

import numpy as np
import pytest
from full_size import LARGEST, layouts, write_full_size

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.runtime.weights.find_tokenizer import find_tokenizer
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.random import random_moments

PUBLISHED = {  # bytes, model_spec.md 5.2 and 5.4
    "wan2.2_animate_14B_bf16.safetensors": (34_549_787_368, 0),
    "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors": (18_401_760_586, 4_000),
    "wan2.2_animate_14B_int8_convrot.safetensors": (18_413_068_672, 0),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (6_735_906_897 - 4_548_313, 4_000),  # without its SentencePiece
    "Wan2_1_VAE_bf16.safetensors": (253_806_278, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_have_the_published_sizes(name: str) -> None:
    files = {k: v for kind in ("fp8", "bf16", "int8") for k, v in layouts(ANIMATE_14B, kind).items()}
    size, tolerance = PUBLISHED[name]
    assert abs(files[name].size - size) <= tolerance


@pytest.mark.parametrize("transformer", ["fp8", "bf16"])
def test_the_loader_takes_them(transformer: str, tmp_path: Path) -> None:
    write_full_size(tmp_path, TINY, transformer)
    config, weights = load_weights([tmp_path], {})
    assert config == TINY
    for part in PARTS:
        for name, shape in required_tensors(TINY, part).items():
            values = weights[part][name]
            mean, deviation = random_moments(name, shape)
            assert values.shape == shape and np.isfinite(values).all(), name
            if values.size > 1000:
                assert abs(values.mean() - mean) < 0.2 * deviation, name
                assert values.std() == pytest.approx(deviation, rel=0.1), name
                assert np.abs(values).max() < mean + 1.1 * deviation * LARGEST, name
    types = {name: entry.dtype for name, entry in weights["transformer"].file.entries.items()}
    fp8 = transformer == "fp8"
    assert types["blocks.0.ffn.0.weight"] == ("F8_E4M3" if fp8 else "BF16")
    assert types.get("blocks.0.ffn.0.scale_weight") == ("F32" if fp8 else None)
    assert types["head.head.weight"] == "BF16"
    assert weights["text_encoder"].file["shared.weight"].dtype == "F16"
    tokenizer = find_tokenizer(None, [tmp_path], weights["text_encoder"], TINY.text.length)
    assert max(tokenizer.encode("two cats")) < TINY.text.vocabulary


def test_bytes_follow_the_seed(tmp_path: Path) -> None:
    first = write_full_size(tmp_path / "a", TINY, seed=1)
    same = write_full_size(tmp_path / "b", TINY, seed=1)
    other = write_full_size(tmp_path / "c", TINY, seed=2)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in same]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first[:-1], other[:-1], strict=True))


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"0\.0 GB free"):
        write_full_size(tmp_path, TINY)
    assert not list(tmp_path.iterdir())
