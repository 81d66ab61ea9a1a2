"""Reads the inputs, outputs and weight files of an ONNX file, without the package `onnx` or a runtime.

The protobuf is walked in place and large fields are skipped: a 2.5 GB network takes milliseconds, and a wrong
file is refused before it is loaded.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.store.files import keep, read_json
from trt_wan.engines.store.home import home
from trt_wan.errors import WeightsError

FLOAT, HALF = 1, 10  # TensorProto.DataType
LFS_POINTER = b"version https://git-lfs"

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER, _INPUT, _OUTPUT = 7, 5, 11, 12
_NAME_OF_TENSOR, _EXTERNAL_DATA = 8, 13

Buffer = mmap.mmap | bytes
Span = tuple[int, int]


@dataclass(frozen=True)
class Value:
    """An input or output. An open dimension is None."""

    name: str
    type: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OnnxFile:
    path: Path
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weight_files: tuple[Path, ...]  # beside `path`. Empty: the weights are in `path`

    @property
    def sha256(self) -> str:
        """The hash of the file and its weights. Kept on disk until one changes: 2.5 GB take seconds."""
        files = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in (self.path, *self.weight_files)]
        name = hashlib.sha256(str(self.path).encode()).hexdigest()[:32]
        kept = home() / "onnx" / f"{name}.json"
        try:
            known = read_json(kept)
            if known["files"] == files:
                return str(known["sha256"])
        except (KeyError, TypeError):
            pass  # missing or damaged: computed again
        digest = hashlib.sha256()
        for path in (self.path, *self.weight_files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        keep(kept, json.dumps({"files": files, "sha256": digest.hexdigest()}))
        return digest.hexdigest()


def find_onnx(path: Path) -> Path:
    """The file itself, or in a folder `end2end.onnx`, as in the official code, or the only .onnx file."""
    if not path.exists():
        raise WeightsError(f"There is no file {path}.", "Check the path.")
    if not path.is_dir():
        return path.absolute()  # not resolved: files in the Hugging Face cache are links
    if (path / "end2end.onnx").is_file():
        return (path / "end2end.onnx").absolute()
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0].absolute()
    what = f"{len(found)} ONNX files" if found else "no ONNX file"
    raise WeightsError(f"The folder {path} has {what} and no end2end.onnx.", "Name the .onnx file itself.")


def read_onnx(path: Path) -> OnnxFile:
    """Raises WeightsError unless it is a complete ONNX file with all its weights."""
    file = find_onnx(path)
    refused = WeightsError(f"{file} is not an ONNX file, or is cut short.", "Download it again.")
    if file.stat().st_size < 8:
        raise refused
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(LFS_POINTER)] == LFS_POINTER:
            raise WeightsError(
                f"{file} is a Git LFS pointer, not the network itself.",
                "Run `git lfs pull` where it came from, or download the file.",
            )
        try:
            inputs, outputs, external = _graph(data)
        except (ValueError, IndexError, KeyError) as error:  # errors of walking damaged bytes
            raise refused from error
    if not inputs or not outputs:
        raise refused
    weights = tuple((file.parent / name) for name in external)
    for weight_file in weights:
        if not weight_file.is_file():
            raise WeightsError(
                f"{file.name} keeps its weights in {weight_file.name}, which is not in {weight_file.parent}.",
                f"Put {weight_file.name} beside {file.name}, under exactly that name.",
            )
    return OnnxFile(file, inputs, outputs, weights)


def _graph(data: Buffer) -> tuple[tuple[Value, ...], tuple[Value, ...], list[str]]:
    """Inputs without those that are weights (old files list both), outputs, and the weights' files."""
    graph = _only(data, (0, len(data)), _GRAPH)
    weights: set[str] = set()
    external: dict[str, None] = {}
    values: dict[int, list[Value]] = {_INPUT: [], _OUTPUT: []}
    for field, span in _fields(data, graph):
        if field == _INITIALIZER:
            for inner, part in _fields(data, span):
                if inner == _NAME_OF_TENSOR:
                    weights.add(_text(data, part))
                elif inner == _EXTERNAL_DATA and _text(data, _only(data, part, 1)) == "location":
                    external[_text(data, _only(data, part, 2))] = None
        elif field in values:
            values[field].append(_value(data, span))
    inputs = tuple(value for value in values[_INPUT] if value.name not in weights)
    return inputs, tuple(values[_OUTPUT]), list(external)


def _value(data: Buffer, span: Span) -> Value:
    name = _text(data, _only(data, span, 1))
    tensor = _only(data, _only(data, span, 2), 1)
    kind, shape = 0, []
    for field, part in _fields(data, tensor):
        if field == 1:
            kind = part[0]
        elif field == 2:
            for inner, dimension in _fields(data, part):
                if inner == 1:
                    sizes = [size for number, (size, _) in _fields(data, dimension) if number == 1]
                    shape.append(sizes[0] if sizes and sizes[0] > 0 else None)
    return Value(name, kind, tuple(shape))


def _fields(data: Buffer, span: Span) -> Iterator[tuple[int, Span]]:
    """Each field's number and the span of its bytes. For an integer, its value and 0."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind, start = key & 7, at
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, (number, 0)
            continue
        if kind == 2:
            length, start = _varint(data, at)
            at = start + length
        elif kind in (1, 5):
            at = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError(f"a field ends at {at}, its message at {end}")
        yield key >> 3, (start, at)


def _only(data: Buffer, span: Span, wanted: int) -> Span:
    return next((part for field, part in _fields(data, span) if field == wanted), (0, 0))


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _text(data: Buffer, span: Span) -> str:
    return data[span[0] : span[1]].decode()
