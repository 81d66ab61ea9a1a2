"""--help in sections, --version, and the completion of shells."""

import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_cli import HEAVY, LISTING

from trt_wan.cli.live import live
from trt_wan.cli.main import cli
from trt_wan.cli.preprocess import preprocess
from trt_wan.cli.run import run
from trt_wan.cli.sections import OTHERS, SECTIONS, section_of
from trt_wan.runtime.device.driver import has_nvidia_gpu, nvidia_smi
from trt_wan.runtime.sampling.grids import GRIDS
from trt_wan.runtime.sampling.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) echo "NVIDIA H200, 143771 MiB, 580.95.05"; echo "NVIDIA L4, 23034 MiB, 580.95.05" ;;
  *) echo "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |" ;;
esac
"""


def sections(text: str) -> dict[str, list[str]]:
    """The options of every section of a --help."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"\w.*:", line):
            found[line[:-1]] = []
        elif option := re.match(r"  (?:-\w, )?(--[\w-]+)", line):
            found[list(found)[-1]].append(option[1])
    return found


@pytest.mark.parametrize("command", [run, preprocess, live])
def test_every_option_is_in_one_section(command: click.Command) -> None:
    shown = sections(CliRunner().invoke(command, ["--help"]).stdout)
    assert shown[OTHERS] == ["--json", "--quiet", "--help"]
    assert list(shown)[-1] == OTHERS and [name for name in SECTIONS if name in shown] == list(shown)[:-1]
    options = [option for option in command.params if isinstance(option, click.Option)]
    listed = [option for found in shown.values() for option in found]
    assert len(listed) == len(set(listed)) == len(options) + 1, "and --help"
    assert {section_of(option.name) for option in options} - {OTHERS} == set(shown) - {OTHERS}


def test_the_sections_of_run() -> None:
    shown = sections(CliRunner().invoke(run, ["--help"]).stdout)
    assert list(shown) == [*SECTIONS, OTHERS] == [
        "Video", "Context windows", "Sampling", "Guidance", "Camera", "Identity", "People",
        "Masks (mode replace)", "Weights", "Machine", "Other"
    ]  # fmt: skip
    assert {"--size", "--audio"} <= set(shown["Video"]) and "--seed" in shown["Sampling"]
    assert "--point" in shown["People"] and "--vram" in shown["Machine"]


def test_no_name_is_in_two_sections() -> None:
    names = [name for names in SECTIONS.values() for name in names]
    assert len(names) == len(set(names))


# --- --version -------------------------------------------------------------------------------------------


def with_smi(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quickly: nothing heavy is imported. The GPUs are those of a made-up nvidia-smi."""
    with_smi(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    listing = tmp_path / "modules"
    start = time.perf_counter()
    command = [sys.executable, "-c", LISTING, str(listing), "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - start
    rows = [tuple(re.split(r"  +", line)) for line in shown.splitlines()]
    assert rows[0] == ("trt-wan", version("trt-wan"))
    assert rows[1][0] == "Python" and rows[1][1].startswith("{}.{}.{}".format(*sys.version_info))
    assert ("torch", f"{version('torch')} (torch)") in rows
    assert [row[0] for row in rows].count("TensorRT") == 1
    assert rows[-2:] == [
        ("GPU", "NVIDIA H200, 143771 MiB, driver 580.95.05, CUDA 13.0"),
        ("GPU", "NVIDIA L4, 23034 MiB, driver 580.95.05, CUDA 13.0"),
    ]
    assert not set(listing.read_text().split()) & (HEAVY | {"numpy", "onnxruntime", "cuda"})
    assert seconds < 1.5, "a second, on a machine that is busy"


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi() == []
    shown = CliRunner().invoke(cli, ["--version"])
    assert shown.exit_code == 0 and re.search("^GPU +no NVIDIA driver answers$", shown.stdout, re.MULTILINE)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert nvidia_smi() == []


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x10de", "0x030200", True),  # a 3D controller
        ("0x10de", "0x040300", False),  # the sound of an NVIDIA card
        ("0x1002", "0x030000", False),  # AMD
    ],
)
def test_a_gpu_without_a_driver_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, kind: str, expected: bool
) -> None:
    monkeypatch.setattr("trt_wan.runtime.device.driver.DEVICE_FILES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    (tmp_path / "0000:02:00.0").mkdir()  # a device without the files
    assert has_nvidia_gpu(tmp_path) is expected


# --- Shells ----------------------------------------------------------------------------------------------

# The program `trt-wan` of an installation: its name decides the variable that a shell sets.
PROGRAM = "import sys; sys.argv[0] = 'trt-wan'; from trt_wan.__main__ import main; main()"


def complete(**variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_of_the_readme_makes_a_completion(shell: str) -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"_TRT_WAN_COMPLETE={shell}_source trt-wan" in readme
    script = complete(_TRT_WAN_COMPLETE=f"{shell}_source")
    assert f"_TRT_WAN_COMPLETE={shell}_complete" in script and "trt-wan" in script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("trt-wan pre", ["preprocess"]),
        ("trt-wan run --pose-", ["--pose-end", "--pose-start", "--pose-strength"]),
        ("trt-wan run --sampler ", list(SAMPLERS)),
        ("trt-wan run --grid ", list(GRIDS)),
        ("trt-wan bench ", ["calibrate-cache", "compare", "preprocess", "quality", "sweep", "vae", "window"]),
    ],
)
def test_a_shell_is_offered_the_words(words: str, offered: list[str]) -> None:
    last = str(len(words.split(" ")) - 1)
    shown = complete(_TRT_WAN_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=last)
    assert {line.partition(",")[2] for line in shown.splitlines()} == set(offered)
