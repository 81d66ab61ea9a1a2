"""`trt-wan doctor`: every check finds its fault and names the fix, and nothing is compiled."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from test_cli import LISTING
from test_hints import not_alone

import trt_wan.checks.machine
from trt_wan.checks.check import Check
from trt_wan.checks.machine import FoundGpu, machine_checks, precision_check
from trt_wan.checks.packages import CODECS, LIBRARIES, package_checks
from trt_wan.checks.places import graphs_check, place_checks
from trt_wan.checks.weights import weights_checks
from trt_wan.cli.doctor import described
from trt_wan.cli.main import cli
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.store.home import home
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
ADA = FoundGpu("NVIDIA L4", (8, 9), 24_000_000_000, 22_000_000_000)
AMPERE = FoundGpu("NVIDIA A10", (8, 6), 24_000_000_000, 22_000_000_000)
HOPPER = FoundGpu("NVIDIA H200", (9, 0), 140_000_000_000, 139_000_000_000)
NONE = "no driver"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights of this machine."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRT_WAN_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder, 0)
    return folder


def by_topic(checks: list[Check]) -> dict[str, Check]:
    return {check.topic: check for check in checks}


def faults(checks: list[Check]) -> set[str]:
    return {check.topic for check in checks if check.state == "fault"}


# --- The machine -----------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    module = ModuleType(name)
    module.__version__ = version or ""
    monkeypatch.setitem(sys.modules, name, module if version else None)  # type: ignore[arg-type]


def test_a_gpu_with_its_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "tensorrt_rtx", "1.6.1")
    pretend(monkeypatch, "tensorrt", None)
    checks, flavour = machine_checks(ADA)
    assert not faults(checks) and flavour is not None and flavour.name == "tensorrt_rtx"
    found = by_topic(checks)
    assert found["gpu"].text.startswith("NVIDIA L4, compute capability 8.9, 22.0 of 24.0 GB free, driver ")
    assert found["tensorrt_rtx"].text == "1.6.1, can run here"
    assert found["executor"].text == ("tensorrt_rtx 1.6.1 (it is made for RTX GPUs and builds in seconds)")
    assert precision_check(ADA, flavour)[1] == "fp8" and precision_check(AMPERE, flavour)[1] == "bf16"


def test_a_gpu_without_any_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        pretend(monkeypatch, name, None)
    checks, flavour = machine_checks(ADA)
    assert faults(checks) == {"executor"} and flavour is None
    (command,) = by_topic(checks)["executor"].commands
    assert "install" in command and "rtx" in command
    assert precision_check(ADA, None)[1] == "fp32"


def test_a_release_that_refuses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "tensorrt_rtx", "1.7.0")
    pretend(monkeypatch, "tensorrt", None)
    checks, _ = machine_checks(HOPPER)
    assert "refuses compute capability 9.0" in by_topic(checks)["tensorrt_rtx"].text
    assert by_topic(checks)["executor"].commands == ("pip install 'tensorrt-rtx>=1.6,<1.7'",)


@pytest.mark.parametrize(("in_the_machine", "state"), [(True, "fault"), (False, "warning")])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, in_the_machine: bool, state: str) -> None:
    """One that is built in and has no driver is a fault."""
    monkeypatch.setattr(trt_wan.checks.machine, "has_nvidia_gpu", lambda: in_the_machine)
    checks, flavour = machine_checks(NONE)
    assert by_topic(checks)["gpu"].state == state and flavour is None
    assert precision_check(NONE, None)[1] == "fp32"


# --- Packages --------------------------------------------------------------------------------------------


def test_packages() -> None:
    found = by_topic(package_checks(None))
    assert found["codecs"].state == "ok" and all(name in found["codecs"].text for name in CODECS)
    assert "CPU" in found["onnxruntime"].text and found["export"].text.startswith("torch ")


def test_the_two_onnxruntimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the packages' metadata, with the commands that mend it."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        about = tmp_path / "site" / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    check = by_topic(package_checks(None))["onnxruntime"]
    assert check.state == "fault" and "are both installed" in check.text
    assert check.commands == ("pip uninstall -y onnxruntime onnxruntime-gpu", "pip install onnxruntime-gpu")


@pytest.mark.parametrize(
    ("gpu", "state"),
    [(None, ("ok", "ok")), (ADA, ("fault", "ok")), (HOPPER, ("fault", "warning"))],
    ids=["no GPU", "Ada", "Hopper"],
)
def test_libraries_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, gpu: FoundGpu | None, state: tuple[str, str]
) -> None:
    from cuda import pathfinder

    def missing(name: str) -> Any:
        raise RuntimeError(f"no {name}")

    nowhere = {name: replace(row, packages=("no-such-package",)) for name, row in LIBRARIES.items()}
    monkeypatch.setattr("trt_wan.checks.packages.LIBRARIES", nowhere)
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    found = by_topic(package_checks(gpu))
    assert (found["nvrtc"].state, found["cudnn"].state) == state
    assert [bool(found[name].commands) for name in ("nvrtc", "cudnn")] == [part != "ok" for part in state]


def test_a_pyav_without_h264(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.setattr(av, "codecs_available", {"aac", "libvpx-vp9"})
    check = by_topic(package_checks(None))["codecs"]
    assert check.state == "fault" and "libx264" in check.text and "aac" not in check.text and check.commands


# --- Folders, graphs, weights ----------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not faults(place_checks()) and not list(tmp_path.glob(".trt-wan-doctor*"))
    monkeypatch.setenv("TRT_WAN_HOME", "/proc/trt-wan")
    (check,) = [check for check in place_checks() if check.state == "fault"]
    assert check.topic == "cache" and check.commands == ('export TRT_WAN_HOME="$PWD/trt-wan-cache"',)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("trt_wan.checks.places.shutil.disk_usage", lambda _: usage)
    assert {check.state for check in place_checks()} == {"warning"}


def test_graphs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run exports them, which needs torch."""
    check = graphs_check(TINY, "bf16")
    assert check.state == "warning" and check.commands[0].startswith(
        "trt-wan build --model tiny --size 832x480"
    )
    monkeypatch.setattr("trt_wan.checks.places.lacking_exporters", lambda: ["torch"])
    check = graphs_check(TINY, "bf16")
    assert check.state == "fault" and any("install" in command for command in check.commands)
    (home() / "graphs" / "tiny-64x48x5-bf16-0").mkdir(parents=True)
    assert graphs_check(TINY, "bf16").state == "warning", "jobs of another size can run"


