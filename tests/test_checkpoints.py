"""Checkpoint files: values against torch and safetensors, the layouts people have, every way to be broken.

Files are written with the safetensors package or, where that refuses, byte by byte.
"""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
import safetensors.torch
import sentencepiece
import torch
from made_layouts import official_umt5
from oracles import diffusers_transformer
from safetensors import safe_open

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL, PARTS, TOKEN_EMBEDDING, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.tokenizer import load_sentencepiece, load_tokenizer_json
from trt_wan.runtime.weights.checkpoint import Checkpoint, orthonormal
from trt_wan.runtime.weights.find_files import files_below
from trt_wan.runtime.weights.find_tokenizer import find_tokenizer
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tensor_file import TensorFile
from trt_wan.runtime.weights.tiny import write_tiny_weights

SEED = 1
LAYER = "blocks.0.self_attn.q"
PROMPT = "the person walks, then a cat sits"
Tensors = dict[str, torch.Tensor]


# ---- helpers ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written tiny weights, not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_weights(folder, SEED)
    return folder


@pytest.fixture(scope="module")
def files(tiny: Path) -> dict[Part, Path]:
    return {part: checkpoint.path for part, checkpoint in load_weights([tiny], {})[1].items()}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny weights that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "weights"))


def rewrite(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(change(safetensors.torch.load_file(source)), target)
    return target


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header at all."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A BF16 file of any size that takes no room on the disk; all values are 0."""
    header, position = {}, 0
    for name, shape in shapes.items():
        stop = position + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    write_raw(path, header)
    os.truncate(path, path.stat().st_size + position)
    return path


def failure(call: Callable[[], object]) -> WeightsError:
    """The error of a call, which must be one sentence on one line, with a hint."""
    with pytest.raises(WeightsError) as caught:
        call()
    error = caught.value
    assert error.message.endswith(".") and ". " not in error.message and "\n" not in error.message, (
        error.message
    )
    assert error.hint.endswith("."), error.hint
    return error


def by_torch(tensors: Tensors, name: str) -> Array:
    """The slow, simple dequantisation."""
    values = tensors[name].to(torch.float32)
    for suffix in ("scale_weight", "weight_scale"):
        scale = tensors.get(name.removesuffix("weight") + suffix)
        if scale is not None:
            values = values * scale.to(torch.float32)
    return values.numpy()


def quantised(weights: Mapping[str, Array], chosen: Callable[[str], bool], suffix: str) -> Tensors:
    """Chosen matrices in scaled FP8 as Kijai writes it, all else in BF16, by torch."""
    tensors: Tensors = {}
    for name, values in weights.items():
        weight = torch.from_numpy(values)
        if weight.ndim == 2 and name.endswith(".weight") and chosen(name):
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + suffix] = scale
        else:
            tensors[name] = weight.to(torch.bfloat16)
    return tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


# ---- the tiny weights ----


