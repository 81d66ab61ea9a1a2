"""`trt-wan pull` against a local server that behaves like the Hub (fake_hub.py), and the table of files."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_hub import COMMIT, FakeHub, running

import trt_wan.cli.pull
from trt_wan.cli.main import cli
from trt_wan.errors import DownloadError, OutputError, UsageError
from trt_wan.runtime.events import Event, FileProgress, FileReady
from trt_wan.runtime.presets import PRESETS
from trt_wan.runtime.published.fetch import FREE_AFTERWARDS, Collected, fetch
from trt_wan.runtime.published.files import EXTRAS, FILES, PublishedFile, files_of
from trt_wan.runtime.published.places import ComfyFolder, HubCache, Place, hub_cache

ROOT = Path(__file__).parents[1]
CHUNK = 10 << 20  # huggingface_hub writes that many bytes at once
SIZE = 25_000_003
NAME = "owner/models/sub/big.safetensors"
SMALL = "owner/models/small.onnx"


def some_bytes(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


BIG_BYTES, SMALL_BYTES = some_bytes(SIZE, 1), some_bytes(70_001, 2)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(FakeHub({NAME: BIG_BYTES, SMALL: SMALL_BYTES})) as hub:
        yield hub


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """For huggingface_hub's own download: the server offers xet and has none, which `fetch` does not mind."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def published(name: str, content: bytes, folder: str = "loras", **other: Any) -> PublishedFile:
    owner, repository, path = name.split("/", 2)
    digest = hashlib.sha256(content).hexdigest()
    file = PublishedFile("part", f"{owner}/{repository}", path, folder, len(content), digest, ("fast4",))
    return replace(file, **other)


BIG, LITTLE = published(NAME, BIG_BYTES), published(SMALL, SMALL_BYTES, "detection")


