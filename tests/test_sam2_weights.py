"""SAM2 checkpoints: the official pickle and safetensors are read strictly, without torch, and told apart."""

import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sam2_oracle import transformers_model
from torch.nn.functional import interpolate

from trt_wan.engines.sam2.config import SAM2_MODELS
from trt_wan.engines.sam2.contracts import POSITION, required_tensors
from trt_wan.errors import NotFinite, WeightsError
from trt_wan.preprocess.sam2.weights import identify, load_sam2, position_table, random_sam2_weights

ROOT = Path(__file__).parents[1]
Values = NDArray[np.float32]
TINY = SAM2_MODELS["sam2.1_tiny"]
COUNTS = {  # tensors and parameters (preprocess_spec.md B1.1; the others from transformers' models)
    "sam2.1_base_plus": (615, 80_850_434),
    "sam2_base_plus": (612, None),
    "sam2.1_large": (903, None),
    "sam2_large": (900, None),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Values]:
    return random_sam2_weights(TINY, 0)


@pytest.mark.parametrize("name", COUNTS)
def test_the_names_are_those_of_the_official_files(name: str) -> None:
    required = required_tensors(SAM2_MODELS[name])
    count, parameters = COUNTS[name]
    assert len(required) == count
    if parameters is not None:
        assert sum(math.prod(shape) for shape in required.values()) == parameters


@pytest.mark.parametrize("name", SAM2_MODELS)
def test_every_model_loads_strictly_into_transformers(name: str) -> None:
    """Renamed, the tensors are exactly those of transformers' model; nothing is allocated."""
    config = SAM2_MODELS[name]
    empty = np.zeros(1, np.float32)
    shapes = {n: np.broadcast_to(empty, shape) for n, shape in required_tensors(config).items()}
    with torch.device("meta"):
        model = transformers_model(config, shapes, assign=True)
    assert sum(p.numel() for p in model.parameters()) > 38e6
    assert identify(Path("x"), {n: value.shape for n, value in shapes.items()}) == config


def test_safetensors_in_fp32_and_fp16(weights: dict[str, Values], tmp_path: Path) -> None:
    for dtype in (np.float32, np.float16):
        file = tmp_path / f"{np.dtype(dtype).name}.safetensors"
        save_file({name: value.astype(dtype) for name, value in weights.items()}, file)
        loaded = load_sam2(file)
        assert loaded.config == TINY and set(loaded) == set(weights)
        for name in ("no_obj_ptr", "sam_mask_decoder.mask_tokens.weight"):
            assert loaded[name].dtype == np.float32
            np.testing.assert_array_equal(loaded[name], weights[name].astype(dtype).astype(np.float32))


def test_the_official_pickle(weights: dict[str, Values], tmp_path: Path) -> None:
    """Also with tensors that share storage, are transposed, or are parameters, as torch may save them."""
    tensors: dict[str, torch.Tensor] = OrderedDict((n, torch.from_numpy(v)) for n, v in weights.items())
    name = "memory_attention.layers.0.linear1.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    both = torch.stack((tensors["no_obj_ptr"], tensors["no_obj_ptr"] + 1))
    tensors["no_obj_ptr"] = both[1]
    tensors["no_mem_embed"] = torch.nn.Parameter(tensors["no_mem_embed"].half())
    file = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": tensors}, file)
    loaded = load_sam2(file)
    assert loaded.config == TINY and set(loaded) == set(weights)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[key], tensor.detach().float().numpy())


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was_here"),)

    file = tmp_path / "evil.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {"a": Evil()}}))
    with pytest.raises(WeightsError, match="posix.mkdir|nt.mkdir"):
        load_sam2(file)
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"model": {}})])
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cut.pt"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="cut.pt is no SAM2 checkpoint"):
        load_sam2(file)


