"""The numbers, strings and metadata of a GGUF header, little-endian, one after the other.

Nothing is read or allocated that the file is too short for, and all lengths are bounded: a header takes a few
seconds and a small multiple of MAX_HEADER of memory at most.
"""

import struct
from typing import Any, BinaryIO

MAX_HEADER = 64 << 20  # bytes; the words of a tokenizer take 10 MB
MOST_WORDS = 600_000  # in lists of the metadata: they are skipped one by one
LONGEST_NAME = 4096  # bytes of a key or of a tensor's name
LONGEST_TEXT = 1 << 16  # bytes of a string that is kept of the metadata
LONGEST_LIST = 16  # numbers that are kept of the metadata
STRING, LIST = 8, 9  # types of the metadata; the others are numbers
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Fault(Exception):
    """A fault of a header, in words."""


class Header:
    """The first bytes of a file; faults before anything is read that the file is too short for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.end = file, min(size, MAX_HEADER)
        self.position, self._words = 0, 0

    def take(self, size: int) -> bytes:
        self._move(size)
        data = self.file.read(size)
        if len(data) < size:
            raise Fault("its header ends early")
        return data

    def skip(self, size: int) -> None:
        self._move(size)
        self.file.seek(size, 1)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, size: int, most: int = MAX_HEADER) -> int:
        """How many things follow that have at least `size` bytes."""
        count = int(self.number("Q"))
        if most < count <= MAX_HEADER:
            raise Fault(f"its header has {count} entries")
        if count * size > self.end - self.position:
            raise Fault(f"its header promises {count} values and ends early")
        return count

    def name(self) -> str:
        length = self.count(1)
        if length > LONGEST_NAME:
            raise Fault(f"a name has {length} bytes")
        return self._text(length)

    def value(self, kind: int) -> object:
        """A number, a string or a list of numbers; None for a list of strings, and for all that is long."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            length = self.count(1)
            if length <= LONGEST_TEXT:
                return self._text(length)
            self.skip(length)
            return None
        if kind != LIST:
            raise Fault("a value of its metadata has no known type")
        kind = self.number("I")
        if kind == STRING:
            words = self.count(8)
            self._words += words
            if self._words > MOST_WORDS:
                raise Fault(f"its metadata has more than {MOST_WORDS} words")
            for _ in range(words):
                self.skip(self.count(1))
            return None
        if kind not in NUMBERS:
            raise Fault("a list of its metadata has no known type")
        form = NUMBERS[kind]
        count = self.count(struct.calcsize("<" + form))
        if count <= LONGEST_LIST:
            return [self.number(form) for _ in range(count)]
        self.skip(count * struct.calcsize("<" + form))
        return None

    def _text(self, length: int) -> str:
        return self.take(length).decode("utf-8", "replace")

    def _move(self, size: int) -> None:
        if size > self.end - self.position:
            raise Fault("its header ends early")
        self.position += size
