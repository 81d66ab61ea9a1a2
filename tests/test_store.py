"""The graph store: a folder counts only when it is whole, and finished graphs stay.

Most builds here write a few bytes where the exporter would write a graph: the store cannot tell, and a build
takes milliseconds. What `trt-wan build` really exports is test_cli.py's and test_pipeline.py's business.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import BUILD, PLAN, as_argv

import trt_wan.build.graphs
from trt_wan.build.beside import Write, helpers
from trt_wan.build.graphs import fill
from trt_wan.engines.config import ANIMATE_14B, TINY, ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import MANIFEST, graph_set, graphs_folder, require_graphs
from trt_wan.engines.store.locks import in_silence
from trt_wan.errors import GraphError

ROOT = Path(__file__).parents[1]
NAMES = list(networks(TINY, PLAN))

# `trt-wan build` with an exporter that needs no torch. It waits for a line on stdin half way through the
# graph that its argument names.
SLOW_BUILD = """
import sys, types

def export(network, model, plan, path):
    with path.open("wb", buffering=0) as file:
        file.write(network.name.encode() * 100)
        if sys.argv[1:] == [network.name]:
            print("half", flush=True)
            sys.stdin.readline()
        file.write(network.name.encode() * 100)

sys.modules["trt_wan.build.export"] = types.SimpleNamespace(export=export)
import trt_wan.build.graphs
from trt_wan.build.graphs import build_graphs
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan

trt_wan.build.graphs.helpers_for = lambda graphs: 0  # they would have the real exporter
made = []
build_graphs(TINY, Plan(64, 48, 13), lambda name, seconds: made.append(name))
print(len(made))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    return tmp_path


def build(model: ModelConfig = TINY, plan: Plan = PLAN) -> tuple[str, ...]:
    """The graphs that had to be built."""
    graphs = graph_set(model, plan)
    with graphs.filling() as missing:
        for name in missing:
            (graphs.folder / f"{name}.onnx").write_bytes(name.encode() * 100)
            graphs.finished(name)
    return missing


def slow_build(half: str = "") -> "subprocess.Popen[str]":
    """A build; with `half` one that has come half way through that graph, and waits there."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, *filter(None, [half])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=stoppable,
    )
    assert process.stdout is not None and (not half or process.stdout.readline() == "half\n")
    return process


def stoppable() -> None:
    """Ctrl-C reaches the process also where the tests run with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_build_is_complete_and_is_not_made_twice(home: Path) -> None:
    assert not graph_set(TINY, PLAN).complete()
    assert build() == tuple(NAMES)
    assert require_graphs(TINY, PLAN) == graphs_folder(TINY, PLAN)
    assert build() == ()


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


def nest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"graphs": ' + "[" * 100_000)


# With the places of the graphs that are exported again.
DAMAGES: dict[str, tuple[Callable[[Path], object], slice]] = {
    "a graph is missing": (lambda folder: (folder / f"{NAMES[0]}.onnx").unlink(), slice(0, 1)),
    "a graph is cut short": (cut, slice(3, 4)),
    "a graph has a flipped bit": (flip, slice(-1, None)),
    "a graph is empty": (lambda folder: (folder / f"{NAMES[1]}.onnx").write_bytes(b""), slice(1, 2)),
    "the manifest lacks a network": (forget, slice(2, 3)),
    "the manifest is missing": (lambda folder: (folder / MANIFEST).unlink(), slice(None)),
    "the manifest is cut short": (lambda folder: os.truncate(folder / MANIFEST, 100), slice(None)),
    "the manifest is another JSON": (lambda folder: (folder / MANIFEST).write_text("[]"), slice(None)),
    "the manifest is not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), slice(None)),
    "the manifest is nested without end": (nest, slice(None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_what_is_damaged_alone_is_built_again(
    home: Path, damage: str
) -> None:
    build()
    folder = graphs_folder(TINY, PLAN)
    harm, place = DAMAGES[damage]
    harm(folder)
    wanted = tuple(NAMES[place])
    assert graph_set(TINY, PLAN).missing() == wanted
    state = (
        "not built" if wanted == tuple(NAMES) else f"not complete: 1 of {len(NAMES)} are missing or damaged"
    )
    with pytest.raises(GraphError, match=f"are {state}") as caught:
        require_graphs(TINY, PLAN)
    assert caught.value.hint == f"Run:\n{BUILD}"
    assert build() == wanted
    assert require_graphs(TINY, PLAN) == folder


def test_graphs_of_releases_that_kept_complete_sets_alone_still_count(home: Path) -> None:
    build()
    manifest = graphs_folder(TINY, PLAN) / MANIFEST
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: values[name] for name in ("graphs", "sha256")}))
    assert build() == ()


