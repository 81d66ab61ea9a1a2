"""Small inputs with which tests/fuzz.py ended a reader, kept as they were found or cut down."""

import hashlib
import json
import resource
import shutil
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import fuzz
import numpy as np
import pytest
from av.packet import Packet
from made_clips import write_clip, write_reference
from test_resume import RECORD

from trt_wan.cli.main import cli
from trt_wan.errors import InputError, OutputError, UsageError
from trt_wan.runtime.events import silent
from trt_wan.runtime.kept import windows as kept
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.video.cut import Mark
from trt_wan.runtime.video.join import join_videos, numbered
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.video.sound import Sound, require_sound
from trt_wan.runtime.video.working_file import Settled
from trt_wan.runtime.window_state import WindowState


@pytest.mark.parametrize("name", [b"xxxx", b"\0\0\0\0", b"fpcm"])
def test_a_clip_of_an_unknown_codec(tmp_path: Path, name: bytes) -> None:
    """PyAV has no decoder for the stream, and so no codec context."""
    path = write_clip(tmp_path / "c.mp4", 6, (64, 48), codec="libx264")
    path.write_bytes(path.read_bytes().replace(b"avc1", name))
    with pytest.raises(InputError) as caught:
        Clip(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_sound_of_an_unknown_codec_is_none_and_said(tmp_path: Path) -> None:
    """Such a stream has no codec context either: as a job's sound, as --audio and in a part for `join`."""
    path = write_clip(tmp_path / "c.mp4", 6, (64, 48), codec="libx264", sound=True)
    assert len(list(tmp_path.iterdir())) == 1
    good = Path(shutil.copy(path, tmp_path / "good.mp4"))
    content = path.read_bytes()
    assert (content.count(b"mp4a"), content.count(b"esds")) == (1, 1)
    path.write_bytes(content.replace(b"mp4a", b"xxxx").replace(b"esds", b"free"))
    with Clip(good) as clip:
        assert clip.has_sound and "unknown_sound" not in {note.code for note in clip.notes}
    with Clip(path) as clip:
        assert not clip.has_sound and clip.window([0]).shape == (1, 48, 64, 3)
        assert "unknown_sound" in {note.code for note in clip.notes}
    with pytest.raises(InputError, match="has no sound"):
        require_sound(path)
    assert Sound.of(path, KINDS[".mp4"]) is None
    for parts in ((path, good), (path, path)):
        joined = tmp_path / f"joined{len(set(parts))}.mp4"
        assert join_videos(parts, joined)[0] == 12
        with Clip(joined) as clip:
            assert clip.has_sound == (good in parts) and clip.frames == 12


def test_a_part_whose_times_are_not_in_its_order_is_refused() -> None:
    packets = []
    for pts in reversed(range(10)):
        packets.append(packet := Packet(b"x"))
        packet.pts, packet.time_base = pts, Fraction(1, 12)
    source: Any = SimpleNamespace(name="part.mp4", demux=lambda stream: packets)
    stream: Any = None
    with pytest.raises(InputError, match=r"part\.mp4 cannot be joined: its pictures"):
        list(numbered(source, stream, 0, Fraction(12)))


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 5000])
def test_a_png_whose_chunk_is_longer_than_the_file(tmp_path: Path, length: int) -> None:
    """OpenCV takes 2 GB and 10 s for it."""
    path = write_reference(tmp_path / "c.png", (64, 48))
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + length.to_bytes(4) + content[at + 4 :])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"c\.png cannot be read as a picture"):
        read_picture(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000 and time.perf_counter() - start < 3, f"{grown} KB"


@pytest.mark.parametrize("more", [b"", b"behind the end"])
def test_a_whole_png_is_read(tmp_path: Path, more: bytes) -> None:
    path = write_reference(tmp_path / "c.png", (64, 48))
    path.write_bytes(path.read_bytes() + more)
    assert read_picture(path).shape == (48, 64, 3)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError):
        read_picture(path)


@pytest.mark.parametrize("kind", ["record", "state", "joined"])
def test_a_few_damaged_inputs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand of each by hand."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    outcomes = {k: fuzz.run_one(kind, k, tmp_path / str(k)) for k in range(20)}
    assert {k: text for k, (outcome, text) in outcomes.items() if outcome not in ("read", "refused")} == {}
    assert {outcome for outcome, _ in outcomes.values()} == {"read", "refused"}, "damage is seen, not all is"


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("options", "steps", {}, "is no value of --steps"),
        ("options", "seed", float("inf"), "is no value of --seed"),
        ("options", "guidance", None, "is no value of --guidance"),
        ("options", "crf", [], "is no value of --crf"),
        ("options", "audio", 7, "is no value of --audio"),
        ("options", "loras", [None], "is no value of --lora"),
        ("options", "loras", ["a.safetensors:0" + "9" * 5000], "a.safetensors:0999"),
        ("paths", "options", 0.5, "has no record of a run in it"),
        ("paths", "files", None, "has no record of a run in it"),
    ],
)
def test_a_record_that_was_changed(tmp_path: Path, part: str, name: str, value: Any, says: str) -> None:
    values = json.loads(fuzz.some_record().text(with_paths=True))
    values[part][name] = value
    values["paths"] = values["paths"] if part == "paths" else {}
    path = tmp_path / "v.json"
    path.write_text(json.dumps(values))
    with pytest.raises(click.BadParameter) as caught:
        cli.commands["run"].make_context("run", ["--from", str(path), "-o", str(tmp_path / "o.mp4")])
    message = caught.value.format_message()
    assert says in message and len(message) < 500


def test_a_long_time_is_cut_in_the_message() -> None:
    with pytest.raises(UsageError, match="9…' is no frame and no time") as caught:
        Mark.of("0:00." + "9" * 5000)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("made", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_a_state_that_is_no_archive(tmp_path: Path, made: bytes) -> None:
    """Its checksum is right. zipfile's own errors are no OSError and no ValueError."""
    partial = tmp_path / "out.partial.mp4"
    settled = Settled(partial.name, 0, hashlib.sha256().hexdigest(), 13, 1, 0, False, "0")
    arrays = np.zeros((3, 1, 4, 4), np.float32)
    kept.save(partial, RECORD, settled, WindowState(1, arrays, CpuGenerator(0).state(), arrays))
    index = kept.folder_of(partial) / kept.INDEX
    values = json.loads(index.read_text())
    del values[kept.CHECKSUM]
    values["windows"]["sha256"] = hashlib.sha256(made).hexdigest()
    index.write_text(kept.index_text(values))
    (index.parent / values["windows"]["file"]).write_bytes(made)
    with pytest.raises(OutputError, match=r"windows-1\.npz is missing or not what was written"):
        kept.find(tmp_path / "out.mp4", RECORD, silent)


def test_a_long_name_in_a_state_is_cut_in_the_message(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial.mp4"
    settled = Settled("x" * 5000, 0, "", 13, 1, 0, False, "0")
    arrays = np.zeros((3, 1, 4, 4), np.float32)
    kept.save(partial, RECORD, settled, WindowState(1, arrays, CpuGenerator(0).state(), arrays))
    with pytest.raises(OutputError, match="it is that of xxx") as caught:
        kept.find(tmp_path / "out.mp4", RECORD, silent)
    assert len(caught.value.message) < 400
