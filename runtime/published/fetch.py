"""Fetches published files from the Hub, by plain HTTP ranges.

`hf_hub_download` of huggingface_hub 2.4 starts again after a stop and checks no hash. So only its parts are
used: addresses, metadata, the token, and the request with retries.

Every byte is hashed as it is written. The hash is compared with the table (files.py), or else with the Hub's,
before the file gets its name.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_wan.engines.store.files import named
from trt_wan.engines.store.locks import held
from trt_wan.errors import DownloadError, OutputError, with_commands
from trt_wan.runtime.events import FileProgress, FileReady, Note, Progress, silent
from trt_wan.runtime.published.files import PublishedFile, spoken_size
from trt_wan.runtime.published.places import Place, Remote

FREE_AFTERWARDS = 200 << 20  # bytes that stay free on the disk
READ_BYTES = 1 << 20
REPORTS_EVERY = 0.5  # s
NETWORK = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
)  # used by huggingface_hub
AGAIN = "Run the same command again: it goes on where it stopped."

Free = Callable[[Path], int]  # folder -> free bytes of its disk


def free_bytes(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def fetch(
    files: Sequence[PublishedFile],
    place: Place,
    *,
    endpoint: str | None = None,
    progress: Progress = silent,
    free: Free = free_bytes,
) -> list[Path]:
    """Returns the path of every file; those that are there are not fetched. Asks for all files, and counts
    the free space, before it fetches the first.

    `endpoint`: the Hub's address, by default that of huggingface_hub (HF_ENDPOINT). Raises DownloadError,
    OutputError for a full disk, UsageError for another file in the place of one.
    """
    remotes: dict[PublishedFile, Remote] = {}
    for file in files:
        if place.find(file) is None:
            place.require_free(file)
            remotes[file] = _ask(file, endpoint)
    _require_space(remotes, place, free)
    paths = []
    for number, file in enumerate(files, 1):
        path = place.find(file)
        state = "there" if path is not None else "fetched"
        if path is None:
            path = _fetch_one(file, remotes[file], place, (number, len(files)), progress)
        progress(FileReady(file.name, number, len(files), str(path), path.stat().st_size, state))
        paths.append(path)
    return paths


def _ask(file: PublishedFile, endpoint: str | None) -> Remote:
    """The file on the Hub, which must be the one of the table."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    def address(revision: str) -> str:
        return hf_hub_url(file.repository, file.path, revision=revision, endpoint=endpoint)

    try:
        found = get_hf_file_metadata(address(file.revision))
    except Exception as error:
        raise _told(error, file) from error
    if not found.etag or found.size is None or not found.commit_hash:
        raise DownloadError(f"{address(file.revision)} is no file of a Hub.", "Check HF_ENDPOINT.")
    other = file.sha256 and _is_sha256(found.etag) and found.etag != file.sha256
    if other or file.size not in (None, found.size):
        raise DownloadError(
            f"{file.repository} has other bytes under the name {file.path} than trt-wan knows: "
            f"{found.size} bytes, {found.etag[:12]}….",
            "Nothing was fetched. A newer trt-wan may know them.",
        )
    return Remote(address(found.commit_hash), found.commit_hash, found.etag, found.size)


def _require_space(remotes: Mapping[PublishedFile, Remote], place: Place, free: Free) -> None:
    """All files may lie on one disk, or a folder of models be a link to another."""
    needed: dict[int, list[tuple[Path, int]]] = {}
    for file, remote in remotes.items():
        partial = place.incomplete(file, remote)
        there = next(path for path in partial.absolute().parents if path.exists())
        missing = remote.size - (partial.stat().st_size if partial.exists() else 0)
        needed.setdefault(os.stat(there).st_dev, []).append((there, missing))
    for parts in needed.values():
        folder, bytes_needed = parts[0][0], sum(size for _, size in parts)
        if (room := free(folder)) < bytes_needed + FREE_AFTERWARDS:
            raise OutputError(
                f"The disk of {folder} has {spoken_size(room)} free, and {spoken_size(bytes_needed)} are "
                "to be fetched.",
                "Free some space, or name another disk with --into DIR or HF_HUB_CACHE.",
            )