def test_tiny_weights_are_the_same_bytes_for_the_same_seed(tiny: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    paths = write_tiny_weights(again, SEED)
    write_tiny_weights(other, SEED + 1)
    assert sorted(path.name for path in paths) == sorted(os.listdir(tiny))
    for path in paths:
        assert path.read_bytes() == (tiny / path.name).read_bytes(), path
        if path.suffix == ".safetensors":
            assert path.read_bytes() != (other / path.name).read_bytes(), path
    assert sum(path.stat().st_size for path in paths) < 12e6  # measured: 8.8e6


def test_tiny_weights_are_complete_and_close_to_what_was_drawn(tiny: Path) -> None:
    model, weights = load_weights([tiny], {})
    assert model is TINY and list(weights) == list(PARTS)
    roundoff = {"F8_E4M3": 2**-4, "BF16": 2**-8, "F16": 2**-11}
    for part, checkpoint in weights.items():
        for name, drawn in random_weights(TINY, part, SEED).items():
            loaded, dtype = checkpoint[name], checkpoint.file[name].dtype
            subnormal = np.abs(drawn).max() / 448 * 2**-10 if dtype == "F8_E4M3" else 2**-25
            excess = np.abs(loaded - drawn) - roundoff[dtype] * 1.001 * np.abs(drawn) - subnormal
            assert excess.max() <= 0, f"{name} ({dtype}) is {excess.max()} beyond rounding"


def test_a_seed_keeps_its_weights_wherever_networks_are_cut() -> None:
    weights = random_weights(TINY, "transformer", 0)
    names = ("blocks.1.self_attn.o.weight", "blocks.0.ffn.2.bias", "blocks.3.cross_attn.o.weight")
    first = [float(weights[name].flat[0]) for name in names]
    assert first == pytest.approx([-0.0227659, -0.0898448, -0.0720062], abs=1e-6)


def test_the_tiny_transformer_is_laid_out_like_the_scaled_fp8_files(files: dict[Part, Path]) -> None:
    with safe_open(files["transformer"], framework="pt") as file:  # opened by the safetensors package
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    kernels = {name for name in tensors if name.endswith(".kernel")}
    scales = {name for name in tensors if name.endswith(".scale_weight")}
    fp8 = {name for name, values in tensors.items() if values.dtype == torch.float8_e4m3fn} - {"scaled_fp8"}
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn and tensors["scaled_fp8"].shape == (2,)
    assert len(fp8) == 12 * TINY.transformer.layers and all(name.startswith("blocks.") for name in fp8)
    assert scales == {name.removesuffix("weight") + "scale_weight" for name in fp8}
    assert all(tensors[name].dtype == torch.float32 and tensors[name].shape == () for name in scales)
    assert len(kernels) == 14 and all(tensors[name].float().sum() == 1 for name in kernels)
    others = tensors.keys() - fp8 - scales - {"scaled_fp8"}
    assert {tensors[name].dtype for name in others} == {torch.bfloat16}
    assert others - kernels | fp8 == required_tensors(TINY, "transformer").keys()


def test_the_safetensors_package_reads_the_same_values(files: dict[Part, Path]) -> None:
    for part, path in files.items():
        tensors, checkpoint = safetensors.torch.load_file(path), Checkpoint(path)
        assert tensors.keys() == set(checkpoint.file)
        for name in required_tensors(TINY, part):
            np.testing.assert_array_equal(checkpoint[name], by_torch(tensors, name), err_msg=name)


def test_diffusers_converts_the_tiny_transformer_strictly(files: dict[Part, Path]) -> None:
    checkpoint = Checkpoint(files["transformer"])
    names = required_tensors(TINY, "transformer")
    converted = diffusers_transformer(TINY, {name: checkpoint[name] for name in names})
    query, directions = (
        converted.blocks[3].attn1.to_q.weight,
        converted.motion_encoder.motion_synthesis_weight,
    )
    np.testing.assert_array_equal(query, checkpoint["blocks.3.self_attn.q.weight"])
    np.testing.assert_array_equal(directions, checkpoint[DIRECTION])
    blur = [values for name, values in converted.named_buffers() if "blur_kernel" in name]
    kernels = [checkpoint[name] for name in checkpoint if name.endswith(".kernel")]  # buffers there
    assert len(blur) == len(kernels) == 14
    for ours, theirs in zip(kernels, blur, strict=True):
        np.testing.assert_array_equal(ours, theirs.squeeze())


# ---- values ----


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scaled_fp8_equals_torch_for_every_code(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], suffix: str
) -> None:
    tensors = {
        f"{LAYER}.weight": torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(dtype),
        f"{LAYER}.{suffix}": torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.01,
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    checkpoint.require({f"{LAYER}.weight": (16, 16)})
    want = by_torch(tensors, f"{LAYER}.weight")
    assert np.isnan(want).any() and np.nanmax(np.abs(want)) > 0
    np.testing.assert_array_equal(checkpoint[f"{LAYER}.weight"], want)
    np.testing.assert_array_equal(checkpoint.rows(f"{LAYER}.weight", [9, 0, 9]), want[[9, 0, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_other_types_are_plain_values(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"patch_embedding.weight": torch.randn(8, 6, 1, 2, 2).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    checkpoint.require({"patch_embedding.weight": (8, 6, 1, 2, 2)})
    values = checkpoint["patch_embedding.weight"]
    np.testing.assert_array_equal(values, tensors["patch_embedding.weight"].float().numpy())
    assert type(values) is np.ndarray and values.dtype == np.float32
    assert values.flags.c_contiguous and values.flags.aligned


def test_a_scale_is_used_for_fp8_only(tmp_path: Path) -> None:
    """The rule that keeps v1 files right: what is stored in two bytes is not scaled."""
    tensors = {f"{LAYER}.weight": torch.ones(2, 2), f"{LAYER}.scale_weight": torch.tensor(0.5)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(Checkpoint(tmp_path / "x.safetensors")[f"{LAYER}.weight"], np.ones((2, 2)))


def test_values_at_an_odd_byte_are_read_right(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    if len(json.dumps(header)) % 2 == 0:
        header = {"xy": header["x"]}
    path = write_raw(tmp_path / "x.safetensors", header, values.tobytes())
    (name,) = checkpoint = Checkpoint(path)
    assert checkpoint.file[name].start % 2 == 1
    np.testing.assert_array_equal(checkpoint[name], values)
    assert checkpoint[name].flags.aligned


@pytest.mark.parametrize(
    ("suffix", "outside"),
    [
        ("scale_weight", ()),
        (
            "weight_scale",  # v2: every nn.Linear
            ("text_embedding", "time_", "head.head", "img_emb.proj", "face_adapter", "face_encoder.out_proj"),
        ),
    ],
    ids=["v1", "v2"],
)
def test_both_scaled_fp8_layouts_load(folder: Path, suffix: str, outside: tuple[str, ...]) -> None:
    weights = random_weights(TINY, "transformer", SEED)
    tensors = quantised(weights, lambda name: name.startswith(("blocks.", *outside)), suffix)
    assert sum(name.endswith(suffix) for name in tensors) == (
        48 if not outside else 48 + 9 + 3 * TINY.transformer.fusers
    )
    (old,) = folder.glob("*animate*")
    old.unlink()
    safetensors.torch.save_file(tensors, folder / "quantised.safetensors")
    checkpoint = load_weights([folder], {})[1]["transformer"]
    for name in weights:
        np.testing.assert_array_equal(checkpoint[name], by_torch(tensors, name), err_msg=name)


def test_fp8_without_a_scale_in_a_scaled_file_is_an_error(files: dict[Part, Path], tmp_path: Path) -> None:
    lost = ("blocks.2.ffn.0", "blocks.3.cross_attn.v_img")
    path = rewrite(
        files["transformer"],
        tmp_path / "x.safetensors",
        lambda tensors: {k: v for k, v in tensors.items() if k not in {f"{n}.scale_weight" for n in lost}},
    )
    message = failure(lambda: Checkpoint(path).require(required_tensors(TINY, "transformer"))).message
    assert str(path) in message
    assert "2 of 227 tensors are FP8 without a scale, such as blocks." in message


def test_the_marker_alone_demands_scales(tmp_path: Path) -> None:
    shapes = {f"{LAYER}.weight": (2, 2), "scaled_fp8": (2,)}
    tensors = {name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    message = failure(
        lambda: Checkpoint(tmp_path / "x.safetensors").require({f"{LAYER}.weight": (2, 2)})
    ).message
    assert "1 of 1 tensors is FP8 without a scale, such as" in message


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(512, 20), (32, 20)], ids=str)
def test_orthonormal_equals_torch_with_its_signs(shape: tuple[int, int], seed: int) -> None:
    direction = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    want = torch.linalg.qr(torch.from_numpy(direction) + 1e-8)[0].numpy()
    got = orthonormal(direction)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-6)  # measured 2e-7


def test_the_orthonormal_directions_are_a_tensor_of_the_checkpoint(files: dict[Part, Path]) -> None:
    checkpoint = Checkpoint(files["transformer"])
    assert ORTHONORMAL in checkpoint and ORTHONORMAL not in Checkpoint(files["vae"])
    np.testing.assert_array_equal(checkpoint[ORTHONORMAL], orthonormal(checkpoint[DIRECTION]))


# ---- names and layouts ----


def test_the_14b_needs_the_tensors_of_the_spec() -> None:
    shapes = required_tensors(ANIMATE_14B, "transformer")
    assert len(shapes) == 1427
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 17_274_816_884
    assert len(required_tensors(ANIMATE_14B, "vae")) == 194
    assert not any("orthonormal" in name for name in shapes)
    spec = {  # one of each row of model_spec.md 1.3
        "patch_embedding.weight": (5120, 36, 1, 2, 2),
        "pose_patch_embedding.weight": (5120, 16, 1, 2, 2),
        "text_embedding.0.weight": (5120, 4096),
        "time_embedding.2.bias": (5120,),
        "time_projection.1.weight": (30720, 5120),
        "img_emb.proj.3.weight": (5120, 1280),
        "img_emb.proj.4.weight": (5120,),
        "blocks.39.modulation": (1, 6, 5120),
        "blocks.0.self_attn.o.weight": (5120, 5120),
        "blocks.17.self_attn.norm_q.weight": (5120,),
        "blocks.3.norm3.bias": (5120,),
        "blocks.39.cross_attn.v_img.weight": (5120, 5120),
        "blocks.8.cross_attn.norm_k_img.weight": (5120,),
        "blocks.0.ffn.0.weight": (13824, 5120),
        "blocks.0.ffn.2.weight": (5120, 13824),
        "head.modulation": (1, 2, 5120),
        "head.head.weight": (64, 5120),
        "face_adapter.fuser_blocks.7.linear1_kv.weight": (10240, 5120),
        "face_adapter.fuser_blocks.0.linear2.bias": (5120,),
        "face_adapter.fuser_blocks.3.q_norm.weight": (128,),
        "face_encoder.conv1_local.conv.weight": (4096, 512, 3),
        "face_encoder.conv3.conv.weight": (1024, 1024, 3),
        "face_encoder.out_proj.weight": (5120, 1024),
        "face_encoder.padding_tokens": (1, 1, 1, 5120),
        "motion_encoder.enc.net_app.convs.0.0.weight": (32, 3, 1, 1),
        "motion_encoder.enc.net_app.convs.0.1.bias": (1, 32, 1, 1),
        "motion_encoder.enc.net_app.convs.4.conv1.0.weight": (256, 256, 3, 3),
        "motion_encoder.enc.net_app.convs.4.conv2.1.weight": (512, 256, 3, 3),
        "motion_encoder.enc.net_app.convs.4.skip.1.weight": (512, 256, 1, 1),
        "motion_encoder.enc.net_app.convs.8.weight": (512, 512, 4, 4),
        "motion_encoder.enc.fc.4.weight": (20, 512),
        DIRECTION: (512, 20),
    }
    assert {name: shapes.get(name) for name in spec} == spec


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_are_stripped(folder: Path, files: dict[Part, Path], prefix: str) -> None:
    (path,) = folder.glob("*animate*")
    rewrite(path, path, lambda tensors: {prefix + name: values for name, values in tensors.items()})
    renamed, plain = load_weights([folder], {})[1]["transformer"], Checkpoint(files["transformer"])
    for name in required_tensors(TINY, "transformer"):
        np.testing.assert_array_equal(renamed[name], plain[name], err_msg=name)


def shard(path: Path) -> Path:
    """Replaces a file by two shards and an index, as the official repository has it."""
    tensors = safetensors.torch.load_file(path)
    names = sorted(tensors)
    index = {}
    for k, part in enumerate((names[::2], names[1::2]), start=1):
        file = path.with_name(f"diffusion_pytorch_model-0000{k}-of-00002.safetensors")
        safetensors.torch.save_file({name: tensors[name] for name in part}, file)
        index |= {name: file.name for name in part}
    path.unlink()
    target = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    target.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return target


@pytest.mark.parametrize("named", [False, True])
def test_a_sharded_checkpoint_opens_as_one(folder: Path, files: dict[Part, Path], named: bool) -> None:
    (path,) = folder.glob("*animate*")
    index = shard(path)
    sharded = load_weights([folder], {"transformer": index} if named else {})[1]["transformer"]
    assert sharded.path == index
    plain = Checkpoint(files["transformer"])
    for name in required_tensors(TINY, "transformer"):
        np.testing.assert_array_equal(sharded[name], plain[name], err_msg=name)


def test_kijais_umt5_official_names_and_unscaled_fp8(folder: Path) -> None:
    drawn = {name: torch.from_numpy(v) for name, v in random_weights(TINY, "text_encoder", SEED).items()}
    stored = {
        name: values.to(torch.float8_e4m3fn if ".layer." in name and values.ndim == 2 else torch.bfloat16)
        for name, values in drawn.items()
    }
    (old,) = folder.glob("umt5*")
    old.unlink()
    safetensors.torch.save_file(
        {official_umt5(name): values for name, values in stored.items()},
        folder / "umt5-xxl-enc-fp8.safetensors",
    )
    checkpoint = load_weights([folder], {})[1]["text_encoder"]
    for name, values in stored.items():
        np.testing.assert_array_equal(checkpoint[name], values.float().numpy(), err_msg=name)
    rows = [7, 0, 511]
    np.testing.assert_array_equal(checkpoint.rows(TOKEN_EMBEDDING, rows), checkpoint[TOKEN_EMBEDDING][rows])


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def spiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "rain falls on a red street"] * 4),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def test_the_tokenizer_inside_the_file_is_preferred_and_the_named_one_wins(
    folder: Path, spiece: bytes
) -> None:
    """Ids differ between the two formats' models, so they tell which one was taken."""
    (path,) = folder.glob("umt5*")
    length = TINY.text.length
    inside = load_sentencepiece(spiece, length).encode(PROMPT)
    beside = load_tokenizer_json(folder / "tokenizer.json", length).encode(PROMPT)
    assert inside != beside

    def found(chosen: Path | None) -> list[int]:
        return find_tokenizer(chosen, [folder], Checkpoint(path), length).encode(PROMPT)

    assert found(None) == beside
    model = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    rewrite(path, path, lambda tensors: tensors | {"spiece_model": model})
    assert load_weights([folder], {})[1]["text_encoder"].path == path
    assert found(None) == inside
    assert found(folder / "tokenizer.json") == beside
    (folder / "spiece.model").write_bytes(spiece)
    assert found(folder / "spiece.model") == inside
    message = failure(lambda: found(folder / "absent.json")).message
    assert str(folder / "absent.json") in message


@pytest.mark.parametrize(
    "place", ["enc", "enc/tokenizer", "enc/google/umt5-xxl", "tokenizer", ".", "google/umt5-xxl"]
)
def test_the_tokenizer_is_found_where_layouts_have_it(
    folder: Path, files: dict[Part, Path], place: str
) -> None:
    (folder / "enc").mkdir()
    path = Path(shutil.move(folder / files["text_encoder"].name, folder / "enc"))
    (folder / place).mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "tokenizer.json", folder / place / "tokenizer.json")
    find_tokenizer(None, [folder], Checkpoint(path), TINY.text.length).encode(PROMPT)


def test_a_tokenizer_of_who_knows_what_is_not_taken(folder: Path, files: dict[Part, Path]) -> None:
    (folder / "LLM").mkdir()
    shutil.move(folder / "tokenizer.json", folder / "LLM")
    path = folder / files["text_encoder"].name
    error = failure(lambda: find_tokenizer(None, [folder], Checkpoint(path), TINY.text.length))
    assert str(path) in error.message and "--tokenizer" in error.hint


# ---- which files ----


def test_a_missing_folder_and_an_empty_one(tmp_path: Path, files: dict[Part, Path]) -> None:
    error = failure(lambda: load_weights([tmp_path / "absent"], {}))
    assert str(tmp_path / "absent") in error.message and "--weights" in error.hint
    error = failure(lambda: load_weights([tmp_path], {}))
    for part in PARTS:
        assert part.replace("_", " ") in error.message and f"--{part.replace('_', '-')} FILE" in error.hint
    assert load_weights([tmp_path / "absent"], files)[0] is TINY  # every part named: the folder is not needed


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_with_its_option(folder: Path, files: dict[Part, Path], part: Part) -> None:
    shutil.move(folder / files[part].name, folder.parent / "elsewhere.safetensors")
    error = failure(lambda: load_weights([folder], {}))
    assert str(folder) in error.message and error.message.count("the ") == 1
    assert (
        f"the {part.replace('_', ' ')}" in error.message and f"--{part.replace('_', '-')} FILE" in error.hint
    )
    chosen = {part: folder.parent / "elsewhere.safetensors"}
    assert load_weights([folder], chosen)[1][part].path == chosen[part]


@pytest.mark.parametrize("part", PARTS)
def test_two_files_for_a_part_are_named_with_the_option(
    folder: Path, files: dict[Part, Path], part: Part
) -> None:
    """Two models of the same type and layout compete."""
    one, two = folder / files[part].name, folder / "below" / "second.safetensors"
    name = next(
        name for name in required_tensors(TINY, part) if Checkpoint(one).entry(name).dtype != "F8_E4M3"
    )
    rewrite(one, two, lambda tensors: tensors | {name: tensors[name] + 1})
    error = failure(lambda: load_weights([folder], {}))
    assert f"Several files in {folder} hold the {part.replace('_', ' ')}: " in error.message
    assert f"{one.name} (" in error.message and "below/second.safetensors (" in error.message
    assert error.message.count(" GB)") == 2 and len(error.message) < 400
    assert f"--{part.replace('_', '-')} FILE" in error.hint
    assert load_weights([folder], {part: two})[1][part].path == two


def test_of_several_files_the_one_that_fits_is_taken(folder: Path, files: dict[Part, Path]) -> None:
    """A folder of models has CLIPs of other sizes, int8 twins and broken copies."""
    clip = folder / files["image_encoder"].name
    rewrite(
        clip,
        folder / "clip_vision_g.safetensors",
        lambda tensors: tensors | {"vision_model.embeddings.class_embedding": torch.zeros(1664)},
    )
    transformer = folder / files["transformer"].name
    (folder / "part.safetensors").write_bytes(transformer.read_bytes()[:-1000])
    _, weights = load_weights([folder], {})
    assert weights["image_encoder"].path == clip and weights["transformer"].path == transformer

    rewrite(clip, clip, lambda tensors: {k: v for k, v in tensors.items() if "pre_layrnorm" not in k})
    error = failure(lambda: load_weights([folder], {}))
    assert "None of 2 files fits" in error.message and f"{clip.name} 2 of" in error.message
    assert "clip_vision_g.safetensors 1 of" in error.message and "([1664] instead of [80])" in error.message
    assert "--image-encoder FILE" in error.hint


def test_the_t5_of_other_models_is_no_candidate(folder: Path) -> None:
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # in block 0 only
    tensors = {TOKEN_EMBEDDING: torch.zeros(8, 8), bias: torch.zeros(32, 8)}
    (path,) = folder.glob("umt5*")
    path.unlink()
    safetensors.torch.save_file(tensors, folder / "t5xxl_fp16.safetensors")
    assert "holds the text encoder" in failure(lambda: load_weights([folder], {})).message


def test_linked_folders_are_searched_once_even_in_circles(tiny: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "big disk").symlink_to(tiny, target_is_directory=True)
    for circle in ("a", "b"):  # two: followed blindly, they double with every level
        (models / circle).symlink_to(models, target_is_directory=True)
    assert load_weights([models], {})[0] is TINY


def test_a_file_with_two_names_is_one_candidate(folder: Path) -> None:
    for path in list(folder.glob("*.safetensors")):
        path.with_name("copy of " + path.name).symlink_to(path)
    assert load_weights([folder], {})[0] is TINY


def test_a_broken_file_matters_only_when_a_part_is_missing(folder: Path, files: dict[Part, Path]) -> None:
    broken = {
        "empty.safetensors": b"",
        "pickle.safetensors": b"\x80\x02}q\x00.",
        "bad.safetensors.index.json": b'{"weight_map": 3}',
    }
    (folder / "other").mkdir()
    for name, content in broken.items():
        (folder / "other" / name).write_bytes(content)
    (folder / "other" / "dangling.safetensors").symlink_to(folder / "nowhere")
    assert load_weights([folder], {})[0] is TINY
    (folder / files["vae"].name).unlink()
    message = failure(lambda: load_weights([folder], {})).message
    found = [name for name in (*broken, "dangling.safetensors") if f"; {name} " in message]
    assert len(found) == 3 and "1 more" in message and len(message) < 400


def test_two_hundred_loras_do_not_slow_the_search(folder: Path) -> None:
    names = [
        f"diffusion_model.blocks.{n}.{layer}.lora_{side}.weight"
        for n in range(40)
        for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
        for side in ("A", "B")
    ]
    header = {
        name: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8 * i, 8 * i + 8]}
        for i, name in enumerate(names)
    }
    lora = write_raw(folder / "lora_0.safetensors", header, bytes(8 * len(names))).read_bytes()
    for i in range(1, 200):
        (folder / f"lora_{i}.safetensors").write_bytes(lora)
    start = time.perf_counter()
    load_weights([folder], {})
    assert time.perf_counter() - start < 2  # measured 0.14 s


