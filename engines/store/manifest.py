"""The files of one engine: `<key>.plan`, and `<key>.json`, its manifest, which holds its own hash."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trt_wan.engines.store.engine_id import FORMAT, Kind
from trt_wan.engines.store.files import read_json, replace_atomically
from trt_wan.engines.store.home import home


@dataclass(frozen=True)
class Manifest:
    """An engine in words; network and `about` are those that it was first compiled for."""

    key: str
    kind: Kind
    network: str
    about: str
    precision: str
    rebuild: tuple[str, ...]
    source: str
    target: str
    flavour: str
    version: str
    flavour_reason: str
    gpu: str | None
    driver: int | None
    built: str  # UTC
    build_seconds: float
    bytes: int
    sha256: str  # the plan's
    format: int = FORMAT


FILE = re.compile(r"([0-9a-f]{32})\.(plan|json|checked)")


def folder() -> Path:
    return home() / "engines"


def path_of(key: str, kind: str) -> Path:
    return folder() / f"{key}.{kind}"


def lock_of(key: str) -> Path:
    return folder() / "locks" / f"{key}.lock"


def read_manifest(key: str) -> Manifest | None:
    """None for a manifest that is missing, edited, or of another format."""
    try:
        values = read_json(path_of(key, "json"))
        checksum = values.pop("checksum")
        if checksum == _checksum(values) and values["format"] == FORMAT:
            return Manifest(**values | {"rebuild": tuple(values["rebuild"])})
    except (KeyError, TypeError, AttributeError):
        pass
    return None


def write_manifest(manifest: Manifest) -> None:
    values = asdict(manifest)
    text = json.dumps(values | {"checksum": _checksum(values)}, indent=1, ensure_ascii=False)
    replace_atomically(path_of(manifest.key, "json"), text, sync=True)


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def erase(key: str) -> None:
    """Removes the manifest first, so that an interruption leaves no engine; also partial files of killed
    writers.
    """
    path_of(key, "json").unlink(missing_ok=True)
    for path in folder().glob(f"{key}.*"):
        path.unlink(missing_ok=True)
