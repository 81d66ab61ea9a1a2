"""Odd values for every option of every command: refused in a sentence, or taken, and never a traceback.

The work of each command is cut off at its first step.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from made_clips import FakePeople, FakeSegmenter, write_clip, write_reference
from test_hints import not_alone

import trt_wan.preprocess.stages
from trt_wan.cli.demo import DEMO_SAMPLE
from trt_wan.cli.main import cli
from trt_wan.errors import TrtWanError
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.weights.tiny import write_tiny_weights

VALUES = ("", "-1", "nan", "1e400", "9" * 5000, "٣", "99984x99984", "a\udcffb", "/dev/zero", "/")
WEIGHTS = ("--transformer", "--vae", "--text-encoder", "--image-encoder", "--lora")
RUN = ["run", "--weights", "models", "-o", "o.mp4", "--window", "13", "--steps", "1", "--no-build"]
COMMANDS = {
    "run": [*RUN, "--inputs", "sample"],
    "run REF CLIP": [*RUN, "c.png", "d.mp4", "--size", "64x48"],
    "preprocess": ["preprocess", "c.png", "d.mp4", "-o", "made", "--size", "64x48", "--mode", "replace"],
    "build": ["build", "--model", "tiny", "--size", "64x48", "--window", "13"],
    "bench": ["bench", "--model", "tiny"],
    "bench sweep": ["bench", "sweep", "--model", "tiny"],
    "bench quality": ["bench", "quality", "--model", "tiny"],
    "bench preprocess": ["bench", "preprocess", "--detector", "models", "--pose", "models"],
    "bench compare": ["bench", "compare"],
    "show": ["show"],
    "weights tiny": ["weights", "tiny", "made"],
}
WORK = (
    "trt_wan.runtime.render.render",
    "trt_wan.build.compile.export_graphs",
    "trt_wan.preprocess.preprocess.preprocess",
    "trt_wan.benchmarks.bench.run_bench",
    "trt_wan.benchmarks.measure.sweep.run_sweep",
    "trt_wan.benchmarks.measure.quality.measure_quality",
    "trt_wan.benchmarks.preprocess.bench.run_bench",
    "trt_wan.runtime.weights.tiny.write_tiny_weights",
)


class Reached(TrtWanError):
    code = "reached"


def reached(*arguments: object, **options: object) -> None:
    raise Reached("The work begins.", "Nothing to do.")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write_tiny_weights(folder / "models", seed=0)
    shutil.copytree(DEMO_SAMPLE, folder / "sample")
    write_reference(folder / "c.png", (64, 48))
    write_clip(folder / "d.mp4", 3, (64, 48), codec="libx264")
    return folder


@pytest.fixture(autouse=True)
def cut_off(place: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    stages = Stages(FakePeople(), FakeSegmenter())
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **options: stages)
    for name in WORK:
        monkeypatch.setattr(name, reached)
    before = {path.name for path in place.iterdir()}
    yield
    assert {path.name for path in place.iterdir()} == before, "nothing is made"


def options_of(name: str) -> list[str]:
    command: Any = cli
    for word in name.removesuffix(" REF CLIP").split():
        command = command.commands[word]
    found = [param for param in command.params if isinstance(param, click.Option) and not param.is_flag]
    return [max(param.opts, key=len) for param in found] or [""]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in COMMANDS for option in options_of(name)]
)
def test_an_odd_value(name: str, option: str) -> None:
    for value in VALUES:
        if value == "/" and option in ("--weights", "--out", "--output"):
            continue  # a search of the whole disk; a folder that is there
        if value == "/" and option in WEIGHTS:
            value = "sample"  # a folder without the whole disk below it, which is searched
        arguments = [*COMMANDS[name], "--json", *([option] if option else []), value]
        result = CliRunner().invoke(cli, arguments)
        what = (value[:20], result.output[-2000:], result.exception)
        assert isinstance(result.exception, SystemExit) or result.exit_code == 0, what
        if result.exit_code:
            error = json.loads(result.stdout.splitlines()[-1])["error"]
            assert error["code"] == "reached" or (result.exit_code in (1, 2) and error["hint"]), what
            assert len(error["message"]) < 600 or len(value) > 600, what
            assert not not_alone(error["hint"]), what