@pytest.fixture(params=["comfy", "cache"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return ComfyFolder(tmp_path / "models") if request.param == "comfy" else HubCache(tmp_path / "hub")


def finished(folder: Path) -> set[str]:
    """The files under final names."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".incomplete", ".lock"))
    }


def store_requests(hub: FakeHub, name: str = NAME) -> list[str]:
    return [asked for method, what, asked in hub.requests if method == "GET" and what == f"store {name}"]


def test_a_set_is_fetched_and_not_fetched_again(hub: FakeHub, place: Place) -> None:
    events: list[Event] = []
    paths = fetch([BIG, LITTLE], place, endpoint=hub.endpoint, progress=events.append)
    assert [path.read_bytes() for path in paths] == [BIG_BYTES, SMALL_BYTES]
    asked = len(hub.requests)
    assert fetch([BIG, LITTLE], place, endpoint=hub.endpoint, progress=events.append) == paths
    assert len(hub.requests) == asked, "nothing is asked for files that are there"
    states = [event.state for event in events if isinstance(event, FileReady)]
    assert states == ["fetched", "fetched", "there", "there"]


def test_the_token_goes_to_the_hub_alone(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch([LITTLE], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    assert not hub.tokens


def test_the_folders_of_comfyui(hub: FakeHub, tmp_path: Path) -> None:
    fetch([BIG, LITTLE], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        "loras/big.safetensors",
        "detection/small.onnx",
    }, "no lock and no part stays"


def test_the_layout_of_the_cache_is_that_of_huggingface_hub(
    hub: FakeHub, tmp_path: Path, no_xet: None
) -> None:
    """Its own functions find the file, by revision and by commit, and its own download fetches nothing."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    (path,) = fetch([LITTLE], HubCache(tmp_path), endpoint=hub.endpoint)
    for revision in ("main", COMMIT):
        found = try_to_load_from_cache(LITTLE.repository, LITTLE.path, cache_dir=tmp_path, revision=revision)
        assert found == str(path)
    sent = hub.sent
    downloaded = hf_hub_download(
        LITTLE.repository, LITTLE.path, cache_dir=tmp_path, endpoint=hub.endpoint, revision="main"
    )
    assert Path(downloaded).read_bytes() == SMALL_BYTES and hub.sent == sent


def test_what_huggingface_hub_has_fetched_is_there(hub: FakeHub, tmp_path: Path, no_xet: None) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(LITTLE.repository, LITTLE.path, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert HubCache(tmp_path).find(LITTLE) == Path(path)


def test_the_cache_is_where_huggingface_hub_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variables in ({}, {"HF_HOME": str(tmp_path / "a")}, {"HF_HUB_CACHE": str(tmp_path / "b")}):
        with monkeypatch.context() as patch:
            for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            assert str(hub_cache().root) == run.stdout.strip()


def test_a_lost_connection_goes_on_where_it_ended(hub: FakeHub, place: Place) -> None:
    hub.cuts[NAME] = [CHUNK + 5000]
    (path,) = fetch([BIG], place, endpoint=hub.endpoint)
    assert path.read_bytes() == BIG_BYTES
    assert store_requests(hub) == ["", f"bytes={CHUNK}-"]


def stop_half_way(hub: FakeHub, place: Place, files: list[PublishedFile], **options: Any) -> None:
    """After the first piece of the big file is written."""

    def stop(event: Event) -> None:
        if isinstance(event, FileProgress) and event.name == BIG.path.rpartition("/")[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(files, place, endpoint=hub.endpoint, progress=stop, **options)
    assert [part.stat().st_size for part in place_parts(place)] == [CHUNK]


def test_a_call_that_fails_says_how_to_go_on(hub: FakeHub, place: Place, tmp_path: Path) -> None:
    hub.cuts[NAME], hub.store_fails_later = [CHUNK + 5000], True
    with pytest.raises(DownloadError, match="answered 503 for owner/models/sub/big") as raised:
        fetch([BIG], place, endpoint=hub.endpoint)
    assert "goes on" in raised.value.hint and not finished(tmp_path)
    hub.store_fails_later = False
    assert fetch([BIG], place, endpoint=hub.endpoint)[0].read_bytes() == BIG_BYTES


def test_a_later_call_goes_on_where_the_first_ended(hub: FakeHub, place: Place, tmp_path: Path) -> None:
    stop_half_way(hub, place, [BIG])
    assert not finished(tmp_path), "nothing half-written has a final name"
    hub.requests.clear()
    (path,) = fetch([BIG], place, endpoint=hub.endpoint)
    assert path.read_bytes() == BIG_BYTES and store_requests(hub) == [f"bytes={CHUNK}-"]


def test_a_server_without_ranges_sends_the_file_again(hub: FakeHub, place: Place) -> None:
    hub.ranges, hub.cuts[NAME] = False, [CHUNK + 5000]
    (path,) = fetch([BIG], place, endpoint=hub.endpoint)
    assert path.read_bytes() == BIG_BYTES and len(store_requests(hub)) == 2


@pytest.mark.parametrize("known", [True, False], ids=["hash of the table", "hash of the Hub"])
def test_a_wrong_byte_is_refused(hub: FakeHub, place: Place, tmp_path: Path, known: bool) -> None:
    file = BIG if known else replace(BIG, sha256="")
    hub.wrong[NAME] = SIZE - 7
    with pytest.raises(DownloadError, match="wrong bytes: its SHA-256"):
        fetch([file], place, endpoint=hub.endpoint)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    hub.wrong.clear()
    (path,) = fetch([file], place, endpoint=hub.endpoint)
    assert path.read_bytes() == BIG_BYTES


def test_a_wrong_part_of_an_earlier_call_is_found(hub: FakeHub, place: Place) -> None:
    stop_half_way(hub, place, [BIG])
    (part,) = place_parts(place)
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    with pytest.raises(DownloadError, match="wrong bytes"):
        fetch([BIG], place, endpoint=hub.endpoint)
    assert not place_parts(place), "else no call would ever succeed"


def place_parts(place: Place) -> list[Path]:
    root = place.models if isinstance(place, ComfyFolder) else place.root  # type: ignore[attr-defined]
    return list(root.rglob("*.incomplete"))


@pytest.mark.parametrize("other", [{"sha256": "a" * 64}, {"size": SIZE - 1}], ids=["hash", "size"])
def test_another_file_under_the_name_is_not_fetched(hub: FakeHub, place: Place, other: Any) -> None:
    with pytest.raises(DownloadError, match="has other bytes under the name"):
        fetch([replace(BIG, **other)], place, endpoint=hub.endpoint)
    assert hub.sent == 0


@pytest.mark.parametrize(
    ("status", "code", "message", "command"),
    [
        (404, "EntryNotFound", "has no file owner/models/sub/big.safetensors in the revision main", ""),
        (404, "RevisionNotFound", "in the revision main", ""),
        (401, "GatedRepo", "is gated", "hf auth login"),
        (403, "GatedRepo", "is gated", "hf auth login"),
        (401, "RepoNotFound", "no repository owner/models, or does not show it", "hf auth login"),
        (500, "", "answered 500", ""),
    ],
)
def test_refusals_of_the_hub(
    hub: FakeHub, tmp_path: Path, status: int, code: str, message: str, command: str
) -> None:
    """Before anything is fetched, also of the files before it."""
    hub.refused[NAME] = (status, code)
    with pytest.raises(DownloadError, match=message) as raised:
        fetch([LITTLE, BIG], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    assert command in raised.value.hint.splitlines() or not command
    assert hub.sent == 0 and not finished(tmp_path)


def test_no_hub_answers(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not be fetched"):
        fetch([LITTLE], ComfyFolder(tmp_path), endpoint="http://127.0.0.1:9")


def test_no_space(hub: FakeHub, place: Place) -> None:
    """Counted for all files before the first is fetched; parts that are there count as they are."""
    need = SIZE + len(SMALL_BYTES) + FREE_AFTERWARDS
    with pytest.raises(OutputError, match="0.23 GB free, and 25.1 MB are to be fetched"):
        fetch([LITTLE, BIG], place, endpoint=hub.endpoint, free=lambda _: need - 1)
    assert hub.sent == 0
    stop_half_way(hub, place, [BIG, LITTLE], free=lambda _: need)
    fetch([BIG, LITTLE], place, endpoint=hub.endpoint, free=lambda _: need - CHUNK)


def test_the_disk_fills_up_on_the_way(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an OSError with the file's name; what is there stays."""
    write = Collected.write

    def full(self: Collected, data: bytes) -> int:
        if self.done:
            raise OSError(28, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Collected, "write", full)
        with pytest.raises(OSError) as raised:
            fetch([BIG], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    (part,) = place_parts(ComfyFolder(tmp_path))
    assert raised.value.filename == str(part) and part.stat().st_size == CHUNK
    (path,) = fetch([BIG], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    assert path.read_bytes() == BIG_BYTES and store_requests(hub)[-1] == f"bytes={CHUNK}-"


def test_files_that_are_there_in_other_folders(hub: FakeHub, tmp_path: Path) -> None:
    """Below the folder, in diffusion_models for a LoRA, and through a link to another disk."""
    comfy = ComfyFolder(tmp_path / "models")
    for folder in ("loras/Wan", "diffusion_models"):
        path = tmp_path / "models" / folder / "big.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(BIG_BYTES)
        assert fetch([BIG], comfy, endpoint=hub.endpoint) == [path]
        path.unlink()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "big.safetensors").write_bytes(BIG_BYTES)
    (tmp_path / "models" / "loras" / "linked").symlink_to(tmp_path / "disk")
    assert fetch([BIG], comfy, endpoint=hub.endpoint)[0].name == "big.safetensors" and not hub.requests


def test_another_file_in_its_place_stays(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "big.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="has 4 bytes, and the published file has 25000003"):
        fetch([BIG], ComfyFolder(tmp_path), endpoint=hub.endpoint)
    assert (tmp_path / "loras" / "big.safetensors").read_bytes() == b"mine"


# --- The command -----------------------------------------------------------------------------------------

# `trt-wan pull` with a table of one file: python -c PROGRAM NAME SIZE SHA256 --into DIR …
PROGRAM = """
import sys
name, size, digest = (sys.argv.pop(1) for _ in range(3))
import trt_wan.cli.pull as pull
from trt_wan.runtime.published.files import PublishedFile
owner, repository, path = name.split("/", 2)
file = PublishedFile("part", f"{owner}/{repository}", path, "loras", int(size), digest, ())
pull.files_of = lambda preset: (file,)
sys.argv.insert(1, "pull")
from trt_wan.__main__ import main
main()
"""


def start(hub: FakeHub, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, NAME, str(SIZE), hub.sha256(NAME), "--into", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint}
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Any) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 20 s")


def part_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.incomplete"))


def test_ctrl_c_keeps_what_can_be_resumed(hub: FakeHub, tmp_path: Path) -> None:
    hub.stalls[NAME] = CHUNK + 5000
    process = start(hub, tmp_path)
    wait_for(lambda: part_size(tmp_path) == CHUNK)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Stopped" in stderr and "Traceback" not in stderr
    assert part_size(tmp_path) == CHUNK and not finished(tmp_path)
    hub.go_on.set()
    stdout, stderr = start(hub, tmp_path).communicate(timeout=30)
    assert stdout.strip() == str(tmp_path) and "big.safetensors  fetched, 25.00 MB" in stderr
    assert store_requests(hub)[-1] == f"bytes={CHUNK}-"
    assert (tmp_path / "loras" / "big.safetensors").read_bytes() == BIG_BYTES


@pytest.mark.long
def test_two_at_once_wait_for_each_other(hub: FakeHub, tmp_path: Path) -> None:
    hub.stalls[NAME] = CHUNK + 5000
    first = start(hub, tmp_path, "--json")
    wait_for(lambda: part_size(tmp_path) == CHUNK)
    second = start(hub, tmp_path, "--json")
    assert second.stdout is not None
    line = json.loads(second.stdout.readline())
    assert (line["code"], line["data"]["process"]) == ("waiting_for_lock", first.pid)
    hub.go_on.set()
    assert first.wait(timeout=30) == second.wait(timeout=30) == 0
    assert len(store_requests(hub)) == 1, "one of them fetches"
    first.communicate(), second.communicate()
    assert (tmp_path / "loras" / "big.safetensors").read_bytes() == BIG_BYTES


@pytest.mark.parametrize(("extra", "files"), [("camera", 1), ("lynx", 3)])
def test_files_that_no_preset_needs(extra: str, files: int, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shown = CliRunner().invoke(cli, ["pull", extra, "--into", str(tmp_path), "--dry-run", "--json"])
    data = json.loads(shown.stdout.splitlines()[-1])["data"]
    assert shown.exit_code == 0 and len(data["files"]) == files and data["bytes"] is None


def test_the_command_prints_the_folder_and_honours_hf_endpoint(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_wan.cli.pull, "files_of", lambda preset: (BIG, LITTLE))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    ComfyUI = str(tmp_path / "ComfyUI")
    dry = CliRunner().invoke(cli, ["pull", "--into", ComfyUI, "--dry-run"])
    assert "2 files to fetch, 25.1 MB" in dry.stderr and "missing" in dry.stdout and not hub.requests
    made = CliRunner().invoke(cli, ["pull", "fast4", "--into", ComfyUI, "--json"])
    done = json.loads(made.stdout.splitlines()[-1])["data"]
    assert done["result"] == f"{ComfyUI}/models"
    assert done["files"] == [
        f"{ComfyUI}/models/loras/big.safetensors",
        f"{ComfyUI}/models/detection/small.onnx",
    ]
    assert (
        "/".join((ComfyUI, "models/loras"))
        in CliRunner().invoke(cli, ["pull", "--into", f"{ComfyUI}/models", "--dry-run"]).stdout
    )
    missing = CliRunner().invoke(cli, ["pull", "--into", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and missing.stderr.endswith(f"mkdir -p {tmp_path}/nowhere/models\n")


# --- The table -------------------------------------------------------------------------------------------


def test_the_table_is_complete_for_every_preset() -> None:
    parts = {"transformer", "vae", "text_encoder", "image_encoder", "detector", "pose", "sam2"}
    assert len({(file.repository, file.path) for file in FILES}) == len(FILES)
    for name, preset in PRESETS.items():
        files = files_of(name)
        found = [file.part for file in files]
        assert parts <= set(found) and found.count("transformer") == 1
        assert {f"{lora.kind} LoRA" for lora in preset.loras} == {p for p in found if p.endswith("LoRA")}
    for file in FILES:
        assert re.fullmatch("[0-9a-f]{64}|", file.sha256) and re.fullmatch("main|[0-9a-f]{40}", file.revision)
        assert set(file.presets) <= {*PRESETS, *EXTRAS} and "/" in file.repository
