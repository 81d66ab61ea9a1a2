"""Feeds damaged files to every reader of files, by hand: python tests/fuzz.py keypoints png --count 10000

Each kind is a function that makes one damaged input in a folder from a seeded generator and reads it. A
reader may return or raise a TrtWanError. Everything else is reported: another exception, the death of the
process, more than LIMIT_SECONDS, more than LIMIT_BYTES of memory. Inputs run in processes of their own, so
that a crash or a hang is one line of the result. `--only 123` runs one input in this process, with its
traceback, and leaves its files in --out.
"""

import argparse
import copy
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

LIMIT_SECONDS = 5.0  # of a processor
PATIENCE = 60.0  # seconds that an input may wait
LIMIT_BYTES = 4 << 30
CEILING = 6 << 30  # bytes that a process cannot exceed

Random = random.Random
Kind = Callable[[Random, Path], None]

# --- Damage ----------------------------------------------------------------------------------------------

INTERESTING = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff" * 8, b"\0" * 8, b"\0\0\0\1")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "\ud800", "1" * 300, [], {}, [[]], [None] * 133),
)


def damaged(rng: Random, data: bytes) -> bytes:
    """One to eight changes: bits, bytes, pieces cut, doubled, moved or overwritten, a cut end."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(content)
        at = rng.randrange(size + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), size - at)
        match rng.randrange(7):
            case 0 if size:
                content[at % size] ^= 1 << rng.randrange(8)
            case 1 if size:
                content[at % size] = rng.randrange(256)
            case 2:
                value = rng.choice(INTERESTING)
                content[at : at + len(value)] = value
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                other = rng.randrange(size + 1)
                content[at : at + length] = content[other : other + length]
            case 6:
                del content[at:]
    return bytes(content)


def odd_value(rng: Random) -> Any:
    if rng.random() < 0.1:
        value: Any = copy.deepcopy(rng.choice(ODD))
        for _ in range(rng.choice((2, 20, 40, 400))):
            value = [value] if rng.random() < 0.5 else {"keypoints": value}
        return value
    return copy.deepcopy(rng.choice(ODD))


def changed_tree(rng: Random, tree: Any) -> Any:
    """One to four places of a JSON value replaced, removed, doubled or renamed."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = json.loads(json.dumps(holder[rng.choice(list(_keys(holder)))]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice((f"{key}x", "", "box", "size"))] = holder.pop(key)
            case 2:
                holder[key:key] = holder[key : key + 1] * rng.choice((1, 2, 200))
            case 3 if isinstance(holder[key], (int, float)) and abs(holder[key]) < 1e300:
                holder[key] = rng.choice((-1, 1e4, -1e4, 1e6, 1e8, 0.001)) * (holder[key] or 1)
            case _:
                holder[key] = odd_value(rng)
    return tree


def _keys(holder: Any) -> Iterator[Any]:
    return iter(holder if isinstance(holder, dict) else range(len(holder)))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, (dict, list)):
            for key in _keys(holder):
                yield holder, key
                waiting.append(holder[key])


def damaged_json(rng: Random, tree: Any) -> bytes:
    """As a changed value, as changed bytes, or as nesting and numbers that parsers stumble over."""
    text = json.dumps(changed_tree(rng, tree) if rng.random() < 0.7 else tree)
    content = text.encode("utf-8", "surrogatepass")
    dice = rng.random()
    if dice < 0.05:
        at, depth = rng.randrange(len(content)), rng.choice((100, 900, 5_000, 200_000))
        content = content[:at] + rng.choice((b"[", b'{"a":')) * depth + content[at:]
    elif dice < 0.08:
        at = rng.randrange(len(content))
        content = content[:at] + b"9" * rng.choice((400, 5_000, 1_000_000)) + content[at:]
    elif dice < 0.4:
        content = damaged(rng, content)
    return content


@contextmanager
def home(folder: Path) -> Iterator[Path]:
    os.environ["TRT_WAN_HOME"] = str(folder)
    yield folder


# --- Kinds -----------------------------------------------------------------------------------------------


@cache
def some_keypoints() -> str:
    import numpy as np
    from made_clips import SIZE, box_of, standing

    from trt_wan.preprocess.clips.keypoints import FoundPeople, write_keypoints
    from trt_wan.preprocess.people.person import NOBODY, PersonFrame

    people = [PersonFrame(box_of(standing(SIZE, x)), standing(SIZE, x).round(1)) for x in (0, 4, 8)]
    people[1] = NOBODY
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.json"
        write_keypoints(path, FoundPeople(people, SIZE, people[0], (192, 112)))
        assert np.isfinite(people[0].keypoints).all()  # type: ignore[arg-type]
        return path.read_text()


