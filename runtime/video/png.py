"""Checks a PNG before it is decoded: OpenCV believes the length of a chunk, and takes gigabytes for a few
damaged bytes (4.13).
"""

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FRAME = 12  # bytes of a chunk beside its content: length, name, checksum


def is_cut_short(data: NDArray[np.uint8]) -> bool:
    """Whether `data`, the bytes of a file, is a PNG with a chunk that ends after the file."""
    content = data.data
    at = len(SIGNATURE)
    if content[:at] != SIGNATURE:
        return False
    while at < len(content) and bytes(content[at + 4 : at + 8]) != b"IEND":
        at += FRAME + int.from_bytes(content[at : at + 4])
    return at >= len(content)
