"""Opens a checkpoint file by its first bytes: safetensors, GGUF, or the zip that torch writes.

The suffix does not matter, except for an index of shards, which is JSON.
"""

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights import gguf_file, torch_file
from trt_wan.runtime.weights.foreign import FIRST, foreign_kind
from trt_wan.runtime.weights.gguf_file import GgufFile
from trt_wan.runtime.weights.tensor_file import INDEX, Entry, TensorFile, header_text, require_plain
from trt_wan.runtime.weights.torch_file import TorchFile, pickled_names

GGUF_NAMES = 16 << 20  # bytes; a tokenizer in front of the names takes 10 MB
PICKLE = b"\x80\x02"  # begins every pickle that torch writes


class OpenFile(Protocol):
    """TensorFile, GgufFile or TorchFile."""

    path: Path
    metadata: dict[str, object]
    entries: dict[str, Entry]

    def read(self, name: str) -> NDArray[Any]: ...


def open_file(path: Path) -> TensorFile | GgufFile | TorchFile:
    """Reads the header. Raises WeightsError that names the file and its fault."""
    match kind_of(path):
        case "gguf":
            return GgufFile(path)
        case "torch":
            return TorchFile(path)
    return TensorFile(path)


def names_text(path: Path) -> bytes:
    """Bytes with the names of all tensors in them, each as it is: a hundredth of the work of opening a file.

    Raises WeightsError for a file that cannot hold any.
    """
    match kind_of(path):
        case "gguf":
            return _begin(path, GGUF_NAMES)
        case "torch":
            return pickled_names(path)
    return header_text(path)


def kind_of(path: Path) -> str:
    """safetensors, gguf or torch. Raises WeightsError for a file of another kind that is known."""
    if path.name.endswith(INDEX):
        return "safetensors"
    begin = _begin(path, FIRST)
    if begin.startswith(gguf_file.MAGIC):
        return "gguf"
    if begin[8:9] != b"{" and begin.startswith((torch_file.MAGIC, PICKLE)):
        return "torch"
    if (found := foreign_kind(begin)) is not None:
        raise WeightsError(f"{path} is {found[0]}.", found[1])
    return "safetensors"


def _begin(path: Path, count: int) -> bytes:
    require_plain(path)
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(count)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
