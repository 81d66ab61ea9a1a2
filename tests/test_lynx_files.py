"""Lynx's files: both layouts and both kinds, full-size headers, and files that do not fit."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from full_size import lynx_layouts
from safetensors.numpy import load_file, save_file

from trt_wan.checks.weights import lynx_check
from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import LYNX_PARTS, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.lynx import Kind, Lynx
from trt_wan.errors import UsageError, WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.identity import FaceIdentity
from trt_wan.runtime.opening.lynx import LynxSearch, acting_adapters
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.lynx import find_lynx
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny import write_tiny_lynx, write_tiny_weights

IP, REF, RESAMPLER = "Lynx_{}_ip_layers_tiny_fp16", "Lynx_full_ref_layers_tiny_fp16", "lynx_{}_resampler_tiny"


def byte_dance(folder: Path, kind: Kind) -> Path:
    """The originals' names: adapters are numbered from 0 on."""
    folder.mkdir()
    for file, part in (("resampler", "lynx_resampler"), ("ip_layers", "lynx_ip"), ("ref_layers", "lynx_ref")):
        tensors = random_weights(TINY, part, 4, kind)  # type: ignore[arg-type]
        save_file(tensors, folder / f"{file}.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["full", "lite"])
def test_both_layouts_hold_the_same(kind: Kind, tmp_path: Path) -> None:
    write_tiny_lynx(tmp_path / "kijai", 4, kind)
    names = load_file(tmp_path / f"kijai/{IP.format(kind)}.safetensors")
    blocks = {int(name.split(".")[1]) for name in names}
    assert blocks == ({0, 1, 2, 3} if kind == "full" else {0, 2})
    assert any(name.endswith("ip_adapter.registers") for name in names) == (kind == "full")
    assert any(name.endswith("bias") for name in names) == (kind == "full")
    one, other = (
        find_lynx(TINY, [folder]) for folder in (tmp_path / "kijai", byte_dance(tmp_path / "originals", kind))
    )
    assert one.kind == other.kind == kind
    for part in LYNX_PARTS:
        wanted = required_tensors(TINY, part, kind)
        for name, shape in wanted.items():
            assert one.parts[part][name].shape == shape
            np.testing.assert_allclose(one.parts[part][name], other.parts[part][name], atol=2e-3)
    second = one.parts["lynx_ip"]["1.to_k_ip.weight"]
    block = names[f"blocks.{1 if kind == 'full' else 2}.cross_attn.ip_adapter.to_k_ip.weight"]
    np.testing.assert_array_equal(second, block.astype(np.float32))


def changed(path: Path, change: Mapping[str, Array | None]) -> None:
    tensors = {**load_file(path), **change}
    save_file({name: values for name, values in tensors.items() if values is not None}, path)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_tiny_lynx(tmp_path, 0)
    full = tmp_path / f"{IP.format('full')}.safetensors"
    resampler = tmp_path / f"{RESAMPLER.format('full')}.safetensors"

    def refused(says: str) -> WeightsError:
        with pytest.raises(WeightsError, match=says) as caught:
            find_lynx(TINY, [tmp_path])
        assert len(caught.value.message) < 400 and caught.value.hint
        return caught.value

    original = full.read_bytes()
    changed(full, {"blocks.3.cross_attn.ip_adapter.to_v_ip.bias": None})
    refused(r"1 of 20 tensors is missing, such as 3\.to_v_ip\.bias")
    full.write_bytes(original)
    changed(full, {"blocks.9.cross_attn.ip_adapter.to_v_ip.bias": np.zeros(256, np.float16)})
    refused(r"has tensors that the IP adapter of Lynx has not: 9\.to_v_ip\.bias")
    full.write_bytes(original)
    resampler.unlink()
    assert find_lynx(TINY, [tmp_path]).ip is None, "the ref adapter needs no resampler"
    (tmp_path / f"{REF}.safetensors").unlink()
    refused("needs a resampler of Lynx, and there is none")
    write_tiny_lynx(tmp_path / "lite", 0, "lite")
    (tmp_path / f"lite/{IP.format('lite')}.safetensors").unlink()
    error = refused(
        "is the full IP adapter of Lynx, and .* the lite resampler: they must be of the same kind"
    )
    assert error.message.count(".") <= 4  # one sentence, with two file names
    write_tiny_lynx(tmp_path / "lite", 0, "lite")
    assert find_lynx(TINY, [tmp_path]).kind == "lite", "the pair that fits"
    write_tiny_lynx(tmp_path, 0)
    assert find_lynx(TINY, [tmp_path]).kind == "full", "full where both pairs are there"
    assert find_lynx(TINY, [tmp_path], [tmp_path / "lite"]).kind == "lite", "named files win"
    write_tiny_weights(tmp_path / "other", 0)
    vae = tmp_path / "other/wan2.1_vae_tiny_bf16.safetensors"
    with pytest.raises(WeightsError, match="is no file of Lynx: it is the VAE"):
        find_lynx(TINY, [], [vae])


def test_a_resampler_of_another_adapter_is_no_fault(tmp_path: Path) -> None:
    """IP-Adapters have resamplers with the same names."""
    write_tiny_lynx(tmp_path, 0)
    (tmp_path / f"{IP.format('full')}.safetensors").unlink()
    (tmp_path / f"{RESAMPLER.format('full')}.safetensors").unlink()
    save_file({"layers.0.0.to_kv.weight": np.zeros((4, 2), np.float32)}, tmp_path / "other.safetensors")
    save_file(
        {"image_proj.layers.0.0.to_kv.weight": np.zeros((4, 2), np.float32)}, tmp_path / "id.safetensors"
    )
    found = find_lynx(TINY, [tmp_path])
    assert (found.ip, found.resampler) == (None, None) and found.ref is not None


@pytest.mark.parametrize("kind", ["full", "lite"])
def test_full_size_files_are_recognised(kind: Kind, tmp_path: Path) -> None:
    """The sizes of addons_spec.md 2.1; the files here have a header and no data on the disk."""
    sizes = {
        "full": {"lynx_ip": 4_201_676_800, "lynx_ref": 4_195_123_200, "lynx_resampler": 343_680_000},
        "lite": {"lynx_ip": 838_860_800, "lynx_ref": 4_195_123_200, "lynx_resampler": 327_914_496},
    }[kind]
    for name, layout in lynx_layouts(ANIMATE_14B, kind).items():
        with (tmp_path / name).open("wb") as file:
            file.write(layout.header())
            file.truncate(layout.size)
    found = find_lynx(ANIMATE_14B, [tmp_path])
    assert found.kind == kind
    for part, checkpoint in found.parts.items():
        entries = checkpoint.file.entries.values()
        assert sum(entry.stop - entry.start for entry in entries) == sizes[part], part
    ip = found.parts["lynx_ip"]
    assert math.prod(ip.shape("19.to_k_ip.weight")) == 5120 * (5120 if kind == "full" else 2048)
    shown = CliRunner().invoke(cli, ["weights", "show", str(ip.path), "--json"])
    data = json.loads(shown.stdout)["data"]
    assert (data["part"], data["model"], data["problem"], data["unexpected"]) == ("lynx_ip", "14b", "", "")


def test_doctor_names_the_adapters(tmp_path: Path) -> None:
    assert lynx_check([tmp_path], TINY) == []
    write_tiny_lynx(tmp_path, 0)
    (check,) = lynx_check([tmp_path], TINY)
    assert check.state == "ok"
    assert check.text == "the full IP adapter (with --face-embedder) and the ref adapter of Lynx"
    (tmp_path / f"{REF}.safetensors").unlink()
    (tmp_path / f"{RESAMPLER.format('full')}.safetensors").unlink()
    (check,) = lynx_check([tmp_path], TINY)
    assert check.state == "warning" and "needs a resampler" in check.text


def test_which_adapters_act(tmp_path: Path) -> None:
    picture, embedder = tmp_path / "face.png", tmp_path / "arcface.onnx"
    write_tiny_lynx(tmp_path / "all", 0)
    write_tiny_lynx(tmp_path / "ref", 0)
    for name in (IP, RESAMPLER):
        (tmp_path / f"ref/{name.format('full')}.safetensors").unlink()
    write_tiny_lynx(tmp_path / "ip", 0, "lite")
    (tmp_path / f"ip/{REF}.safetensors").unlink()
    (tmp_path / "none").mkdir()

    def acting(folder: str, **settings: float | Path) -> tuple[Lynx, str]:
        identity = FaceIdentity(picture, **settings)  # type: ignore[arg-type]
        found = LynxSearch(WeightFiles((tmp_path / folder,))).adapters(TINY, identity)
        return found, acting_adapters(found, identity).text

    both, text = acting("all", embedder=embedder)
    assert both == Lynx(True, True, "full")
    assert text == "identity: the IP adapter (full, scale 1) and the ref adapter (of a picture, scale 1)"
    one, text = acting("all")
    assert one == Lynx(False, True) and text.endswith("; no IP adapter: there is no --face-embedder")
    one, text = acting("all", embedder=embedder, ip_scale=0)
    assert one == Lynx(False, True) and "no IP" not in text
    one, text = acting("ref", embedder=embedder)
    assert one == Lynx(False, True) and text.endswith("; no IP adapter: there is no file of it")
    one, text = acting("ip", embedder=embedder, ip_scale=0.5)
    assert one == Lynx(True, False, "lite") and "(lite, scale 0.5); no ref adapter" in text
    with pytest.raises(UsageError, match="needs a face embedder"):
        acting("ip")
    with pytest.raises(WeightsError, match="no IP and no ref adapter of Lynx") as caught:
        acting("none", embedder=embedder)
    assert "trt-wan pull lynx" in caught.value.hint
    with pytest.raises(WeightsError, match="There is no ref adapter"):
        acting("ip", ip_scale=0)
