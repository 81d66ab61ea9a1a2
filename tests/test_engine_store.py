"""The engine store: whatever is killed, cut, swapped or edited, no wrong plan is ever returned, and every
message names the command that builds the right one.

"Compiling" here takes milliseconds and gives bytes that only their engine has, so that a wrong plan is seen.
Real engines go through the store in test_compile.py.
"""

import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.shape import Plan
from trt_wan.engines.store import checksums as checked_plan
from trt_wan.engines.store import engines as engine_store
from trt_wan.engines.store import kernels, locks
from trt_wan.engines.store.engine_id import EngineId, Recipe, wan_engine
from trt_wan.engines.store.engines import ensure, find, obtain, open_checked
from trt_wan.engines.store.entries import entries, remove, trim
from trt_wan.engines.store.environment import limit_bytes
from trt_wan.errors import GraphError, UsageError, shell_command

RTX = Flavour("tensorrt_rtx", "1.6.1.120", SimpleNamespace(), "it builds without a GPU")
PLAN = Plan(832, 480, 77, "fp8")
H200 = GpuKind("NVIDIA H200", 580)
SIZE = 10_000


def engine(name: str = "attn_in") -> EngineId:
    return wan_engine(name, "14b", PLAN, hashlib.sha256(name.encode()).hexdigest(), "sm89", RTX, None)


A, B = engine("attn_in"), engine("attn_out")
REBUILD = (
    "Run:\ntrt-wan build --model 14b --size 832x480 --window 77 --precision fp8 --target sm89 "
    "--flavour tensorrt_rtx"
)


def plan_of(wanted: EngineId) -> bytes:
    return random.Random(wanted.key).randbytes(SIZE)


