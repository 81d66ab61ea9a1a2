"""Stands for an export that takes long, in a module that a helper process finds under the same name: test
modules are `tests.…` for pytest, and color-matcher brings a package `tests`.
"""

import time
from pathlib import Path


def stay(name: str, path: Path) -> None:
    path.write_text(name)
    time.sleep(60)
