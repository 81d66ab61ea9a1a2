"""The command that installs an extra, for every way in which trt-wan can have been installed."""

import json
import shlex
from importlib.metadata import Distribution, PathDistribution, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from trt_wan import install
from trt_wan.install import install_command

METADATA = """Metadata-Version: 2.4
Name: trt-wan
Version: 0.1.0
Requires-Dist: numpy>=1.26
Requires-Dist: filelock>=3.13
Provides-Extra: rtx
Provides-Extra: mac
Requires-Dist: nvidia-cuda-nvrtc; extra == 'rtx'
Requires-Dist: tensorrt-rtx<1.8,>=1.6; extra == 'rtx'
Requires-Dist: nvidia-cutlass-dsl[cu13]<4.9; (sys_platform != 'nowhere') and extra == 'rtx'
Requires-Dist: never; (sys_platform == 'nowhere') and extra == 'rtx'
"""
PACKAGES = ["nvidia-cuda-nvrtc", "tensorrt-rtx<1.8,>=1.6", "nvidia-cutlass-dsl[cu13]<4.9"]
GIT = {"url": "https://example.com/w/trt-wan.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b3c"}}


def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Any, installer: str = "pip"
) -> list[str]:
    """The words of the command, for an installation with this direct_url.json (None: it has none)."""
    folder = tmp_path / "trt_wan-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    (folder / "INSTALLER").write_text(f"{installer}\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(origin if isinstance(origin, str) else json.dumps(origin))
    monkeypatch.setattr(install, "distribution", lambda name: PathDistribution(folder))
    line = install_command("rtx")
    assert "\n" not in line
    return shlex.split(line)


@pytest.mark.parametrize(
    ("editable", "words"), [(True, ["pip", "install", "-e"]), (False, ["pip", "install"])]
)
def test_from_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, editable: bool, words: list[str]
) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    origin = {"url": checkout.as_uri(), "dir_info": {"editable": True} if editable else {}}
    assert command(monkeypatch, tmp_path, origin) == [*words, f"{checkout}[rtx]"]


def test_from_a_wheel_that_is_still_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "trt_wan-0.1.0-py3-none-any.whl"
    wheel.touch()
    origin = {"url": wheel.as_uri(), "archive_info": {"hash": "sha256=00"}}
    assert command(monkeypatch, tmp_path, origin) == ["pip", "install", f"{wheel}[rtx]"]


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (GIT, "trt-wan[rtx] @ git+https://example.com/w/trt-wan.git@1a2b3c"),
        (
            GIT | {"subdirectory": "tools/wan"},
            "trt-wan[rtx] @ git+https://example.com/w/trt-wan.git@1a2b3c#subdirectory=tools/wan",
        ),
        (
            {"url": "https://example.com/trt_wan-0.1.0-py3-none-any.whl", "archive_info": {}},
            "trt-wan[rtx] @ https://example.com/trt_wan-0.1.0-py3-none-any.whl",
        ),
    ],
)
def test_from_a_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Any, requirement: str) -> None:
    assert command(monkeypatch, tmp_path, origin) == ["pip", "install", requirement]
    parsed = Requirement(requirement)
    assert (parsed.name, parsed.extras) == ("trt-wan", {"rtx"}) and parsed.url


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "",
        "{",
        "[1]",
        '{"url": 3}',
        {"url": "file:///gone/away", "dir_info": {"editable": True}},
        {"vcs_info": {}},
    ],
)
def test_any_other_way_names_the_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Any
) -> None:
    assert command(monkeypatch, tmp_path, origin) == ["pip", "install", *PACKAGES]


def test_by_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its environments have no pip."""
    assert command(monkeypatch, tmp_path, None, "uv")[:3] == ["uv", "pip", "install"]


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Distribution:
        raise install.PackageNotFoundError(name)

    monkeypatch.setattr(install, "distribution", nothing)
    root = Path(__file__).parents[1]
    assert shlex.split(install_command("build")) == ["pip", "install", "-e", f"{root}[build]"]


@pytest.mark.parametrize("extra", ["build", "rtx", "tensorrt", "hopper", "mediapipe"])
def test_every_extra_of_a_hint_has_packages(extra: str) -> None:
    """Read from the metadata of this very installation, which the pyproject.toml made."""
    installed = install.distribution("trt-wan")
    names = [Requirement(line).name for line in install._packages(installed, extra)]
    assert names or extra == "mediapipe", "MediaPipe has no release for newer Pythons"
    assert "trt-wan" not in names and "numpy" not in names


def test_extras_may_be_installed_one_after_the_other() -> None:
    """MediaPipe 0.10.14 takes protobuf 4 alone; onnx 1.23 needs 6, and pip broke one for the other."""
    needed = map(Requirement, requires("onnx") or ())
    (protobuf,) = (one for one in needed if one.name == "protobuf")
    assert protobuf.specifier.contains("4.25.9")
