"""Finds the tokenizer of a text encoder: the given file, or inside the file of the encoder, or beside it.

Only the places of known layouts are searched: a folder of models is full of other models' files of the same
name, and a foreign tokenizer would give a wrong prompt without an error.
"""

from collections.abc import Sequence
from pathlib import Path

from trt_wan.errors import WeightsError
from trt_wan.runtime.networks.tokenizer import Tokenizer, load_sentencepiece, load_tokenizer_json
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.recognition.layouts import EMBEDDED

WRAPPER = "custom_nodes/ComfyUI-WanVideoWrapper/configs/T5_tokenizer"  # in ComfyUI's folder, beside models/
LEVELS = 5  # folders above the encoder in which ComfyUI's folder is looked for
NAMES = ("tokenizer.json", "spiece.model")
LARGEST = 256 << 20  # bytes; umT5's files have 17 and 5 MB


def find_tokenizer(
    chosen: Path | None, folders: Sequence[Path], text_encoder: Checkpoint, length: int
) -> Tokenizer:
    """`chosen`, or the one inside `text_encoder`, or one beside it or in `folders`. Raises WeightsError."""
    if chosen is None and EMBEDDED in text_encoder:
        return load_sentencepiece(text_encoder.raw(EMBEDDED).tobytes(), length)
    path = chosen or _search(text_encoder.path.parent, folders)
    if path is None:
        raise WeightsError(
            f"{text_encoder.path} holds no tokenizer and none is beside it.",
            "Put tokenizer.json or spiece.model of google/umt5-xxl there, or name it with --tokenizer FILE.",
        )
    _require_plausible(path)
    load = load_tokenizer_json if path.suffix == ".json" else load_sentencepiece
    return load(path, length)


def _require_plausible(path: Path) -> None:
    """Raises WeightsError for a file that is none or far too large, before it is read into memory."""
    if path.is_file() and path.stat().st_size <= LARGEST:
        return
    why = f"larger than {LARGEST >> 20} MB" if path.is_file() else "not a file"
    raise WeightsError(
        f"The tokenizer {path} is {why}.", "It is `tokenizer.json` or `spiece.model` of google/umt5-xxl."
    )


def _search(beside: Path, folders: Sequence[Path]) -> Path | None:
    places = [
        beside,
        beside / "tokenizer",
        beside / "google/umt5-xxl",  # the official repository
        beside.parent / "tokenizer",  # diffusers: beside the folder text_encoder
    ]
    for folder in folders:
        places += [folder, folder / "tokenizer", folder / "google/umt5-xxl"]
    for start in (beside, *folders):
        start = start.absolute()
        places += [above / WRAPPER for above in (start, *list(start.parents)[:LEVELS])]
    candidates = (place / name for place in places for name in NAMES)
    return next((path for path in candidates if path.is_file()), None)
