"""A GGUF file with the interface of a TensorFile: names, types and shapes from the header, values as views.

The header is not read by the gguf package, which believes every count in it (gguf_header.py). The package
names the types and their blocks.

GGUF lists dimensions from the innermost one. Some converters flatten a tensor of more dimensions than the
four of llama.cpp and keep its shape in the metadata `comfy.gguf.orig_shape.<name>`; those for ComfyUI write
it as it is (ComfyUI-GGUF, tools/convert.py and fix_5d_tensors.py). In files for Wan, quantised tensors are
matrices: 1-D tensors, small ones, `.modulation` and 5-D ones stay in F32, and the others in F16 or BF16, with
`text_embedding`, `time_embedding`, `time_projection`, `img_emb` and `head` (tools/lcpp.patch there).
llama-quantize drops leading dimensions of one.

All faults are WeightsErrors that name the file.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.gguf_header import Fault, Header
from trt_wan.runtime.weights.stored import BLOCKS
from trt_wan.runtime.weights.tensor_file import DTYPES, LARGEST, Entry

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_ENTRIES = 20_000  # tensors, and pairs of metadata
MOST_DIMENSIONS = 8
LARGEST_ALIGNMENT = 1 << 20
ALIGNMENT = 32  # bytes, where `general.alignment` is missing
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


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
                self._read_header(Header(file, size), size)
        except OSError as error:
            raise WeightsError(
                f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
            ) from error
        except Fault as fault:
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

    def _read_header(self, header: "Header", size: int) -> None:
        if header.take(4) != MAGIC:
            raise Fault("it does not begin with GGUF")
        version = header.number("I")
        if version not in VERSIONS:
            if version.to_bytes(4, "little")[:2] == b"\0\0":
                raise Fault("its numbers are big-endian")
            raise Fault(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
        tensors, pairs = header.count(24, MOST_ENTRIES), header.count(13, MOST_ENTRIES)
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
            raise Fault("its alignment is no power of two")
        kinds = _kinds()
        start = position = -(-end // alignment) * alignment
        for name, shape, kind, offset in sorted(found, key=lambda tensor: tensor[3]):
            if name in self.entries:
                raise Fault(f"it has two tensors {_shown(name)}")
            if kind not in kinds:
                raise WeightsError(
                    f"{self.path} holds {_shown(name)} in GGUF's type {kind}, which is not known.",
                    "Use a file of another quantisation, such as Q8_0 or Q4_K_M.",
                )
            dtype, count, nbytes = kinds[kind]
            numbers = math.prod(shape)
            if numbers >= LARGEST or numbers % count or (shape and shape[-1] % count):
                raise Fault(f"the shape of {_shown(name)} is {list(shape)}")
            if start + offset != position:
                raise Fault(f"{_shown(name)} does not begin where the tensor before it ends")
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
            raise Fault(f"the original shape of {_shown(name)} does not fit")
        if count > 1 and (len(shape) < 2 or math.prod(shape[1:]) % count or not shape[0]):
            raise Fault(f"the rows of {_shown(name)}, {list(shape)}, are no whole blocks")
        return shape


def _tensor(header: Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset."""
    name, dimensions = header.name(), header.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise Fault(f"{_shown(name)} has {dimensions} dimensions")
    sizes = [header.number("Q") for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), header.number("I"), header.number("Q")


def _kinds() -> dict[int, tuple[str, int, int]]:
    """Name, numbers per block and bytes per block of every type."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _shown(name: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in name[:100])
    return text if len(name) <= 100 else text + "…"
