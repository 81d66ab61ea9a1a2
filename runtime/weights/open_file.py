"""Opens a checkpoint file by its first bytes: safetensors, GGUF, or the zip that torch writes.

The suffix does not matter, except for an index of shards, which is JSON.
"""

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights import gguf_file, torch_file
from trt_wan.runtime.weights.gguf_file import GgufFile
from trt_wan.runtime.weights.tensor_file import INDEX, Entry, TensorFile, header_text, require_plain
from trt_wan.runtime.weights.torch_file import TorchFile, pickled_names

GGUF_NAMES = 16 << 20  # bytes; a tokenizer in front of the names takes 10 MB
FIRST = 16  # bytes
PICKLE = b"\x80\x02"  # begins every pickle that torch writes
# How files begin that are no checkpoint, and the answer to it.
FOREIGN = (
    (b"version https://", "is a pointer of Git LFS and not the file itself", "Fetch it with git lfs pull."),
    (b"<", "is a web page", "Download the file again; its site may ask for a login."),
    (b"\x89HDF", "is an HDF5 file", "Use the safetensors file of the model."),
)


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
    for magic, says, hint in FOREIGN:
        if begin.startswith(magic) and begin[8:9] != b"{":
            raise WeightsError(f"{path} {says}.", hint)
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
