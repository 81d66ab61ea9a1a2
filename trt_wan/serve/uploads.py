"""Uploads: from the request to a checked file under a fixed name."""

import asyncio
import base64
import binascii
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from trt_wan.errors import InputError, TrtWanError, UsageError, shown
from trt_wan.serve.settings import Limits

AT_ONCE = 2  # uploads that are checked at the same time
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
STEP = 1 << 20
log = logging.getLogger("trt_wan.serve")


@dataclass(frozen=True)
class Accepted:
    """A checked upload. `folder` has its `content` and, of a .zip, the `clips`."""

    folder: Path
    filename: str
    facts: dict[str, Any]

    @property
    def content(self) -> Path:
        return content_of(self.folder, self.facts["suffix"])

    @property
    def clips(self) -> Path:
        return self.folder / "clips"


def content_of(folder: Path, suffix: str) -> Path:
    return folder / f"content{suffix}"


class Uploads:
    """`incoming` is a folder on the disk of the results; leftovers of a killed server are removed."""

    def __init__(self, incoming: Path, limits: Limits) -> None:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        self._incoming, self._limits = incoming, limits
        self._room = asyncio.Semaphore(AT_ONCE)
        self._spare: subprocess.Popen[str] | None = None  # a process that has imported all and waits
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Starts the process for the next upload."""
        with self._lock:
            if self._spare is None:
                self._spare = _started()

    def close(self) -> None:
        with self._lock:
            if self._spare is not None:
                self._spare.kill()
                self._spare.wait()

    @asynccontextmanager
    async def accepted(self, upload: UploadFile | str) -> AsyncIterator[Accepted]:
        """A file of a form, or a data: URL. Its folder is removed at the end of the block unless it was
        moved. Raises TrtWanError.
        """
        folder = self._incoming / secrets.token_hex(8)
        folder.mkdir()
        try:
            if isinstance(upload, str):
                name = "upload"
                await asyncio.to_thread((folder / "content").write_bytes, from_data_url(upload))
            else:
                name = Path((upload.filename or "upload").replace("\\", "/")).name[:200] or "upload"
                await asyncio.to_thread(_copy, upload, folder / "content")
            async with self._room:
                facts = await asyncio.to_thread(self._check, folder, name)
            os.replace(folder / "content", content_of(folder, facts["suffix"]))
            yield Accepted(folder, name, facts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _check(self, folder: Path, name: str) -> dict[str, Any]:
        limits = self._limits
        (folder / "clips").mkdir()
        task = {
            "path": str(folder / "content"),
            "out": str(folder / "clips"),
            "name": name,
            "limits": {
                "upload": limits.upload,
                "frames": limits.frames,
                "pixels": limits.pixels,
                "clip_pixels": limits.clip_pixels,
                "memory": limits.check_memory,
                "seconds": int(limits.check_seconds),
            },
        }
        with self._lock:
            process, self._spare = self._spare or _started(), None
        threading.Thread(target=self.prepare, daemon=True).start()
        try:
            output, _ = process.communicate(json.dumps(task) + "\n", timeout=limits.check_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise InputError(
                f"{shown(name)} takes more than {limits.check_seconds:g} s to decode.",
                "Make it shorter or smaller.",
            ) from None
        with suppress(ValueError):
            answer = json.loads(output)
            if "error" in answer:
                raise RefusedUpload(**answer["error"])
            if not any((folder / "clips").iterdir()):
                (folder / "clips").rmdir()
            return answer["facts"]  # type: ignore[no-any-return]
        log.warning("The check of an upload ended with %s", process.returncode)
        raise InputError(
            f"{shown(name)} breaks its decoder, or needs more memory or time than the server gives a file.",
            "Encode it again.",
        )


class RefusedUpload(TrtWanError):
    """The error of the checking process."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.code = code


def _started() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "trt_wan.serve.check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, STEP)


def from_data_url(text: str) -> bytes:
    """The bytes in a data: URL in base64. Raises UsageError."""
    head, comma, data = text.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise UsageError(
            "This is no upload, no id of a file and no data: URL in base64.", "Upload it to /v1/files."
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("The data: URL is no base64.", "Encode it again.") from error
