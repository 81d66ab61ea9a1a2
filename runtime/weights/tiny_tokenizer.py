"""Writes a real `tokenizer.json`, for the tiny model, of umT5's kind: Unigram pieces, `▁` for a space, bytes.

It is deterministic, has 26 kB, and never gives `<unk>`: unknown characters are spelt in UTF-8 bytes. (As with
umT5's own file, a prompt that contains the name of a special piece gets that piece.)
"""

from itertools import product
from pathlib import Path

SPECIAL = ("<pad>", "</s>", "<unk>")  # an id is a place in the vocabulary: 0, 1, 2
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
CHARACTERS = ("▁", *(chr(code) for code in range(0x21, 0x7F)), *"视频中的人在做动作")
WORDS = (
    "the of and to in a is that it for on with as his her at by from they we you not this are or an their be "
    "person people man woman child girl boy dancer singer face head hand hands arm arms leg eyes mouth hair "
    "body video picture camera scene light background street room stage rain sun sky water city night day "
    "red blue green black white one two three slow fast left right up down standing sitting walking "
    "running dancing talking singing smiling looking moving making movements movement wearing holding "
    "turning jumping"
).split()
SYLLABLES = tuple(
    map("".join, (*product("bcdfghklmnprstvw", "aeiou"), *product("aeiou", "bcdfghklmnprstvw")))
)


def write_tiny_tokenizer(path: Path, vocabulary: int) -> None:
    """Writes a `tokenizer.json` of exactly `vocabulary` pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.Unigram(_scored(vocabulary), unk_id=SPECIAL.index("<unk>"), byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    tokenizer.save(str(path))


def _scored(vocabulary: int) -> list[tuple[str, float]]:
    """Pieces and log-probabilities: words beat syllables, syllables letters, letters bytes. A larger
    vocabulary is filled with pieces that no text has.
    """
    kept = vocabulary - len(SPECIAL) - len(BYTES) - len(CHARACTERS)
    longer = [*((f"▁{word}", -6.0) for word in WORDS), *((syllable, -9.0) for syllable in SYLLABLES)]
    assert kept >= 0, f"a vocabulary of {vocabulary} is too small"
    unused = [(f"<unused {k}>", -50.0) for k in range(kept - len(longer))]
    return [
        *((piece, 0.0) for piece in SPECIAL),
        *((piece, -50.0) for piece in BYTES),
        *((piece, -8.0) for piece in CHARACTERS),
        *longer[:kept],
        *unused,
    ]