# ---- broken files ----


def open_all(path: Path) -> None:
    Checkpoint(path).require(required_tensors(TINY, "transformer"))


def test_all_wrong_tensors_are_named_at_once(files: dict[Part, Path], tmp_path: Path) -> None:
    missing = ["blocks.1.modulation", "head.head.bias", "pose_patch_embedding.bias"]
    changed = {"patch_embedding.bias": torch.zeros(3), "blocks.0.ffn.0.weight": torch.zeros(4, 5)}
    path = rewrite(
        files["transformer"],
        tmp_path / "x.safetensors",
        lambda tensors: {k: v for k, v in tensors.items() if k not in missing} | changed,
    )
    message = failure(lambda: open_all(path)).message
    assert str(path) in message and len(message) < 400
    assert f"3 of {len(required_tensors(TINY, 'transformer'))} tensors are missing, such as " in message
    assert "2 have another shape, such as" in message and " instead of [" in message


@pytest.mark.parametrize("where", ["empty", "5 bytes", "header", "data", "last byte"])
def test_a_truncated_file(files: dict[Part, Path], tmp_path: Path, where: str) -> None:
    whole = files["transformer"].read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    kept = {
        "empty": 0,
        "5 bytes": 5,
        "header": header // 2,
        "data": (header + len(whole)) // 2,
        "last byte": -1,
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[: kept[where]])
    error = failure(lambda: open_all(path))
    assert str(path) in error.message and "truncated" in error.message and "again" in error.hint


