"""`trt-wan build --target`, `list`, `show` and `rm`, as a user without a GPU has them.

The tiny model is exported and cross-compiled once, by the commands; every test works on a copy of that store.
"""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import Engines
from tiny_job import BUILD_ENGINES, PLAN, TRT_WAN

import trt_wan.build.goals
import trt_wan.cli.engines
from trt_wan.build.compile import CompileReport, EngineRow
from trt_wan.cli.main import cli
from trt_wan.engines.choice.candidates import CANDIDATES, Engine, Machine
from trt_wan.engines.choice.recipes import engine_names, recipes
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engines import find
from trt_wan.engines.store.entries import entries
from trt_wan.engines.store.locks import held
from trt_wan.engines.store.manifest import Manifest
from trt_wan.engines.store.measurements import Figure, Place, record_figures, title
from trt_wan.errors import EnvironmentBroken, UsageError, shell_command
from trt_wan.runtime.events import CandidateReady, CandidateStep
from trt_wan.runtime.opening.model import choose_precision
from trt_wan.runtime.settings import Settings

pytest.importorskip("tensorrt_rtx", reason="engines are compiled with TensorRT-RTX")

FP8 = Plan(PLAN.width, PLAN.height, PLAN.frames, "fp8")
NAMES = engine_names(TINY, FP8)
FIGURE = Figure(
    "attention", "cudnn", "measured", 38.5, 3.1e-3, 1e-2, "exact", "A GPU", "tensorrt_rtx 1.6", "exact"
)
GRAPHS = len(networks(TINY, FP8))
# Holds a lock until its stdin ends: python -c HOLD FILE
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
BUILD = shlex.split(BUILD_ENGINES)[1:]


