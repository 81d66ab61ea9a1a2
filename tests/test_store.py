"""The graph store: a folder counts only when it is whole, whatever was killed, cut or changed.

Most builds here write a few bytes where the exporter would write a graph: the store cannot tell, and a build
takes milliseconds. What `trt-wan build` really exports is test_cli.py's and test_pipeline.py's business.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import BUILD, PLAN

from trt_wan.engines.config import ANIMATE_14B, TINY, ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import MANIFEST, graph_set, graphs_folder, require_graphs
from trt_wan.errors import GraphError

ROOT = Path(__file__).parents[1]
NAMES = list(networks(TINY, PLAN))

# `trt-wan build` with an exporter that needs no torch and takes 8 ms per graph, four writes each.
SLOW_BUILD = """
import sys, time, types

def export(network, model, plan, path):
    with path.open("wb", buffering=0) as file:
        for _ in range(4):
            file.write(network.name.encode() * 100)
            time.sleep(0.002)

sys.modules["trt_wan.build.export"] = types.SimpleNamespace(export=export)
from trt_wan.build.graphs import build_graphs
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan

made = []
build_graphs(TINY, Plan(64, 48, 13), lambda name, seconds: made.append(name))
print(len(made))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    return tmp_path


def fill(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.onnx").write_bytes(name.encode() * 100)


def build(model: ModelConfig = TINY, plan: Plan = PLAN) -> bool:
    """Whether anything had to be built."""
    with graph_set(model, plan).filling() as folder:
        if folder is not None:
            fill(folder)
    return folder is not None


def slow_build() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.001)


def test_a_build_is_complete_and_is_not_made_twice(home: Path) -> None:
    assert not graph_set(TINY, PLAN).complete()
    assert build()
    assert require_graphs(TINY, PLAN) == graphs_folder(TINY, PLAN)
    assert not build()


def test_graphs_that_are_not_there_are_named_with_their_command(home: Path) -> None:
    with pytest.raises(GraphError, match="are not built") as caught:
        require_graphs(TINY, PLAN)
    assert caught.value.hint == f"Run:\n{BUILD}"
    assert shlex.join(("trt-wan", *caught.value.command)) == BUILD
    assert str(graphs_folder(TINY, PLAN)) in caught.value.message
    with pytest.raises(GraphError, match="fp8, are not built") as caught:
        require_graphs(TINY, replace(PLAN, precision="fp8"))
    assert caught.value.hint == f"Run:\n{BUILD.replace('fp32', 'fp8')}"


def cut(folder: Path) -> None:
    graph = folder / f"{NAMES[3]}.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])


def flip(folder: Path) -> None:
    graph = folder / f"{NAMES[-1]}.onnx"
    graph.write_bytes(bytes([graph.read_bytes()[0] ^ 1]) + graph.read_bytes()[1:])


def forget(folder: Path) -> None:
    """A manifest that does not know one of the networks, as if it were of an older version."""
    manifest = (folder / MANIFEST).read_text().splitlines()
    (folder / MANIFEST).write_text("\n".join(line for line in manifest if f'"{NAMES[2]}"' not in line))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a graph is missing": lambda folder: (folder / f"{NAMES[0]}.onnx").unlink(),
    "a graph is cut short": cut,
    "a graph has a flipped bit": flip,
    "a graph is empty": lambda folder: (folder / f"{NAMES[1]}.onnx").write_bytes(b""),
    "the manifest is missing": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest is cut short": lambda folder: os.truncate(folder / MANIFEST, 100),
    "the manifest is another JSON": lambda folder: (folder / MANIFEST).write_text("[]"),
    "the manifest is not text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "the manifest lacks a network": forget,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_rebuilt(home: Path, damage: str) -> None:
    build()
    folder = graphs_folder(TINY, PLAN)
    DAMAGES[damage](folder)
    assert not graph_set(TINY, PLAN).complete()
    with pytest.raises(GraphError, match="are damaged") as caught:
        require_graphs(TINY, PLAN)
    assert caught.value.hint == f"Run:\n{BUILD}"
    assert build()
    assert require_graphs(TINY, PLAN) == folder


def test_a_build_that_lacks_a_graph_does_not_count(home: Path) -> None:
    with graph_set(TINY, PLAN).filling() as folder:
        assert folder is not None
        fill(folder)
        (folder / f"{NAMES[5]}.onnx").unlink()
    assert not graph_set(TINY, PLAN).complete()