def test_a_file_with_something_behind_its_tensors(files: dict[Part, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(files["vae"].read_bytes() + b"more")
    assert "damaged" in failure(lambda: open_all(path)).message


def torch_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch_pickle(), "227 of 227 tensors are missing"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 34549787368\n",
            "a pointer of Git LFS",
        ),
        (b"<!DOCTYPE html><html><body>Access to this model is restricted</body></html>", "a web page"),
        (b"", "model.pth is empty."),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "is a JPEG picture"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "is an MP4 video"),
        (b"PK\x03\x04\x14\0\0\0\0\0", "no file of torch's tensors"),
        (b"\xef\xbb\xbf\n <html>", "a web page"),
        (b"Entry not found", "is a text that begins with 'Entry not found'"),
        (b'{"error": "Unauthorized"}', 'is a text that begins with \'{"error": "Unauthorized"}\''),
        (bytes(4096), "begins with zeros, as an unfinished download"),
        ((6).to_bytes(8, "little") + b'["no"]', "not a safetensors, GGUF or torch file"),
        (
            (10**5).to_bytes(8, "little") + b'{"a":' + b"[" * (10**5 - 5),
            "not a safetensors, GGUF or torch file",
        ),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "not a safetensors, GGUF or torch file"),
    ],
    ids=lambda value: value.replace(" ", "-")[:30] if isinstance(value, str) else "",
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    error = failure(lambda: open_all(path))
    assert str(path) in error.message and says in error.message


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "changed",
    [
        3,
        None,
        [0, 8],
        {"dtype": "F32", "shape": [2]},
        {"shape": [2], "data_offsets": [0, 8]},
        GOOD | {"dtype": 7},
        GOOD | {"shape": 2},
        GOOD | {"shape": ["2"]},
        GOOD | {"shape": [-2]},
        GOOD | {"shape": [2.0]},
        GOOD | {"shape": [3]},
        GOOD | {"data_offsets": [0]},
        GOOD | {"data_offsets": [0, 8, 16]},
        GOOD | {"data_offsets": ["0", "8"]},
        GOOD | {"data_offsets": [-8, 0]},
        GOOD | {"data_offsets": [8, 0]},
        GOOD | {"data_offsets": [8, 16]},
        GOOD | {"data_offsets": [1, 9]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, -8]},
        GOOD | {"shape": [10**400]},
        GOOD | {"shape": [1] * 40 + [2]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 10**400]},
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense(tmp_path: Path, changed: object) -> None:
    """`first` and `second` share 16 bytes; any change of `first` leaves a gap, an overlap or nonsense."""
    second = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    path = tmp_path / "x.safetensors"
    assert TensorFile(write_raw(path, {"first": GOOD, "second": second}, bytes(16))).keys() == {
        "first",
        "second",
    }
    write_raw(path, {"first": changed, "second": second}, bytes(16))
    message = failure(lambda: open_all(path)).message
    assert str(path) in message and "damaged" in message


