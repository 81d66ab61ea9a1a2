"""`trt-wan weights convert`: every engine gets the same bytes from a converted file as from its source."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from quantised_weights import as_gguf, as_int8, wan_type, write_gguf
from safetensors import safe_open
from safetensors.numpy import save_file
from weight_oracle import contents
from weight_oracle import quantised as plainly_quantised

from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.errors import OutputError, UsageError, WeightsError
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.find_files import find_files
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.open_file import open_file
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.quantise import quantised
from trt_wan.runtime.weights.rewrite import rewrite
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
BF16, E4M3, E5M2 = (np.dtype(t) for t in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
Numbers = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder, 3)
    return folder


@pytest.fixture(scope="module")
def numbers(folder: Path) -> Numbers:
    """The transformer in float32, with rows of different sizes, which a scale per tensor does not suit."""
    transformer = load_weights([folder], {})[1]["transformer"]
    rng = np.random.default_rng(5)
    made = {name: transformer[name] for name in required_tensors(TINY, "transformer")}
    return {
        name: values * np.exp(rng.normal(0, 1, (len(values), *[1] * (values.ndim - 1)))).astype(np.float32)
        if values.ndim == 2
        else values
        for name, values in made.items()
    }


def is_linear(name: str, values: Any) -> bool:
    return name.startswith("blocks.") and values.ndim == 2 and name.endswith(".weight")


def scaled_fp8(numbers: Numbers, dtype: Any, per_row: bool, largest: float) -> Numbers:
    made: Numbers = {"scaled_fp8": np.zeros(2, E4M3)}
    for name, values in numbers.items():
        if not is_linear(name, values):
            made[name] = values.astype(BF16)
            continue
        most = np.abs(values).max(axis=1, keepdims=True) if per_row else np.abs(values).max()
        scale = (most / largest).astype(np.float32)
        made[name] = (values / scale).astype(dtype)
        made[name.removesuffix("weight") + "scale_weight"] = scale
    return made


def int8(numbers: Numbers, rotation: int) -> Numbers:
    made: Numbers = {}
    for name, values in numbers.items():
        if not is_linear(name, values) or values.shape[1] % 16:
            made[name] = values.astype(BF16)
            continue
        layer = name.removesuffix("weight")
        made[name], made[f"{layer}weight_scale"] = as_int8(values, rotation)
        about: Numbers = {"format": "int8_tensorwise"}
        if rotation:
            about |= {"convrot": True, "convrot_groupsize": rotation}
        made[f"{layer}comfy_quant"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return made


def make(path: Path, numbers: Numbers, layout: str) -> Path:
    if layout == "Q8_0":
        path = path.with_suffix(".gguf")
        write_gguf(path, {n: as_gguf(v, wan_type(n, v.shape, "Q8_0")) for n, v in numbers.items()})
        return path
    tensors = {
        "fp32": lambda: numbers,
        "fp16": lambda: {name: values.astype(np.float16) for name, values in numbers.items()},
        "bf16 with a prefix": lambda: {
            f"model.diffusion_model.{n}": v.astype(BF16) for n, v in numbers.items()
        },
        "plain e4m3": lambda: {n: v.astype(E4M3 if is_linear(n, v) else BF16) for n, v in numbers.items()},
        "e4m3, scale per tensor": lambda: scaled_fp8(numbers, E4M3, False, 448),
        "e4m3, scale per row": lambda: scaled_fp8(numbers, E4M3, True, 448),
        "e5m2, scale per tensor": lambda: scaled_fp8(numbers, E5M2, False, 57344),
        "int8": lambda: int8(numbers, 0),
        "int8 convrot": lambda: int8(numbers, 16),
    }[layout]()
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    return path


LAYOUTS = (
    *("fp32", "fp16", "bf16 with a prefix", "plain e4m3", "e4m3, scale per tensor", "e4m3, scale per row"),
    *("e5m2, scale per tensor", "int8", "int8 convrot", "Q8_0"),
)


def opened(path: Path, part: Part) -> Checkpoint:
    checkpoint = Checkpoint(path, part)
    checkpoint.require(required_tensors(TINY, part), part)
    return checkpoint


def packs(part: Part, precision: Precision) -> Iterator[Pack]:
    for network in networks(TINY, Plan(precision=precision)).values():
        if network.part == part:
            yield from (Pack.of(network, n) for n in range(network.repeats))


def assert_same(source: Path, made: Path, part: Part, precision: Precision) -> None:
    """Byte for byte, in every pack of the loader."""
    before, after = opened(source, part), opened(made, part)
    for pack in packs(part, precision):
        assert contents(pack, before) == contents(pack, after), pack.key


def types_of(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:  # an independent reader
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transformer_of_any_layout(tmp_path: Path, numbers: Numbers, layout: str) -> None:
    source = make(tmp_path / "source.safetensors", numbers, layout)
    about = rewrite(source, tmp_path / "fp8.safetensors")
    assert (about["part"], about["model"], about["type"]) == ("transformer", "tiny", "fp8")
    assert_same(source, tmp_path / "fp8.safetensors", "transformer", "fp8")
    types = types_of(tmp_path / "fp8.safetensors")
    linears = [name for name, values in numbers.items() if is_linear(name, values)]
    assert {types[name] for name in linears} == {"F8_E4M3"}
    assert {types[name.removesuffix("weight") + "scale_weight"] for name in linears} == {"F32"}
    rewrite(source, tmp_path / "bf16.safetensors", "bf16")
    assert_same(source, tmp_path / "bf16.safetensors", "transformer", "bf16")
    assert set(types_of(tmp_path / "bf16.safetensors").values()) <= {"BF16", "F16", "F32"}


def test_rows_are_quantised_as_by_the_plain_version() -> None:
    """Bit for bit, near every boundary between two codes, over all sizes of rows."""
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    middles = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    row = np.concatenate([codes, middles, *near, [448.0]]).astype(np.float32)
    rng = np.random.default_rng(0)
    some = rng.standard_normal((40, len(row))) * np.exp(rng.normal(0, 8, (40, 1)))
    zero = np.zeros_like(row)
    weight = np.stack([row, row * 3, row / 7, zero, *some]).astype(np.float32)
    for made, plain in zip(quantised(weight), plainly_quantised(weight, None), strict=True):
        assert made.tobytes() == plain.tobytes()


def test_a_second_conversion_changes_nothing(tmp_path: Path, numbers: Numbers) -> None:
    source = make(tmp_path / "source.safetensors", numbers, "fp32")
    rewrite(source, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("part", [part for part in PARTS if part != "transformer"])
def test_the_other_parts(folder: Path, tmp_path: Path, part: Part) -> None:
    source = load_weights([folder], {})[1][part].path
    about = rewrite(source, tmp_path / "made.safetensors")
    assert (about["part"], about["type"]) == (part, "bf16")
    assert_same(source, tmp_path / "made.safetensors", part, "bf16")
    before, after = opened(source, part), opened(tmp_path / "made.safetensors", part)
    for name in required_tensors(TINY, part):  # also those that no engine takes
        if name not in {
            pack.network.weight_key(w.name, pack.n)
            for pack in packs(part, "bf16")
            for w in pack.network.weights
        }:
            assert np.array_equal(before[name], after[name]), name
    with pytest.raises(UsageError, match="takes? no FP8"):
        rewrite(source, tmp_path / "fp8.safetensors", "fp8")


def test_the_tokenizer_inside_stays(folder: Path, tmp_path: Path) -> None:
    source = load_weights([folder], {})[1]["text_encoder"]
    tensors = {name: source.file.read(name) for name in source.file.entries}
    piece = np.arange(200, dtype=np.uint8)
    save_file({**tensors, "spiece_model": piece}, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert np.array_equal(opened(tmp_path / "b.safetensors", "text_encoder").raw("spiece_model"), piece)


# --- The command -----------------------------------------------------------------------------------------


def convert(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["weights", "convert", *map(str, arguments), "--json"])


def test_nothing_is_overwritten_without_y(tmp_path: Path, numbers: Numbers) -> None:
    source = make(tmp_path / "source.safetensors", numbers, "fp16")
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    refused = convert(source, "-o", output)
    assert refused.exit_code == 2 and "exists" in refused.stdout and output.read_bytes() == b"mine"
    done = convert(source, "-o", output, "-y")
    assert json.loads(done.stdout.splitlines()[-1])["data"]["bytes"] == output.stat().st_size
    again = convert(output, "-o", output, "-y")
    assert again.exit_code == 2 and "is an input" in again.stdout


@pytest.mark.parametrize("name", ["out.gguf", "out.pth", "out", "out.safetensors.index.json"])
def test_another_suffix_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    """The source is no checkpoint, which would be told later."""
    (tmp_path / "source.safetensors").touch()
    refused = convert(tmp_path / "source.safetensors", "-o", tmp_path / name)
    assert refused.exit_code == 2 and "does not end in .safetensors" in refused.stdout


def test_a_folder_that_cannot_be_written_is_told_first(
    tmp_path: Path, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source.safetensors", numbers, "fp16")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("trt_wan.runtime.weights.rewrite.shutil.disk_usage", lambda _: usage)

    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("trt_wan.runtime.weights.rewrite.TemporaryFile", denied)
    with pytest.raises(OutputError, match=f"The folder {tmp_path / 'deep'} cannot be written to"):
        rewrite(source, tmp_path / "deep" / "out.safetensors")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("indexed", [False, True])
def test_a_folder_of_shards(tmp_path: Path, numbers: Numbers, indexed: bool) -> None:
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    names, found = sorted(numbers), {}
    for k in range(2):
        shard = folder / f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors"
        save_file({name: numbers[name] for name in names[k::2]}, shard)
        found |= dict.fromkeys(names[k::2], shard.name)
    if indexed:
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": found}))
    whole = make(tmp_path / "whole.safetensors", numbers, "fp32")
    rewrite(whole, tmp_path / "a.safetensors")
    for source in (folder, folder.parent):
        assert convert(source, "-o", tmp_path / "b.safetensors", "-y").exit_code == 0
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    refused = convert(folder, "-o", shard, "-y")
    assert refused.exit_code == 2 and "is an input" in refused.stdout


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of the 14B, a sparse file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in required_tensors(ANIMATE_14B, "transformer").items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    source = tmp_path / "14b.safetensors"
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    command = [sys.executable, "-m", "trt_wan", "weights", "convert", str(source), "-o"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, str(tmp_path / "made" / "out.safetensors")], env=environment, stderr=subprocess.PIPE
    ) as process:
        until = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob("made/*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == b"Error: Stopped at once.\n"
    assert list((tmp_path / "made").iterdir()) == []


def test_an_error_leaves_no_half_file(
    tmp_path: Path, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "source.safetensors", numbers, "fp16")
    monkeypatch.setattr(
        "trt_wan.runtime.weights.rewrite.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError):
        rewrite(source, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 10})
        patch.setattr("trt_wan.runtime.weights.rewrite.shutil.disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match="and its disk has 0.00 GB free"):
            rewrite(source, tmp_path / "out.safetensors")


def test_what_is_no_part_is_refused(tmp_path: Path, numbers: Numbers) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not a part of Wan2.2-Animate") as caught:
        rewrite(tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    assert "Uni3C" in caught.value.hint
    some = {name: values for name, values in numbers.items() if "blocks.1." not in name}
    save_file(some, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="does not fit"):
        rewrite(tmp_path / "cut.safetensors", tmp_path / "out.safetensors")
    some = {name: values for name, values in numbers.items() if name != "blocks.1.cross_attn.k.bias"}
    save_file(some, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="1 of 227 tensors is missing"):  # not judged against the 14B
        rewrite(tmp_path / "cut.safetensors", tmp_path / "out.safetensors")


def test_a_shard_of_the_source_is_not_overwritten(tmp_path: Path, numbers: Numbers) -> None:
    names = sorted(numbers)
    shards = [tmp_path / f"model-0000{k + 1}-of-00002.safetensors" for k in range(2)]
    for k, shard in enumerate(shards):
        save_file({name: numbers[name] for name in names[k::2]}, shard)
    before = shards[1].read_bytes()
    with pytest.raises(UsageError, match="is an input"):
        rewrite(shards[0], shards[1])
    assert shards[1].read_bytes() == before


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias"])
def test_a_nan_is_not_converted(tmp_path: Path, numbers: Numbers, name: str) -> None:
    spoilt = numbers[name].copy()
    spoilt.flat[3] = np.nan
    save_file(dict(numbers) | {name: spoilt}, tmp_path / "source.safetensors")
    with pytest.raises(WeightsError, match=f"{name} holds a NaN"):
        rewrite(tmp_path / "source.safetensors", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    """Opening one waits for its other end, which no signal stopped."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors.index.json")
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match="no plain file"):
            open_file(path)
    with pytest.raises(WeightsError, match="No file in"):
        find_files([tmp_path], ["vae"])
