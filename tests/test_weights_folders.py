"""The folders searched for weights: named, TRT_WAN_WEIGHTS, what was pulled, extra_model_paths.yaml."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, running

from trt_wan.cli.run import RunOptions
from trt_wan.engines.config import TINY
from trt_wan.errors import UsageError, WeightsError
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.opening.model import open_weights
from trt_wan.runtime.published.fetch import fetch
from trt_wan.runtime.published.files import FILES, PublishedFile
from trt_wan.runtime.published.places import hub_cache
from trt_wan.runtime.weights.find_files import find_files
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.weights_folders import KINDS, comfy_extra_folders, searched_folders


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("TRT_WAN_WEIGHTS", raising=False)
    return tmp_path / "hub"


def pulled(cache: Path) -> Path:
    """A published file in the cache, with a snapshot beside it that has none."""
    (file,) = [file for file in FILES if file.part == "sam2"]
    repository = cache / f"models--{file.repository.replace('/', '--')}" / "snapshots"
    path = repository / ("b" * 40) / file.path
    path.parent.mkdir(parents=True)
    path.touch()
    (repository / ("a" * 40)).mkdir()
    return path.parent


def test_named_folders_win(tmp_path: Path, no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = pulled(no_cache)
    assert searched_folders(()) == (snapshot,)
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    monkeypatch.setenv("TRT_WAN_WEIGHTS", os.pathsep.join((str(a), "", str(b))))
    assert searched_folders(()) == (a, b)
    assert searched_folders([tmp_path / "c"]) == (tmp_path / "c",)


def test_a_wrong_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for folder, says in (
        (tmp_path / "none", f"There is no weights folder {tmp_path / 'none'} of TRT_WAN_WEIGHTS."),
        ("~nobody-here/x", "There is no weights folder ~nobody-here/x of TRT_WAN_WEIGHTS."),
        (tmp_path / "x.png", "of TRT_WAN_WEIGHTS is a file (a PNG picture), not a folder of weights."),
    ):
        monkeypatch.setenv("TRT_WAN_WEIGHTS", os.pathsep.join((str(tmp_path), str(folder))))
        with pytest.raises(WeightsError, match=re.escape(says)):
            searched_folders(())
    with pytest.raises(WeightsError, match=r"x.png is a file \(a PNG picture\), not a folder of weights"):
        find_files([tmp_path / "x.png"], ["vae"])


def test_the_command_line_searches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_WEIGHTS", str(tmp_path))
    assert RunOptions().weight_files().folders == (tmp_path,)
    assert RunOptions(random_weights="tiny").weight_files().folders == ()
    file = tmp_path / "x.safetensors"
    every = RunOptions(transformer=file, vae=file, text_encoder=file, image_encoder=file)
    assert every.weight_files().folders == ()


def test_without_any_the_hint_fetches_them() -> None:
    with pytest.raises(UsageError, match="There are no weights") as raised:
        RunOptions().weight_files()
    assert raised.value.hint.splitlines()[-1] == "trt-wan pull"


def test_a_run_finds_what_was_pulled(tmp_path: Path, no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete tiny set, from the Hub to open weights."""
    paths = write_tiny_weights(tmp_path / "made", 0)
    with running(FakeHub({f"owner/tiny/split/{path.name}": path.read_bytes() for path in paths})) as hub:
        files = [
            PublishedFile("part", "owner/tiny", f"split/{path.name}", "", path.stat().st_size, "", ())
            for path in paths
        ]
        fetch(files, hub_cache(), endpoint=hub.endpoint)
    monkeypatch.setattr("trt_wan.runtime.weights_folders.FILES", files)
    opened = open_weights(RunOptions().weight_files(), "bf16", silent)
    assert opened.config is TINY
    assert all(file.is_relative_to(no_cache) for file in opened.text_files)


def make(comfy: Path, text: str, *folders: str) -> list[Path]:
    comfy.mkdir(exist_ok=True)
    (comfy / "extra_model_paths.yaml").write_text(text)
    for folder in folders:
        (comfy / folder).mkdir(parents=True, exist_ok=True)
    return comfy_extra_folders(comfy)


def test_a_section_with_a_base_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several folders of one kind, a variable, kinds that are not ours, a folder that does not exist."""
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    text = """
comfyui:
    base_path: $DISK/models
    diffusion_models: |
        unet
        big/diffusion
    loras: loras/
    embeddings: embeddings
    vae: missing
