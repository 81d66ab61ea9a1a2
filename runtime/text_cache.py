"""Text features on disk: a known prompt opens no text encoder, and gets the bits that encoding would give.

    $TRT_WAN_HOME/text/<key>.features      sha256 of the rest, then the rows up to the last one with a number
    $TRT_WAN_HOME/text/<file>.checksum     sha256 of a file of weights, with its size, inode and times

The key covers the prompt, the content of the encoder's and the tokenizer's files, the packages that tokenise,
and `numbers`. Hashing 6.7 GB takes seconds, so the hash of a file is remembered, and an unknown one is
computed in a thread while the job goes on. A cache never ends a job: a fault of the disk is a miss.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Lock, Thread

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.store.checksums import content_hash, file_state, known_hash
from trt_wan.engines.store.files import keep
from trt_wan.engines.store.home import home

FORMAT = 1
LIMIT = 256 << 20  # bytes of features; the least recently used ones go first
PATIENCE = 2.0  # seconds that `close` waits for the hashes
DIGEST = 32  # bytes

Features = NDArray[np.float32]


class TextCache:
    """Features [length, dim] of the prompts of one text encoder.

    `files` are all files of the encoder and the tokenizer. `numbers` names everything else that decides the
    bits: precision, executor with its version, GPU, graph. Not for random weights: pass `enabled` False.
    """

    def __init__(
        self, enabled: bool, files: Sequence[Path], numbers: Sequence[str], shape: tuple[int, int]
    ) -> None:
        self._shape, self._numbers, self._folder = shape, [*numbers, *_packages()], home() / "text"
        self._pending: dict[str, Features] = {}
        self._hashing: Thread | None = None
        self._stop, self._lock = Event(), Lock()
        self._hashes: list[str] | None = None
        self._files: dict[Path, list[int]] = {}
        if enabled:
            with suppress(OSError):
                self._files = {path: file_state(path) for path in files}
                known = [known_hash(path, self._memory(path)) for path in self._files]
                if None not in known:
                    self._hashes = [sha256 for sha256 in known if sha256 is not None]

    def find(self, prompt: str) -> Features | None:
        """Returns the features of a prompt, or None: encode it, then call `store`."""
        if not self._files:
            return None
        with self._lock:
            if self._hashes is None:
                return self._pending.get(prompt)
            path = self._path(prompt, self._hashes)
        with suppress(OSError, ValueError):
            features = self._read(path.read_bytes())
            path.touch()
            return features
        return None

    def store(self, prompt: str, features: Features) -> None:
        """Keeps the features, as soon as the hashes of the files are known."""
        if not self._files:
            return
        assert features.shape == self._shape and features.dtype == np.float32, features.shape
        with self._lock:
            if self._hashes is None:
                self._pending[prompt] = features
                if self._hashing is None:
                    self._hashing = Thread(target=self._hash, name="text cache", daemon=True)
                    self._hashing.start()
            else:
                self._write(prompt, features, self._hashes)

    def close(self, patience: float = PATIENCE) -> None:
        """Waits `patience` seconds for the hashes, then gives up; the next run begins anew."""
        if self._hashing is not None:
            self._hashing.join(patience)
            self._stop.set()

    def _hash(self) -> None:
        hashes: list[str] = []
        for path, state in self._files.items():
            sha256 = None
            with suppress(OSError):
                # The features belong to the content that was there when the encoder was opened.
                sha256 = content_hash(path, state, self._memory(path), self._stop.is_set)
            if sha256 is None:
                break
            hashes.append(sha256)
        with self._lock:
            if len(hashes) < len(self._files):  # nothing is kept, on the disk or here
                self._files = {}
                self._pending.clear()
                return
            self._hashes = hashes
            for prompt, features in self._pending.items():
                self._write(prompt, features, hashes)
            self._pending.clear()

    def _write(self, prompt: str, features: Features, hashes: Sequence[str]) -> None:
        rows = np.flatnonzero(features.view(np.uint32).any(axis=1))
        data = features[: rows[-1] + 1 if len(rows) else 0].tobytes()
        if keep(self._path(prompt, hashes), hashlib.sha256(data).digest() + data):
            self._trim()

    def _read(self, stored: bytes) -> Features:
        """Raises ValueError for a damaged file."""
        digest, data = stored[:DIGEST], stored[DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("damaged")
        features = np.zeros(self._shape, np.float32)
        rows = np.frombuffer(data, np.float32).reshape(-1, self._shape[1])
        features[: len(rows)] = rows
        if not np.isfinite(features).all():
            raise ValueError("not finite")
        return features

    def _trim(self) -> None:
        with suppress(OSError):
            found = [(path, path.stat()) for path in self._folder.glob("*.features")]
            total = sum(stat.st_size for _, stat in found)
            for path, stat in sorted(found, key=lambda item: item[1].st_mtime_ns):
                if total <= LIMIT:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size

    def _path(self, prompt: str, hashes: Sequence[str]) -> Path:
        key = json.dumps([FORMAT, prompt, hashes, self._numbers, self._shape])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.features"

    def _memory(self, path: Path) -> Path:
        name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
        return self._folder / f"{name[:32]}.checksum"


def _packages() -> list[str]:
    """The packages that turn a prompt into token ids, with their versions."""
    found = []
    for package in ("ftfy", "tokenizers", "sentencepiece"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found
