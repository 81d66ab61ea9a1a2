"""Compiled engines on disk, in $TRT_WAN_HOME/engines: `<key>.plan`, and `<key>.json` that says what it is.

The manifest is written last and holds the plan's hash and its own: a plan that was cut, edited or swapped, or
whose manifest was, is found before anything loads it. Hashing a large plan takes a second, so `<key>.checked`
remembers which file has passed (checked_plan.py). Reading takes no lock; building takes one per key, so
that one process compiles and the others wait. When the store outgrows TRT_WAN_ENGINES_GB, what was used
longest ago goes. Nothing here knows how engines are compiled or what runs them.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any

from trt_wan.engines.store import checksums as checked_plan
from trt_wan.engines.store.engine_id import FORMAT, EngineId
from trt_wan.engines.store.home import home
from trt_wan.engines.store.measurements import Figure
from trt_wan.errors import GraphError, UsageError

DEFAULT_LIMIT_GB = 4.0
_FILE = re.compile(r"([0-9a-f]{32})\.(plan|json|checked)(\.\d+\.partial)?")


@dataclass(frozen=True)
class Manifest:
    """What an engine is, in words. Network, model and size are those it was first compiled for."""

    key: str
    network: str
    model: str
    width: int
    height: int
    frames: int
    precision: str
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
    sha256: str  # of the plan
    candidates: list[Figure] = field(default_factory=list)
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """What the store holds under a key; without a manifest it is damaged or half written."""

    key: str
    manifest: Manifest | None
    bytes: int
    used: float  # seconds since the epoch


def folder() -> Path:
    return home() / "engines"


def limit_bytes() -> float:
    text = os.environ.get("TRT_WAN_ENGINES_GB", str(DEFAULT_LIMIT_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1
    if not 0 <= gigabytes < float("inf"):
        raise UsageError(f"TRT_WAN_ENGINES_GB is {text!r}, which is no size.", "Set it to GB, such as 4.")
    return gigabytes * 1e9


def open_checked(engine: EngineId) -> bytes:
    """The plan, proved to be the one that was built.

    GraphError, with the command that builds it, if it is not there, was cut or edited, or is another's.
    """
    with _checked(engine) as (file, _):
        plan = file.read()
    _touch(engine.key)
    return plan


def find(engine: EngineId) -> Manifest | None:
    """The manifest if `open_checked` would succeed, else None."""
    try:
        with _checked(engine) as (_, manifest):
            return manifest
    except GraphError:
        return None


def ensure(engine: EngineId, build: Callable[[], bytes]) -> tuple[Manifest, bool]:
    """The manifest, and whether the engine had to be built, because it was missing or damaged."""
    manifest = find(engine)
    if manifest is None:
        with _lock(engine.key):
            manifest = find(engine)  # another process may have built it meanwhile
            if manifest is None:
                _erase(engine.key)
                start = time.perf_counter()
                plan = build()
                return _put(engine, plan, time.perf_counter() - start), True
    _touch(engine.key)
    return manifest, False


def record_candidates(engine: EngineId, figures: Collection[Figure]) -> None:
    """Writes a measurement's figures into the manifest, beside those of other GPUs and candidates."""

    def measured(figure: Figure) -> tuple[str, str, str]:
        return figure.gpu, figure.version, figure.candidate

    new = {measured(figure) for figure in figures}
    with _lock(engine.key):
        with _checked(engine) as (_, manifest):
            pass
        kept = [figure for figure in manifest.candidates if measured(figure) not in new]
        _write_manifest(replace(manifest, candidates=[*kept, *figures]))


def entries() -> list[Entry]:
    """Everything in the store, what was used last first."""
    sizes: dict[str, int] = {}
    used: dict[str, float] = {}
    for path in folder().glob("*"):
        if match := _FILE.fullmatch(path.name):
            key = match[1]
            try:
                status = path.stat()
            except FileNotFoundError:  # removed meanwhile by another process
                continue
            sizes[key] = sizes.get(key, 0) + status.st_size
            used[key] = max(used.get(key, 0), status.st_mtime)
    found = [Entry(key, _whole(key), size, used[key]) for key, size in sizes.items()]
    return sorted(found, key=lambda entry: (-entry.used, entry.key))


def remove(key: str) -> bool:
    """False if another process is building it; then it stays."""
    from filelock import Timeout

    try:
        with _lock(key, timeout=0):
            _erase(key)
    except Timeout:
        return False
    return True


