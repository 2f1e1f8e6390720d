"""The tables of the state, and the changes that can be made to them.

A change is one SQL statement with its parameters; several of them make a transaction (:meth:`Store.apply`). Nothing
here touches the database.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

APPLICATION_ID: Final = 0x716D7064
"""``qmpd``, in the header of the database file."""

VERSION: Final = 1
"""Of the tables. A database of a newer one is refused; one of an older one is brought up to date."""

TABLES: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (number INTEGER PRIMARY KEY, name TEXT NOT NULL, data TEXT, time INTEGER NOT NULL);
CREATE TABLE results (number INTEGER PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE nodes (name TEXT PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, command TEXT NOT NULL, row TEXT NOT NULL);
CREATE TABLE jobs (id TEXT PRIMARY KEY, began INTEGER NOT NULL, row TEXT NOT NULL, checkpoint TEXT,
  passed INTEGER NOT NULL DEFAULT 0, speed INTEGER, paused INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE partial (path TEXT PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
"""

LEFT_BEHIND: Final = "left-behind"
"""The fact that tells which files commits have made superfluous: device, inode, size, time of change of each."""

Change = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job that was not over. ``row`` says what it is, ``checkpoint`` how far it was durably (None: not at all).

    ``passed``: only telling was left. ``speed`` in bytes per second. ``began`` in nanoseconds since the epoch.
    """

    id: str
    began: int
    row: dict[str, Any]
    checkpoint: dict[str, Any] | None
    passed: bool
    speed: int
    paused: bool


@dataclass(frozen=True, slots=True)
class EventRow:
    """A numbered event. ``time`` in nanoseconds since the epoch."""

    number: int
    name: str
    data: dict[str, Any] | None
    time: int


def dumps(row: Any) -> str:
    """As rows are kept: ASCII, so that file names that are no text survive."""
    return json.dumps(row, separators=(",", ":"), sort_keys=True)


def meta(name: str, value: str) -> Change:
    """A fact about the state as a whole."""
    return "INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value)


def event(row: EventRow) -> Change:
    """An event that is about to be told."""
    data = None if row.data is None else dumps(row.data)
    return "INSERT INTO events VALUES (?, ?, ?, ?)", (row.number, row.name, data, row.time)


def forget_events(number: int) -> Change:
    """The events up to this one."""
    return "DELETE FROM events WHERE number <= ?", (number,)


def result(number: int, row: dict[str, Any]) -> Change:
    """How a job ended, told by the event ``number``."""
    return "INSERT INTO results VALUES (?, ?)", (number, dumps(row))


def forget_results(number: int) -> Change:
    """The results up to this one."""
    return "DELETE FROM results WHERE number <= ?", (number,)


def node(name: str, row: str | None) -> Change:
    """A node as it is now; None: it is gone."""
    if row is None:
        return "DELETE FROM nodes WHERE name = ?", (name,)
    return "INSERT OR REPLACE INTO nodes VALUES (?, ?)", (name, row)


def call(key: str, command: str, arguments: dict[str, Any]) -> Change:
    """A command to be repeated at the next start, after those that are there; instead of an earlier one of this key."""
    return "INSERT OR REPLACE INTO calls (key, command, row) VALUES (?, ?, ?)", (key, command, dumps(arguments))


def kept_call(key: str, command: str, row: str) -> Change:
    """The same in its place, if there is one of this key already."""
    return (
        "INSERT INTO calls (key, command, row) VALUES (?, ?, ?)"
        " ON CONFLICT (key) DO UPDATE SET command = excluded.command, row = excluded.row",
        (key, command, row),
    )


def forget_calls(pattern: str) -> Change:
    """Of commands, those whose key is GLOB ``pattern``."""
    return "DELETE FROM calls WHERE key GLOB ?", (pattern,)


def job(job_id: str, began: int, row: dict[str, Any], speed: int) -> Change:
    """A job that begins, or begins again: its checkpoint stays."""
    return (
        "INSERT INTO jobs (id, began, row, speed) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET row = excluded.row, passed = 0",
        (job_id, began, dumps(row), speed),
    )


def checkpoint(job_id: str, row: dict[str, Any]) -> Change:
    """How far a job is durably."""
    return "UPDATE jobs SET checkpoint = ? WHERE id = ?", (dumps(row), job_id)


def passed(job_id: str) -> Change:
    """The job has done all it was to do."""
    return "UPDATE jobs SET passed = 1 WHERE id = ?", (job_id,)


def settings(job_id: str, speed: int, *, paused: bool) -> Change:
    """What clients told a job while it ran."""
    return "UPDATE jobs SET speed = ?, paused = ? WHERE id = ?", (speed, paused, job_id)


def forget_job(job_id: str) -> Change:
    """The job is over."""
    return "DELETE FROM jobs WHERE id = ?", (job_id,)


def partial(path: str, row: dict[str, Any] | None) -> Change:
    """The file ``path`` holds a part of what was to be committed into it; None: no longer."""
    if row is None:
        return "DELETE FROM partial WHERE path = ?", (path,)
    return "INSERT OR REPLACE INTO partial VALUES (?, ?)", (path, dumps(row))
