"""Finds the tokenizer that goes with a text encoder: as told, inside its file, or beside it."""

from pathlib import Path

from trt_wan.errors import WeightsError
from trt_wan.runtime.checkpoints.loading import Checkpoint
from trt_wan.runtime.tokenizer import Tokenizer, load_sentencepiece, load_tokenizer_json

EMBEDDED = "spiece_model"  # U8 bytes of a SentencePiece model, in ComfyUI's umT5 files
NAMES = ("tokenizer.json", "spiece.model")


def find_tokenizer(chosen: Path | None, weights: Path, text_encoder: Checkpoint, length: int) -> Tokenizer:
    """`chosen`, or the one embedded in `text_encoder`, or the first in or below its folder or `weights`."""
    if chosen is None and EMBEDDED in text_encoder:
        return load_sentencepiece(text_encoder.raw(EMBEDDED).tobytes(), length)
    path = chosen or _search(text_encoder.path.parent, weights)
    if path is None:
        raise WeightsError(
            f"{text_encoder.path} holds no tokenizer and none is beside it.",
            "Put tokenizer.json or spiece.model of google/umt5-xxl there, or name it with --tokenizer FILE.",
        )
    load = load_tokenizer_json if path.suffix == ".json" else load_sentencepiece
    return load(path, length)


def _search(*folders: Path) -> Path | None:
    for folder in folders:
        for name in NAMES:
            for path in sorted(folder.rglob(name)):
                return path
    return None
