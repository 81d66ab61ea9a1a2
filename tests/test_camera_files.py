"""Uni3C's file: recognised by its content with any FFN, under both programs' names; and the rest named."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_size import Layout, Stored, camera_layout, write_full_size

from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.errors import WeightsError
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import open_weights
from trt_wan.runtime.published.files import CAMERA, files_of
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.describe import describe
from trt_wan.runtime.weights.load import load_camera
from trt_wan.runtime.weights.tiny import write_tiny_weights

BYTES = {3072: 1_913_333_248, 4096: 1_997_260_288, 8192: 2_332_968_448}  # of numbers, addons_spec.md 1.1
INPUTS = Inputs(Path("ref"), Path("pose"), None)


def header_alone(path: Path, layout: Layout) -> Path:
    """A sparse file of the full size."""
    with path.open("wb") as file:
        file.write(layout.header())
        file.truncate(layout.size)
    return path


def full(ffn_dim: int, renamed: Callable[[str], str] = lambda name: name) -> Layout:
    (layout,) = camera_layout(ANIMATE_14B, ffn_dim).values()
    return Layout({renamed(name): tensor for name, tensor in layout.tensors.items()})


def comfy(name: str) -> str:
    """As ComfyUI's own loader renames it."""
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
        name = name.replace(f".self_attn.{theirs}.", f".self_attn.{ours}.")
    return f"diffusion_model.{name}"


@pytest.mark.parametrize("ffn_dim", BYTES)
@pytest.mark.parametrize("names", ["Kijai's", "ComfyUI's"])
def test_the_published_header_is_known(ffn_dim: int, names: str, tmp_path: Path) -> None:
    layout = full(ffn_dim, comfy if names == "ComfyUI's" else lambda name: name)
    assert len(layout.tensors) == 490
    assert layout.size - len(layout.header()) == BYTES[ffn_dim]
    path = header_alone(tmp_path / "any name.safetensors", layout)
    found = describe(path)
    assert (found.part, found.problem, found.model) == ("camera_control", "", "14b")
    assert found.what == "the camera control Uni3C" and found.encoding == "F16"
    assert (found.missing, found.wrong, found.unexpected) == ("", "", "")
    told: list[Event] = []
    model, _ = load_camera([tmp_path], None, ANIMATE_14B, "fp8", told.append)
    assert model.camera.ffn_dim == ffn_dim
    assert replace(model, camera=ANIMATE_14B.camera) == ANIMATE_14B
    assert any(isinstance(event, Note) and event.data.get("part") == "camera_control" for event in told)


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    tensors = dict(full(3072).tensors)
    del tensors["controlnet_blocks.7.norm2.linear.weight"]
    tensors["proj_out.3.weight"] = Stored("F16", (5120, 512))
    tensors["extra.3.weight"] = Stored("F16", (4,))
    path = header_alone(tmp_path / "cut.safetensors", Layout(tensors))
    found = describe(path)
    assert "1 of 484 tensors is missing, such as controlnet_blocks.7.norm2.linear.weight" in found.missing
    assert "proj_out.3.weight ([5120, 512] instead of [5120, 1024])" in found.wrong
    assert found.unexpected == "extra.3.weight"
    with pytest.raises(WeightsError, match="does not fit as the camera control Uni3C"):
        load_camera([], path, ANIMATE_14B, "fp8")


def test_the_mask_branch_may_be_left_out(tmp_path: Path) -> None:
    tensors = {n: t for n, t in full(3072).tensors.items() if "mask" not in n}
    assert len(tensors) == 484
    path = header_alone(tmp_path / "bare.safetensors", Layout(tensors))
    assert not describe(path).problem


def test_another_file_in_its_place(tmp_path: Path) -> None:
    write_tiny_weights(tmp_path, 0)
    with pytest.raises(WeightsError, match="is the VAE of Wan2.1, not the camera control Uni3C"):
        load_camera([], tmp_path / "wan2.1_vae_tiny_bf16.safetensors", TINY, "fp32")


def test_it_is_asked_for_by_jobs_with_a_camera_alone(tmp_path: Path) -> None:
    paths = {path.name: path for path in write_tiny_weights(tmp_path, 0)}
    (uni3c,) = (path for name, path in paths.items() if "Uni3C" in name)
    aside = uni3c.rename(tmp_path / "aside.txt")
    weights = open_weights(WeightFiles((tmp_path,)), "fp32", lambda event: None)
    for camera in (None, Camera(strength=0), Camera(start=0, end=0)):
        job = Job(INPUTS, camera=camera)
        assert weights.load_of(job, lambda event: None) == job.load
        assert "camera_control" not in weights.files_of(job)
    job = Job(INPUTS, camera=Camera())
    with pytest.raises(WeightsError, match="holds the camera control") as caught:
        weights.load_of(job, lambda event: None)
    assert "trt-wan pull camera" in caught.value.hint and "--camera-control FILE" in caught.value.hint
    aside.rename(uni3c)  # it is looked for again
    assert weights.load_of(job, lambda event: None).camera_ffn == TINY.camera.ffn_dim
    assert weights.files_of(job)["camera_control"] == (uni3c,)
    stored: Mapping[str, Any] = weights.host["camera_control"]
    assert np.asarray(stored["proj_in.weight"]).shape == (TINY.camera.dim, TINY.transformer.dim)
    assert len(stored) == len(list(stored))


def test_pull_knows_it() -> None:
    (file,) = files_of(CAMERA)
    assert (file.repository, file.name, file.folder) == (
        "Kijai/WanVideo_comfy",
        "Wan21_Uni3C_controlnet_fp16.safetensors",
        "controlnet",
    )


def test_a_full_size_file_of_the_tiny_model_loads(tmp_path: Path) -> None:
    more = camera_layout(TINY, 256)
    write_full_size(tmp_path, TINY, more=more)
    model, file = load_camera([tmp_path], None, TINY, "fp32")
    assert model.camera.ffn_dim == 256 != TINY.camera.ffn_dim
    assert np.isfinite(file["controlnet_blocks.2.ffn.0.weight"]).all()
    header = json.loads((tmp_path / next(iter(more))).read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["controlnet_patch_embedding.weight"]["dtype"] == "F32"