def build(wanted: EngineId) -> bool:
    """Whether it had to be built."""
    return ensure(wanted, lambda: plan_of(wanted))[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    monkeypatch.delenv("TRT_WAN_ENGINES_GB", raising=False)
    return tmp_path / "engines"


def file(wanted: EngineId, kind: str) -> Path:
    return Path(os.environ["TRT_WAN_HOME"]) / "engines" / f"{wanted.key}.{kind}"


def refused(wanted: EngineId) -> GraphError:
    with pytest.raises(GraphError) as caught:
        open_checked(wanted)
    assert caught.value.hint == REBUILD
    assert wanted.network in caught.value.message
    assert find(wanted) is None
    return caught.value


def test_an_engine_is_built_once_and_described() -> None:
    assert build(A) and not build(A)
    assert open_checked(A) == plan_of(A)
    manifest = json.loads(file(A, "json").read_text())
    assert (manifest["kind"], manifest["network"]) == ("wan", "attn_in")
    assert (manifest["about"], manifest["precision"]) == ("14b, 832x480, 77 frames", "fp8")
    assert manifest["target"] == "sm89" and manifest["rebuild"] == list(A.rebuild)
    assert (manifest["flavour"], manifest["version"]) == ("tensorrt_rtx", "1.6.1.120")
    assert manifest["flavour_reason"] == RTX.reason
    assert manifest["bytes"] == SIZE and manifest["sha256"] == hashlib.sha256(plan_of(A)).hexdigest()
    assert manifest["build_seconds"] >= 0 and manifest["gpu"] is None


def test_an_engine_that_is_not_there() -> None:
    assert refused(A).message == (
        "The engine attn_in (14b, 832x480, 77 frames, fp8, sm89, tensorrt_rtx 1.6.1.120) is not built."
    )


def test_the_rebuild_command_is_made_of_the_engine() -> None:
    assert shlex.split(REBUILD.removeprefix("Run:\n")) == ["trt-wan", *A.rebuild]
    assert refused(A).command == A.rebuild
    other = wan_engine("head", "tiny", Plan(64, 48, 13, "bf16"), "source", "sm120", RTX, None)
    assert shell_command(other.rebuild) == (
        "trt-wan build --model tiny --size 64x48 --window 13 --precision bf16 --target sm120 "
        "--flavour tensorrt_rtx"
    )


OTHERS = [
    replace(A, source=B.source),
    replace(A, target="sm120"),
    replace(A, flavour=replace(RTX, version="1.7.1.116")),
    replace(A, flavour=replace(RTX, name="tensorrt")),
    replace(A, target="current", gpu=H200),
    replace(A, target="current", gpu=replace(H200, driver=590)),
    replace(A, target="current", gpu=replace(H200, name="NVIDIA H100")),
]


def test_everything_that_decides_the_plan_is_in_the_key() -> None:
    assert len({other.key for other in [A, *OTHERS]}) == 1 + len(OTHERS)
    same = replace(
        A, network="x", about="tiny", precision="fp32", rebuild=(), flavour=replace(RTX, reason="?")
    )
    assert same.key == A.key


@pytest.mark.parametrize("other", OTHERS[1:])
def test_what_another_version_or_gpu_made_is_named_and_not_loaded(other: EngineId) -> None:
    build(other)
    message = refused(A).message
    made = f"{other.target} on {other.gpu.name}, driver {other.gpu.driver}" if other.gpu else other.target
    assert f"; there is one for {made} by {other.flavour.name} {other.flavour.version}" in message


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def set_field(name: str, value: object) -> None:
    values = json.loads(file(A, "json").read_text())
    assert values[name] != value
    file(A, "json").write_text(json.dumps(values | {name: value}))


def swap_everything() -> None:
    for kind in ("plan", "json"):
        swap(file(A, kind), file(B, kind))


WRONG_PLAN = random.Random(0).randbytes(SIZE)
DAMAGES: dict[str, tuple[Callable[[], object], str]] = {
    "plan missing": (lambda: file(A, "plan").unlink(), "is not built"),
    "plan cut": (lambda: os.truncate(file(A, "plan"), 4000), "has 4000 bytes instead of 10000"),
    "plan empty": (lambda: os.truncate(file(A, "plan"), 0), "has 0 bytes instead of 10000"),
    "plan longer": (lambda: edit(file(A, "plan"), lambda data: data + b"!"), "has 10001 bytes"),
    "first bit": (
        lambda: edit(file(A, "plan"), lambda d: bytes([d[0] ^ 1]) + d[1:]),
        "was changed after",
    ),
    "last bit": (
        lambda: edit(file(A, "plan"), lambda d: d[:-1] + bytes([d[-1] ^ 1])),
        "was changed after",
    ),
    "plans swapped": (lambda: swap(file(A, "plan"), file(B, "plan")), "was changed after"),
    "all swapped": (swap_everything, "should be there is another, attn_out"),
    "manifests swapped": (lambda: swap(file(A, "json"), file(B, "json")), "is another, attn_out"),
    "manifest missing": (lambda: file(A, "json").unlink(), "has no manifest"),
    "manifest cut": (lambda: os.truncate(file(A, "json"), 100), "or an edited one"),
    "manifest empty": (lambda: os.truncate(file(A, "json"), 0), "or an edited one"),
    "manifest other JSON": (lambda: file(A, "json").write_text("[1]"), "or an edited one"),
    "manifest no text": (lambda: file(A, "json").write_bytes(b"\xff\xfe\x00"), "or an edited one"),
    "manifest hash": (
        lambda: set_field("sha256", hashlib.sha256(WRONG_PLAN).hexdigest()),
        "or an edited one",
    ),
    "manifest target": (lambda: set_field("target", "sm120"), "or an edited one"),
    "manifest command": (lambda: set_field("rebuild", ["build"]), "or an edited one"),
    "manifest field more": (lambda: edit(file(A, "json"), lambda d: b'{"x": 1,' + d[1:]), "or an edited one"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_repaired(damage: str) -> None:
    build(A)
    build(B)
    spoil, words = DAMAGES[damage]
    spoil()
    assert words in refused(A).message
    assert build(A)
    assert open_checked(A) == plan_of(A)
    assert not build(A)
    if "swapped" in damage:
        assert build(B) and open_checked(B) == plan_of(B)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every plan counts as large; who is hashed, by their number of bytes."""
    sizes: list[int] = []
    digest = hashlib.file_digest

    def counted(opened: Any, name: str) -> Any:
        sizes.append(os.fstat(opened.fileno()).st_size)
        return digest(opened, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr(checked_plan, "LARGE", 1)
    monkeypatch.setattr(checked_plan, "SETTLED", SETTLED)
    return sizes


SETTLED = 0.05  # s; some file systems tell times in hundredths


def remember(*wanted: EngineId) -> None:
    for each in wanted:
        build(each)
    time.sleep(2 * SETTLED)
    for each in wanted:
        open_checked(each)
    time.sleep(2 * SETTLED)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_remembered_plan_is_found_as_well(damage: str, hashed: list[int]) -> None:
    remember(A, B)
    hashed.clear()
    assert open_checked(A) == plan_of(A) and find(A) and not build(A) and hashed == []
    spoil, words = DAMAGES[damage]
    spoil()
    assert words in refused(A).message
    assert build(A)
    assert open_checked(A) == plan_of(A)


@pytest.mark.skipif(os.name != "posix", reason="there is no time of the last change")
@pytest.mark.parametrize("how", ["in place", "another file"])
def test_an_edit_that_sets_the_time_back_is_found(how: str, hashed: list[int]) -> None:
    remember(A)
    plan = file(A, "plan")
    before = plan.stat()
    if how == "in place":
        with plan.open("r+b") as opened:
            opened.write(b"?")
    else:
        other = plan.with_name("other")
        other.write_bytes(WRONG_PLAN)
        other.replace(plan)
    os.utime(plan, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plan.stat().st_size == SIZE and plan.stat().st_mtime_ns == before.st_mtime_ns
    assert "was changed after" in refused(A).message


def test_what_is_remembered_may_be_damaged_or_old(hashed: list[int]) -> None:
    remember(A)
    for text in ("", "{", "[]", "null", file(A, "checked").read_text().replace("[", "[1, ")):
        file(A, "checked").write_text(text)
        hashed.clear()
        assert open_checked(A) == plan_of(A) and hashed == [SIZE]
        assert open_checked(A) == plan_of(A) and hashed == [SIZE]
    assert remove(A.key) and not file(A, "checked").exists()


def test_a_plan_that_has_just_been_written_is_not_remembered(
    hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_plan, "SETTLED", 60.0)
    build(A)
    hashed.clear()
    assert open_checked(A) == open_checked(A) == plan_of(A) and hashed == [SIZE, SIZE]


def test_small_plans_are_hashed_each_time() -> None:
    build(A)
    open_checked(A)
    assert not file(A, "checked").exists() and checked_plan.LARGE > SIZE


def test_a_plan_and_its_hash_exchanged_together_are_found() -> None:
    """Whoever edits both knows the format; the manifest's own hash still tells."""
    build(A)
    file(A, "plan").write_bytes(WRONG_PLAN)
    set_field("sha256", hashlib.sha256(WRONG_PLAN).hexdigest())
    assert "edited" in refused(A).message


def test_a_failed_build_leaves_nothing(folder: Path) -> None:
    def fail() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(A, fail)
    assert [path.name for path in folder.iterdir()] == ["locks"]
    assert build(A)


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            build(A)
    assert [path.name for path in folder.iterdir()] == ["locks"]
    refused(A)


# Builds engines one after the other for ever, in random order and each anew; tells when it has begun.
BUILD_FOR_EVER = """
import random, sys
sys.path.insert(0, sys.argv[1])
from test_engine_store import A, B, plan_of
from trt_wan.engines.store.engines import ensure
from trt_wan.engines.store.manifest import erase
print("ready", flush=True)
while True:
    wanted = random.choice((A, B))
    ensure(wanted, lambda: plan_of(wanted))
    erase(wanted.key)
"""

# Builds two engines, slowly; prints what it had to build.
BUILD_SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_engine_store import A, B, plan_of
from trt_wan.engines.store.engines import ensure, open_checked

def compile(wanted):
    print(wanted.network, flush=True)
    time.sleep(0.3)
    return plan_of(wanted)

for wanted in (A, B):
    ensure(wanted, lambda: compile(wanted))
    assert open_checked(wanted) == plan_of(wanted)
"""


def start(program: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_builds_leave_the_right_plan_or_none(folder: Path) -> None:
    rng = random.Random(0)
    there = 0
    for attempt in range(60):
        if (
            attempt >= 12 and there
        ):  # on a loaded machine the first kills can all come before anything is built
            break
        process = start(BUILD_FOR_EVER)
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
        time.sleep(rng.uniform(0, 0.05) * (1 + attempt / 6))
        process.kill()
        process.communicate()
        for wanted in (A, B):
            if find(wanted) is not None:
                there += 1
                assert open_checked(wanted) == plan_of(wanted)
            else:
                refused(wanted)
    assert there, "nothing was ever built: the kills came too early to show anything"
    for wanted in (A, B):
        build(wanted)
        assert open_checked(wanted) == plan_of(wanted)
    trim({A.key, B.key})
    kinds = sorted(path.name.split(".", 1)[1] for path in folder.glob("*.*"))
    assert kinds == ["json", "json", "plan", "plan"], "something of the killed processes is left"


def test_two_processes_build_each_engine_once() -> None:
    processes = [start(BUILD_SLOWLY) for _ in range(3)]
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sorted(" ".join(out for out, _ in outputs).split()) == ["attn_in", "attn_out"]


def test_an_engine_under_construction_is_not_removed(folder: Path) -> None:
    def compile_and_remove() -> bytes:
        assert not remove(A.key)
        assert not trim(())
        return plan_of(A)

    ensure(A, compile_and_remove)
    assert open_checked(A) == plan_of(A)
    assert remove(A.key)
    refused(A)


def age(wanted: EngineId, seconds: float) -> None:
    for kind in ("plan", "json"):
        moment = time.time() - seconds
        os.utime(file(wanted, kind), (moment, moment))


def names() -> list[str]:
    return [entry.manifest.network for entry in entries() if entry.manifest]


def test_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [engine(f"n{i}") for i in range(5)]
    for seconds, wanted in enumerate(made, 100):
        build(wanted)
        age(wanted, seconds)
    assert names() == ["n0", "n1", "n2", "n3", "n4"]
    open_checked(made[4])  # now the one used last
    ensure(made[3], lambda: pytest.fail("it is there"))
    age(made[3], 1)
    assert names() == ["n4", "n3", "n0", "n1", "n2"]
    size = sum(entry.bytes for entry in entries())
    assert not trim(())

    monkeypatch.setenv("TRT_WAN_ENGINES_GB", str((size - SIZE) / 1e9))
    assert [entry.manifest.network for entry in trim(()) if entry.manifest] == ["n2"]
    assert names() == ["n4", "n3", "n0", "n1"]

    monkeypatch.setenv("TRT_WAN_ENGINES_GB", "0")
    trim({made[0].key, made[1].key})
    assert names() == ["n0", "n1"]
    assert open_checked(made[0]) == plan_of(made[0])
    refused(made[4])


def test_damaged_and_half_written_engines_go_before_all_others(folder: Path) -> None:
    build(A)
    build(B)
    file(A, "json").unlink()
    (folder / f"{engine('other').key}.plan.123.partial").write_bytes(b"x")
    (folder / "README.txt").write_text("A user's own file.")
    assert [entry.bytes for entry in entries() if entry.manifest is None] == [SIZE]
    trim(())
    assert names() == ["attn_out"]
    kinds = {path.name.split(".", 1)[1] for path in folder.glob("*.*")}
    assert kinds == {"plan", "json", "txt"}


def test_every_new_engine_makes_room_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not `trt-wan build` alone: also a run, preprocessing and SAM2, which build what is missing."""
    build(A)
    age(A, 100)
    build(B)
    monkeypatch.setenv("TRT_WAN_ENGINES_GB", str(3 * SIZE / 1e9))  # two, with their manifests
    other = engine("other")
    assert obtain(Recipe(other, lambda progress: plan_of(other))).built
    assert names() == ["other", "attn_out"]
    assert ensure(engine("more"), lambda: plan_of(A), {B.key, other.key})[1]
    assert names() == ["more", "other", "attn_out"], "spared engines stay, even if they are too much"


def test_a_limit_that_is_no_size_is_found_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_ENGINES_GB", "four")
    with pytest.raises(UsageError, match="TRT_WAN_ENGINES_GB"):
        ensure(A, lambda: pytest.fail("built"))


def test_an_engine_that_vanishes_between_building_and_reading_is_built_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process may need the room at once."""
    made = []

    def compile(progress: Any) -> bytes:
        made.append(1)
        return plan_of(A)

    touch = engine_store._put

    def vanishing(wanted: EngineId, plan: bytes, seconds: float) -> Any:
        manifest = touch(wanted, plan, seconds)
        if len(made) == 1:
            file(wanted, "plan").unlink()
        return manifest

    monkeypatch.setattr(engine_store, "_put", vanishing)
    got = obtain(Recipe(A, compile))
    assert (got.plan, got.built, len(made)) == (plan_of(A), True, 2)
    assert not obtain(Recipe(A, compile)).built


@pytest.mark.parametrize("how", ["full disk", "read-only home"])
def test_an_engine_that_cannot_be_stored_is_used_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    made = []

    def compile(progress: Any) -> bytes:
        made.append(1)
        return plan_of(A)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if how == "full disk":
        monkeypatch.setattr(os, "fsync", full)
    else:
        folder.write_text("a file where the folder should be")
    assert obtain(Recipe(A, compile)).plan == plan_of(A) and made == [1]


def kernels_of(wanted: EngineId, gpu: str = "H200", driver: str = "580.95.05", size: int = 1000) -> Path:
    manifest = find(wanted)
    assert manifest is not None
    path = kernels.KernelCache("tensorrt_rtx", gpu, driver).file(manifest.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_kernels_belong_to_a_plan_a_gpu_and_a_driver() -> None:
    """Two drivers, or two GPUs, that share a home do not write each other's file."""
    build(A)
    build(B)
    places = [("H200", "580.95.05"), ("H200", "580.82.07"), ("L40S", "580.95.05")]
    files = {kernels_of(wanted, *place) for wanted in (A, B) for place in places}
    assert len(files) == 6
    remove(A.key)
    assert sum(path.exists() for path in files) == 3, "an engine's kernels go with it"


def test_kernels_count_and_orphans_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(A)
    age(A, 100)
    build(B)
    kept, going = kernels_of(B), kernels_of(A, size=5 * SIZE)
    orphan = going.with_name("0" * 32 + "-123456789012.kernels")
    orphan.write_bytes(b"of an engine that is gone")
    cubin = folder.parent / "kernels" / "cubin" / "a.cubin"
    cubin.parent.mkdir()
    cubin.write_bytes(b"of no engine")
    trim(())
    assert names() == ["attn_out", "attn_in"] and not orphan.exists()
    monkeypatch.setenv("TRT_WAN_ENGINES_GB", str(4 * SIZE / 1e9))
    trim(())
    assert names() == ["attn_out"] and kept.exists() and cubin.exists() and not going.exists()


def test_stale_locks_go_and_held_ones_stay(folder: Path) -> None:
    build(A)
    (folder / "locks" / f"{'0' * 32}.lock").touch()
    with locks.held(folder / "locks" / f"{'1' * 32}.lock"):
        trim(())
        there = {path.stem for path in (folder / "locks").iterdir()}
        assert there == {A.key, "1" * 32}
    assert remove(A.key) and not (folder / "locks" / f"{A.key}.lock").exists()


@pytest.mark.parametrize("limit", ["four", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_ENGINES_GB", limit)
    with pytest.raises(UsageError, match=f"TRT_WAN_ENGINES_GB is '{limit}'"):
        trim(())


def test_the_default_limit_is_four_gigabytes() -> None:
    assert limit_bytes() == 4e9


def test_a_store_that_may_only_be_read_still_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(A)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert open_checked(A) == plan_of(A)
    assert not build(A)