def test_metadata_that_is_no_object(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"__metadata__": ["pt"], "x": GOOD}, bytes(8))
    assert "__metadata__" in failure(lambda: open_all(path)).message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("absent.safetensors", "folder.safetensors", "absent.safetensors.index.json"):
        error = failure(lambda name=name: open_all(tmp_path / name))  # type: ignore[misc]
        assert str(tmp_path / name) in error.message and "rights" in error.hint


def test_a_file_without_the_right_to_read_it(folder: Path, files: dict[Part, Path]) -> None:
    path = folder / files["vae"].name
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in failure(lambda: Checkpoint(path)).message
    message = failure(lambda: load_weights([folder], {})).message
    assert "holds the vae" in message and f"{path.name} cannot be read" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(content)
    assert str(path) in failure(lambda: open_all(path)).message


def test_an_index_of_impossible_or_many_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors.index.json"
    for name in ("x" * 5000, "a\0b", "."):
        path.write_text(json.dumps({"weight_map": {"x": name}}))
        assert str(path) in failure(lambda: open_all(path)).message
    path.write_text(json.dumps({"weight_map": {f"x{k}": f"{k:03}.safetensors" for k in range(500)}}))
    message = failure(lambda: open_all(path)).message
    assert "000.safetensors, 001.safetensors" in message and message.endswith("and 495 more.")


