"""Compiled engines on disk, in $TRT_WAN_HOME/engines: `<key>.plan`, and `<key>.json`, its manifest.

The manifest is written last and holds the plan's hash and its own: a plan that was cut, edited or swapped, or
whose manifest was, is found before anything loads it. Hashing a large plan takes a second, so `<key>.checked`
remembers which file has passed (checksums.py). Reading takes no lock; building takes one per key, so that one
process compiles and the others wait. Every engine that is put into the store makes room
(entries.py). This module does not know how engines are compiled or run.
"""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader

from trt_wan.engines.store import checksums
from trt_wan.engines.store.engine_id import EngineId, Recipe
from trt_wan.engines.store.entries import entries, trim
from trt_wan.engines.store.environment import limit_bytes
from trt_wan.engines.store.files import replace_atomically
from trt_wan.engines.store.locks import Waiting, held, in_silence
from trt_wan.engines.store.manifest import Manifest, erase, lock_of, path_of, read_manifest, write_manifest
from trt_wan.errors import GraphError


@dataclass(frozen=True)
class Obtained:
    plan: bytes
    manifest: Manifest
    built: bool


def open_checked(engine: EngineId) -> bytes:
    """The plan, proved to be the one that was built.

    Raises GraphError, with the command that builds it, for a plan that is missing, cut, edited or another's.
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


def ensure(
    engine: EngineId,
    build: Callable[[], bytes],
    spare: Collection[str] = (),
    waiting: Waiting = in_silence,
) -> tuple[Manifest, bool]:
    """The manifest, and whether the engine had to be built, because it was missing or damaged.

    A new engine may push others out of the store, but none of the keys `spare`. Where another process is
    building it, `waiting` is called once.
    """
    manifest = find(engine)
    if manifest is None:
        limit_bytes()  # a limit that is no size is refused before anything is built
        with held(lock_of(engine.key), waiting=waiting):
            manifest = find(engine)  # another process may have built it meanwhile
            if manifest is None:
                erase(engine.key)
                start = time.perf_counter()
                plan = build()
                manifest = _put(engine, plan, time.perf_counter() - start)
                trim({engine.key, *spare})
                return manifest, True
    _touch(engine.key)
    return manifest, False


def obtain(recipe: Recipe, spare: Collection[str] = (), waiting: Waiting = in_silence) -> Obtained:
    """The checked plan of a recipe's engine, which is built if it is missing or damaged.

    An engine that cannot be stored, on a full disk or in a read-only folder, is used all the same.
    """
    engine, built = recipe.engine, False
    compiled: list[bytes] = []

    def build() -> bytes:
        compiled.append(recipe.compile(_unheard))
        return compiled[-1]

    for attempt in range(3):  # another process may remove the engine before it is read
        try:
            with _checked(engine) as (file, manifest):
                plan = file.read()
            _touch(engine.key)
            return Obtained(plan, manifest, built)
        except GraphError:
            if attempt == 2:
                raise
        try:
            built = ensure(engine, build, spare, waiting)[1]
        except OSError:
            start = time.perf_counter()
            plan = compiled[-1] if compiled else build()
            return Obtained(plan, _described(engine, plan, time.perf_counter() - start), True)
    raise AssertionError("three attempts end in a return or a raise")


def _unheard(phase: str, step: int, steps: int) -> None:
    """An engine that is built on the spot is reported when it is built, not while."""


@contextmanager
def _checked(engine: EngineId) -> Iterator[tuple[BufferedReader, Manifest]]:
    """The open plan, proved to be the one that was built, and its manifest."""
    key = engine.key

    def refused(message: str) -> GraphError:
        hint = "" if engine.rebuild else "It is built when it is used."
        return GraphError(message, hint, engine.rebuild)

    try:
        file = path_of(key, "plan").open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise refused(f"The {engine.title} is not built{_others(engine)}.") from None
    with file:
        manifest = read_manifest(key)
        if manifest is None:
            edited = path_of(key, "json")
            raise refused(f"The {engine.title} has no manifest, or an edited one ({edited}).")
        if manifest.key != key:
            raise refused(f"Where the {engine.title} should be there is another, {manifest.network}.")
        size = os.fstat(file.fileno()).st_size
        if size != manifest.bytes:
            raise refused(f"The {engine.title} has {size} bytes instead of {manifest.bytes}.")
        if not checksums.has_hash(file, manifest.sha256, path_of(key, "checked")):
            raise refused(f"The {engine.title} was changed after it was built ({path_of(key, 'plan')}).")
        yield file, manifest


def _others(engine: EngineId) -> str:
    """The engines of the same graph for another target, or by another version, GPU or driver."""
    found = []
    for entry in entries():
        manifest = entry.manifest
        if manifest is not None and manifest.source == engine.source and manifest.key != engine.key:
            gpu = f" on {manifest.gpu}, driver {manifest.driver}" if manifest.gpu else ""
            found.append(f"one for {manifest.target}{gpu} by {manifest.flavour} {manifest.version}")
    return f"; there is {', '.join(found)}" if found else ""


def _put(engine: EngineId, plan: bytes, seconds: float) -> Manifest:
    manifest = _described(engine, plan, seconds)
    replace_atomically(path_of(engine.key, "plan"), plan, sync=True)
    write_manifest(manifest)
    return manifest


def _described(engine: EngineId, plan: bytes, seconds: float) -> Manifest:
    return Manifest(
        key=engine.key,
        kind=engine.kind,
        network=engine.network,
        about=engine.about,
        precision=engine.precision,
        rebuild=engine.rebuild,
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


def _touch(key: str) -> None:
    """Marks the engine as used, on its manifest: the plan's times are part of its checksum record."""
    try:
        os.utime(path_of(key, "json"))
    except OSError:  # removed meanwhile, or a store that this user may only read
        pass
