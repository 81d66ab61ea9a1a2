"""All files below folders, through links to other disks, each folder once."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def files_below(folders: Sequence[Path]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        for parent, inner, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner.sort()
            yield from (Path(parent, name) for name in sorted(names))