def test_a_product_of_long_numbers_is_not_computed(tmp_path: Path) -> None:
    """It would take minutes: a header of 4 MB."""
    shape = [10**4000] * 1000
    path = write_raw(tmp_path / "x.safetensors", {"x": GOOD | {"shape": shape}}, bytes(8))
    start = time.perf_counter()
    assert "x has no proper type" in failure(lambda: open_all(path)).message
    assert time.perf_counter() - start < 5


def test_an_index_whose_shard_is_missing(folder: Path) -> None:
    (path,) = folder.glob("*animate*")
    index = shard(path)
    lost = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    lost.unlink()
    message = failure(lambda: load_weights([folder], {})).message  # and not: the shard left lacks tensors
    assert str(index) in message and lost.name in message and "00001-of" not in message


# ---- formats we do not read: tests/test_layouts.py has those that people have ----


def test_types_of_the_future_are_named(tmp_path: Path) -> None:
    described = {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}
    path = write_raw(tmp_path / "x.safetensors", {"x": described}, bytes(3))
    assert (
        "1 of 1 tensors has the type F6_E3M2"
        in failure(lambda: Checkpoint(path).require({"x": (4,)})).message
    )


@pytest.mark.parametrize(("dim", "told"), [(1536, "[1536, 36, 1, 2, 2]"), (None, "missing")])
def test_a_transformer_of_unknown_width(folder: Path, dim: int | None, told: str) -> None:
    shapes = {} if dim is None else {"patch_embedding.weight": (dim, 36, 1, 2, 2)}
    path = write_sparse(folder / "wan_1.3b.safetensors", shapes | {"x": (1,)})
    error = failure(lambda: load_weights([folder], {"transformer": path}))
    assert str(path) in error.message and told in error.message