def test_a_storage_that_was_cut(weights: dict[str, Values], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"model": {n: torch.from_numpy(v) for n, v in weights.items()}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(cut, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            target.writestr(entry, data[: len(data) // 8 * 4] if entry.endswith("data/0") else data)
    loaded = load_sam2(cut)
    with pytest.raises(WeightsError, match="too short"):
        loaded[next(iter(weights))]


def test_strict(weights: dict[str, Values]) -> None:
    shapes = {name: value.shape for name, value in weights.items()}
    changed = dict(shapes)
    del changed["no_obj_ptr"]
    changed["extra.weight"] = (1,)
    changed["no_mem_embed"] = (1, 1, 255)
    with pytest.raises(WeightsError) as caught:
        identify(Path("x.pt"), changed)
    message = caught.value.message
    assert "looks like sam2.1_tiny" in message and message.count(".") and "\n" not in message
    for part in ("1 missing: no_obj_ptr", "1 unexpected: extra.weight", "1 of a wrong shape: no_mem_embed"):
        assert part in message
    with pytest.raises(WeightsError, match="is no SAM2 checkpoint"):
        identify(Path("x.pt"), {"a": (1,)})


@pytest.mark.parametrize("model", ["sam2.1_tiny", "sam2.1_base_plus"])
def test_position_table(model: str) -> None:
    config = replace(SAM2_MODELS[model], image_size=256, dim=8)
    rng = np.random.default_rng(0)
    background = rng.standard_normal((1, 8, config.background, config.background)).astype(np.float32)
    window = rng.standard_normal((1, 8, 8, 8)).astype(np.float32)
    size = config.mask_size
    want = interpolate(torch.from_numpy(background), (size, size), mode="bicubic")
    want = want + torch.from_numpy(window).tile(1, 1, size // 8, size // 8)
    got = position_table(background, window, size)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0).numpy(), atol=2e-6)
    assert POSITION not in required_tensors(config)


def pickled(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
    return path


BOMBS: dict[str, tuple[bytes, int, str]] = {
    "a zip bomb": (bytes(1 << 28), zipfile.ZIP_DEFLATED, "data.pkl is compressed"),
    "a large pickle": (bytes(17 << 20), zipfile.ZIP_STORED, "has 17825792 bytes, more than 16777216"),
    # bytearray8 and binbytes8 of 2^33 bytes, and the number 2^28 for an object.
    "a length that is not there": (b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little"), 0, "8589934592"),
    "bytes that are not there": (b"\x80\x05\x8e" + (1 << 33).to_bytes(8, "little"), 0, "8589934592"),
    "a large number": (b"\x80\x02}r" + (1 << 28).to_bytes(4, "little") + b".", 0, "268435456 objects"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path, bomb: str) -> None:
    data, compression, says = BOMBS[bomb]
    file = pickled(tmp_path / "bomb.pt", data, compression)
    program = (
        "import sys, resource\nfrom pathlib import Path\n"
        "from trt_wan.errors import WeightsError\nfrom trt_wan.preprocess.sam2.weights import load_sam2\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load_sam2(Path(sys.argv[1]))\nexcept WeightsError as error:\n    print(error.message)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, file], capture_output=True, text=True, check=True, cwd=ROOT
    )
    message, megabytes = run.stdout.splitlines()
    assert message.startswith(f"{file} is no SAM2 checkpoint, or damaged: ") and says in message
    assert int(megabytes) < 64, f"{megabytes} MB"


@pytest.mark.parametrize("fault", ["compressed", "missing", "changed"])
def test_a_storage_that_cannot_be_read(weights: dict[str, Values], tmp_path: Path, fault: str) -> None:
    whole, bad = tmp_path / "whole.pt", tmp_path / "bad.pt"
    torch.save({"model": {n: torch.from_numpy(v) for n, v in weights.items()}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bad, "w") as target:
        for entry in source.namelist():
            if entry.endswith("data/0") and fault != "changed":
                if fault == "missing":
                    continue
                target.writestr(entry, source.read(entry), zipfile.ZIP_DEFLATED)
            else:
                target.writestr(entry, source.read(entry))
    if fault == "changed":
        content = bytearray(bad.read_bytes())
        at = content.index(weights[next(iter(weights))].tobytes()[:64])
        content[at] ^= 1
        bad.write_bytes(content)
    loaded = load_sam2(bad)
    with pytest.raises(WeightsError, match="bad.pt is damaged: .*data/0"):
        loaded[next(iter(weights))]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(
    weights: dict[str, Values], tmp_path: Path, value: float
) -> None:
    name = "image_encoder.neck.convs.0.conv.bias"
    spoiled = weights[name].copy()
    spoiled[0] = value
    save_file({**weights, name: spoiled}, tmp_path / "bad.safetensors")
    loaded = load_sam2(tmp_path / "bad.safetensors")
    with pytest.raises(NotFinite, match=f"tensor {name} holds"):
        loaded[name]
