"""The README is a contract: its commands parse, its demo does what it says, its Python example runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_clips import FakePeople, FakeSegmenter, write_clip, write_reference

import trt_wan.preprocess.stages
from trt_wan.cli.demo import DEMO_SAMPLE
from trt_wan.cli.main import cli
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.presets import PRESETS, Preset
from trt_wan.runtime.published.files import ALL, FEW_STEPS, FILES, spoken_size
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.serve.metrics import Metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "serving.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_ci_runs_the_readme_test_command() -> None:
    (test_command,) = [
        line for block in blocks("sh") for line in block.splitlines() if "scripts/check" in line
    ]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(("text", "least"), [(README, 20), (GUIDE, 3)], ids=["README", "serving"])
def test_commands_parse(text: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0] for block in blocks("sh", text) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("trt-wan ")]
    commands = [words for words in commands if words[1:] != ["--version"]]  # would end the test
    assert len(commands) >= least
    for _, name, *arguments in commands:
        for argument in arguments:  # what is named has to be there
            if argument.endswith("/"):
                Path(argument).mkdir(parents=True, exist_ok=True)
            elif Path(argument).suffix in (".png", ".mp4", ".onnx", ".safetensors", ".json"):
                Path(argument).touch()
        cli.commands[name].make_context(name, arguments)


def test_the_guide_to_serving_names_what_there_is() -> None:
    metrics = Metrics(lambda: 0, lambda: 0, lambda: 0).text().decode()
    for name in re.findall(r"`(trt_wan_\w+)`", GUIDE):
        assert f"\n# TYPE {name} " in metrics, name
    options = {option for parameter in cli.commands["serve"].params for option in parameter.opts}
    for option in re.findall(r"^\| `(--[a-z-]+)`", GUIDE, re.MULTILINE):
        assert option in options
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert set(copied) == set(packages["wheel"]["packages"])


def as_table(*rows: tuple[str, ...]) -> str:
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((head, "|" + "---|" * len(rows[0]), *others)) + "\n"


def test_every_row_of_the_differences_has_a_figure() -> None:
    _, _, after = README.partition("\n| what | against | difference |\n")
    table, _, _ = after.partition("\n\n")
    figures = [line.strip("| ").rpartition("|")[2].strip() for line in table.splitlines()[1:]]
    assert len(figures) > 8 and all(re.match(r"\d", figure) for figure in figures), figures


def test_the_table_of_files() -> None:
    rows = [
        (
            f"`{f.name}`",
            f.repository,
            f"`{f.folder}/`",
            spoken_size(f.size),
            "all"
            if f.presets == ALL
            else "all but quality20"
            if f.presets == FEW_STEPS
            else ", ".join(f.presets),
            f.licence or "not stated",
        )
        for f in FILES
    ]
    table = as_table(
        ("file", "repository", "in ComfyUI's models/", "size", "presets", "licence stated"), *rows
    )
    assert table in README, f"README needs this table:\n{table}"


def test_the_table_of_presets() -> None:
    def loras(preset: Preset) -> str:
        named = [
            f"{lora.kind} {lora.strength:g}{f' ({lora.mode})' if lora.mode else ''}" for lora in preset.loras
        ]
        return ", ".join(named)

    rows = [
        (f"`{p.name}`", str(r.steps), f"{r.sampler}, {r.grid}", f"{r.shift:g}", f"{r.guidance:g}", loras(p))
        for p in PRESETS.values()
        for r in (p.recipe,)
    ]
    table = as_table(("preset", "steps", "sampler, grid", "shift", "guidance", "LoRAs"), *rows)
    assert table in README, f"README needs this table:\n{table}"


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
    (example,) = [block for block in blocks("python") if "openai" not in block]  # test_serve.py runs that
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
    assert run.stdout == "(21, 192, 320, 3) 12.0\n"


def first_page() -> list[list[str]]:
    """The arguments of the commands of "Make a video", in order."""
    page = README.partition("## Make a video")[2].partition("\n## ")[0]
    found = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in found if line.startswith("trt-wan ")]


@pytest.fixture
def people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up people, in place of MediaPipe, which is not there for every Python."""
    stages = Stages(FakePeople(), FakeSegmenter())
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **options: stages)


def run_lines(lines: list[list[str]]) -> None:
    for arguments in lines:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, (arguments, result.output)


def test_the_first_page_line_by_line_on_the_cpu(
    place: Path, people: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checkout, as it stands. The demo has made the graphs."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRT_WAN_HOME", str(place / "home"))
    (place / "trt_wan").symlink_to(ROOT / "trt_wan")
    lines = first_page()[:3]
    assert [(words[0], words[-1]) for words in lines] == [("weights", "tiny/"), ("run", "4"), ("run", "13")]
    run_lines(lines)
    with Clip(DEMO_SAMPLE / "driving.mp4") as driving:
        for name in ("first.mp4", "second.mp4"):
            with Clip(place / name) as made:
                assert (made.width, made.height, made.frames) == (320, 192, driving.frames)


def test_the_first_page_with_files_of_ones_own(
    tmp_path: Path, tiny_home: Path, people: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines for a GPU, with the tiny model, small and short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    write_tiny_weights(tmp_path / "models", seed=5)
    write_reference(tmp_path / "character.png", (64, 48))
    write_clip(tmp_path / "dance.mp4", 15, (64, 48), codec="libx264")
    lines, others = first_page()[3:9], first_page()[9:]
    assert lines[0] == ["--version"] and lines[-1][0] == "join" and len(lines) == 6
    assert [words[0] for words in others] == ["live", "run"]  # test_live_run.py, test_gpus.py
    for name, *words in others:
        cli.commands[name].make_context(name, words)  # refuses options that are not there
    run_lines([lines[0]])
    small = ["--window", "13", "--steps", "1"]
    run_lines(
        [
            [*("5" if word == "10s" else word for word in words), *small]
            + ([] if "--inputs" in words else ["--size", "64x48"])
            for words in lines[1:-1]
        ]
    )
    run_lines([lines[-1]])
    made = {"out.mp4", "again.mp4", "swapped.mp4", "more.mp4", "whole.mp4", "out.inputs"}
    assert made <= {path.name for path in tmp_path.iterdir()}
