"""The database itself: opened with care, changed in transactions that are durable when they return.

Any thread may call; one at a time gets through. Whatever SQLite says is turned into a QmpdError that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from qmpd.errors import Kind, QmpdError
from qmpd.state import schema
from qmpd.state.directory import Directory
from qmpd.state.schema import Change, EventRow, JobRow

T = TypeVar("T")

PATIENCE: Final = 2.0
"""Seconds to wait for another program that looks at the database."""


@dataclass(slots=True)
class Loaded:
    """Everything, as the last incarnation left it. Lists are oldest first."""

    log: str
    incarnation: str | None = None
    #: The number of the newest event.
    last: int = 0
    events: list[EventRow] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Key, command, arguments.
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    jobs: list[JobRow] = field(default_factory=list)
    partial: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Device, inode, size and time of change of each image that a commit has made superfluous.
    left_behind: list[list[int]] = field(default_factory=list)


class Store:
    """An open state."""

    def __init__(self, directory: Directory) -> None:
        """Open the database, or make it. Raises QmpdError, with nothing changed, for one that cannot be trusted."""
        self.directory = directory
        self._lock = threading.Lock()
        self._path = directory.database
        self._database: sqlite3.Connection | None = None
        self._guarded(self._open)

    def load(self) -> Loaded:
        """All there is."""
        return self._guarded(self._load)

    def apply(self, changes: Iterable[Change]) -> None:
        """Make all of the changes, durably, or none. Raises QmpdError."""
        with self._lock:
            self._guarded(self._apply, changes)

    def give_up(self) -> None:
        """Close it, and put it where no start looks for it. Does not raise."""
        with contextlib.suppress(sqlite3.Error):  # what it wanted to write is not worth more than the rest
            self.close()
        self.directory.give_up()

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        is_new = not os.path.exists(self._path)
        # Without a transaction of its own making: this module says where one begins and ends.
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=PATIENCE)
        try:
            if not is_new:
                self._check(database)
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            self._database = database
            if self._number(database, "user_version") == 0:
                self._make(database)
            # What cannot be written to is found out now, and from here on nobody else can.
            self._apply([schema.meta("opened", str(time.time_ns()))])
        except BaseException:
            database.close()
            self._database = None
            raise
        os.chmod(self._path, 0o600)

    def _check(self, database: sqlite3.Connection) -> None:
        """Raise unless this is a sound state of a version that is known. Changes nothing."""
        application = self._number(database, "application_id")
        version = self._number(database, "user_version")
        if version == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchall():
            return  # made, but never filled: its maker was killed
        if application != schema.APPLICATION_ID:
            raise self._refusal("is not a state of qmpd", "choose another directory")
        if version > schema.VERSION:
            known = f"its format is {version}, this program knows up to {schema.VERSION}"
            raise self._refusal(f"was written by a newer qmpd: {known}", "use that, or another directory")
        findings = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
        if findings != ["ok"]:
            raise self._damaged(findings[0])

    def _make(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        for statement in filter(str.strip, schema.TABLES.split(";")):
            database.execute(statement)
        database.execute(*schema.meta("log", str(uuid.uuid4())))
        database.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {schema.VERSION}")
        database.execute("COMMIT")

    # -- reading and writing -------------------------------------------------------------------------------------------

    def _apply(self, changes: Iterable[Change]) -> None:
        database = self._opened
        database.execute("BEGIN IMMEDIATE")
        try:
            for statement, parameters in changes:
                database.execute(statement, parameters)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _load(self) -> Loaded:
        database = self._opened
        meta = dict(database.execute("SELECT name, value FROM meta"))
        loaded = Loaded(meta["log"], meta.get("incarnation"))
        for number, name, data, when in database.execute("SELECT number, name, data, time FROM events ORDER BY number"):
            loaded.events.append(EventRow(number, name, None if data is None else json.loads(data), when))
            loaded.last = number
        loaded.results = [json.loads(row) for (row,) in database.execute("SELECT row FROM results ORDER BY number")]
        loaded.nodes = {name: json.loads(row) for name, row in database.execute("SELECT name, row FROM nodes")}
        calls = database.execute("SELECT key, command, row FROM calls ORDER BY position")
        loaded.calls = [(key, command, json.loads(row)) for key, command, row in calls]
        jobs = "SELECT id, began, row, checkpoint, passed, speed, paused FROM jobs ORDER BY began"
        for job_id, began, row, checkpoint, passed, speed, paused in database.execute(jobs):
            where = None if checkpoint is None else json.loads(checkpoint)
            loaded.jobs.append(JobRow(job_id, began, json.loads(row), where, bool(passed), speed, bool(paused)))
        loaded.partial = {path: json.loads(row) for path, row in database.execute("SELECT path, row FROM partial")}
        loaded.left_behind = json.loads(meta.get(schema.LEFT_BEHIND, "[]"))
        return loaded

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise QmpdError(f"State '{self._path}' is closed", Kind.IO, path=self._path)
        return self._database

    # -- errors --------------------------------------------------------------------------------------------------------

    def _guarded(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL:
                raise self._refusal(f"cannot be written: {error}", "make room", Kind.NO_SPACE) from error
            raise self._refusal(f"cannot be used: {error}", "it must be writable, and no other program's") from error
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise self.directory.failure(error) from error

    def _damaged(self, why: str) -> QmpdError:
        return self._refusal(f"is damaged: {why}", "move it away to start without; no image was touched", Kind.CORRUPT)

    def _refusal(self, what: str, hint: str, kind: Kind = Kind.IO) -> QmpdError:
        return QmpdError(f"State '{self._path}' {what}; {hint}", kind, path=self._path)

    @staticmethod
    def _number(database: sqlite3.Connection, pragma: str) -> int:
        found: int = database.execute(f"PRAGMA {pragma}").fetchone()[0]
        return found
