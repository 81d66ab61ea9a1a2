"""A prompt to token ids, as umT5 was trained: cleaned, cut, `</s>` last. It pads nothing.

The pieces come in two file formats: a Hugging Face `tokenizer.json`, and a SentencePiece model, either a file
`spiece.model` or the U8 tensor `spiece_model` inside ComfyUI's text encoder (model_spec.md 5.4). The packages
for text are imported on first use, because importing them takes longer than the start of the command line.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trt_wan.errors import WeightsError

END = "</s>"
LONGEST_PIECE = 10_000  # bytes; umT5's longest has 48
_HINT = "Download it again: it is `tokenizer.json` or `spiece.model` of google/umt5-xxl."


@dataclass(frozen=True)
class Tokenizer:
    pieces: Callable[[str], list[int]]  # ids of a cleaned text, with nothing added
    end: int  # id of </s>
    length: int  # most ids the text encoder takes, </s> included
    file: Path | None = None  # where it was read from, if not from inside the text encoder's file

    def encode(self, prompt: str) -> list[int]:
        """Returns 1 to `length` ids. A prompt that is too long loses its tail, never its `</s>`."""
        return [*self.pieces(clean(prompt))[: self.length - 1], self.end]

    def count(self, prompt: str) -> int:
        """Ids of the whole prompt, `</s>` included; `encode` returns at most `length` of them."""
        return len(self.pieces(clean(prompt))) + 1


def clean(prompt: str) -> str:
    """Broken Unicode repaired, HTML entities resolved (twice: "&amp;lt;"), white space collapsed."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def load_tokenizer_json(path: Path, length: int) -> Tokenizer:
    """Reads a Hugging Face tokenizer. Raises WeightsError."""
    import tokenizers

    _refuse_long_pieces(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for every fault, a missing file included
        raise _unreadable(str(path), str(error)) from error
    tokenizer.no_truncation()  # a text truncated by the file's own settings would have no </s>
    tokenizer.no_padding()
    end = tokenizer.token_to_id(END)
    if end is None:
        raise _endless(str(path))
    return Tokenizer(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), end, length, path
    )


def _refuse_long_pieces(path: Path) -> None:
    """The package frees pieces recursively: one of 200,000 characters overflows the stack (0.23.3)."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise _unreadable(str(path), str(error.strerror)) from error
    quotes = np.flatnonzero(content == ord('"'))
    for k in np.flatnonzero(np.diff(quotes, prepend=0, append=len(content)) > LONGEST_PIECE):
        end = quotes[k - 1] if k else 0
        if not content[max(end - 40, 0) : end].tobytes().rstrip(b' "\n:').endswith(b"precompiled_charsmap"):
            raise _unreadable(str(path), f"it has a piece of more than {LONGEST_PIECE} bytes")


def load_sentencepiece(model: Path | bytes, length: int) -> Tokenizer:
    """Reads a SentencePiece model from a file or from its bytes. Raises WeightsError."""
    import sentencepiece

    name = str(model) if isinstance(model, Path) else "inside the text encoder's file"
    try:
        proto = model.read_bytes() if isinstance(model, Path) else model
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except OSError as error:
        raise _unreadable(name, str(error)) from error
    except RuntimeError as error:  # its text names a line of C++
        raise _unreadable(name, "not a SentencePiece model") from error
    if processor.eos_id() < 0:  # an empty model loads and has none either
        raise _endless(name)
    file = model if isinstance(model, Path) else None
    return Tokenizer(lambda text: list(processor.encode(text)), processor.eos_id(), length, file)


def byte_tokenizer(vocabulary: int, length: int) -> Tokenizer:
    """The tokenizer of random weights: a piece per byte, `</s>` is 1 as in umT5."""
    return Tokenizer(lambda text: [3 + byte % (vocabulary - 3) for byte in text.encode()], 1, length)


def _unreadable(name: str, reason: str) -> WeightsError:
    return WeightsError(f"The tokenizer {name} cannot be read ({reason[:200]}).", _HINT)


def _endless(name: str) -> WeightsError:
    return WeightsError(f"The tokenizer {name} has no {END}, so it is not umT5's.", _HINT)
