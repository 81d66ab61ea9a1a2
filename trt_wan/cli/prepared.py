"""`prepared.json` in the folder of clips that `run REFERENCE CLIP` makes: their files and options. With it
`--resume` uses clips of the same origin again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_wan.cli.preprocess import PREPARING_FILES

FILE = "prepared.json"


def origin(reference: Path, clip: Path, options: Mapping[str, Any]) -> str | None:
    """All that decides the prepared clips, as JSON. None where that is no plain file, as stdin."""
    from trt_wan.runtime.kept.identity import identity

    named = {"reference": reference, "clip": clip} | {name: options[name] for name in PREPARING_FILES}
    given = {name: path for name, path in named.items() if path is not None}
    if not all(path.is_file() for path in given.values()):
        return None
    files = {name: identity(path, weights=name in PREPARING_FILES) for name, path in given.items()}
    plain = {name: str(value) for name, value in options.items() if name not in PREPARING_FILES}
    return json.dumps({"files": files, "options": plain}, indent=1, sort_keys=True) + "\n"


def is_from(folder: Path, wanted: str | None) -> bool:
    try:
        return wanted is not None and (folder / FILE).read_text(encoding="utf-8") == wanted
    except (OSError, ValueError):
        return False
