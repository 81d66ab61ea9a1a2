"""Jobs and uploads in one SQLite file (WAL), which survives the server's death at any moment.

A row changes when something lasting happens: created, started, a window finished, ended. The steps in between
are in memory alone (live.py).
"""

import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal["video", "preparation"]
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED = ("completed", "failed", "cancelled")
VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL,
    status TEXT NOT NULL, created_at REAL NOT NULL, started_at REAL, completed_at REAL,
    cancelling INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL, result TEXT NOT NULL, error TEXT, notes TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at REAL NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, suffix TEXT NOT NULL, facts TEXT NOT NULL
);
"""
JSON = ("request", "result", "error", "notes", "facts")


@dataclass(frozen=True)
class Job:
    number: int
    id: str
    kind: Kind
    status: Status
    created_at: float
    request: dict[str, Any]  # request.py
    started_at: float | None = None
    completed_at: float | None = None
    cancelling: bool = False
    attempts: int = 0  # runs since its last finished window that ended with the worker's death
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class File:
    number: int
    id: str
    created_at: float
    filename: str
    purpose: str
    suffix: str
    facts: dict[str, Any]  # kind, bytes, width, height, frames, fps


class Database:
    """One connection, used by one thread at a time. Raises sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        version = self._rows("PRAGMA user_version")[0][0]
        if version > VERSION:
            raise sqlite3.DatabaseError("it is of a newer trt-wan")
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = FULL")
        with self._lock:
            self._connection.executescript(SCHEMA)
        self._run(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._connection.close()

    # Jobs

    def add_job(self, id: str, kind: Kind, request: Mapping[str, Any], most_waiting: int) -> Job | None:
        """None if `most_waiting` jobs wait already."""
        with self._lock:
            if self.waiting() >= most_waiting:
                return None
            self._run(
                "INSERT INTO jobs (id, kind, status, created_at, request, result, notes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (id, kind, "queued", time.time(), json.dumps(request), "{}", "[]"),
            )
            return self.job(id)

    def job(self, id: str) -> Job | None:
        found = self._rows("SELECT * FROM jobs WHERE id = ?", (_plain(id),))
        return _job(found[0]) if found else None

    def jobs(
        self, kind: Kind, limit: int, after: str | None = None, newest_first: bool = True
    ) -> list[Job] | None:
        """None if `after` is the id of no job."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        values: list[Any] = [kind]
        more = ""
        if after is not None:
            if (start := self.job(after)) is None:
                return None
            more = f" AND number {sign} ?"
            values.append(start.number)
        rows = self._rows(
            f"SELECT * FROM jobs WHERE kind = ?{more} ORDER BY number {order} LIMIT ?", (*values, limit)
        )
        return [_job(row) for row in rows]

    def change(self, id: str, **values: Any) -> Job | None:
        """The job with these values; None if it is gone."""
        names = [field.name for field in fields(Job)]
        assert values.keys() <= set(names), values.keys()
        coded = [
            json.dumps(value) if name in JSON and value is not None else value
            for name, value in values.items()
        ]
        with self._lock:
            self._run(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?", (*coded, id)
            )
            return self.job(id)

    def take_next(self) -> Job | None:
        """The job that has waited longest, which is in progress from now on."""
        with self._lock:
            rows = self._rows("SELECT id FROM jobs WHERE status = 'queued' ORDER BY number LIMIT 1")
            if not rows:
                return None
            return self.change(rows[0]["id"], status="in_progress", started_at=time.time())

    def end_queued(self, id: str) -> Job | None:
        """Cancels a job that has not begun; None if it has."""
        with self._lock:
            done = self._run(
                "UPDATE jobs SET status = 'cancelled', completed_at = ? WHERE id = ? AND status = 'queued'",
                (time.time(), id),
            )
            return self.job(id) if done else None

    def begin_again(self) -> list[Job]:
        """Call when the server starts: jobs that were in progress wait again, in their old places."""
        rows = self._rows("SELECT * FROM jobs WHERE status = 'in_progress'")
        self._run("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")
        return [_job(row) for row in rows]

    def remove_job(self, id: str) -> None:
        self._run("DELETE FROM jobs WHERE id = ?", (id,))

    def waiting(self) -> int:
        return int(self._rows("SELECT COUNT(*) AS n FROM jobs WHERE status = 'queued'")[0]["n"])

    def place(self, job: Job) -> int:
        """How many jobs come before this one that waits."""
        query = "SELECT COUNT(*) AS n FROM jobs WHERE status = 'queued' AND number < ?"
        return int(self._rows(query, (job.number,))[0]["n"])

    def counts(self) -> dict[tuple[str, str], int]:
        """How many jobs there are, by kind and status."""
        rows = self._rows("SELECT kind, status, COUNT(*) AS n FROM jobs GROUP BY kind, status")
        return {(row["kind"], row["status"]): row["n"] for row in rows}

    def ids(self) -> set[str]:
        return {row["id"] for row in self._rows("SELECT id FROM jobs UNION SELECT id FROM files")}

    # Files

    def add_file(self, id: str, filename: str, purpose: str, suffix: str, facts: Mapping[str, Any]) -> File:
        self._run(
            "INSERT INTO files (id, created_at, filename, purpose, suffix, facts) VALUES (?, ?, ?, ?, ?, ?)",
            (id, time.time(), filename, purpose, suffix, json.dumps(facts)),
        )
        found = self.file(id)
        assert found is not None
        return found

    def file(self, id: str) -> File | None:
        found = self._rows("SELECT * FROM files WHERE id = ?", (_plain(id),))
        return File(**_values(found[0])) if found else None

    def files(self, limit: int) -> list[File]:
        return [
            File(**_values(row))
            for row in self._rows("SELECT * FROM files ORDER BY number DESC LIMIT ?", (limit,))
        ]

    def remove_file(self, id: str) -> None:
        self._run("DELETE FROM files WHERE id = ?", (id,))

    def is_whole(self) -> bool:
        return [tuple(row) for row in self._rows("PRAGMA integrity_check")] == [("ok",)]

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    def _run(self, query: str, values: Sequence[Any] = ()) -> int:
        """Returns the number of rows that it changed."""
        with self._lock, closing(self._connection.execute(query, values)) as cursor:
            return cursor.rowcount


def _plain(id: str) -> str:
    """SQLite takes no surrogates, which a client may send."""
    return id.encode(errors="replace").decode()


def _job(row: sqlite3.Row) -> Job:
    values = _values(row)
    return Job(**{**values, "cancelling": bool(values["cancelling"])})


def _values(row: sqlite3.Row) -> dict[str, Any]:
    return {
        name: json.loads(row[name]) if name in JSON and row[name] is not None else row[name]
        for name in row.keys()
    }