def trim(in_use: Collection[str]) -> list[Entry]:
    """Removes what is damaged, then what was used longest ago until the rest fits the limit.

    Keys `in_use` stay, even if they alone are too much.
    """
    there, limit = entries(), limit_bytes()
    size = sum(entry.bytes for entry in there)
    removed = []
    for entry in sorted(there, key=lambda entry: (entry.manifest is not None, entry.used)):
        wanted = entry.key in in_use or (entry.manifest is not None and size <= limit)
        if not wanted and remove(entry.key):
            removed.append(entry)
            size -= entry.bytes
    return removed


@contextmanager
def _checked(engine: EngineId) -> Iterator[tuple[BufferedReader, Manifest]]:
    """The open plan, proved to be the one that was built, and its manifest."""
    key, hint = engine.key, f"Run: {engine.rebuild}"
    try:
        file = _path(key, "plan").open("rb")
    except FileNotFoundError:
        raise GraphError(f"The {engine.title} is not built{_others(engine)}.", hint) from None
    with file:
        manifest = read_manifest(key)
        if manifest is None:
            edited = _path(key, "json")
            raise GraphError(f"The {engine.title} has no manifest, or an edited one ({edited}).", hint)
        if manifest.key != key:
            raise GraphError(
                f"Where the {engine.title} should be there is another, {manifest.network}.", hint
            )
        size = os.fstat(file.fileno()).st_size
        if size != manifest.bytes:
            raise GraphError(f"The {engine.title} has {size} bytes instead of {manifest.bytes}.", hint)
        if not checked_plan.has_hash(file, manifest.sha256, _path(key, "checked")):
            raise GraphError(f"The {engine.title} is not what was built ({_path(key, 'plan')}).", hint)
        yield file, manifest


def _others(engine: EngineId) -> str:
    """What there is of the same graph for another target, or by another version, GPU or driver."""
    found = []
    for entry in entries():
        m = entry.manifest
        if m is not None and m.source == engine.source and m.key != engine.key:
            gpu = f" on {m.gpu}, driver {m.driver}" if m.gpu else ""
            found.append(f"one for {m.target}{gpu} by {m.flavour} {m.version}")
    return f"; there is {', '.join(found)}" if found else ""


def _put(engine: EngineId, plan: bytes, seconds: float) -> Manifest:
    manifest = Manifest(
        key=engine.key,
        network=engine.network,
        model=engine.model,
        width=engine.plan.width,
        height=engine.plan.height,
        frames=engine.plan.frames,
        precision=engine.plan.precision,
        source=engine.source,
        target=engine.target,
        flavour=engine.flavour.name,
        version=engine.flavour.version,
        flavour_reason=engine.flavour.reason,
        gpu=engine.gpu.name if engine.gpu else None,
        driver=engine.gpu.driver if engine.gpu else None,
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        build_seconds=round(seconds, 3),
        bytes=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
    )
    _write(_path(engine.key, "plan"), plan)
    _write_manifest(manifest)
    return manifest


def _path(key: str, kind: str) -> Path:
    return folder() / f"{key}.{kind}"


def read_manifest(key: str) -> Manifest | None:
    """None if there is none in this format that is as it was written."""
    try:
        values = json.loads(_path(key, "json").read_text(encoding="utf-8"))
        checksum = values.pop("checksum")
        if checksum == _checksum(values) and values["format"] == FORMAT:
            figures = [Figure(**figure) for figure in values.pop("candidates")]
            return Manifest(**values, candidates=figures)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _whole(key: str) -> Manifest | None:
    """The manifest if the plan beside it has the right size, which is what can be told at a glance."""
    manifest, plan = read_manifest(key), _path(key, "plan")
    return manifest if manifest and plan.exists() and plan.stat().st_size == manifest.bytes else None


def _write_manifest(manifest: Manifest) -> None:
    values = asdict(manifest)
    text = json.dumps(values | {"checksum": _checksum(values)}, indent=1, ensure_ascii=False)
    _write(_path(manifest.key, "json"), text.encode())


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, also when the power fails: the bytes are on the disk before the name is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def _erase(key: str) -> None:
    """The manifest first: what is left if this is interrupted is no engine. Also what killed writers left."""
    _path(key, "json").unlink(missing_ok=True)
    for path in folder().glob(f"{key}.*"):
        path.unlink(missing_ok=True)


def _touch(key: str) -> None:
    """Marks the engine as used, on the manifest: the plan's own times say whether it is as it was."""
    try:
        os.utime(_path(key, "json"))
    except OSError:  # removed meanwhile, or a store that this user may only read
        pass


@contextmanager
def _lock(key: str, timeout: float = -1) -> Iterator[None]:
    from filelock import FileLock

    path = folder() / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=timeout):
        yield