def invoke(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(cli, arguments, **options)


def data_of(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    envelope = json.loads(result.stdout.splitlines()[-1])
    assert envelope["ok"]
    return dict(envelope["data"])


def refused(exit_code: int, *arguments: str) -> tuple[str, str]:
    """Message and hint."""
    result = invoke(*arguments, "--json")
    envelope = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, envelope["ok"]) == (exit_code, False), result.output
    return envelope["error"]["message"], envelope["error"]["hint"]


def states(data: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["state"] for row in data["engines"]}


@pytest.fixture
def store(tiny_engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a copy's engines."""
    home = shutil.copytree(tiny_engines.home, tmp_path / "home")
    monkeypatch.setenv("TRT_WAN_HOME", str(home))
    return home / "engines"


@pytest.fixture
def no_engines(tiny_engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that has the graphs alone."""
    shutil.copytree(tiny_engines.home / "graphs", tmp_path / "home" / "graphs")
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "engines"


def manifest(name: str) -> Manifest:
    found = find(recipes(TINY, FP8, "sm89", choose_flavour(None, None))[name].engine)
    assert found is not None
    return found


# --- build -----------------------------------------------------------------------------------------------


def test_a_dry_run_names_everything_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    dry = data_of(*BUILD, "--dry-run")
    assert states(dry) == dict.fromkeys(NAMES, "missing")
    assert len(dry["missing_graphs"]) == GRAPHS and dry["result"] is None
    assert {(row["target"], row["precision"]) for row in dry["engines"]} == {("sm89", "fp8")}
    assert not list(tmp_path.iterdir())


def test_a_build_says_what_it_does_line_by_line(tiny_engines: Engines) -> None:
    """FP8 without being asked, since the target has it; the folder alone on stdout."""
    told = tiny_engines.told
    assert tiny_engines.stdout == f"{tiny_engines.home / 'engines'}\n"
    assert told.startswith("sm89: fp8, tensorrt_rtx ")
    for number, name in enumerate(NAMES, 1):
        assert f"sm89  engine {number}/{len(NAMES)}  {name}  built in " in told
    assert told.count("exported ") == 1 and tiny_engines.exported.count("exported ") == GRAPHS
    assert f"{len(NAMES)} built in" in told


def test_a_second_build_finds_all_and_says_so(store: Path) -> None:
    before = {path.name: path.stat().st_ino for path in store.glob("*.plan")}
    dry = invoke(*BUILD, "--dry-run")
    assert dry.exit_code == 0 and dry.stdout.count(" there ") == len(NAMES)
    assert "would be built" not in dry.stdout and "graphs" not in dry.stderr
    data = data_of(*BUILD)
    assert states(data) == dict.fromkeys(NAMES, "there") and data["graphs"] == data["removed"] == 0
    for row in data["engines"]:
        file = store / f"{row['key']}.plan"
        assert row["bytes"] == file.stat().st_size > 0 and row["seconds"] > 0
    assert {path.name: path.stat().st_ino for path in store.glob("*.plan")} == before


def test_only_what_is_damaged_is_built_again(store: Path) -> None:
    os.truncate(store / f"{manifest('head').key}.plan", 100)
    wanted = {name: "missing" if name == "head" else "there" for name in NAMES}
    dry = data_of(*BUILD, "--dry-run")
    assert states(dry) == wanted and dry["missing_graphs"] == []
    assert invoke(*BUILD, "--dry-run").stdout.count("would be built") == 1
    assert states(data_of(*BUILD)) == wanted | {"head": "built"}
    assert manifest("head").bytes > 100


def test_ctrl_c_keeps_the_finished_engines(no_engines: Path) -> None:
    command = [*TRT_WAN, *BUILD]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    assert any(f"engine 3/{len(NAMES)}" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "Error: Stopped at once.\nFinished engines stay: the same command goes on from there." in err
    there = entries()
    assert 3 <= len(there) < len(NAMES) and all(entry.manifest for entry in there)
    dry = data_of(*BUILD, "--dry-run")
    kept = {name for name, state in states(dry).items() if state == "there"}
    assert kept == set(NAMES[: len(there)])


def test_targets_choose_their_precision_and_share_nothing(no_engines: Path) -> None:
    """Named in one option or in several."""
    data = data_of(*BUILD[:-1], "sm86,SM89", "--target", "sm89", "--dry-run")
    found = [(row["target"], row["precision"]) for row in data["engines"]]
    assert set(found) == {("sm86", "bf16"), ("sm89", "fp8")} and found.count(("sm89", "fp8")) == len(NAMES)
    assert {name.rpartition(" ")[2] for name in data["missing_graphs"]} == {"(bf16)"}


@pytest.mark.parametrize(
    ("options", "exit_code", "says", "fix"),
    [
        (["--target", "sm99"], 2, "'sm99' is no target; there are current, sm80", "build --help"),
        (["--target", "sm120,sm86", "--precision", "fp8"], 2, "target sm86 have no FP8", "--precision bf16"),
        (["--target", "sm89", "--flavour", "tensorrt"], 1, "only for a GPU of this machine", "pip install"),
        (["--target", "sm89", "--window", "12"], 2, "A window of 12 frames", "--window 13"),
    ],
)
def test_build_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], exit_code: int, says: str, fix: str
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    message, hint = refused(exit_code, *BUILD[:-2], *options)
    assert says in message and fix in hint, (message, hint)
    assert not list(tmp_path.iterdir())


class FakeGpu:
    name, capability, driver = "A GPU", (8, 9), 13


def without_gpu() -> None:
    raise EnvironmentBroken("No CUDA device can be used (test).", "on the CPU")


def test_without_a_gpu_it_says_that_it_exports_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    monkeypatch.setattr(trt_wan.build.goals, "Gpu", without_gpu)
    for precision in ("fp32", "bf16", "fp8", "int8"):
        options = ["--precision", precision] if precision != "fp32" else []
        result = invoke(*BUILD[:-2], "--dry-run", *options)
        assert result.exit_code == 0 and f"-{precision}-" in result.stdout
        assert result.stdout.startswith(f"{GRAPHS} graphs would be exported: {tmp_path}")
        assert result.stderr.startswith("Graphs only; engines need a GPU or --target. No CUDA device")
        again = f"trt-wan build --model tiny --size 64x48 --window 13 --precision {precision} --target sm89"
        assert (f"\n{again}\n" in result.stderr) == (precision != "fp32")
        assert ("the CPU runs fp32" in result.stderr) == (precision != "fp32")
    message, hint = refused(1, *BUILD[:-2], "--flavour", "tensorrt_rtx")
    assert "No CUDA device" in message and "Leave --flavour out" in hint
    message, hint = refused(1, *BUILD[:-1], "current")
    assert "No CUDA device" in message and "--target sm89" in hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("capability", "options", "precision"),
    [((8, 9), [], "fp8"), ((8, 6), [], "bf16"), ((8, 9), ["--precision", "fp32"], "fp32")],
)
def test_with_a_gpu_it_builds_for_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    options: list[str],
    precision: str,
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    monkeypatch.setattr(FakeGpu, "capability", capability)
    monkeypatch.setattr(trt_wan.build.goals, "Gpu", FakeGpu)
    asked: list[Any] = []

    def compiled(*arguments: Any, machine: Machine, missing: Any, dry_run: bool) -> Any:
        asked.append((*arguments[:3], arguments[3].name, machine.gpu, machine.capability, dry_run))
        return CompileReport(())

    def tuned(*arguments: Any, again: bool) -> list[Figure]:
        asked.append(again)
        return [FIGURE]

    monkeypatch.setattr(trt_wan.build.goals, "compile_engines", compiled)
    monkeypatch.setattr(trt_wan.build.goals, "autotune", tuned)
    data = data_of(*BUILD[:-2], *options)
    plan = Plan(PLAN.width, PLAN.height, PLAN.frames, precision)  # type: ignore[arg-type]
    build = (TINY, plan, "current", "tensorrt_rtx", GpuKind("A GPU", 13), capability, False)
    assert asked == [build, False] and data["candidates"] == [vars(FIGURE)]
    assert data_of(*BUILD[:-2], *options, "--no-measure")["candidates"] == []
    data_of(*BUILD[:-2], *options, "--measure")
    data_of(*BUILD[:-2], *options, "--dry-run")
    assert asked[2:] == [build, build, True, (*build[:-1], True)]
    message, _ = refused(2, *BUILD, "--measure")
    assert "measured on the GPU" in message


def test_fp8_on_a_gpu_without_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At `build` and at `run`."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    monkeypatch.setattr(FakeGpu, "capability", (8, 6))
    monkeypatch.setattr(trt_wan.build.goals, "Gpu", FakeGpu)
    message, hint = refused(2, *BUILD[:-2], "--precision", "fp8")
    assert message == "Precision fp8 needs compute capability 8.9 or later; this GPU has 8.6."
    assert hint == "Use --precision bf16." and not list(tmp_path.iterdir())
    gpu: Any = FakeGpu()
    with pytest.raises(UsageError, match="this GPU has 8.6"):
        choose_precision(Settings(precision="fp8"), gpu)
    assert choose_precision(Settings(), gpu) == "bf16"


def test_what_could_not_be_built_is_no_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason is the builder's; events and the choice are told line by line."""
    monkeypatch.setattr(trt_wan.build.goals, "Gpu", FakeGpu)
    row = EngineRow("attention", "current", "impossible", None, "It asks for 68 GB.")
    report = CompileReport((row,))
    monkeypatch.setattr(trt_wan.build.goals, "compile_engines", lambda *_, **options: report)
    sentences = []

    def tuned(model: Any, plan: Any, machine: Any, gpu: Any, missing: Any, progress: Any, **_: Any) -> Any:
        sentences.extend(missing(row) for row in CANDIDATES if row.engine == Engine("attention"))
        sentences.extend(missing(row) for row in CANDIDATES if row.engine == Engine("attn_in"))
        progress(CandidateStep("attention", "cudnn", 1, 1))
        f = FIGURE
        ready = CandidateReady(f.network, f.candidate, 1, 1, f.state, f.ms, f.error, f.tolerance, title(f))
        progress(ready)
        return [FIGURE]

    monkeypatch.setattr(trt_wan.build.goals, "autotune", tuned)
    told = invoke(*BUILD[:-2]).stderr.splitlines()
    assert sentences == ["It asks for 68 GB.", None]
    words = "38.50 ms, error 3.1e-03 <= 1.0e-02"
    assert told[-2:] == [
        f"attention  candidate 1/1  cudnn  {words}",
        f"exact: attention = cudnn ({words})",
    ]
    events = [json.loads(line) for line in invoke(*BUILD[:-2], "--json").stdout.splitlines()]
    ready = next(event for event in events if event.get("event") == "CandidateReady")
    assert (ready["ms"], ready["error"], ready["tolerance"]) == (38.5, 3.1e-3, 1e-2)


# --- list and show ---------------------------------------------------------------------------------------


def test_list_shows_what_was_used_last_first(store: Path) -> None:
    newest = manifest("head").key
    os.utime(store / f"{newest}.plan", (time.time() + 60,) * 2)
    data = data_of("list")
    assert data["engines"][0]["key"] == newest and len(data["engines"]) == len(NAMES)
    assert {row["network"] for row in data["engines"]} == set(NAMES)
    assert data["bytes"] == sum(path.stat().st_size for path in store.glob("*.*"))
    first = data["engines"][0]
    described = [first[name] for name in ("kind", "about", "precision", "target")]
    assert described == ["wan", "tiny, 64x48, 13 frames", "fp8", "sm89"]
    assert first["state"] == "whole" and first["gpu"] is None
    engines, _, folders = invoke("list").stdout.partition("\n\n")
    header, row, *rest = engines.splitlines()
    assert header.split()[:4] == ["KEY", "KIND", "ENGINE", "ABOUT"] and len(rest) == len(NAMES) - 1
    assert row.split()[:7] == [newest[:8], "wan", "head", "tiny,", "64x48,", "13", "frames"]
    graphs = next(path.name for path in (store.parent / "graphs").iterdir() if path.is_dir())
    names = [line.split()[0] for line in folders.splitlines() if line]
    assert names[:-1] == ["FOLDER", f"graphs/{graphs}", "locks"]
    assert folders.endswith(f"MB in {store.parent}\n")


def test_list_marks_the_damaged_with_their_cure(store: Path) -> None:
    cut, unknown = manifest("head").key, manifest("fuser").key
    os.truncate(store / f"{cut}.plan", 100)
    (store / f"{unknown}.json").write_text("{}")
    listed = invoke("list")
    assert listed.exit_code == 0 and listed.stdout.count(" damaged\n") == 2
    _, _, after = listed.stderr.partition(f"The engine {cut[:8]} is damaged. Run:\ntrt-wan ")
    rebuild = after.splitlines()[0]
    assert f"The engine {unknown[:8]} is damaged. Run:\ntrt-wan rm {unknown[:8]} --yes\n" in listed.stderr
    assert data_of(*rebuild.split())["engines"], "the command it names is one"
    assert {row["state"] for row in data_of("list")["engines"]} == {"whole"}


def test_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    result = invoke("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"There are no graphs and no engines in {tmp_path}. Run:\ntrt-wan build\n"
    assert data_of("list")["engines"] == []
    nothing = {"result": None, "removed": [], "folders": [], "freed_bytes": 0}
    assert data_of("rm", "--all", "--yes") == nothing


def test_show_tells_the_manifest_and_the_measurements(store: Path) -> None:
    engine = recipes(TINY, FP8, "sm89", choose_flavour(None, None))["attention"].engine
    figures = [
        replace(FIGURE, candidate="flash4", state="missing", ms=None, error=None, chosen="", problem="Gone."),
        replace(FIGURE, candidate="tensorrt", ms=77.62, error=2e-2, chosen=""),
        FIGURE,
    ]
    assert "No candidates were measured." in invoke("show", engine.key).stdout
    place = Place("A GPU", "tensorrt_rtx 1.6", engine.source)
    record_figures(place, [engine.source], {figure.candidate: figure for figure in figures})
    shown = invoke("show", engine.key[:10]).stdout
    for fact in (
        engine.key,
        "attention",
        "64x48, 13 frames",
        "fp8",
        "sm89",
        "whole",
        shell_command(engine.rebuild),
    ):
        assert fact in shown
    table = [line.split() for line in shown.splitlines()[-4:]]
    gpu = ["A", "GPU", "tensorrt_rtx", "1.6"]
    assert table == [
        "CANDIDATE MS ERROR TOLERANCE TIER CHOSEN GPU TENSORRT PROBLEM".split(),
        ["cudnn", "38.50", "3.1e-03", "1.0e-02", "exact", "exact", *gpu],
        ["tensorrt", "77.62", "2.0e-02", "1.0e-02", "exact", *gpu],
        ["flash4", "1.0e-02", "exact", *gpu, "Gone."],
    ]
    data = data_of("show", engine.key)
    assert (
        data["candidates"] == [vars(figure) for figure in figures]
        and data["state"] == "whole"
        and data["rebuild"] == list(engine.rebuild)
    )


def test_show_finds_one_flipped_bit_which_list_cannot(store: Path) -> None:
    head = manifest("head")
    file = store / f"{head.key}.plan"
    plan = bytearray(file.read_bytes())
    plan[len(plan) // 2] ^= 1
    file.write_bytes(plan)
    assert {row["state"] for row in data_of("list")["engines"]} == {"whole"}
    assert data_of("show", head.key)["state"] == "damaged"
    shown = invoke("show", head.key).stdout
    assert re.search("^state +damaged\nrebuild +trt-wan build --model tiny", shown, re.M)


def test_show_of_what_has_no_manifest(store: Path) -> None:
    key = manifest("head").key
    (store / f"{key}.json").unlink()
    message, hint = refused(1, "show", key)
    assert "damaged" in message and hint == f"Run:\ntrt-wan rm {key[:8]} --yes"


def test_keys_that_fit_none_or_several(store: Path) -> None:
    keys = [entry.key for entry in entries()]
    typo = keys[0][:6] + ("0" if keys[0][6] != "0" else "1") + keys[0][7]
    for command in (["show"], ["rm", "--yes"]):
        message, hint = refused(2, *command, typo)
        assert message == f"There is no engine and no folder {typo!r}."
        assert f"Close to it: {keys[0][:8]}" in hint and hint.endswith(" Run:\ntrt-wan list")
    digit = max("0123456789abcdef", key=lambda d: sum(key.startswith(d) for key in keys))
    several = [key for key in keys if key.startswith(digit)]
    assert len(several) > 1, "21 keys begin with 16 digits"
    message, hint = refused(2, "show", digit)
    assert message == f"{len(several)} engines begin with '{digit}'." and several[0][:8] in hint
    assert "no engine" in refused(2, "show", "")[0]
    assert len(entries()) == len(keys)


# --- rm --------------------------------------------------------------------------------------------------


def test_rm_removes_what_is_named_and_says_how_much(store: Path) -> None:
    keys = [manifest(name).key for name in ("head", "fuser")]
    size = sum(path.stat().st_size for key in keys for path in store.glob(f"{key}.*"))
    data = data_of("rm", keys[0], keys[1][:10], keys[0][:12], "--yes")
    assert data == {"result": None, "removed": keys, "folders": [], "freed_bytes": size}
    assert not any(list(store.glob(f"{key}.*")) for key in keys) and len(entries()) == len(NAMES) - 2
    result = invoke("rm", "--all", "--yes")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{len(NAMES) - 2} engines, 1 set of graphs, locks (")
    assert " MB) removed" in result.stdout and entries() == []
    assert not [path for path in store.parent.rglob("*") if path.is_file()], "everything is gone"


FOLDERS = ("graphs/a", "kernels/cubin", "measurements", "timings", "onnx", "text", "weights/tiny")


def test_everything_on_disk_is_listed_and_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(bytes(100))
    (tmp_path / "a user's own file").touch()
    listed = data_of("list")["folders"]
    names = {name if name == "graphs/a" else name.partition("/")[0] for name in FOLDERS}
    assert {row["name"]: row["bytes"] for row in listed} == dict.fromkeys(names, 100) | {"unknown": 0}
    data = data_of("rm", "kernels", "text", "--yes")
    assert data["folders"] == ["kernels", "text"] and data["freed_bytes"] == 200
    lock = tmp_path / "graphs" / "a.lock"
    with held(lock):
        message, hint = refused(1, "rm", "--all", "--yes")
        assert "Another process is building graphs/a; " in message and hint
        assert (tmp_path / "graphs" / "a" / "file").exists()
    assert data_of("rm", "graphs", "--yes")["folders"] == ["graphs/a"] and not lock.exists()
    assert [row["name"] for row in data_of("list")["folders"]] == ["unknown"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a user's own file"]


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "Which engines or"), (["--all", "0"], "Which engines or"), (["--all"], "cannot ask whether")],
)
def test_rm_refuses(store: Path, options: list[str], says: str) -> None:
    message, _ = refused(2, "rm", *options)
    assert says in message and len(entries()) == len(NAMES)


@pytest.mark.parametrize(
    ("answer", "exit_code", "left"), [(b"n\n", 0, len(NAMES)), (b"y\n", 0, 0), (b"\x03", 130, len(NAMES))]
)
def test_rm_asks_on_a_terminal(store: Path, answer: bytes, exit_code: int, left: int) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*TRT_WAN, "rm", "--all"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        preexec_fn=controlling_terminal(theirs),
    )
    os.close(theirs)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(ours, 4096)
    assert f"Remove {len(NAMES)} engines, ".encode() in shown
    os.write(ours, answer)
    try:
        out, _ = process.communicate(timeout=5)
    except (
        subprocess.TimeoutExpired
    ):  # a Ctrl-C just before Python reads is only seen after the read: press again
        os.write(ours, answer)
        out, _ = process.communicate(timeout=20)
    os.close(ours)
    assert process.returncode == exit_code, out
    assert len(entries()) == left and ("Nothing was removed." in out) == (answer == b"n\n")


def controlling_terminal(terminal: int) -> Callable[[], None]:
    """So that Ctrl-C typed there is a signal for the process."""

    def take() -> None:
        import fcntl
        import termios

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have it ignored

        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return take


def test_rm_leaves_what_another_process_builds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = manifest("head").key
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store / "locks" / f"{head}.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    message, hint = refused(1, "rm", "--all", "--yes")
    assert f"Another process is building {head[:8]}; {len(NAMES) - 1} engines, 1 set of" in message and hint
    holder.communicate("")
    assert [entry.key for entry in entries()] == [head]


def test_the_commands_are_documented_without_heavy_imports() -> None:
    program = (
        "import sys\nfrom trt_wan.cli.main import cli\n"
        "for name in ('build', 'list', 'show', 'rm'):\n"
        "    cli.commands[name].get_help(__import__('click').Context(cli.commands[name]))\n"
        "print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"numpy", "cuda", "torch", "tensorrt_rtx", "filelock", "rich"} & set(printed.stdout.split())
    assert isinstance(cli, click.Group) and {"build", "list", "show", "rm"} <= set(cli.commands)
