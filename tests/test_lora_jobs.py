"""LoRAs of jobs on an open model, on ONNX Runtime: weights, and all that is computed from them, follow."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lora_files import FAMILIES
from safetensors.numpy import save_file
from tiny_job import PLAN, prepare, write_sound

from trt_wan.cli.run import run
from trt_wan.errors import UsageError, WeightsError
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job, Lora
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.tiny import write_tiny_weights


@pytest.fixture(scope="module")
def place(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """weights/, clips/, and two LoRAs that change every kind of tensor, and the fusers."""
    base = tmp_path_factory.mktemp("jobs")
    prepare(base / "clips", write_sound(base / "tone.m4a", 1))
    write_tiny_weights(base / "weights", seed=5)
    FAMILIES["high_noise"]().save(base / "distill.safetensors")
    FAMILIES["diffusers"]().save(base / "relight.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        yield base


def opened(folder: Path) -> OpenModel:
    return open_model(WeightFiles((folder,)), Settings(executor="onnxruntime", text_cache=False))


def job(place: Path, **changes: Any) -> Job:
    """Without a face clip, which takes most of the time."""
    inputs = replace(Inputs.from_folder(place / "clips", "animate"), face=None)
    return Job(inputs, **{"window": PLAN.frames, "steps": 1, "seed": 7} | changes)


def frames(model: OpenModel, task: Job, **more: Any) -> Array:
    """The first piece of frames: what comes after it depends on it alone."""
    pieces = model.pieces(task, **more)
    first = next(pieces)
    pieces.close()
    return first


def test_jobs_with_other_loras_in_a_row_equal_single_runs(place: Path) -> None:
    distill, relight = place / "distill.safetensors", place / "relight.safetensors"
    sets = [
        (),
        (Lora(distill),),
        (Lora(distill), Lora(relight, 0.5)),
        (Lora(relight, 0.5),),
        (Lora(distill, 0.0),),
    ]
    alone = []
    for loras in sets[:4]:
        with opened(place / "weights") as single:
            alone.append(frames(single, job(place, loras=loras)))
    for k in range(3):
        assert all(np.abs(alone[k] - other).max() > 1e-3 for other in alone[:k]), k
    with opened(place / "weights") as model:
        for k, loras in enumerate([*sets, sets[1]]):
            wanted = [*alone, alone[0], alone[1]][k]
            assert np.array_equal(frames(model, job(place, loras=loras)), wanted), k
        reversed_order = job(place, loras=tuple(reversed(sets[2])))
        assert np.array_equal(frames(model, reversed_order), alone[2])


def test_a_lora_that_cannot_be_used_leaves_the_model_as_it_was(place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": np.zeros((4, 4), np.float32)}, bad)
    with opened(place / "weights") as model:
        first = frames(model, job(place, loras=(Lora(place / "distill.safetensors"),)))
        with pytest.raises(WeightsError, match="a LoRA of Flux"):
            frames(model, job(place, loras=(Lora(place / "relight.safetensors"), Lora(bad))))
        with pytest.raises(WeightsError, match="cannot be read"):
            frames(model, job(place, loras=(Lora(tmp_path / "missing.safetensors"),)))
        assert np.array_equal(frames(model, job(place, loras=(Lora(place / "distill.safetensors"),))), first)


def test_merged_weights_equal_a_merged_checkpoint(place: Path, tmp_path: Path) -> None:
    """The job's frames against those of a float32 checkpoint that was merged by the formula."""
    made = FAMILIES["high_noise"]()
    write_tiny_weights(tmp_path, seed=5)
    (path,) = tmp_path.glob("*animate*")
    base = Checkpoint(path)
    whole = {
        name: base[name] for name in base if name.endswith(("weight", "bias", "modulation", "padding_tokens"))
    }
    for name, delta in made.deltas.items():
        whole[name] = (whole[name] + 0.7 * delta).astype(np.float32)
    save_file(whole, path)
    with opened(tmp_path) as model:
        wanted = frames(model, job(place))
    notes: list[Event] = []
    with opened(place / "weights") as model:
        task = job(place, loras=(Lora(place / "distill.safetensors", 0.7),))
        got = frames(model, task, progress=notes.append)
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    said = [note.text for note in notes if isinstance(note, Note)]
    assert f"LoRA distill.safetensors: changes {len(made.deltas)} tensors." in said


def test_random_weights_take_no_lora(place: Path) -> None:
    with (
        open_model(WeightFiles(random="tiny"), Settings(executor="onnxruntime")) as model,
        pytest.raises(UsageError, match="Random weights take no LoRA"),
    ):
        frames(model, job(place, loras=(Lora(place / "distill.safetensors"),)))


def test_the_command_merges_and_refuses_before_it_exports(place: Path, tmp_path: Path) -> None:
    arguments = [
        "--inputs",
        str(place / "clips"),
        "--weights",
        str(place / "weights"),
        "--window",
        str(PLAN.frames),
    ]
    arguments += ["--steps", "1", "--executor", "onnxruntime", "-y"]
    lora = f"{place / 'distill.safetensors'}:0.7"
    done = CliRunner().invoke(run, [*arguments, "-o", str(tmp_path / "a.mp4"), "--lora", lora])
    assert done.exit_code == 0, done.stderr
    assert "LoRA distill.safetensors: changes" in done.stderr
    other = tmp_path / "other.safetensors"
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": np.zeros((4, 4), np.float32)}, other)
    refused = CliRunner().invoke(
        run, [*arguments, "--window", "81", "-o", str(tmp_path / "b.mp4"), "--lora", str(other)]
    )
    assert refused.exit_code == 1 and "is a LoRA of Qwen-Image" in refused.stderr, refused.stderr