empty:
"""
    folders = ("unet", "big/diffusion", "loras", "embeddings")
    below = [f"../disk/models/{name}" for name in folders]
    found = make(tmp_path / "ComfyUI", text, *below)
    assert found == [tmp_path / "disk" / "models" / name for name in ("unet", "big/diffusion", "loras")]


def test_sections_without_a_base_path_and_the_default_first(tmp_path: Path) -> None:
    text = f"""
one:
    vae: {tmp_path}/one
two:
    is_default: true
    vae: {tmp_path}/two
"""
    found = make(tmp_path / "ComfyUI", text, "../one", "../two")
    assert found == [tmp_path / "two", tmp_path / "one"]


def test_without_sections(tmp_path: Path) -> None:
    found = make(tmp_path / "ComfyUI", "base_path: ../disk\nvae: v\nclip: c\n", "../disk/v", "../disk/c")
    assert [path.resolve() for path in found] == [tmp_path / "disk" / "c", tmp_path / "disk" / "v"]


def test_it_is_read_beside_the_models_folder_too(tmp_path: Path) -> None:
    make(tmp_path / "ComfyUI", f"x:\n    vae: {tmp_path}/v\n", "models", "../v")
    for named in (tmp_path / "ComfyUI", tmp_path / "ComfyUI" / "models"):
        assert searched_folders([named]) == (named, tmp_path / "v")


@pytest.mark.parametrize(
    "text",
    [
        *("", "# a comment", "x: 3", "x:\n    vae: [1, 2]\n", "x:\n    vae: 5\n", "x: &x\n    vae: *x\n"),
        *("x:\n    2: y\n", "x:\n    base_path: [a]\n    vae: none\n"),
        *("x:\n    vae: ~nobody-here/vae\n", "x:\n    base_path: ~nobody-here\n    vae: vae\n"),
        *("x:\n    vae: " + "a" * 5000, 'x:\n    vae: "a\\0b"\n', "x:\n    vae: $NOTHING/${NONE\n"),
    ],
)
def test_what_has_no_folders(tmp_path: Path, text: str) -> None:
    assert make(tmp_path / "ComfyUI", text) == []


def test_a_list_of_folders_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    text = "\ufeffx:\n    base_path: ~/disk\n    vae: [a, 'b']\n    loras: ~/c\n"
    found = make(tmp_path / "ComfyUI", text, "../disk/a", "../disk/b", "../c")
    assert found == [tmp_path / "disk/a", tmp_path / "disk/b", tmp_path / "c"]


@pytest.mark.parametrize("form", ["{{<<: [{}]}}", "[{}]"], ids=["merges", "lists"])
def test_a_bomb_takes_no_time(tmp_path: Path, form: str) -> None:
    """Nine of nine of …: 9^9 entries to a PyYAML before 6.0.4, which pyproject.toml rules out."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 10)]
    start = time.process_time()
    assert make(tmp_path / "ComfyUI", "\n".join(lines)) == []
    assert time.process_time() - start < 1


def test_the_line_of_a_tab_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be read \(line 2: found character '\\t' that cannot"):
        make(tmp_path / "ComfyUI", "x:\n\tvae: y\n")


def test_what_has_no_sections_is_refused(tmp_path: Path) -> None:
    for text in ("- a list", "a text", "3"):
        with pytest.raises(WeightsError, match="extra_model_paths.yaml holds no sections with names"):
            make(tmp_path / "ComfyUI", text)


@pytest.mark.parametrize(
    "text",
    [
        *("x: [", "x: !!python/object/apply:os.system ['touch ran']", "\0", "[" * 50_000),
        *("x: 2020-99-99", "{[a]: b}"),
    ],
    ids=["list", "code", "binary", "deep", "date", "key"],
)
def test_what_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(WeightsError, match="extra_model_paths.yaml cannot be read"):
        make(tmp_path / "ComfyUI", text)


def test_the_folders_of_published_files_are_among_the_kinds() -> None:
    assert {file.folder for file in FILES} <= set(KINDS)


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was skipped without a word, with all that it holds."""
    write_tiny_weights(tmp_path / "models", seed=0)
    locked = tmp_path / "models/locked"
    locked.mkdir()
    scandir = os.scandir

    def refusing(folder: Any) -> Any:
        if Path(folder) == locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    events: list[Event] = []
    find_files([tmp_path / "models"], ["vae"], events.append)
    assert any(f"{locked}: Permission denied" in event.text for event in events if isinstance(event, Note))
    with pytest.raises(WeightsError, match="locked: Permission denied"):
        find_files([locked], ["vae"])
