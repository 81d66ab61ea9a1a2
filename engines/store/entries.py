"""The engines in the store, their removal, and the limit of their size.

When engines and their kernels outgrow TRT_WAN_ENGINES_GB, the longest unused ones go.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from trt_wan.engines.store.environment import limit_bytes
from trt_wan.engines.store.folders import forget_leftovers
from trt_wan.engines.store.kernels import forget_kernels, forget_orphans, kernel_bytes
from trt_wan.engines.store.locks import forget_locks, held
from trt_wan.engines.store.manifest import FILE, Manifest, erase, folder, lock_of, path_of, read_manifest


@dataclass(frozen=True)
class Entry:
    """The files of one key; without a manifest they are damaged or half written."""

    key: str
    manifest: Manifest | None
    bytes: int
    used: float  # seconds since the epoch


def entries() -> list[Entry]:
    """Every engine in the store, the last used first."""
    sizes: dict[str, int] = {}
    used: dict[str, float] = {}
    for path in folder().glob("*"):
        if match := FILE.fullmatch(path.name):
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
    """Removes an engine with its kernels; False if another process is building it, which leaves it there."""
    manifest = read_manifest(key)
    with held(lock_of(key), wait=False) as ours:
        if ours:
            erase(key)
            if manifest is not None:
                forget_kernels(manifest.sha256)
            with suppress(OSError):  # Windows keeps a lock that is held
                lock_of(key).unlink()
    return ours


def trim(spare: Collection[str]) -> list[Entry]:
    """Removes damaged engines, then the longest unused ones until the rest fits the limit, which counts
    kernels too. Keys `spare` stay, even if they alone are too much.
    """
    there, limit = entries(), limit_bytes()

    def whole_size(entry: Entry) -> int:
        return entry.bytes + (kernel_bytes(entry.manifest.sha256) if entry.manifest else 0)

    size = sum(map(whole_size, there))
    removed: list[Entry] = []
    for entry in sorted(there, key=lambda entry: (entry.manifest is not None, entry.used)):
        wanted = entry.key in spare or (entry.manifest is not None and size <= limit)
        if not wanted:
            freed = whole_size(entry)
            if _removed(entry.key):
                removed.append(entry)
                size -= freed
    _tidy([entry for entry in there if entry not in removed])
    return removed


def _tidy(there: Collection[Entry]) -> None:
    """Removes kernels of engines that are gone, locks of engines that were never built, and leftovers."""
    forget_leftovers(folder())
    forget_orphans({entry.manifest.sha256 for entry in there if entry.manifest})
    forget_locks(folder() / "locks", {entry.key for entry in there})


def _removed(key: str) -> bool:
    try:
        return remove(key)
    except OSError:  # a file that is open on Windows, or a folder that this user may only read
        return False


def _whole(key: str) -> Manifest | None:
    """The manifest if the plan beside it has the right size; its content is not read."""
    manifest, plan = read_manifest(key), path_of(key, "plan")
    return manifest if manifest and plan.exists() and plan.stat().st_size == manifest.bytes else None