def test_a_build_that_lacks_a_graph_does_not_count(home: Path) -> None:
    build()
    (graphs_folder(TINY, PLAN) / f"{NAMES[5]}.onnx").unlink()
    assert not graph_set(TINY, PLAN).complete()


def test_a_failed_build_keeps_its_error_and_its_finished_graphs(home: Path) -> None:
    graphs = graph_set(TINY, PLAN)
    with pytest.raises(RuntimeError, match="out of luck"), graphs.filling() as missing:
        (graphs.folder / f"{missing[0]}.onnx").write_bytes(b"whole")
        graphs.finished(missing[0])
        (graphs.folder / f"{missing[1]}.onnx").write_bytes(b"half")
        raise RuntimeError("out of luck")
    assert build() == tuple(NAMES[1:])


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGINT,
        signal.SIGKILL,
        *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_a_stopped_build_goes_on_where_it_was(home: Path, how: signal.Signals) -> None:
    """Stopped while the first, some middle and the last graphs are being written."""
    folder = graphs_folder(TINY, PLAN)
    for place in (0, 6, 13, len(NAMES) - 1):
        process = slow_build(half=NAMES[place])
        process.send_signal(how)
        process.wait(20)
        assert graph_set(TINY, PLAN).missing() == tuple(NAMES[place:]), "the graphs before are kept"
        with pytest.raises(GraphError):
            require_graphs(TINY, PLAN)
    (folder / f"{NAMES[0]}.onnx.123.partial").touch()
    out, err = slow_build().communicate(timeout=20)
    assert out == "1\n", err
    assert graph_set(TINY, PLAN).complete()
    assert {path.suffix for path in (home / "graphs").iterdir()} <= {folder.suffix, ".lock"}
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *(f"{name}.onnx" for name in NAMES)}


def test_a_helper_exports_graphs_and_stops_at_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that it gets copies files of its folder."""
    monkeypatch.chdir(tmp_path)
    Path("first").write_bytes(b"1")
    Path("second").write_bytes(b"2")
    done: list[str] = []

    def work(write: Write) -> None:
        assert threading.current_thread() is not threading.main_thread()
        for name in ("first", "second", "missing", "first"):
            write(name, tmp_path / f"{name}.onnx")
            done.append(name)

    with helpers(1, shutil.copyfile, work) as wait:
        wait()
    assert done == ["first", "second"]
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.onnx"))] == [b"1", b"2"]


def only_here(name: str, path: Path) -> None:
    """A helper cannot import the tests, and ends."""
    time.sleep(0.01)
    path.write_text(name)


def test_without_its_helpers_a_build_does_everything_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_wan.build.graphs, "helpers_for", lambda graphs: 2)
    made: list[str] = []
    folder = fill(graph_set(TINY, PLAN), only_here, lambda name, seconds: made.append(name), in_silence)
    assert sorted(made) == sorted(NAMES) and graph_set(TINY, PLAN).complete()
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *(f"{name}.onnx" for name in NAMES)}


def test_two_builds_at_once_wait_for_each_other(home: Path) -> None:
    first, second = slow_build(half=NAMES[3]), slow_build()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    made = [process.communicate(line, timeout=20) for process, line in ((first, "\n"), (second, ""))]
    assert [int(out) for out, _ in made] == [len(NAMES), 0], made
    assert graph_set(TINY, PLAN).complete()


# Holds a lock until its stdin ends: python -c HOLD FILE
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_build_that_waits_says_for_which_process_and_stops_at_ctrl_c(home: Path) -> None:
    lock = home / "graphs" / f"{graphs_folder(TINY, PLAN).name}.lock"
    lock.parent.mkdir()
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    command = [*as_argv(BUILD), "--json"]
    waiting = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=stoppable)
    assert waiting.stdout is not None
    events = map(json.loads, waiting.stdout)
    note = next(event for event in events if event.get("code") == "waiting_for_lock")
    process = holder.pid if sys.platform == "linux" else None
    assert note["data"] == {"lock": str(lock), "process": process}
    assert note["text"].startswith("Waiting for") and str(lock) in note["text"]
    waiting.send_signal(signal.SIGINT)
    *_, ended = events
    _, err = waiting.communicate(timeout=20)
    assert (waiting.returncode, ended["error"]["code"], err) == (130, "interrupted", "")
    assert "Finished graphs stay: the same command goes on from there." in ended["error"]["hint"]
    holder.communicate("")


def test_a_file_in_place_of_the_folder_gives_way(home: Path) -> None:
    folder = graphs_folder(TINY, PLAN)
    folder.parent.mkdir()
    folder.touch()
    assert not graph_set(TINY, PLAN).complete()
    assert build() == tuple(NAMES) and folder.is_dir()


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
