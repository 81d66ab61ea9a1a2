"""`trt-wan list`, `show` and `rm` for everything that is no engine: without a GPU, and without TensorRT."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_job import BUILD, PLAN

from trt_wan.cli.main import cli
from trt_wan.engines.config import TINY
from trt_wan.engines.store.graphs import graph_set
from trt_wan.engines.store.locks import held

KEY = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2
OLD = 3600  # s


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def data_of(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1])["data"])


def refused(exit_code: int, *arguments: str) -> tuple[str, str]:
    result = invoke(*arguments, "--json")
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert result.exit_code == exit_code, result.output
    return error["message"], error["hint"]


def put(path: Path, size: int, age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


# Files by the row that they belong to, with sizes that tell the sums apart. "": an engine's.
FILES = {
    f"engines/{KEY}.plan": ("", 1),
    f"engines/{KEY}.checked": ("", 1 << 1),
    f"engines/{OTHER}.plan.77.partial": ("leftovers", 1 << 2),
    "engines/README.txt": ("unknown", 1 << 3),
    f"engines/locks/{KEY}.lock": ("locks", 0),
    "graphs/small/head.onnx": ("graphs/small", 1 << 4),
    "graphs/small/ffn.onnx.partial": ("leftovers", 1 << 5),
    "graphs/old.partial/head.onnx": ("leftovers", 1 << 6),
    "graphs/small.lock": ("locks", 0),
    "graphs/smaller/head.onnx": ("graphs/smaller", 1 << 7),
    "graphs/notes.txt": ("unknown", 1 << 8),
    "kernels/cubin/a.cubin": ("kernels", 1 << 9),
    "kernels/tensorrt_rtx/b.kernels": ("kernels", 1 << 10),
    "kernels/cubin/a.cubin.77.partial": ("leftovers", 1 << 11),
    "measurements/a.json": ("measurements", 1 << 12),
    "measurements/a.lock": ("locks", 0),
    "timings": ("leftovers", 1 << 13),  # a file in place of a folder
    "onnx/a.json": ("onnx", 1 << 14),
    "text/a.features": ("text", 1 << 15),
    "weights/tiny/a.safetensors": ("weights", 1 << 16),
    "weights/.making-x/src_pose.mp4": ("leftovers", 1 << 17),
    "my own/film.mp4": ("unknown", 1 << 18),
    "letter.txt": ("unknown", 1 << 19),
    "step_cache/a-20.json": ("step_cache", 1 << 20),
}

# Leftovers, and a lock, that go with a row.
PARTS = {
    "graphs/small": {"graphs/small.lock", "graphs/small/ffn.onnx.partial"},
    "kernels": {"kernels/cubin/a.cubin.77.partial"},
    "weights": {"weights/.making-x/src_pose.mp4"},
}


@pytest.fixture
def full(home: Path) -> Path:
    for name, (_, size) in FILES.items():
        put(home / name, size, OLD)
    return home


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


def test_every_file_is_in_one_row(full: Path) -> None:
    wanted: dict[str, int] = {}
    for row, size in FILES.values():
        if row:
            wanted[row] = wanted.get(row, 0) + size
    data = data_of("list")
    assert {row["name"]: row["bytes"] for row in data["folders"]} == wanted
    assert data["bytes"] == 3 and data["total_bytes"] == sum(size for _, size in FILES.values())
    assert data["home"] == str(full)
    told = invoke("list").stdout
    assert all(f"\n{row} " in told for row in wanted)
    assert told.endswith(f"\n2.10 MB in {full}\n")


def test_everything_is_removed_but_what_others_made(full: Path) -> None:
    left = {name for name, (row, _) in FILES.items() if row == "unknown"}
    data = data_of("rm", "--all", "--yes")
    assert data["removed"] == [KEY] and "leftovers" in data["folders"] and "unknown" not in data["folders"]
    assert data["freed_bytes"] == sum(size for row, size in FILES.values() if row != "unknown")
    assert files(full) == left
    assert not [path for path in full.rglob("*") if ".making-" in path.name or path.suffix == ".partial"]


@pytest.mark.parametrize("row", ["kernels", "locks", "leftovers", "graphs/small", "weights"])
def test_one_row_is_removed_and_no_file_of_another(full: Path, row: str) -> None:
    gone = {name for name, (of, _) in FILES.items() if of == row}
    gone |= PARTS.get(row, set())
    told = invoke("rm", row, "--yes")
    size = sum(size for of, size in FILES.values() if of == row)
    what = "1 set of graphs" if row == "graphs/small" else row
    assert told.stdout == f"{what} ({readable(size)}) removed\n" and told.exit_code == 0
    assert files(full) == set(FILES) - gone


def readable(size: int) -> str:
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.2f} MB"


@pytest.fixture
def builds(full: Path) -> Iterator[None]:
    """Other processes, that are making the engine OTHER and the graphs `small` and `old`. filelock locks are
    per file handle: this process is as good as another.
    """
    with ExitStack() as stack:
        for lock in (f"engines/locks/{OTHER}.lock", "graphs/small.lock", "graphs/old.lock"):
            stack.enter_context(held(full / lock))
        put(full / "kernels/cubin/a.cubin.77.partial", 1 << 11)  # a moment old
        yield


@pytest.mark.usefixtures("builds")
def test_parts_that_a_process_is_making_are_no_leftovers(full: Path) -> None:
    rows = {row["name"]: row["bytes"] for row in data_of("list")["folders"]}
    unfinished = (1 << 2) + (1 << 5) + (1 << 6) + (1 << 11)
    assert (rows["unfinished"], rows["leftovers"]) == (unfinished, (1 << 13) + (1 << 17))
    data_of("rm", "leftovers", "--yes")
    gone = set(FILES) - files(full)
    assert gone == {"timings", "weights/.making-x/src_pose.mp4"}
    message, _ = refused(1, "rm", "graphs/small", "--yes")
    assert message == "Another process is building graphs/small; nothing was removed."


@pytest.mark.parametrize(("row", "what"), [("unknown", "did not make"), ("unfinished", "is making")])
def test_what_is_not_ours_to_remove_is_refused(full: Path, row: str, what: str) -> None:
    message, hint = refused(2, "rm", row, "--yes")
    assert what in message and hint == f"See them:\ntrt-wan show {row}"
    assert files(full) == set(FILES)


def test_rm_says_when_there_was_nothing(home: Path) -> None:
    for names in (["kernels"], ["graphs", "leftovers"]):
        told = invoke("rm", *names, "--yes")
        assert told.stdout == f"There is nothing in {', '.join(names)}. Nothing was removed.\n"
        assert told.exit_code == 0
    assert invoke("rm", "--all", "--yes").stdout.startswith("There is nothing on disk.")


def test_a_set_of_graphs_is_named_by_its_beginning(full: Path) -> None:
    message, hint = refused(2, "rm", "graphs/smal", "--yes")
    assert message == "2 sets of graphs begin with 'graphs/smal'."
    assert hint == "Name one of them: graphs/small, graphs/smaller."
    assert data_of("rm", "graphs/smalle", "--yes")["folders"] == ["graphs/smaller"]
    message, hint = refused(2, "show", "graphs/large")
    assert message == "There is no set of graphs 'graphs/large'." and hint == "Run:\ntrt-wan list"
    assert data_of("rm", "graphs", "--yes")["folders"] == ["graphs/small"]
    message, hint = refused(2, "rm", "kernel", "--yes")
    assert "'kernel'" in message and hint.startswith("Close to it: kernels.")


def export(home: Path, finished: int) -> Path:
    """The folder of the tiny model's graphs, of which some are finished."""
    graphs = graph_set(TINY, PLAN)
    with graphs.filling() as missing:
        for name in missing[:finished]:
            put(graphs.folder / f"{name}.onnx", 10)
            graphs.finished(name)
    return graphs.folder