# ---- little is read ----


def test_opening_and_checking_the_14b_reads_its_header_only(tmp_path: Path) -> None:
    """All 34.5 GB, 11 GB of text encoder and the others, sparse; then three rows of a 2.1 GB table."""
    for part in PARTS:
        write_sparse(tmp_path / f"{part}.safetensors", required_tensors(ANIMATE_14B, part))
    assert (tmp_path / "transformer.safetensors").stat().st_size > 34.5e9
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    model, weights = load_weights([tmp_path], {})
    assert "spiece_model" not in weights["text_encoder"] and TOKEN_EMBEDDING in weights["text_encoder"]
    rows = weights["text_encoder"].rows(TOKEN_EMBEDDING, [0, 1000, 256_383])
    seconds, grown = time.perf_counter() - start, psutil.Process().memory_info().rss - before
    assert model is ANIMATE_14B and rows.shape == (3, 4096)
    assert seconds < 1, f"{seconds:.2f} s"  # measured 0.05 s
    assert grown < 50e6, f"{grown / 1e6:.0f} MB"  # measured 4 MB


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(ml_dtypes.bfloat16)
    header = {"shared.weight": {"dtype": "BF16", "shape": [50, 8], "data_offsets": [0, 800]}}
    checkpoint = Checkpoint(write_raw(tmp_path / "x.safetensors", header, table.tobytes()))
    rows = checkpoint.rows("shared.weight", [49, 0, 0, 7])
    np.testing.assert_array_equal(rows, table[[49, 0, 0, 7]].astype(np.float32))
    assert type(rows) is np.ndarray and rows.dtype == np.float32


def test_a_search_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --weights / would have none."""
    monkeypatch.setattr("trt_wan.runtime.weights.find_files.MOST_FILES", 3)
    for name in "abcd":
        (tmp_path / f"{name}.bin").touch()
    with pytest.raises(WeightsError, match="has more than 3 files below it"):
        list(files_below([tmp_path]))
