"""`trt-wan weights show`: what a file is, from its header, in a second."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.runtime.weights.open_file import open_file
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]


def shown(file: Path, exit_code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["weights", "show", str(file), "--json"])
    assert done.exit_code == exit_code, done.output
    first, *more = map(json.loads, done.stdout.splitlines())
    assert not exit_code or [line["error"]["message"] for line in more] == [first["data"]["problem"]]
    data: dict[str, Any] = first["data"]
    return data


def rows(file: Path, exit_code: int = 0) -> dict[str, str]:
    """The table for people."""
    done = CliRunner().invoke(cli, ["weights", "show", str(file)])
    assert done.exit_code == exit_code, done.output
    assert done.stderr.startswith("Error: ") == bool(exit_code)
    parts = (line.partition("  ") for line in done.stdout.splitlines())
    return {name: text.strip() for name, _, text in parts}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder, 0)
    return folder


def test_a_transformer(weights: Path) -> None:
    file = weights / "wan2.2_animate_tiny_fp8_e4m3fn_scaled.safetensors"
    data = shown(file)
    assert (data["path"], data["part"], data["model"], data["problem"]) == (
        str(file),
        "transformer",
        "tiny",
        "",
    )
    assert data["types"]["F8_E4M3"] and data["encoding"] == "scaled F8_E4M3"
    table = rows(file)
    assert table["part"] == "transformer" and table["parameters"].replace(",", "") == str(data["parameters"])
    assert table["bytes"].endswith(" MB") and "missing" not in table


def test_what_is_missing(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "wan2.1_vae_tiny_bf16.safetensors")
    del tensors[next(iter(tensors))]
    save_file(tensors, tmp_path / "cut.safetensors")
    table = rows(tmp_path / "cut.safetensors", 1)
    assert shown(tmp_path / "cut.safetensors", 1)["problem"] and "missing" in table and "wrong" not in table


def test_a_wrong_scale_is_not_called_missing(weights: Path, tmp_path: Path) -> None:
    content = bytearray((weights / "wan2.2_animate_tiny_fp8_e4m3fn_scaled.safetensors").read_bytes())
    (tmp_path / "x.safetensors").write_bytes(content)
    entries = open_file(tmp_path / "x.safetensors").entries
    scale = next(entry for name, entry in entries.items() if name.endswith(".scale_weight"))
    content[scale.start : scale.stop] = np.float32(-1).tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    table = rows(tmp_path / "x.safetensors", 1)
    assert "1 of 227 tensors has a scale that is no positive number" in table["wrong"]
    assert "missing" not in table


def test_a_folder_is_searched_for_its_checkpoint(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    source = weights / "wan2.2_animate_tiny_fp8_e4m3fn_scaled.safetensors"
    (tmp_path / "transformer" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "broken.safetensors").touch()
    assert shown(tmp_path)["part"] == "transformer"
    for folder, says in ((weights, "several checkpoints: Wan21_Uni3C"), (tmp_path / "none", "no check")):
        folder.mkdir(exist_ok=True)
        done = CliRunner().invoke(cli, ["weights", "show", str(folder)])
        assert done.exit_code == 1 and says in done.stderr


def test_a_lora(tmp_path: Path) -> None:
    made = lora_files.lightx2v_kijai(rank=8)
    save_file({name: np.ascontiguousarray(v) for name, v in made.tensors.items()}, tmp_path / "l.safetensors")
    data = shown(tmp_path / "l.safetensors")
    assert data["model"] == "tiny" and set(data["ranks"]) <= {str(rank) for rank in range(1, 9)}
    assert sum(data["ranks"].values()) > 20 and data["unmatched"] == {}
    assert rows(tmp_path / "l.safetensors")["ranks"].startswith("8 (")


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    assert "no part of Wan2.2-Animate" in shown(tmp_path / "x.safetensors", 1)["problem"]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    done = CliRunner().invoke(cli, ["weights", "show", str(tmp_path / "broken.safetensors")])
    assert done.exit_code == 1 and done.stderr.startswith("Error: ")


def test_the_14b_takes_a_second(tmp_path: Path) -> None:
    """A sparse file: no data is read."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in required_tensors(ANIMATE_14B, "transformer").items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "14b.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    command = [
        sys.executable,
        "-m",
        "trt_wan",
        "weights",
        "show",
        str(tmp_path / "14b.safetensors"),
        "--json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    data = json.loads(run.stdout)["data"]
    assert (data["model"], data["parameters"], data["problem"]) == ("14b", 17_274_816_884, "")
    assert seconds < 1.5, "of a processor: half a second on a machine that is not busy"


def test_names_cannot_drive_the_terminal(weights: Path, tmp_path: Path) -> None:
    source = next(weights.glob("*vae*.safetensors"))
    tensors = load_file(source) | {
        "\x1b[31mred\nline": np.zeros(1, np.float32),
        "x" * 5000: np.zeros(1, np.float32),
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    result = CliRunner().invoke(cli, ["weights", "show", str(tmp_path / "vae.safetensors")])
    assert "\x1b[31mred" not in result.stdout and "\\x1b[31mred\\nline" in result.stdout
    assert len(result.stdout) < 3000
