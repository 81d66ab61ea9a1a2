"""The README is a contract: its commands parse, its demo does what it says, its Python example runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trt_wan.cli.demo import DEMO_SAMPLE
from trt_wan.cli.main import cli
from trt_wan.runtime.video.reader import Clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readme_test_command() -> None:
    (test_command,) = [
        line for block in blocks("sh") for line in block.splitlines() if "scripts/check" in line
    ]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("trt-wan ")]
    assert len(commands) >= 3
    for _, name, *arguments in commands:
        for argument in arguments:  # what is named has to be there
            if argument.endswith("/"):
                Path(argument).mkdir(exist_ok=True)
            elif Path(argument).suffix in (".png", ".mp4", ".onnx", ".safetensors", ".json"):
                Path(argument).touch()
        cli.commands[name].make_context(name, arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run."""
    place = tmp_path_factory.mktemp("demo")
    demo = [sys.executable, "-m", "trt_wan", "demo"]
    environment = os.environ | {"TRT_WAN_HOME": str(place / "home")}
    run = subprocess.run(demo, cwd=place, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "demo.mp4\n"
    assert "random" in run.stderr and "noise" in run.stderr
    return place


def test_demo(place: Path) -> None:
    driving = Clip(DEMO_SAMPLE / "driving.mp4")
    made = Clip(place / "demo.mp4")
    assert (made.frames, made.rate, made.has_sound) == (driving.frames, driving.rate, True)


def test_python_example(place: Path) -> None:
    (example,) = blocks("python")
    shutil.copytree(DEMO_SAMPLE, place / "prepared")
    (place / "models").symlink_to(place / "home" / "weights" / "tiny")
    environment = os.environ | {"TRT_WAN_HOME": str(place / "home")}
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["(192, 320, 3)"] * 21
