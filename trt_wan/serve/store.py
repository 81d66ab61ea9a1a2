"""The folder of a server: the database, the jobs' folders, the uploads, and how much room they take.

server.sqlite3   jobs/ID/   files/ID/   incoming/ (unfinished uploads)   server.lock
"""

import os
import shutil
import sqlite3
import time
from contextlib import ExitStack
from pathlib import Path

from trt_wan.engines.store.locks import held
from trt_wan.errors import OutputError, TrtWanError
from trt_wan.runtime.closing import Closing
from trt_wan.serve.database import Database, File, Job
from trt_wan.serve.settings import Limits
from trt_wan.serve.uploads import Accepted, content_of

FRESH = 5.0  # seconds for which the size of the folder is taken as known


class Full(TrtWanError):
    """There is no room for more jobs or files now."""

    code = "server_full"


def _require_ours(data: Path, database: Path) -> None:
    """Folders without a row are removed: those of a lost database, or of another program, must not be."""
    if not database.exists() and any(
        path.name not in ("server.lock", "lost+found") for path in data.iterdir()
    ):
        raise OutputError(
            f"{data} has files, and no server.sqlite3 of a server.",
            "Put the database of this folder back, or give the server an empty folder: --data DIR",
        )


class Store(Closing):
    """Raises OutputError if another server has the folder."""

    def __init__(self, data: Path, limits: Limits) -> None:
        self.data, self._limits = data, limits
        self._held = ExitStack()
        try:
            data.mkdir(parents=True, exist_ok=True)
            if not self._held.enter_context(held(data / "server.lock", wait=False)):
                raise OutputError(f"Another server uses {data}.", "Stop it, or give this one another --data.")
            file = data / "server.sqlite3"
            _require_ours(data, file)
            self.database = Database(file)
        except sqlite3.Error as error:
            raise OutputError(
                f"{data / 'server.sqlite3'} cannot be used: {error}.",
                "Put a copy of it there, or give the server another folder: --data DIR",
            ) from error
        except OSError as error:
            raise OutputError(
                f"{data} cannot be used: {error.strerror}.", "Give the server another folder: --data DIR"
            ) from error
        self._size, self._looked = 0, -FRESH
        known = self.database.ids()
        for folder in (self.jobs, self.files):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name not in known:  # the server died between the folder and its row
                    shutil.rmtree(path, ignore_errors=True)

    @property
    def jobs(self) -> Path:
        return self.data / "jobs"

    @property
    def files(self) -> Path:
        return self.data / "files"

    @property
    def incoming(self) -> Path:
        return self.data / "incoming"

    def folder(self, job: Job) -> Path:
        return self.jobs / job.id

    def content(self, file: File) -> Path:
        return content_of(self.files / file.id, file.suffix)

    def require_room(self, more: int = 0) -> None:
        """Raises Full."""
        if self.size() + more > self._limits.disk:
            raise Full(
                f"The server keeps {self._limits.disk / 1e9:g} GB at most, and that is full.",
                "Delete videos or files that are not needed any more.",
            )
        if shutil.disk_usage(self.data).free - more < self._limits.free_disk:
            raise Full("The server's disk is full.", "Delete videos or files that are not needed any more.")

    def size(self) -> int:
        """Bytes on the disk, links counted once."""
        if time.monotonic() - self._looked > FRESH:
            seen: dict[tuple[int, int], int] = {}
            for folder, _, names in os.walk(self.data):
                for name in names:
                    try:
                        found = os.stat(os.path.join(folder, name))
                    except OSError:
                        continue
                    seen[found.st_dev, found.st_ino] = found.st_blocks * 512
            self._size, self._looked = sum(seen.values()), time.monotonic()
        return self._size

    def keep(self, upload: Accepted, id: str, purpose: str) -> File:
        """Moves an upload to the files."""
        os.replace(upload.folder, self.files / id)
        return self.database.add_file(id, upload.filename, purpose, upload.facts["suffix"], upload.facts)

    def remove_file(self, file: File) -> None:
        self.database.remove_file(file.id)
        shutil.rmtree(self.files / file.id, ignore_errors=True)

    def remove_job(self, job: Job) -> None:
        self.database.remove_job(job.id)
        shutil.rmtree(self.folder(job), ignore_errors=True)

    def close(self) -> None:
        self.database.close()
        self._held.close()