def keypoints(rng: Random, folder: Path) -> None:
    """Reads the file, and draws, crops, masks and retargets the people of those that are accepted."""
    import numpy as np

    from trt_wan.preprocess.clips.keypoints import read_keypoints, rounded
    from trt_wan.preprocess.footage import Sizes
    from trt_wan.preprocess.people import notes
    from trt_wan.preprocess.people.fill import fill_gaps
    from trt_wan.preprocess.people.skeleton import from_keypoints
    from trt_wan.preprocess.pictures.draw import draw_skeleton
    from trt_wan.preprocess.pictures.face import FaceCropper
    from trt_wan.preprocess.pictures.preview import draw_preview
    from trt_wan.preprocess.retarget.rules import retarget
    from trt_wan.preprocess.stages import BoxSegmenter

    path = folder / "keypoints.json"
    path.write_bytes(damaged_json(rng, json.loads(some_keypoints())))
    found = rounded(read_keypoints(path, 3))
    size = (320, 180)
    sizes = Sizes(size, (192, 112), (192, 112), scale=(0.6, 0.62), offset=(0, -3))
    list(notes.about_frames(found.frames, size))
    notes.jumps([person.box for person in found.frames])
    frame = np.full((112, 192, 3), 90, np.uint8)
    placed = [sizes.placed(person) for person in fill_gaps(found.frames, 6)][:8]
    skeletons = [from_keypoints(person.keypoints, 192, 112) for person in placed]
    list(BoxSegmenter().outlines([frame] * len(placed), placed))
    cropper = FaceCropper()
    list(cropper.crops(cropper.cuts([frame] * len(placed), skeletons)))
    for person, skeleton in zip(placed, skeletons, strict=True):
        draw_skeleton(skeleton, 192, 112)
        draw_preview(frame, skeleton, person.box, None, None, "person")
    if found.reference is not None and found.reference.keypoints is not None:
        reference = from_keypoints(found.reference.keypoints, *found.reference_size)
        for moved in retarget(reference, skeletons, rng.choice(("safe", "official"))):
            draw_skeleton(moved, 192, 112)


@cache
def some_pictures() -> tuple[tuple[str, bytes], ...]:
    import cv2
    from made_clips import textured

    picture = textured((64, 48), 0)
    alpha = cv2.cvtColor(picture, cv2.COLOR_RGB2RGBA)
    deep = picture.astype("uint16") * 257
    made = (
        *((".png", picture), (".png", alpha), (".png", deep), (".png", picture[..., 0])),
        *((".jpg", picture), (".webp", picture), (".tiff", picture), (".bmp", picture)),
    )
    return tuple((suffix, cv2.imencode(suffix, pixels)[1].tobytes()) for suffix, pixels in made)


def png(rng: Random, folder: Path) -> None:
    """PNG in two of three inputs, with the checksums of its chunks made right in half of them."""
    from trt_wan.runtime.video.pictures import read_picture

    pictures = some_pictures()
    suffix, content = pictures[rng.randrange(4 if rng.random() < 0.67 else len(pictures))]
    if suffix == ".png" and rng.random() < 0.5:
        content = _png_with_checksums(rng, content)
    else:
        content = damaged(rng, content)
    path = folder / f"picture{suffix}"
    path.write_bytes(content)
    assert read_picture(path).ndim == 3