def test_a_user_without_a_gpu_is_not_told_to_build_again(home: Path) -> None:
    graphs = graph_set(TINY, PLAN)
    export(home, len(graphs.names))
    listed = invoke("list")
    assert listed.stderr == "There are no engines, which a GPU needs. The CPU runs the graphs.\n"
    name = f"graphs/{graphs.folder.name} "
    row = next(line for line in listed.stdout.splitlines() if line.startswith(name))
    assert "the model tiny for 64x48, 13 frames per window, fp32; " in row and row.endswith(BUILD)


def test_show_checks_graphs(home: Path) -> None:
    names = graph_set(TINY, PLAN).names
    folder = export(home, len(names) - 2)
    (row,) = data_of("list")["folders"][:1]
    assert f", {len(names) - 2} of {len(names)} graphs; " in row["about"]
    put(folder / f"{names[0]}.onnx", 9)
    (folder / f"{names[1]}.onnx").unlink()
    (shown,) = data_of("show", "graphs")["folders"]
    states = {file["name"].removesuffix(".onnx"): file["state"] for file in shown["content"]}
    wanted = {names[0]: "damaged", names[1]: "missing", names[-2]: "missing", names[-1]: "missing"}
    assert states == dict.fromkeys(names, "whole") | wanted | {"manifest.json": ""}
    assert f"{names[0]}.onnx" in invoke("show", f"graphs/{folder.name[:8]}").stdout


def test_show_lists_the_files_of_a_row(full: Path) -> None:
    (shown,) = data_of("show", "kernels")["folders"]
    assert {(file["name"], file["bytes"]) for file in shown["content"]} == {
        ("kernels/cubin/a.cubin", 1 << 9),
        ("kernels/tensorrt_rtx/b.kernels", 1 << 10),
    }
    assert "letter.txt" in invoke("show", "unknown").stdout
    assert invoke("show", "timings").stdout == "There is nothing in timings.\n"


def test_folders_may_be_links_to_another_disk(home: Path, tmp_path: Path) -> None:
    put(tmp_path / "disk" / "a.features", 10)
    home.mkdir()
    (home / "text").symlink_to(tmp_path / "disk")
    assert [(row["name"], row["bytes"]) for row in data_of("list")["folders"]] == [("text", 10)]