def _fetch_one(
    file: PublishedFile, remote: Remote, place: Place, number: tuple[int, int], progress: Progress
) -> Path:
    def waiting(lock: Path, process: int | None) -> None:
        other = "another process" if process is None else f"process {process}"
        text = f"Waiting for {other}, which is fetching {file.name}."
        progress(Note(text, "waiting_for_lock", {"lock": str(lock), "process": process}))

    partial, lock = place.incomplete(file, remote), place.lock(file, remote)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with held(lock, waiting=waiting):
        if (path := place.find(file)) is not None:
            return path
        with named(partial), Collected(partial, remote.size) as collected:
            collected.report = lambda done, rate: progress(
                FileProgress(file.name, *number, done, remote.size, rate)
            )
            _download(file, remote, collected)
        _require_hash(file, remote, collected.sha256, partial)
        path = place.put(file, remote)
        lock.unlink(missing_ok=True)
    return path


def _download(file: PublishedFile, remote: Remote, into: "Collected") -> None:
    """Goes on after a lost connection, as long as each request brings some bytes."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # has no __all__

    while into.done < remote.size:
        before = into.done
        try:
            sink: Any = into
            http_get(
                remote.url,
                sink,
                resume_size=before,
                headers=build_hf_headers(),
                expected_size=remote.size,
                displayed_filename=file.name,
            )
        except Exception as error:
            if not _is_of_the_network(error) or into.done <= before:
                raise _told(error, file) from error


def _require_hash(file: PublishedFile, remote: Remote, sha256: str, partial: Path) -> None:
    expected = file.sha256 or (remote.etag if _is_sha256(remote.etag) else "")
    if expected and sha256 != expected:
        partial.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.name} arrived with wrong bytes: its SHA-256 is {sha256[:12]}… and should be "
            f"{expected[:12]}….",
            "What was fetched of it is removed. Run the same command again.",
        )


@dataclass
class Collected:
    """The bytes that are there, on the disk, hashed. To `http_get` it is the file to write to."""

    path: Path
    size: int

    def __post_init__(self) -> None:
        self.report: Callable[[int, float], None] = lambda done, rate: None

    def __enter__(self) -> "Collected":
        self._file = open(self.path, "a+b", buffering=0)
        self._hash, self.done = hashlib.sha256(), 0
        self._file.seek(0)
        while piece := self._file.read(READ_BYTES):
            self._hash.update(piece)
            self.done += len(piece)
        if self.done > self.size:
            self._empty()
        self._began, self._first, self._told = time.monotonic(), self.done, 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:  # an unbuffered file may take a part
            count = self._file.write(view)
            self._hash.update(view[:count])
            self.done += count
            view = view[count:]
        now = time.monotonic()
        if now - self._told >= REPORTS_EVERY or self.done == self.size:
            self._told = now
            self.report(self.done, (self.done - self._first) / max(now - self._began, 1e-3))
        return len(data)

    def tell(self) -> int:
        return self.done

    def seek(self, position: int, whence: int = 0) -> int:
        """The server sends the whole file again: the only seek there is, and `truncate` follows."""
        assert position == whence == 0, (position, whence)
        return 0

    def truncate(self, size: int | None = None) -> int:
        self._empty()
        return 0

    def _empty(self) -> None:
        self._file.truncate(0)
        self._hash, self.done = hashlib.sha256(), 0


def _is_sha256(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", etag) is not None


def _is_of_the_network(error: BaseException) -> bool:
    """Also OSError without a number: huggingface_hub's for a file that ended early."""
    return type(error).__module__.partition(".")[0] in NETWORK or (
        isinstance(error, OSError) and error.errno in (None, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
    )


def _told(error: Exception, file: PublishedFile) -> Exception:
    """The error for the user; one of the disk as it is."""
    from huggingface_hub import errors

    what = f"{file.repository}/{file.path}"
    match error:
        case errors.GatedRepoError():
            return DownloadError(
                f"{what} is gated: the Hub gives it to accounts that have accepted its terms.",
                with_commands(f"Accept them on the page of {file.repository}, and log in:", "hf auth login"),
            )
        case errors.RepositoryNotFoundError():
            return DownloadError(
                f"The Hub has no repository {file.repository}, or does not show it to this account.",
                with_commands("If it is private, log in:", "hf auth login"),
            )
        case errors.RevisionNotFoundError() | errors.EntryNotFoundError():
            return DownloadError(
                f"The Hub has no file {what} in the revision {file.revision}.",
                "A newer trt-wan may know where it is.",
            )
        case errors.OfflineModeIsEnabled():
            return DownloadError(f"{what} is not here, and HF_HUB_OFFLINE forbids to fetch it.", "Unset it.")
        case errors.HfHubHTTPError():
            status = getattr(error.response, "status_code", None)
            return DownloadError(f"The Hub answered {status} for {what}.", AGAIN)
    if _is_of_the_network(error):
        return DownloadError(f"{what} could not be fetched ({type(error).__name__}: {error}).", AGAIN)
    return error
