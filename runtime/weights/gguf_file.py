"""A GGUF file with the interface of a TensorFile: names, types and shapes from the header, values as views.

The header is read here and not by the gguf package, which believes every count in it: here nothing is read or
allocated that the file is too short for. The package names the types and their blocks.

GGUF lists dimensions from the innermost one. Some converters flatten a tensor of more dimensions than the
four of llama.cpp and keep its shape in the metadata `comfy.gguf.orig_shape.<name>`; those for ComfyUI write
it as it is (ComfyUI-GGUF, tools/convert.py and fix_5d_tensors.py). In files for Wan, quantised tensors are
matrices: 1-D tensors, small ones, `.modulation` and 5-D ones stay in F32, and the others in F16 or BF16, with
`text_embedding`, `time_embedding`, `time_projection`, `img_emb` and `head` (tools/lcpp.patch there).
llama-quantize drops leading dimensions of one.

All faults are WeightsErrors that name the file.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.stored import BLOCKS
from trt_wan.runtime.weights.tensor_file import DTYPES, LARGEST, Entry

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 64 << 20  # bytes; the words of a tokenizer take 10 MB
MOST_WORDS = 1_000_000  # in lists of the metadata: they are skipped one by one
LONGEST_NAME = 4096  # bytes of a key or of a tensor's name
LONGEST_LIST = 16  # numbers that are kept of the metadata
MOST_DIMENSIONS = 8
LARGEST_ALIGNMENT = 1 << 20
ALIGNMENT = 32  # bytes, where `general.alignment` is missing
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
STRING, LIST = 8, 9  # types of the metadata; the others are numbers
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufFile(Mapping[str, Entry]):
    """Header entries by name; `read` maps the values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._map: NDArray[np.uint8] | None = None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                self._read_header(_Header(file, size), size)
        except OSError as error:
            raise WeightsError(
                f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
            ) from error
        except _Fault as fault:
            raise WeightsError(f"{path} is damaged: {fault}.", "Download or copy the file again.") from None

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> NDArray[Any]:
        """The stored values, uncopied and read-only: uint8 [rows, bytes per row] of a type in BLOCKS. Other
        types must be in DTYPES.
        """
        entry = self.entries[name]
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        raw = self._map[entry.start : entry.stop]
        if len(raw) < entry.stop - entry.start:
            raise WeightsError(
                f"{self.path} became shorter after it was opened.", "Download or copy the file again."
            )
        if entry.dtype in BLOCKS:
            return raw.reshape(entry.shape[0], -1)
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def _read_header(self, header: "_Header", size: int) -> None:
        if header.take(4) != MAGIC:
            raise _Fault("it does not begin with GGUF")
        version = header.number("I")
        if version not in VERSIONS:
            if version.to_bytes(4, "little")[:2] == b"\0\0":
                raise _Fault("its numbers are big-endian")
            raise _Fault(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
        tensors, pairs = header.count(24), header.count(13)
        for _ in range(pairs):
            key = header.name()
            value = header.value(header.number("I"))
            if value is not None:
                self.metadata[key] = value
        self._refuse_parts()
        found = [_tensor(header) for _ in range(tensors)]
        self._place(found, header.position, size)

    def _refuse_parts(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise WeightsError(
                f"{self.path} is one of {parts} parts of a GGUF file, which are not read.",
                "Join them first: llama-gguf-split --merge.",
            )

    def _place(self, found: "list[tuple[str, tuple[int, ...], int, int]]", end: int, size: int) -> None:
        """The tensors lie in order of their offsets, each at the next multiple of the alignment."""
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= LARGEST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise _Fault("its alignment is no power of two")
        kinds = _kinds()
        start = position = -(-end // alignment) * alignment
        for name, shape, kind, offset in sorted(found, key=lambda tensor: tensor[3]):
            if name in self.entries:
                raise _Fault(f"it has two tensors {_shown(name)}")
            if kind not in kinds:
                raise WeightsError(
                    f"{self.path} holds {_shown(name)} in GGUF's type {kind}, which is not known.",
                    "Use a file of another quantisation, such as Q8_0 or Q4_K_M.",
                )
            dtype, count, nbytes = kinds[kind]
            numbers = math.prod(shape)
            if numbers >= LARGEST or numbers % count or (shape and shape[-1] % count):
                raise _Fault(f"the shape of {_shown(name)} is {list(shape)}")
            if start + offset != position:
                raise _Fault(f"{_shown(name)} does not begin where the tensor before it ends")
            stop = position + numbers // count * nbytes
            self.entries[name] = Entry(
                self.path, dtype, self._shape(name, shape, count), start + offset, stop
            )
            position = -(-stop // alignment) * alignment
            if stop > size:
                raise WeightsError(
                    f"{self.path} is truncated: {_shown(name)} ends at byte {stop}, the file at {size}.",
                    "Download or copy the file again.",
                )

    def _shape(self, name: str, stored: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The shape before the file was written. Rows are whole blocks of `count` numbers."""
        original = self.metadata.get(ORIGINAL_SHAPE + name, stored)
        sizes = original if isinstance(original, list) else stored
        shape = tuple(size for size in sizes if type(size) is int and 0 <= size < LARGEST)
        if len(shape) < len(sizes) or math.prod(shape) != math.prod(stored):
            raise _Fault(f"the original shape of {_shown(name)} does not fit")
        if count > 1 and (len(shape) < 2 or math.prod(shape[1:]) % count or not shape[0]):
            raise _Fault(f"the rows of {_shown(name)}, {list(shape)}, are no whole blocks")
        return shape


class _Fault(Exception):
    """What is wrong with a header, in words."""


class _Header:
    """The first bytes of a file; faults before anything is read that the file is too short for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.end = file, min(size, MAX_HEADER)
        self.position, self._words = 0, 0

    def take(self, size: int) -> bytes:
        self._move(size)
        data = self.file.read(size)
        if len(data) < size:
            raise _Fault("its header ends early")
        return data

    def skip(self, size: int) -> None:
        self._move(size)
        self.file.seek(size, 1)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, size: int) -> int:
        """How many things follow that have at least `size` bytes."""
        count = int(self.number("Q"))
        if count * size > self.end - self.position:
            raise _Fault(f"its header promises {count} values and ends early")
        return count

    def name(self) -> str:
        length = self.count(1)
        if length > LONGEST_NAME:
            raise _Fault(f"a name has {length} bytes")
        return self._text(length)

    def value(self, kind: int, depth: int = 0) -> object:
        """A number, a string or a short list of numbers; None for what is skipped."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self._text(self.count(1))
        if kind != LIST or depth:
            raise _Fault("a value of its metadata has no known type")
        kind = self.number("I")
        if kind == STRING:
            for _ in range(self._some(self.count(8))):
                self.skip(self.count(1))
            return None
        if kind not in NUMBERS:
            raise _Fault("a list of its metadata has no known type")
        form = NUMBERS[kind]
        count = self.count(struct.calcsize("<" + form))
        if count <= LONGEST_LIST:
            return [self.number(form) for _ in range(count)]
        self.skip(count * struct.calcsize("<" + form))
        return None

    def _some(self, count: int) -> int:
        self._words += count
        if self._words > MOST_WORDS:
            raise _Fault(f"its metadata has more than {MOST_WORDS} words")
        return count

    def _text(self, length: int) -> str:
        return self.take(length).decode("utf-8", "backslashreplace")

    def _move(self, size: int) -> None:
        if size > self.end - self.position:
            raise _Fault("its header ends early")
        self.position += size


def _tensor(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset."""
    name, dimensions = header.name(), header.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise _Fault(f"{_shown(name)} has {dimensions} dimensions")
    sizes = [header.number("Q") for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), header.number("I"), header.number("Q")


def _kinds() -> dict[int, tuple[str, int, int]]:
    """Name, numbers per block and bytes per block of every type."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _shown(name: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in name[:100])
    return text if len(name) <= 100 else text + "…"