def test_the_14b_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"total": 16 * 10**9})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    check = graphs_check(ANIMATE_14B, "fp32")
    assert (check.topic, check.state) == ("memory", "fault") and "16 GB are here" in check.text


def test_weights_and_why_each_is_taken(weights: Path) -> None:
    checks, config = weights_checks([weights], "bf16")
    found = by_topic(checks)
    assert config == TINY and not faults(checks)
    for part in ("transformer", "vae", "text encoder", "image encoder"):
        assert re.search(rf"{weights}/\S+\.safetensors \(.*; the only one\)", found[part].text)
    assert found["distill LoRA"].commands == found["relight LoRA"].commands == ("trt-wan pull",)


def test_weights_that_are_missing(weights: Path, tmp_path: Path) -> None:
    """Each by its name."""
    for path in weights.iterdir():
        if "vae" not in path.name and "clip" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    checks, config = weights_checks([tmp_path], "bf16")
    assert faults(checks) == {"vae", "image encoder", "weights"} and config is None
    assert by_topic(checks)["vae"].commands == ("trt-wan pull",)
    assert faults(weights_checks([], "bf16")[0]) == {"weights"}
    assert faults(weights_checks([tmp_path / "nowhere"], "bf16")[0]) >= {"weights"}


# --- The command -----------------------------------------------------------------------------------------


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["doctor", *arguments])


def test_files_that_cannot_be_used(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "wan_vae.safetensors").write_bytes(b"<html>")
    checks, config = weights_checks([weights, tmp_path], "fp32")
    (warning,) = [check for check in checks if check.topic == "weights" and check.state == "warning"]
    assert warning.text == "Files that cannot be used: wan_vae.safetensors is a web page." and config is TINY


def test_the_command(weights: Path) -> None:
    if trt_wan.checks.machine.has_nvidia_gpu():
        pytest.skip("the checks of a GPU depend on the machine")
    done = doctor("--weights", str(weights))
    assert done.exit_code == 0, done.output
    assert re.search(r"^ok +vae +\S+\.safetensors", done.stdout, re.MULTILINE)
    assert re.search(r"^WARNING +gpu +No NVIDIA GPU", done.stdout, re.MULTILINE)
    assert "\n\ndistill LoRA: Fetch it:\ntrt-wan pull\n" in done.stdout
    assert not not_alone(done.stdout.partition("\n\n")[2])


def test_json_says_the_same(weights: Path) -> None:
    lines = [json.loads(line) for line in doctor("--weights", str(weights), "--json").stdout.splitlines()]
    checks = {line["data"]["topic"]: line["data"] for line in lines[:-1]}
    assert all(line["code"] == "check" for line in lines[:-1])
    assert checks["distill LoRA"]["state"] == "warning" and checks["distill LoRA"]["commands"] == [
        "trt-wan pull"
    ]
    assert set(checks["codecs"]) == {"topic", "state", "text", "fix", "commands"}


def test_without_weights_a_run_cannot_work() -> None:
    done = doctor()
    assert done.exit_code == 1 and "Error: A run cannot work here: " in done.stderr
    assert "FAULT" in done.stdout and "weights: Fetch them:\ntrt-wan pull\n" in done.stdout
    envelope = json.loads(doctor("--json").stdout.splitlines()[-1])
    assert envelope["ok"] is False and envelope["error"]["code"] == "environment_broken"


def processor_seconds() -> float:
    """Those of finished children: a busy machine does not make them more."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_it_takes_a_few_seconds_and_imports_no_torch(weights: Path, tmp_path: Path) -> None:
    listing = tmp_path / "modules"
    command = [sys.executable, "-c", LISTING, str(listing), "doctor", "--weights", str(weights)]
    before = processor_seconds()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert processor_seconds() - before < 4, "one, on a machine that is not busy"
    assert not set(listing.read_text().split()) & {"torch", "onnx", "diffusers", "transformers"}


def test_the_order_of_the_text() -> None:
    checks = [Check("a", "ok", "fine"), Check("b", "fault", "Bad.", "Run:", ("trt-wan pull",))]
    assert described(checks) == "ok     a  fine\nFAULT  b  Bad.\n\nb: Run:\ntrt-wan pull"