def _png_with_checksums(rng: Random, content: bytes) -> bytes:
    at, chunks = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    k = rng.randrange(len(chunks))
    kind, data = chunks[k]
    if kind == b"IHDR" and rng.random() < 0.5:
        width, height = (rng.choice((0, 1, 48, 2**16, 30_000, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        chunks[k] = kind, struct.pack(">II", width, height) + data[8:]
    elif kind == b"IDAT" and rng.random() < 0.5:
        chunks[k] = kind, zlib.compress(damaged(rng, zlib.decompress(data)))
    else:
        chunks[k] = kind, damaged(rng, data)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(chunks))
    made = (struct.pack(">I", len(d)) + c + d + struct.pack(">I", zlib.crc32(c + d)) for c, d in chunks)
    return content[:8] + b"".join(made)


@cache
def some_clips() -> tuple[tuple[str, bytes], ...]:
    from made_clips import write_clip

    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name, codec, sound in (
            ("a.mp4", "libx264", True),
            ("b.mp4", "mpeg4", False),
            ("c.mkv", "ffv1", False),
        ):
            path = write_clip(Path(folder) / name, 6, (64, 48), Fraction(12), codec, sound)
            made.append((path.suffix, path.read_bytes()))
    return tuple(made)


def mp4(rng: Random, folder: Path) -> None:
    """Reads the first frames, as a job does; mostly .mp4, a fifth .mkv."""
    from trt_wan.runtime.video.reader import Clip

    clips = some_clips()
    suffix, content = clips[rng.choice((0, 0, 1, 1, 2))]
    path = folder / f"clip{suffix}"
    path.write_bytes(
        _with_boxes(rng, content) if suffix == ".mp4" and rng.random() < 0.6 else damaged(rng, content)
    )
    with Clip(path, history=4) as clip:
        for k in range(min(clip.frames, 12)):
            clip.window([k])


BOXES = (
    b"tkhd",
    b"mvhd",
    b"mdhd",
    b"elst",
    b"stts",
    b"ctts",
    b"stsz",
    b"stsc",
    b"stco",
    b"stsd",
    b"stss",
    b"avcC",
)


def _with_boxes(rng: Random, content: bytes) -> bytes:
    """Numbers inside the boxes that describe the video."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = made.find(rng.choice(BOXES))
        if at >= 0:
            place = at + rng.randrange(-4, 60)
            value = rng.choice(
                (0, 1, 2, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32))
            )
            made[place : place + 4] = struct.pack(">I", value)
    return bytes(made)


@cache
def some_prepared() -> Path:
    from made_clips import write_clip, write_reference

    folder = Path(tempfile.mkdtemp(prefix="fuzz-prepared-"))
    write_reference(folder / "src_ref.png", (64, 48))
    for name in ("src_pose.mp4", "src_bg.mp4", "src_mask.mp4"):
        write_clip(folder / name, 5, (64, 48), codec="libx264", sound=name == "src_pose.mp4")
    write_clip(folder / "src_face.mp4", 5, (512, 512), codec="libx264")
    write_clip(folder / "other.mp4", 5, (32, 32), codec="libx264")
    write_clip(folder / "longer.mp4", 7, (64, 48), codec="libx264")
    return folder


def prepared(rng: Random, folder: Path) -> None:
    """A folder of clips with one to three files missing, swapped, empty, cut, of another size or length, a
    folder, a link to nothing, a pipe or without rights; opened and read as a run does.
    """
    from trt_wan.runtime.job import Inputs
    from trt_wan.runtime.video.clips import open_clips

    source, made = some_prepared(), folder / "prepared"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(source, made)
    names = sorted(path.name for path in source.iterdir())
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = made / rng.choice(names)
        before = path.read_bytes() if path.is_file() else b""
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        match rng.randrange(9):
            case 0:
                pass
            case 1 | 2:
                shutil.copy(source / rng.choice(names), path)
            case 3:
                path.write_bytes(b"")
            case 4:
                path.write_bytes(before[: rng.randrange(len(before) + 1)])
            case 5:
                path.mkdir()
            case 6:
                path.symlink_to(rng.choice((made / "nowhere", path, made)))
            case 7:
                os.mkfifo(path)
            case 8:
                path.write_bytes(damaged(rng, before))
                path.chmod(rng.choice((0o000, 0o644)))
    mode = rng.choice(("animate", "replace"))
    with open_clips(Inputs.from_folder(made, mode), 5) as clips:  # type: ignore[arg-type]
        for clip in (clips.pose, clips.face, clips.background, clips.mask):
            if clip is not None:
                clip.window(list(range(min(5, clip.frames))))


def engines(rng: Random, folder: Path) -> None:
    """The engine store: manifests, plans and their records. A wrong plan must never come out."""
    import hashlib

    from trt_wan.engines.flavour import Flavour
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.engine_id import wan_engine
    from trt_wan.engines.store.engines import ensure, find, open_checked
    from trt_wan.engines.store.entries import entries, trim

    flavour = Flavour("tensorrt_rtx", "1.6.1.120", SimpleNamespace(), "a test")  # type: ignore[arg-type]
    source = hashlib.sha256(b"graph").hexdigest()
    engine = wan_engine("head", "tiny", Plan(64, 48, 13, "bf16"), source, "sm120", flavour, None)
    plan = random.Random(7).randbytes(4000)
    with home(folder / "home") as there:
        shutil.rmtree(there, ignore_errors=True)
        ensure(engine, lambda: plan)
        for kind in rng.sample(("json", "plan", "checked"), rng.choice((1, 2))):
            path = there / "engines" / f"{engine.key}.{kind}"
            content = path.read_bytes() if path.exists() else b"[1, 2, 3, 4]"
            path.write_bytes(
                damaged_json(rng, json.loads(content)) if kind != "plan" else damaged(rng, content)
            )
        entries()
        find(engine)
        try:
            assert open_checked(engine) == plan, "a wrong plan"
        finally:
            ensure(engine, lambda: plan)
            assert open_checked(engine) == plan
            trim(())


def graphs(rng: Random, folder: Path) -> None:
    """The manifest of a set of graphs, or one of its files."""
    import hashlib

    from trt_wan.engines.store.graphs import GraphSet

    names = ("head", "block", "vae")
    content = {name: random.Random(name).randbytes(300) for name in names}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    for name, data in content.items():
        (folder / f"{name}.onnx").write_bytes(data)
    tree = {"graphs": "a model", "sha256": hashes}
    (folder / "manifest.json").write_bytes(damaged_json(rng, tree))
    damaged_graph = rng.random() < 0.3
    if damaged_graph:
        (folder / "head.onnx").write_bytes(damaged(rng, content["head"]) + b"x")
    made = GraphSet(folder, names, "a model", ("build",)).require()
    assert made == folder and not damaged_graph, "a damaged graph"


def measurements(rng: Random, folder: Path) -> None:
    """The measured figures of candidates, and the choice that is made of them."""
    from trt_wan.engines.store.measurements import (
        Figure,
        Place,
        figures_beside,
        read_figures,
        record_figures,
        title,
    )

    place = Place("a GPU", "tensorrt_rtx 1.6.1", "a graph")
    figures = {
        name: Figure("attention", name, "measured", ms, 1e-3, 1e-2, "exact", "a GPU", "1.6.1")
        for name, ms in (("cudnn", 3.0), ("tensorrt", 5.0))
    }
    with home(folder / "home") as there:
        shutil.rmtree(there, ignore_errors=True)
        record_figures(place, ["source"], figures)
        place.file.write_bytes(damaged_json(rng, json.loads(place.file.read_text())))
        for figure in (*read_figures(place).values(), *figures_beside("source")):
            title(figure)
        record_figures(place, ["source"], figures)
        assert figures.items() <= read_figures(place).items()


def text_cache(rng: Random, folder: Path) -> None:
    """Cached text features and remembered hashes. Wrong features must never come out."""
    import numpy as np

    from trt_wan.engines.store import checksums
    from trt_wan.runtime.text_cache import TextCache

    checksums.SETTLED = -1.0  # type: ignore[misc]  # hashes of files that were just written are remembered
    encoder = folder / "encoder.safetensors"
    encoder.write_bytes(b"weights")
    features = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    with home(folder / "home") as there:
        shutil.rmtree(there, ignore_errors=True)
        cache_ = TextCache(True, [encoder], ["bf16"], (8, 4))
        cache_.store("a cat", features)
        cache_.close(60)
        path = rng.choice(sorted((there / "text").iterdir()))
        content = path.read_bytes()
        as_json = path.suffix == ".checksum"
        path.write_bytes(damaged_json(rng, json.loads(content)) if as_json else damaged(rng, content))
        again = TextCache(True, [encoder], ["bf16"], (8, 4))
        found = again.find("a cat")
        assert found is None or np.array_equal(found, features), "wrong features"
        again.store("a cat", features)
        again.close(60)


@cache
def some_weights() -> Path:
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    folder = Path(tempfile.mkdtemp(prefix="fuzz-weights-"))
    write_tiny_weights(folder, 0)
    return folder


def safetensors(rng: Random, folder: Path) -> None:
    """The header of a checkpoint, or an index of shards; then every tensor that it lists is read."""
    from trt_wan.runtime.weights.checkpoint import Checkpoint
    from trt_wan.runtime.weights.describe import describe
    from trt_wan.runtime.weights.tensor_file import DTYPES, TensorFile, header_text

    if rng.random() < 0.2:
        shutil.copy(some_weights() / "clip_vision_tiny.safetensors", folder / "a.safetensors")
        path = folder / "m.safetensors.index.json"
        path.write_bytes(damaged_json(rng, {"weight_map": dict.fromkeys(("x", "y"), "a.safetensors")}))
    else:
        name = rng.choice(("umt5_tiny_fp8_e4m3fn_scaled", "clip_vision_tiny", "wan2.1_vae_tiny_bf16"))
        content = (some_weights() / f"{name}.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = content[8 : 8 + length], content[8 + length :]
        header = damaged_json(rng, json.loads(header)) if rng.random() < 0.8 else damaged(rng, header)
        announced = len(header) if rng.random() < 0.8 else rng.choice((0, 7, 2**31, 2**63, len(content)))
        path = folder / "m.safetensors"
        path.write_bytes(announced.to_bytes(8, "little") + header + data)
    header_text(path)
    file = TensorFile(path)
    for name, entry in file.items():
        if entry.dtype in DTYPES:
            file.read(name)
    checkpoint = Checkpoint(path)
    for name in checkpoint:
        checkpoint.raw(name) if checkpoint.entry(name).dtype in DTYPES else None
    describe(path)


@cache
def some_gguf() -> tuple[bytes, int]:
    """A file with metadata of every kind, and the length of its header."""
    import numpy as np
    from gguf import GGUFWriter
    from quantised_weights import Made, as_gguf, write_gguf

    from trt_wan.runtime.weights.gguf_file import GgufFile

    rng = np.random.default_rng(0)
    values = {
        "a.weight": (4, 256),
        "b.weight": (2, 512),
        "c.weight": (3, 4, 1, 2, 2),
        "d": (1, 5),
        "e": (32, 8),
    }
    kinds = ("Q4_K", "Q8_0", "F32", "F16", "BF16")
    tensors: dict[str, Made] = {
        name: as_gguf(rng.standard_normal(shape, np.float32), kind)
        for kind, (name, shape) in zip(kinds, values.items(), strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"

        def more(writer: GGUFWriter) -> None:
            writer.add_array("words", ["a", "bc", ""])
            writer.add_array("numbers", [1.5] * 40)
            writer.add_custom_alignment(64)
            writer.add_bool("yes", True)
            writer.add_float64("half", 0.5)

        write_gguf(path, tensors, {"e": (16, 16)}, more=more)
        return path.read_bytes(), min(entry.start for entry in GgufFile(path).values())


def gguf(rng: Random, folder: Path) -> None:
    """The header of a GGUF file; then every tensor that it lists is decoded."""
    from trt_wan.runtime.weights.gguf_file import GgufFile
    from trt_wan.runtime.weights.stored import BLOCKS, Stored
    from trt_wan.runtime.weights.tensor_file import DTYPES

    content, length = some_gguf()
    if rng.random() < 0.5:  # one number becomes another, and all else stays in its place
        head, size = bytearray(content[:length]), rng.choice((1, 4, 8))
        at = rng.randrange(length - size)
        number = rng.choice((0, 1, 2, 9, 2**31, 2**40, 2**60, 2**63, 2**64 - 1, rng.randrange(2**64)))
        head[at : at + size] = number.to_bytes(8, "little")[:size]
        content = bytes(head) + content[length:]
    elif rng.random() < 0.9:
        content = damaged(rng, content[:length]) + content[length:]
    else:
        content = damaged(rng, content)
    path = folder / "m.gguf"
    path.write_bytes(content)
    file = GgufFile(path)
    for name, entry in file.items():
        if entry.dtype in DTYPES or entry.dtype in BLOCKS:
            blocks = entry.dtype if entry.dtype in BLOCKS else ""
            values = Stored(
                file.read(name), None, path, entry.start, blocks=blocks, dims=entry.shape
            ).float32()
            assert values.shape == entry.shape


@cache
def some_lora(family: str) -> bytes:
    """A few layers of a file of that family."""
    from lora_files import FAMILIES
    from safetensors.numpy import save

    chosen = ("blocks.0.", "blocks_0_", "head", "patch_embedding", "face_adapter.0", "conv2")
    tensors = FAMILIES[family]().tensors
    return save({key: values for key, values in tensors.items() if any(part in key for part in chosen)})


@cache
def lora_base() -> Any:
    import numpy as np

    from trt_wan.engines.checkpoint import required_tensors
    from trt_wan.engines.config import TINY
    from trt_wan.runtime.weights.stored import Stored

    class Ones:
        shapes = required_tensors(TINY, "transformer")

        def stored(self, name: str) -> Stored:
            return Stored(np.ones(self.shapes[name], np.float32))

        def __getitem__(self, name: str) -> Any:
            return self.stored(name).float32()

    return Ones()


def lora(rng: Random, folder: Path) -> None:
    """A LoRA: keys, shapes, types and numbers changed; what is accepted is described and merged."""
    from lora_files import FAMILIES

    from trt_wan.engines.config import TINY
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.job import Lora
    from trt_wan.runtime.loras.describe import describe_lora
    from trt_wan.runtime.loras.loras import Loras

    content = some_lora(rng.choice(list(FAMILIES)))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    dice = rng.random()
    if dice < 0.3:  # keys exchange their suffixes, types and shapes; the file stays one of safetensors
        keys = [key for key in header if key != "__metadata__"]
        for _ in range(rng.choice((1, 2, 5))):
            key, other = rng.choice(keys), rng.choice(keys)
            if key not in header:
                continue
            match rng.randrange(4):
                case 0:
                    cut = len(key) - rng.randrange(1, 20)
                    header[key[:cut] + other[-rng.randrange(1, 20) :]] = header.pop(key)
                case 1:
                    entry = header[key]
                    shape = entry["shape"] or [1]
                    entry["shape"] = rng.choice(
                        (shape[::-1], [*shape, 1], [1, *shape], [int(_product(shape))])
                    )
                case 2:
                    entry = header[key]
                    same = {2: ("F16", "BF16", "I16"), 4: ("F32", "I32"), 1: ("U8",)}
                    size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(
                        1, _product(entry["shape"])
                    )
                    entry["dtype"] = rng.choice(same.get(size, ("F32",)))
                case 3 if other in header:
                    header[key], header[other] = header[other], header[key]
        head = json.dumps(header).encode("utf-8", "surrogatepass")
    elif dice < 0.8:
        head = damaged_json(rng, header)
    else:
        head, data = content[8 : 8 + length], damaged(rng, data)
        data = data[: len(content) - 8 - length].ljust(
            len(content) - 8 - length, rng.choice((b"\0", b"\xff"))
        )
    path = folder / "lora.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    merged = Loras(TINY, lora_base()).merging([Lora(path, 0.5)], silent)
    for name in list(merged.changed)[:8]:
        assert merged.tensors[name].shape == merged.tensors.base.stored(name).shape
    describe_lora(path)


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def tokenizer(rng: Random, folder: Path) -> None:
    """tokenizer.json: read, and used for a prompt."""
    from trt_wan.runtime.networks.tokenizer import load_sentencepiece, load_tokenizer_json

    tree = json.loads((some_weights() / "tokenizer.json").read_text())
    path = folder / "tokenizer.json"
    path.write_bytes(damaged_json(rng, tree))
    if rng.random() < 0.2:
        load_sentencepiece(path, 512).encode("a cat")
    else:
        load_tokenizer_json(path, 512).encode("a cat on a mat, twice")


@cache
def some_networks() -> tuple[bytes, ...]:
    import numpy as np
    import onnx_nets

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        onnx_nets.detector(path / "d.onnx", np.zeros((1, 6), np.float32), side=64)
        onnx_nets.pose(path / "p.onnx", np.zeros((133, 3, 4, 4), np.float32))
        return (path / "d.onnx").read_bytes(), (path / "p.onnx").read_bytes()


def onnx(rng: Random, folder: Path) -> None:
    """A user's network for --detector or --pose: opened with ONNX Runtime, and run once."""
    import numpy as np

    from trt_wan.preprocess.onnx.net import OnnxNet
    from trt_wan.preprocess.people.detect import Detector
    from trt_wan.preprocess.people.person import Box
    from trt_wan.preprocess.people.pose import PoseEstimator

    which = rng.randrange(2)
    path = folder / "net.onnx"
    path.write_bytes(damaged(rng, some_networks()[which]))
    net = OnnxNet(path, "onnxruntime", batch=1, frame=((3, 64, 64), (3, 256, 192))[which])
    frame = np.zeros((48, 64, 3), np.uint8)
    if which:
        PoseEstimator(net).estimate([frame], [Box(4, 4, 30, 40)])
    else:
        Detector(net).detect([frame])


@cache
def some_torch_file() -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save({"model": {f"layer.{k}": torch.zeros(3, 4, dtype=torch.float16) for k in range(6)}}, stream)
    return stream.getvalue()


def torch_file(rng: Random, folder: Path) -> None:
    """SAM2's .pt: the pickle inside, or the bytes of the zip."""
    import zipfile

    from trt_wan.runtime.weights.describe import describe
    from trt_wan.runtime.weights.open_file import names_text
    from trt_wan.runtime.weights.torch_file import TorchFile, read_torch_file

    path = folder / "sam2.pt"
    content = some_torch_file()
    if rng.random() < 0.6:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, damaged(rng, data) if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(damaged(rng, content))
    names_text(path)
    for tensor in read_torch_file(path).values():
        tensor.read()
    file = TorchFile(path)
    for name in file:
        file.read(name)
    describe(path)


def comfy_quant(rng: Random, folder: Path) -> None:
    """The descriptions of quantised layers, as tensors or in the header; then the weights are read."""
    from contextlib import suppress

    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from trt_wan.runtime.weights.checkpoint import Checkpoint

    options = {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": 64,
        "params": {"per_row": True},
    }
    tensors: dict[str, Any] = {"motion_encoder.dec.direction.weight": np.ones((2, 2), np.float32)}
    layers: dict[str, Any] = {}
    for k in range(4):
        described = damaged_json(rng, copy.deepcopy(options))
        kind = rng.choice((np.int8, ml_dtypes.float8_e4m3fn, np.uint8, np.float32))
        tensors[f"x.{k}.weight"] = np.ones((4, 64)).astype(kind)
        tensors[f"x.{k}.{rng.choice(('weight_scale', 'scale_weight', 'scale'))}"] = np.ones(
            rng.choice(((), (1,), (4,), (4, 1), (64,), (4, 2, 1))),
            rng.choice((np.float32, np.float16, np.uint8)),
        )
        if rng.random() < 0.3:
            tensors[f"x.{k}.pre_quant_scale"] = np.ones(rng.choice(((64,), (), (4,))), np.float32)
        if rng.random() < 0.5:
            tensors[f"x.{k}.comfy_quant"] = np.frombuffer(described, np.uint8)
        else:
            with suppress(ValueError, RecursionError):
                layers[f"x.{k}"] = json.loads(described)
    metadata = {"_quantization_metadata": damaged_json(rng, {"layers": layers}).decode("latin-1")}
    save_file(tensors, folder / "m.safetensors", metadata)
    checkpoint = Checkpoint(folder / "m.safetensors")
    for k in range(4):
        name = f"x.{k}.weight"
        if checkpoint.fault(name, (4, 64)) is None:
            assert checkpoint[name].shape == (4, 64)
    checkpoint.require({f"x.{k}.weight": (4, 64) for k in range(4)})


@cache
def some_record() -> Any:
    """Like that of a job of the tiny model; its clips and weights exist."""
    from trt_wan.runtime.context.settings import Context
    from trt_wan.runtime.job import Inputs, Job
    from trt_wan.runtime.kept.identity import identity
    from trt_wan.runtime.kept.record import Record, as_values

    clips, weights = some_prepared(), some_weights()
    lora_file = weights / "a-lora.safetensors"
    lora_file.write_bytes(some_lora("lightx2v_kijai"))
    inputs = Inputs.from_folder(clips, "animate")
    parts = Context(frames=5, overlap=4, whole=False)
    job = Job(inputs, prompt="a | b", steps=2, seed=3, window=9, sampler="euler", context=parts)
    files = {"reference": inputs.reference, "pose": inputs.pose, "face": inputs.face, "loras": lora_file}
    files |= {"sound": clips / "src_pose.mp4", "vae": weights / "wan2.1_vae_tiny_bf16.safetensors"}
    given = {"window": 9, "steps": 2, "seed": 3, "sampler": "euler", "context": "static_standard"}
    given |= {"context_frames": 5, "context_overlap": 4, "prompt": "a | b", "colour_match": "mkl:0.5"}
    given |= {"crf": 30, "start": "0", "end": "0:00.4", "guidance": "2,1", "executor": "onnxruntime"}
    paths = {"inputs": str(clips), "weights": [str(weights)], "loras": [f"{lora_file}:0.5"]}
    return Record(
        {"trt-wan": "0.1", "numpy": "2.1", "onnxruntime": "1.22", "CPU": "x86_64"},
        as_values(job),
        {"name": "tiny", "precision": "fp32", "vae_chunk": 1},
        {role: [identity(file, role == "vae")] for role, file in files.items()},
        {"frames": 5, "width": 64, "height": 48, "rate": "12", "kind": ".mp4", "crf": None},
        given | {"loras": [f"{lora_file.name}:0.5"], "audio": "src_pose.mp4"},
        {
            "files": {role: [str(file)] for role, file in files.items()},
            "options": paths | {"audio": str(clips / "src_pose.mp4")},
        },
    )


def _video_with(comment: str, path: Path) -> None:
    import numpy as np

    from trt_wan.runtime.video.writer import VideoWriter

    with VideoWriter(path, 64, 48, Fraction(12), comment=comment) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.finish()


@cache
def some_video() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        _video_with(some_record().text(with_paths=False), path)
        return path.read_bytes()


def record(rng: Random, folder: Path) -> None:
    """The record in a video's metadata or in the .json beside it: read, compared, and given to `run --from`,
    one in ten for a whole dry run.
    """
    import click

    from trt_wan.cli.main import cli
    from trt_wan.errors import UsageError
    from trt_wan.runtime.kept.record import read_record

    genuine, path = some_record(), folder / "v.mp4"
    shutil.rmtree(folder)
    folder.mkdir()
    tree, dice = json.loads(genuine.text(with_paths=True)), rng.random()
    if rng.random() < 0.2:  # so that more of the other options are reached
        tree["options"] = tree["paths"]["options"] = {}
    if dice < 0.5:
        path = folder / "v.json"
        path.write_bytes(damaged_json(rng, tree))
    elif dice < 0.8:
        tree.pop("paths")
        text = damaged_json(rng, tree).decode("utf-8", "replace").replace("\0", "")
        _video_with(text, path)
        path.with_suffix(".json").write_bytes(damaged_json(rng, json.loads(genuine.text(with_paths=True))))
    else:
        content = some_video()
        at = content.index(b"trt_wan_record") if rng.random() < 0.5 else 0
        path.write_bytes(content[:at] + damaged(rng, content[at:]))
    found = read_record(path)
    for difference in (*found.differences(genuine), *genuine.differences(found)):
        assert difference.text
    found.other_versions(genuine)
    given = ["--from", str(path), "-o", str(folder / "o.mp4")]
    try:
        if rng.random() < 0.1:
            cli.main(["run", *given, "--dry-run", "--json"], standalone_mode=False)
        else:
            cli.commands["run"].make_context("run", given)
    except click.ClickException as error:
        raise UsageError(error.format_message(), "click's own") from error
    except SystemExit as ended:
        assert ended.code in (1, 2), ended.code


@cache
def some_state() -> tuple[Path, bytes]:
    """A stopped job with three windows and what it kept, and the video of the whole job."""
    from contextlib import suppress

    from test_resume import RECORD, Chained
    from tiny_job import PLAN, prepare, write_sound

    from trt_wan.errors import Stopped
    from trt_wan.runtime.job import Inputs, Job
    from trt_wan.runtime.render import render

    folder = Path(tempfile.mkdtemp(prefix="fuzz-state-"))
    prepare(folder / "clips", write_sound(folder / "tone.m4a", 2), 40)
    job = Job(Inputs.from_folder(folder / "clips", "animate"), window=PLAN.frames)
    whole = render(job, Chained(), folder / "whole.mp4", record=RECORD).path.read_bytes()
    (folder / "kept").mkdir()
    with suppress(Stopped):
        render(job, Chained(4), folder / "kept" / "out.mp4", record=RECORD)
    return folder, whole


def _changed_arrays(rng: Random, path: Path) -> bytes:
    """An .npz with an array that is missing, renamed, or of another type or shape."""
    import numpy as np

    with np.load(path) as opened:
        arrays = dict(opened)
    name = rng.choice(sorted(arrays))
    value = arrays.pop(name)
    match rng.randrange(4):
        case 0:
            arrays[f"{name}x"] = value
        case 1:
            arrays[name] = np.resize(value, value.shape).view(np.uint8) if value.shape else np.array(["x"])
        case 2:
            arrays[name] = np.stack([value] * rng.choice((0, 2)) or [np.zeros(0)])
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def state(rng: Random, folder: Path) -> None:
    """The kept state of a stopped job, gone on from: the same video comes out, or an error. A state whose
    checksum was made right is only read.
    """
    import hashlib

    from test_resume import RECORD, Chained
    from tiny_job import PLAN

    from trt_wan.runtime.events import silent
    from trt_wan.runtime.job import Inputs, Job
    from trt_wan.runtime.kept.windows import CHECKSUM, find, index_text
    from trt_wan.runtime.render import render

    source, whole = some_state()
    made = folder / "kept"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(source / "kept", made)
    partial = made / "out.partial.mp4"
    index = made / "out.partial.mp4.state" / "state.json"
    arrays = next(index.parent.glob("*.npz"))
    tree, dice = json.loads(index.read_text()), rng.random()
    if dice < 0.6:
        index.write_bytes(damaged_json(rng, tree))
    elif dice < 0.7:
        path = rng.choice((partial, arrays))
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        content = _changed_arrays(rng, arrays) if dice < 0.85 else damaged(rng, arrays.read_bytes())
        arrays.write_bytes(content)
        tree["windows"]["sha256"] = hashlib.sha256(content).hexdigest()
        del tree[CHECKSUM]
        index.write_text(index_text(tree))
    output = made / "out.mp4"
    find(output, RECORD, silent)  # refuses most, and opens no clip
    if dice >= 0.7:
        return
    job = Job(Inputs.from_folder(source / "clips", "animate"), window=PLAN.frames)
    again = render(job, Chained(), output, record=RECORD, resume=True).path.read_bytes()
    assert again == whole, "another video"


def joined(rng: Random, folder: Path) -> None:
    """Parts for `join`, one of them damaged, and a damaged video for `run --extend`."""
    from trt_wan.runtime.video.continued import frames_before
    from trt_wan.runtime.video.join import join_videos

    suffix, content = some_clips()[rng.choice((0, 0, 0, 1, 1, 2))]
    path, other, output = folder / f"part{suffix}", folder / f"other{suffix}", folder / f"joined{suffix}"
    with_boxes = suffix == ".mp4" and rng.random() < 0.6
    path.write_bytes(_with_boxes(rng, content) if with_boxes else damaged(rng, content))
    other.write_bytes(content)
    if rng.random() < 0.4:
        frames_before(SimpleNamespace(start_frame=None, extend=path), 5, 64, 48, Fraction(12))  # type: ignore[arg-type]
    else:
        parts = [path, other]
        rng.shuffle(parts)
        join_videos(parts, output, overwrite=True)


KINDS: dict[str, Kind] = {
    function.__name__: function
    for function in (
        *(keypoints, png, mp4, prepared, engines, graphs, measurements, text_cache, safetensors, gguf),
        *(tokenizer, onnx, torch_file, comfy_quant, lora, record, state, joined),
    )
}

# --- Running ---------------------------------------------------------------------------------------------


def run_one(kind: str, index: int, folder: Path) -> tuple[str, str]:
    """The outcome (read, refused, crash, memory), and the traceback of a crash or the refusal."""
    from trt_wan.errors import TrtWanError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        KINDS[kind](Random(f"{kind} {index}"), folder)
    except TrtWanError as error:
        if len(error.message) > 1000 or not error.hint:
            return "crash", f"a message of {len(error.message)} characters, hint {error.hint!r}"
        return "refused", error.message
    except MemoryError:
        return "memory", traceback.format_exc()
    except Exception:
        return "crash", traceback.format_exc()
    return "read", ""


def worker(kind: str) -> None:
    """Runs the inputs whose numbers come from stdin, one a line, and answers each with a line of JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (CEILING, CEILING))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as warm:  # imports and sources take longer than an input
        run_one(kind, -1, Path(warm))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        start = time.process_time()  # on a busy machine all else takes long
        outcome, text = run_one(kind, int(line), folder)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps([outcome, text, seconds, peak]), file=answers, flush=True)


class Tally:
    def __init__(self, kind: str, out: Path) -> None:
        self.kind, self.out, self.lock = kind, out, Lock()
        self.counts: Counter[str] = Counter()
        self.slowest, self.peak = 0.0, 0
        self.told: set[str] = set()

    def add(self, index: int, outcome: str, text: str, seconds: float, peak: int) -> None:
        with self.lock:
            if outcome in ("read", "refused") and seconds > LIMIT_SECONDS:
                outcome = "hang"
            if outcome in ("read", "refused") and peak > LIMIT_BYTES:
                outcome = "memory"
            self.counts[outcome] += 1
            self.slowest, self.peak = max(self.slowest, seconds), max(self.peak, peak)
            if outcome in ("read", "refused"):
                return
            last = text.strip().splitlines()[-1] if text.strip() else outcome
            with (self.out / f"{self.kind}.log").open("a") as log:
                log.write(
                    f"--- {self.kind} {index}: {outcome} after {seconds:.1f} s, {peak / 1e6:.0f} MB\n{text}\n"
                )
            if last not in self.told:  # each kind of fault once
                self.told.add(last)
                print(f"  {self.kind} {index}: {outcome}: {last[:160]}", flush=True)

    def row(self, seconds: float) -> str:
        counts = [self.counts[name] for name in OUTCOMES]
        figures = f"{self.slowest:.2f} s", f"{self.peak / 1e6:.0f} MB", f"{seconds:.0f} s"
        return _row(self.kind, sum(counts), *counts, *figures)


OUTCOMES = ("read", "refused", "crash", "hang", "memory")


def _row(kind: str, *cells: object) -> str:
    return f"{kind:<14}" + "".join(f"{cell!s:>9}" for cell in cells)


def run_many(tally: Tally, indices: Iterator[int], lock: Lock) -> None:
    """One worker after another: a new one after each death, hang or excess."""
    process: subprocess.Popen[bytes] | None = None
    while True:
        with lock:
            index = next(indices, None)
        if index is None:
            break
        if process is None:
            process = _start(tally.kind)
        assert process.stdin is not None and process.stdout is not None
        start = time.perf_counter()
        process.stdin.write(b"%d\n" % index)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if ready else b""
        if line:
            outcome, text, seconds, peak = json.loads(line)
            tally.add(index, outcome, text, seconds, peak)
            if peak <= LIMIT_BYTES:
                continue
        else:
            process.kill()
            died = process.wait()
            text = f"died with {died}" if ready else f"no answer for {PATIENCE:.0f} s"
            tally.add(index, "crash" if ready else "hang", text, time.perf_counter() - start, 0)
        process.kill()
        process.wait()
        process = None
    if process is not None:
        process.kill()
        process.wait()


def _start(kind: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(Path(__file__)), "--worker", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRT_WAN_HOME": tempfile.gettempdir() + "/fuzz-home"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n", f"{kind} cannot begin"
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"all, or some of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-out"), help="tracebacks, one log for each kind"
    )
    parser.add_argument("--only", type=int, help="one input, in this process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    kinds = list(KINDS) if options.kinds in ([], ["all"]) else options.kinds
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only is not None:
        for kind in kinds:
            print(*run_one(kind, options.only, options.out / f"{kind}-{options.only}"), sep="\n")
        return
    print(_row("kind", "inputs", *OUTCOMES, "slowest", "peak", "wall"))
    failed = False
    for kind in kinds:
        start, tally = time.perf_counter(), Tally(kind, options.out)
        indices, lock = iter(range(options.first, options.first + options.count)), Lock()
        threads = [Thread(target=run_many, args=(tally, indices, lock)) for _ in range(options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(tally.row(time.perf_counter() - start), flush=True)
        failed = failed or any(tally.counts[name] for name in ("crash", "hang", "memory"))
    sys.exit(failed)


if __name__ == "__main__":
    main()
