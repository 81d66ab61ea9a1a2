"""GGUF files: as they are written for Wan, and with every fault in the header."""

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fuzz import gguf as damaged_gguf
from quantised_weights import Made, as_gguf, wan_type, write_gguf, write_gguf_header

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights import gguf_header
from trt_wan.runtime.weights.gguf_file import GgufFile
from trt_wan.runtime.weights.stored import BLOCKS

KINDS = ("F32", "F16", "BF16", *BLOCKS)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def header(
    *tensors: bytes, pairs: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    count = struct.pack("<QQ", *(counts or (len(tensors), len(pairs))))
    return b"GGUF" + struct.pack("<I", version) + count + b"".join(pairs) + b"".join(tensors)


def written(folder: Path, head: bytes, data: int = 0) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(head + bytes(-len(head) % 32 + data))
    return path


def random_tensors(kind: str) -> dict[str, Made]:
    """Some of a transformer's, in the types that a file of a quantisation has."""
    rng, shapes = np.random.default_rng(1), required_tensors(TINY, "transformer")
    chosen = {n: s for n, s in shapes.items() if ".1." not in n and ".2." not in n and ".3." not in n}
    return {
        name: as_gguf(rng.standard_normal(shape, np.float32), wan_type(name, shape, kind))
        for name, shape in chosen.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_for_wan(kind: str, tmp_path: Path) -> None:
    """Every tensor has its shape, of five dimensions too, its type and its values, as the gguf package reads
    them.
    """
    tensors = random_tensors(kind)
    write_gguf(tmp_path / "m.gguf", tensors)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "wan"
    assert set(file) == set(tensors) and len(file) == len(tensors)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for seen in reader.tensors:
        entry, values = file[seen.name], file.read(seen.name)
        assert entry.shape == tensors[seen.name].values.shape and entry.file == file.path
        assert entry.dtype == seen.tensor_type.name == tensors[seen.name].kind
        assert (entry.start, entry.stop) == (seen.data_offset, seen.data_offset + seen.n_bytes)
        assert values.tobytes() == np.ascontiguousarray(seen.data).tobytes()
        assert values.shape == (seen.data.shape if entry.dtype in BLOCKS else entry.shape)
        assert not values.flags.writeable
    assert file["blocks.0.self_attn.q.weight"].dtype == kind
    assert file["blocks.0.modulation"].dtype == file["patch_embedding.weight"].dtype == "F32"
    assert file["patch_embedding.weight"].shape == (256, 36, 1, 2, 2)
    assert file["head.head.weight"].dtype == "F16"


def test_a_tensor_that_was_flattened_has_the_shape_of_the_metadata(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((256, 36, 1, 2, 2), np.float32)
    flat = as_gguf(values.reshape(256, 144), "F16")
    rows = as_gguf(values.reshape(-1, 256), "Q8_0")
    original = {"p.weight": values.shape, "q.weight": (64, 576)}
    write_gguf(tmp_path / "m.gguf", {"p.weight": flat, "q.weight": rows}, original)
    file = GgufFile(tmp_path / "m.gguf")
    assert file["p.weight"].shape == values.shape and file["q.weight"].shape == (64, 576)
    np.testing.assert_array_equal(file.read("p.weight"), values.astype(np.float16))
    assert file.read("q.weight").tobytes() == rows.data.tobytes()
    assert file.read("q.weight").shape == (64, 576 // 32 * 34)


def test_an_alignment_of_the_file(tmp_path: Path) -> None:
    tensors = {name: Made("F32", np.arange(5, dtype=np.float32), np.zeros(0, np.float32)) for name in "ab"}
    write_gguf(tmp_path / "m.gguf", tensors, more=lambda writer: writer.add_custom_alignment(256))
    file = GgufFile(tmp_path / "m.gguf")
    assert file["b"].start % 256 == 0
    np.testing.assert_array_equal(file.read("b"), tensors["b"].data)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    """Numbers, strings and short lists of numbers are kept; long lists and lists of words are skipped."""
    words = struct.pack("<IQ", 8, 3) + text("a") + text("") + text("ü")
    pairs = (
        pair("u8", 0, b"\xff"),
        pair("i8", 1, b"\xff"),
        pair("f32", 6, struct.pack("<f", 0.5)),
        pair("bool", 7, b"\1"),
        pair("text", 8, text("wän")),
        pair("words", 9, words),
        pair("list", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        pair("long", 9, struct.pack("<IQ", 10, 100) + bytes(800)),
        pair("f64", 12, struct.pack("<d", 1e300)),
    )
    file = GgufFile(written(tmp_path, header(tensor("t", (2, 3)), pairs=pairs), 24))
    assert file.metadata == {
        "u8": 255, "i8": -1, "f32": 0.5, "bool": True, "text": "wän", "list": [1, -2, 3], "f64": 1e300,
    }  # fmt: skip
    assert file["t"].shape == (3, 2)


def original(*shape: int) -> bytes:
    return pair("comfy.gguf.orig_shape.t", 9, struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *shape))


F32, Q4_K = 0, 12
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its header ends early"),
    "foreign": (b"PK\3\4" + bytes(60), "it does not begin with GGUF"),
    "old": (header(version=1), "its version is 1, not 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "its numbers are big-endian"),
    "many tensors": (header(counts=(1 << 60, 0)), "promises 1152921504606846976 values and ends early"),
    "many pairs": (header(counts=(0, (1 << 64) - 1)), "promises 18446744073709551615 values"),
    "tensors": (header(counts=(200_000, 0)) + bytes(5_000_000), "its header has 200000 entries"),
    "long key": (header(pairs=(struct.pack("<Q", 1 << 40),)), "promises 1099511627776 values"),
    "long name": (header(tensor("x" * 5000, (1,))), "a name has 5000 bytes"),
    "long text": (header(pairs=(pair("k", 8, struct.pack("<Q", 1 << 40)),)), "promises 1099511627776 values"),
    "no such value": (header(pairs=(pair("k", 13, bytes(8)),)), "a value of its metadata has no known type"),
    "nested lists": (
        header(pairs=(pair("k", 9, struct.pack("<IQ", 9, 1) * 1000 + bytes(8)),)),
        "a list of its metadata has no known type",
    ),
    "long list": (header(pairs=(pair("k", 9, struct.pack("<IQ", 10, 1 << 61)),)), "values and ends early"),
    "dimensions": (header(tensor("t", (1,) * 9)), "t has 9 dimensions"),
    "huge": (header(tensor("t", (1 << 62, 1 << 62))), "the shape of t is"),
    "no whole blocks": (header(tensor("t", (300, 2), Q4_K)), "the shape of t is [2, 300]"),
    "a vector in blocks": (header(tensor("t", (256,), Q4_K)), "the rows of t, [256], are no whole blocks"),
    "no rows": (header(tensor("t", (256, 0), Q4_K)), "the rows of t, [0, 256], are no whole blocks"),
    "type": (header(tensor("t", (4,), 4)), "t in GGUF's type 4, which is not known"),
    "cut": (header(tensor("t", (1 << 40,))), "is truncated: t ends at byte 4398046511168, the file at"),
    "overlap": (header(tensor("s", (8,)), tensor("t", (8,), F32, 4)), "t does not begin where"),
    "same place": (header(tensor("s", (8,)), tensor("t", (8,), F32, 0)), "does not begin where"),
    "gap": (header(tensor("t", (8,), F32, 64)), "t does not begin where"),
    "far": (header(tensor("t", (8,), F32, (1 << 64) - 32)), "t does not begin where"),
    "twice": (header(tensor("t", (8,)), tensor("t", (8,), F32, 32)), "it has two tensors t"),
    "alignment 0": (header(pairs=(pair("general.alignment", 4, bytes(4)),)), "its alignment is no power"),
    "alignment": (header(pairs=(pair("general.alignment", 8, text("x")),)), "its alignment is no power"),
    "part": (header(pairs=(pair("split.count", 2, b"\3\0"),)), "is one of 3 parts of a GGUF file"),
    "shape": (header(tensor("t", (8,)), pairs=(original(2, 3),)), "the original shape of t does not fit"),
    "negative shape": (header(tensor("t", (8,)), pairs=(original(-2, -4),)), "the original shape of t does"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_sentence(fault: str, tmp_path: Path) -> None:
    head, said = FAULTS[fault]
    path = written(tmp_path, head, 64) if head else tmp_path / "m.gguf"
    path.touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as caught:
        GgufFile(path)
    assert said in caught.value.message and caught.value.hint
    assert str(path) in caught.value.message and len(caught.value.message) - len(str(path)) < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_missing_shortened_and_wordy_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        GgufFile(tmp_path)
    path = written(tmp_path, header(tensor("t", (8,)), tensor("u", (1024, 1024), F32, 32)), 32 + (4 << 20))
    file = GgufFile(path)
    with path.open("r+b") as opened:
        opened.truncate(1 << 20)
    with pytest.raises(WeightsError, match="became shorter"):
        file.read("u")
    words = pair("w", 9, struct.pack("<IQ", 8, 1000) + text("") * 1000)
    GgufFile(written(tmp_path, header(pairs=(words,))))
    monkeypatch.setattr(gguf_header, "MOST_WORDS", 1999)
    with pytest.raises(WeightsError, match="more than 1999 words"):
        GgufFile(written(tmp_path, header(pairs=(words, words))))


def test_a_long_text_is_skipped(tmp_path: Path) -> None:
    pairs = pair("long", 8, text("x" * 70_000)), pair("short", 8, text("x" * 60_000))
    assert set(GgufFile(written(tmp_path, header(pairs=pairs))).metadata) == {"short"}


def test_the_longest_metadata_takes_a_moment(tmp_path: Path) -> None:
    """A quarter of what is allowed. Text that is no UTF-8 took 28 s with another handling of its errors."""
    count = gguf_header.MOST_WORDS // 4
    words = pair("w", 9, struct.pack("<IQ", 8, count) + bytes(8 * count))
    bad = struct.pack("<Q", 65_000) + b"\xff" * 65_000
    texts = tuple(pair(f"t{i}", 8, bad) for i in range(gguf_header.MAX_HEADER // 65_000 // 4))
    path = written(tmp_path, header(pairs=(words, *texts)))
    start = time.process_time()
    GgufFile(path)
    assert time.process_time() - start < 1.5


def test_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    """tests/fuzz.py gguf runs more of them."""
    refused = 0
    for index in range(400):
        try:
            damaged_gguf(random.Random(index), tmp_path)
        except WeightsError as error:
            assert error.hint and len(error.message) < 1000
            refused += 1
    assert refused > 200


SIZES = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5}  # bits per number


@pytest.mark.parametrize("kind", SIZES)
def test_a_full_size_file_is_opened_in_under_a_second(kind: str, tmp_path: Path) -> None:
    """14b without values: the header alone is read. The file has as many bytes as its types need."""
    shapes = required_tensors(ANIMATE_14B, "transformer")
    write_gguf_header(tmp_path / "m.gguf", shapes, kind)
    start = time.perf_counter()
    file = GgufFile(tmp_path / "m.gguf")
    assert time.perf_counter() - start < 1
    assert {name: file[name].shape for name in shapes} == shapes
    bits: Callable[[str], float] = lambda n: {"F32": 32, "F16": 16, **SIZES}[file[n].dtype]  # noqa: E731
    data = sum(bits(name) * np.prod(shape, dtype=np.int64) / 8 for name, shape in shapes.items())
    size: Any = (tmp_path / "m.gguf").stat().st_size
    assert 0 <= size - data < 200_000
    matrices = [n for n, s in shapes.items() if n.startswith("blocks.") and len(s) == 2]
    assert len(matrices) == 480 and {file[name].dtype for name in matrices} == {kind}
