"""LoRA files of every family merged into every kind of base, against the plain formula in float64."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from full_size_loras import lora_layouts
from lora_files import BF16, FAMILIES, OF_BASE, Array, of_base
from safetensors.numpy import save_file

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import MODELS, TINY
from trt_wan.errors import WeightsError
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.describe import describe_lora
from trt_wan.runtime.loras.loras import Loras, Merging
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.stored import Stored, Tensors

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


class InMemory(dict[str, Array]):
    """`Tensors` of float32 arrays."""

    def stored(self, name: str) -> Stored:
        return Stored(self[name])

    def rows(self, name: str, indices: Any) -> Array:
        return self[name][list(indices)]


@pytest.fixture(scope="module")
def base() -> InMemory:
    return InMemory(random_weights(TINY, "transformer", 1))


def merged(base: Tensors, *loras: Lora, notes: list[Event] | None = None) -> Merging:
    return Loras(TINY, base).merging(loras, notes.append if notes is not None else silent)


def require_merged(
    merging: Merging, base: Mapping[str, Array], deltas: Mapping[str, Array], strength: float
) -> None:
    """Exactly the tensors of `deltas` change, by strength times delta; rounded once to float32."""
    assert set(merging.changed) == set(deltas)
    for name, weight in base.items():
        if name not in deltas:
            stored = merging.tensors.stored(name)
            assert stored.values is weight and stored.delta is None, name
            continue
        got = merging.tensors[name]
        delta = strength * deltas[name]
        wanted = weight.astype(np.float64) + delta
        assert got.shape == weight.shape and got.dtype == np.float32
        largest = np.abs(delta).max()
        assert largest > 1e-4 and np.all(np.abs(got - wanted) <= 2e-6 * np.abs(wanted) + 4e-6 * largest), name


def test_a_lora_given_twice_adds_its_strengths(base: InMemory, tmp_path: Path) -> None:
    """Also as a link, and as a copy."""
    made = FAMILIES["relight"]()
    path = made.save(tmp_path / "lora.safetensors")
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    loras = [Lora(path, 0.5), Lora(tmp_path / "link.safetensors", 0.25), Lora(tmp_path / "copy.safetensors")]
    notes: list[Any] = []
    require_merged(merged(base, *loras, notes=notes), base, made.deltas, 1.75)
    texts = [note.text for note in notes if note.code == "lora_repeated"]
    sums = "0.5 + 0.25 + 1 = 1.75"
    assert texts == [f"LoRA lora.safetensors is given 3 times; its strengths are added: {sums}."]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged(base: InMemory, tmp_path: Path, family: str) -> None:
    made = FAMILIES[family]()
    path = made.save(tmp_path / "lora.safetensors")
    notes: list[Event] = []
    require_merged(merged(base, Lora(path, 0.7), notes=notes), base, made.deltas, 0.7)
    (note,) = notes
    assert isinstance(note, Note) and f"changes {len(made.deltas)} tensors." in note.text
    assert ("Keys that are left out" in note.text) == (family == "t2v_own"), note.text
    if family == "t2v_own":
        assert note.text.endswith("Keys that are left out: 2 of a patch embedding for text to video.")


@pytest.mark.parametrize("kind", OF_BASE)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_delta_that_depends_on_the_base(base: InMemory, tmp_path: Path, kind: str, strength: float) -> None:
    made = of_base(kind, base)
    path = made.save(tmp_path / "lora.safetensors")
    require_merged(merged(base, Lora(path, strength)), base, made.deltas, strength)


def test_a_pickle_is_read_without_running_it(base: InMemory, tmp_path: Path) -> None:
    """The official relighting_lora.ckpt: PEFT keys under `state_dict`."""
    made = FAMILIES["relight_first"]()
    path = tmp_path / "relighting_lora.ckpt"
    tensors = {key: torch.from_numpy(values) for key, values in made.tensors.items()}
    torch.save({"state_dict": tensors, "epoch": {}}, path)
    require_merged(merged(base, Lora(path)), base, made.deltas, 1.0)


def test_the_motion_directions_are_made_orthonormal_after_the_merge(base: InMemory, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(base[DIRECTION].shape).astype(np.float32)
    path = tmp_path / "lora.safetensors"
    save_file({f"{DIRECTION.removesuffix('.weight')}.diff": delta}, path)
    merging = merged(base, Lora(path, 0.5))
    assert merging.changed == {DIRECTION, ORTHONORMAL}
    wanted = orthonormal(base[DIRECTION] + np.float32(0.5) * delta)
    np.testing.assert_allclose(merging.tensors[ORTHONORMAL], wanted, atol=1e-6)


# ---- refusals ----


def shaped(keys: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {key: np.zeros(shape, np.float16) for key, shape in keys.items()}  # an alpha is 0 too


Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": (4, 256), f"{Q}.lora_up.weight": (256, 4)}
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "Stand-In": (PAIR | {"blocks.0.self_attn.q_loras.down.weight": (4, 256)}, "is a Stand-In LoRA"),
    "UniAnimate": (PAIR | {"dwpose_embedding.0.weight": (4, 4)}, "is a UniAnimate LoRA"),
    "control": (
        PAIR | {"diffusion_model.patch_embedding.lora_A.weight": (4, 32, 1, 2, 2)},
        "is a control LoRA: its diffusion_model.patch_embedding.lora_A.weight takes 32 channels",
    ),
    "enlarged": (PAIR | {f"{Q}.reshape_weight": (2,)}, "enlarges the model's weights"),
    "two experts": ({f"transformer_1.{key[16:]}": shape for key, shape in PAIR.items()}, "for each expert"),
    "OFT": ({f"{Q}.oft_blocks": (4, 4, 4)}, "an OFT or BOFT adapter"),
    "GLoRA": ({f"{Q}.a1.weight": (4, 4)}, "a GLoRA adapter"),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (4, 4)}, "a LoRA of Flux"),
    "SDXL": (
        {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": (4, 4)},
        "a LoRA of Stable Diffusion",
    ),
    "Qwen-Image": ({"transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4)}, "a LoRA of Qwen-Image"),
    "unknown": ({"layer.7.lora_A.weight": (4, 4)}, "not known here: it holds layer.N.lora_A.weight"),
    "1.3B": (
        {key: tuple(1536 if n == 256 else n for n in s) for key, s in PAIR.items()},
        "of Wan2.1 1.3B, 1536 channels",
    ),
    "5B": (
        {key: tuple(3072 if n == 256 else n for n in s) for key, s in PAIR.items()},
        "of Wan2.2 5B, 3072 channels",
    ),
    "14B": (
        {key: tuple(5120 if n == 256 else n for n in s) for key, s in PAIR.items()},
        "of Wan 14B, 5120 channels",
    ),
    "checkpoint": ({"patch_embedding.weight": (4, 4)}, "is no LoRA: it holds patch_embedding.weight"),
    "nothing": ({}, "is no LoRA: it holds nothing"),
    "half a pair": ({f"{Q}.lora_up.weight": (256, 4)}, "has no down beside it"),
    "a middle alone": ({f"{Q}.lora_mid.weight": (4, 4, 1)}, "has no up beside it"),
    "the other half": ({f"{Q}.lora_down.weight": (4, 256)}, "has no up beside it"),
    "ranks": (
        {f"{Q}.lora_down.weight": (4, 256), f"{Q}.lora_up.weight": (256, 8)},
        "where [256, 4] is needed",
    ),
    "a long weight": ({f"{Q}.diff": (256, 257)}, "is [256, 257] where [256, 256] is needed"),
    "no weight": ({"blocks.0.norm1.diff": (256,), **PAIR}, ""),
    "a bias that is none": ({"blocks.0.self_attn.norm_q.diff_b": (256,)}, "has none"),
    "alphas": (PAIR | {f"{Q}.alpha": (2,)}, "is no single number"),
    "alpha 0": (PAIR | {f"{Q}.alpha": ()}, "alpha is 0"),
    "twice": (
        PAIR | {"lora_unet_blocks_0_self_attn_q.lora_up.weight": (256, 4)},
        "are both for blocks.0.self_attn.q",
    ),
    "a magnitude alone": ({f"{Q}.dora_scale": (256, 1)}, "has no low-rank pair beside it"),
    "half a LoKr": ({f"{Q}.lokr_w1": (4, 4)}, "has no lokr_w2 beside it"),
    "a LoKr of another size": ({f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2": (4, 4)}, "makes [16, 16]"),
    "a huge LoKr": (
        {f"{Q}.lokr_w1": (4, 4), f"{Q}.lokr_w2_a": (90_000, 1), f"{Q}.lokr_w2_b": (1, 90_000)},
        "is [90000, 1]",
    ),
    "a down of one number": (PAIR | {f"{Q}.lora_down.weight": ()}, "is a single number"),
    "two families": (PAIR | {f"{Q}.lokr_w1": (4, 4)}, "of another family beside it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(base: InMemory, tmp_path: Path, name: str) -> None:
    shapes, says = REFUSED[name]
    path = tmp_path / "lora.safetensors"
    save_file(shaped(shapes), path)
    if not says:  # layers that the model has not are counted, not refused
        notes: list[Event] = []
        merged(base, Lora(path), notes=notes)
        assert "1 that match nothing in this model: blocks.N.normN.diff." in str(notes)
        return
    with pytest.raises(WeightsError) as caught:
        merged(base, Lora(path))
    message = caught.value.message
    assert says in message and str(path) in message and message.endswith("."), message
    assert len(message.replace(str(path), "")) < 300 and caught.value.hint


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64, E4M3, E5M2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(
    base: InMemory, tmp_path: Path, dtype: Any, value: float
) -> None:
    if dtype == E4M3 and np.isinf(value):
        pytest.skip("the type has no infinity")
    tensors = {key: np.ones(shape, dtype) for key, shape in PAIR.items()}
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({k: as_torch(v) for k, v in tensors.items()}, path)
    merged(base, Lora(path))
    tensors[f"{Q}.lora_up.weight"][200, 3] = value
    safetensors.torch.save_file({k: as_torch(v) for k, v in tensors.items()}, path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeightsError, match=r"self_attn\.q\.lora_up\.weight holds a NaN or an infinity\."):
        merged(base, Lora(path))


def as_torch(values: Array) -> torch.Tensor:
    kinds = {BF16: torch.bfloat16, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
    if values.dtype not in kinds:
        return torch.from_numpy(values.copy())
    return torch.from_numpy(values.view(f"u{values.dtype.itemsize}").copy()).view(kinds[values.dtype])


def test_a_file_that_changed_is_read_again(base: InMemory, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({key: np.ones(shape, np.float16) for key, shape in PAIR.items()}, path)
    loras = Loras(TINY, base)
    first = loras.merging([Lora(path)], silent)
    loras.done(first)
    assert not loras.merging([Lora(path)], silent).changed
    save_file({key: np.full(shape, 2, np.float16) for key, shape in PAIR.items()}, path)
    os.utime(path, ns=(1, 1))
    second = loras.merging([Lora(path)], silent)
    name = "blocks.0.self_attn.q.weight"
    assert second.changed == {name}
    np.testing.assert_allclose(
        second.tensors[name] - base[name], 4 * (first.tensors[name] - base[name]), rtol=1e-3
    )


# ---- descriptions ----


def test_a_description_of_a_full_size_file(tmp_path: Path) -> None:
    """lightx2v's own, rank 64. Sizes and counts are those published (files_and_loras.md 6.1)."""
    layout, relight = lora_layouts(MODELS["14b"]).values()
    assert layout.size == 739_472_104 and len(layout.tensors) == 1749 and relight.size == 1_436_672_440
    path = tmp_path / "lora.safetensors"
    path.write_bytes(layout.header())
    os.truncate(path, layout.size)
    began = time.perf_counter()
    found = describe_lora(path)
    assert time.perf_counter() - began < 1
    assert (found.model, found.family) == ("14b", "low rank and whole deltas")
    assert (found.bytes, found.tensors) == (layout.size, 1749)
    assert (
        found.ranks == {64: 487}
        and not found.alphas
        and found.types == {"BF16": 1749}
        and not found.unmatched
    )
    assert found.parts == {
        **{
            "self-attention": 160,
            "attention to the text": 160,
            "attention to the image": 80,
            "feed-forward": 80,
        },
        **{"biases": 489, "norms": 284, "patch embedding": 1, "head": 1, "embeddings": 7},
    }
    assert sum(found.parts.values()) == 487 + 775


@pytest.mark.parametrize(
    ("family", "name", "ranks", "alphas"),
    [
        ("loha", "LoHa", {4: 48}, {2.0: 48}),
        ("lokr", "LoKr", {3: 24}, {2.0: 24, 1e10: 24}),
        ("lightning", "low rank", {64: 40}, {8.0: 40}),
        ("peft", "low rank", {8: 48, 4: 7}, {}),
    ],
)
def test_descriptions(tmp_path: Path, family: str, name: str, ranks: Any, alphas: Any) -> None:
    found = describe_lora(FAMILIES[family]().save(tmp_path / "lora.safetensors"))
    assert (found.model, found.family, found.ranks) == ("tiny", name, ranks)
    assert found.alphas == {float(np.float32(alpha)): count for alpha, count in alphas.items()}


def test_a_description_names_what_is_no_lora_of_this_model(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(shaped(REFUSED["Flux"][0]), path)
    with pytest.raises(WeightsError, match="a LoRA of Flux"):
        describe_lora(path)
