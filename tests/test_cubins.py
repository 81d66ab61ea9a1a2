"""Compiled kernels on disk: compiled once, for what decides them, and again where the file is not whole."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_wan.runtime.device import cubins, kernels


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def one_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "_compiler", lambda: ("libnvrtc.so", "100", "200"))


def counting(code: bytes) -> tuple[list[bytes], Callable[[], bytes]]:
    made: list[bytes] = []

    def compile() -> bytes:
        made.append(code)
        return code

    return made, compile


def test_code_is_compiled_once(one_compiler: None) -> None:
    made, compile = counting(b"code")
    assert [cubins.kept(("source", "sm_90"), compile) for _ in range(3)] == [b"code"] * 3
    assert len(made) == 1
    assert [path.suffix for path in cubins.folder().iterdir()] == [".cubin"], "nothing partial is left"


def test_whatever_decides_the_code_makes_it_anew(one_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, compile = counting(b"code")
    for origin in (("source", "sm_90"), ("source", "sm_89"), ("other", "sm_90"), ("source", "sm_90", "A=1")):
        cubins.kept(origin, compile)
    monkeypatch.setattr(cubins, "_compiler", lambda: ("libnvrtc.so", "100", "201"))
    cubins.kept(("source", "sm_90"), compile)
    assert len(made) == 5


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:-1] + b"x"],
    ids=["empty", "cut", "longer", "edited"],
)
def test_a_damaged_file_is_made_again(one_compiler: None, damage: Callable[[bytes], bytes]) -> None:
    made, compile = counting(b"some code")
    cubins.kept(("source",), compile)
    (path,) = cubins.folder().iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cubins.kept(("source",), compile) == cubins.kept(("source",), compile) == b"some code"
    assert len(made) == 2


def test_what_cannot_be_kept_is_compiled_every_time(
    one_compiler: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, compile = counting(b"code")
    (home / "kernels").write_text("a file where the folder should be")
    assert [cubins.kept(("source",), compile) for _ in range(2)] == [b"code"] * 2
    monkeypatch.setattr(cubins, "_compiler", lambda: None)
    assert cubins.kept(("source",), compile) == b"code"
    assert len(made) == 3


def compiled(major: int, minor: int) -> bytes:
    return bytes(kernels.compile_source(kernels.SOURCE, (major, minor)).code)


def test_kept_kernels_are_those_that_nvrtc_made(nvrtc: None, home: Path) -> None:
    first = compiled(9, 0)
    (path,) = cubins.folder().iterdir()
    before = path.stat().st_mtime_ns
    assert compiled(9, 0) == first and path.stat().st_mtime_ns == before
    path.unlink()
    assert compiled(9, 0) == first, "the same code every time"
    assert compiled(8, 9) != first


def test_the_same_code_is_loaded_once_a_process(nvrtc: None, home: Path) -> None:
    """A library stays on the GPU until the process ends, as many times as it was loaded. Objects are compared
    by id: without a driver, their repr in a failure's report would wait for ever.
    """
    made = []
    for capability in ((9, 0), (9, 0), (8, 9)):
        made.append(kernels.compile_source(kernels.SOURCE, capability))
        for path in cubins.folder().iterdir():
            path.unlink()
    first, again, other = map(id, made)
    assert again == first != other


# Prints how often the code was made.
PROCESS = """
import os, sys
from pathlib import Path
from on_gpu import with_kernels
from trt_wan.runtime.device import cubins
os.environ["TRT_WAN_HOME"] = str(with_kernels(Path(sys.argv[1])))
made = []
assert cubins.kept(("source",), lambda: made.append(1) or b"code") == b"code"
print(len(made))
"""


@pytest.mark.parametrize("shared", [True, False])
def test_test_files_may_share_kernels(
    nvrtc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Two at a time, as test workers and ranks are."""
    monkeypatch.delenv("KERNELS_OF_TESTS", raising=False)
    if shared:
        monkeypatch.setenv("KERNELS_OF_TESTS", str(tmp_path / "machine"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))

    def made(*names: str) -> list[int]:
        commands = [[sys.executable, "-c", PROCESS, str(tmp_path / name)] for name in names]
        running = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in commands]
        return [int(each.communicate()[0]) for each in running]

    assert 1 <= sum(made("a", "a")) <= 2
    assert made("a", "b") == ([0, 0] if shared else [0, 1])
    assert (tmp_path / "a" / "kernels").is_symlink() == (tmp_path / "machine").exists() == shared
    assert len([*tmp_path.rglob("*.cubin")]) == (1 if shared else 2), "nothing partial is left"