def test_a_failed_build_leaves_nothing_and_keeps_its_error(home: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"), graph_set(TINY, PLAN).filling() as folder:
        assert folder is not None
        fill(folder)
        raise RuntimeError("out of luck")
    assert [path.suffix for path in (home / "graphs").iterdir()] == [".lock"]
    assert build()


def test_killed_builds_never_count(home: Path) -> None:
    """Killed while the first, some middle and the last graphs are being written."""
    folder = graphs_folder(TINY, PLAN)
    for name in (NAMES[0], NAMES[6], NAMES[13], NAMES[-1]):
        process = slow_build()
        wait_for(folder.with_name(f"{folder.name}.partial") / f"{name}.onnx")
        process.kill()
        process.communicate()
        assert not graph_set(TINY, PLAN).complete(), name
        with pytest.raises(GraphError):
            require_graphs(TINY, PLAN)
    out, err = slow_build().communicate(timeout=20)
    assert out == f"{len(NAMES)}\n", err
    assert graph_set(TINY, PLAN).complete()
    assert {path.suffix for path in (home / "graphs").iterdir()} <= {folder.suffix, ".lock"}


def test_two_builds_at_once_wait_for_each_other(home: Path) -> None:
    folder = graphs_folder(TINY, PLAN)
    first = slow_build()
    wait_for(folder.with_name(f"{folder.name}.partial") / f"{NAMES[0]}.onnx")
    second = slow_build()
    made = [process.communicate(timeout=20) for process in (first, second)]
    assert [int(out) for out, _ in made] == [len(NAMES), 0], made
    assert graph_set(TINY, PLAN).complete()


def test_builds_of_different_plans_do_not_wait(home: Path) -> None:
    with graph_set(TINY, PLAN).filling():
        assert build(TINY, replace(PLAN, width=80))


def test_every_model_and_plan_has_its_own_folder(home: Path) -> None:
    plans = [
        PLAN,
        replace(PLAN, width=80),
        replace(PLAN, height=64),
        replace(PLAN, frames=9),
        replace(PLAN, precision="bf16"),
        replace(PLAN, vae_chunk=3),
        replace(PLAN, face_batch=4),
    ]
    other_tiny = replace(TINY, image=replace(TINY.image, layers=4))
    folders = {graphs_folder(model, plan) for model in (TINY, other_tiny, ANIMATE_14B) for plan in plans}
    assert len(folders) == 3 * len(plans)
    assert graphs_folder(TINY, PLAN) == graphs_folder(replace(TINY), replace(PLAN))


def test_reworded_comments_leave_the_folder_and_a_new_version_does_not(tmp_path: Path) -> None:
    """Graphs of a release that explains itself better are the users' graphs still."""
    for name in ("trt_wan", "engines", "build", "runtime"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def keys() -> list[str]:
        program = (
            "from trt_wan.engines import config, shape as plan\n"
            "from trt_wan.engines.sam2 import config as sam2, recipes\n"
            "from trt_wan.engines.store import graphs as store\n"
            "sets = store.graph_set(config.TINY, plan.Plan()), recipes.graph_set(\n"
            "    sam2.SAM2_MODELS['sam2.1_tiny'], sam2.Sam2Plan())\n"
            "print(store.__file__, *(each.folder.name for each in sets))"
        )
        command = [sys.executable, "-c", program]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        printed = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        file, *names = printed.split()
        assert file.startswith(str(tmp_path)), f"not the copy: {file}"
        return names

    before = keys()
    for source in (
        "build/models/ops.py",
        "build/sam2/encoder.py",
        "build/export.py",
        "engines/contracts/head.py",
        "engines/sam2/contracts.py",
        "engines/config.py",
    ):
        text = (tmp_path / source).read_text()
        (tmp_path / source).write_text(text.replace('"""', '"""Reworded: ', 1) + "\n# and a comment\n")
    assert keys() == before
    for i, source in enumerate(("engines/contracts/__init__.py", "engines/sam2/contracts.py")):
        text = (tmp_path / source).read_text()
        (tmp_path / source).write_text(text.replace("GRAPHS_VERSION = ", "GRAPHS_VERSION = 10"))
        changed = keys()
        assert changed[i] != before[i] and changed[i + 1 :] == before[i + 1 :]


def test_without_trt_wan_home_graphs_live_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRT_WAN_HOME", raising=False)
    folder = graphs_folder(TINY, PLAN)
    assert folder.is_absolute() and ROOT not in folder.parents
