"""The identity of a file by its content, so that a copy elsewhere counts as the same file.

Clips and pictures are hashed whole. Weights have tens of GB, so of a large file only its size and parts are
hashed: the beginning, with the header of every format, the end, and SAMPLES places between. Models that
differ in every tensor differ there. `same_values` (weights/recognition/twins.py) compares two open
checkpoints by the beginnings of their tensors and cannot be stored.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

LARGE = 64 << 20  # bytes
EDGE, SAMPLE, SAMPLES = 1 << 20, 1 << 12, 256  # bytes, bytes, places
WHOLE, SAMPLED = "sha256", "sampled_sha256"

Identity = Mapping[str, str | int]  # name, bytes, and a hash under WHOLE or SAMPLED


def identity(path: Path, weights: bool = False) -> Identity:
    """Raises OSError."""
    size = path.stat().st_size
    kind = SAMPLED if weights and size > LARGE else WHOLE
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if kind == WHOLE:
            digest = hashlib.file_digest(file, "sha256")
        else:
            places = [
                (0, EDGE),
                *((size * k // SAMPLES, SAMPLE) for k in range(SAMPLES)),
                (size - EDGE, EDGE),
            ]
            for place, count in places:
                file.seek(place)
                digest.update(file.read(count))
    return {"name": path.name, "bytes": size, kind: digest.hexdigest()}


def is_same(one: Identity, other: Identity) -> bool:
    return {**one, "name": ""} == {**other, "name": ""}
