"""The state directory: what is kept, and that one which cannot be trusted is refused as it is."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from qmpd.errors import Kind, QmpdError
from qmpd.state import directory as state_directory
from qmpd.state import schema
from qmpd.state.directory import Directory
from qmpd.state.schema import EventRow
from qmpd.state.store import Store


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """The state in ``path``."""
    directory = Directory(str(path))
    try:
        store = Store(directory)
        try:
            yield store
        finally:
            store.close()
    finally:
        directory.close()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


def test_what_is_written_is_there_again(tmp_path: Path) -> None:
    """Everything, and in its order; the log keeps its id."""
    with opened(tmp_path / "state") as store:
        log = store.load().log
        store.apply(
            [
                schema.event(EventRow(1, "X", {"name": "caf\udce9"}, 5)),
                schema.event(EventRow(2, "Y", None, 6)),
                schema.result(2, {"a": 1}),
                schema.node("top", "{}"),
                schema.node("gone", "{}"),
                schema.node("gone", None),
                schema.call("object:b", "object-add", {"id": "b"}),
                schema.call("object:a", "object-add", {"id": "a"}),
                schema.job("j0", 7, {"kind": "commit"}, 100),
                schema.checkpoint("j0", {"offset": 3}),
                schema.settings("j0", 200, paused=True),
                schema.partial("base", {"job": "j0"}),
            ]
        )
    with opened(tmp_path / "state") as store:
        loaded = store.load()

    assert (loaded.log, loaded.last) == (log, 2)
    assert loaded.events == [EventRow(1, "X", {"name": "caf\udce9"}, 5), EventRow(2, "Y", None, 6)]
    assert (loaded.results, loaded.nodes, loaded.partial) == ([{"a": 1}], {"top": {}}, {"base": {"job": "j0"}})
    assert [key for key, _, _ in loaded.calls] == ["object:b", "object:a"]
    (job,) = loaded.jobs
    assert (job.checkpoint, job.speed, job.paused, job.passed) == ({"offset": 3}, 200, True, False)


def test_a_failing_change_takes_the_others_with_it(tmp_path: Path) -> None:
    """All of a transaction or nothing."""
    with opened(tmp_path) as store:
        store.apply([schema.event(EventRow(1, "X", None, 0))])
        with pytest.raises(QmpdError):
            store.apply([schema.node("n", "{}"), schema.event(EventRow(1, "Y", None, 0))])

        assert store.load().nodes == {}
        store.apply([schema.node("n", "{}")])
        assert store.load().nodes == {"n": {}}


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    """The second one learns who has it."""
    with opened(tmp_path), pytest.raises(QmpdError, match=f"is in use by process {os.getpid()}") as error:
        Directory(str(tmp_path))
    assert error.value.kind is Kind.LOCKED


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA application_id = 1")


def torn(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4096)


def scribbled(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


def rubbish(path: Path) -> None:
    path.write_bytes(b"what is this" * 1000)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (newer, "was written by a newer qmpd: its format is 2, this program knows up to 1"),
        (foreign, "is not a state of qmpd"),
        (torn, "is damaged"),
        (scribbled, "is damaged"),
        (rubbish, "is damaged: file is not a database"),
    ],
)
def test_what_cannot_be_trusted_is_refused_and_left_alone(
    tmp_path: Path, spoil: Callable[[Path], None], text: str
) -> None:
    """The reason names the file; not a byte of it changes."""
    with opened(tmp_path) as store:
        store.apply([schema.node(f"n{index}", '{"a":"' + "x" * 300 + '"}') for index in range(100)])
    spoil(tmp_path / "state.db")
    before = content(tmp_path)

    with pytest.raises(QmpdError, match=text) as error, opened(tmp_path):
        pass
    assert error.value.path == str(tmp_path / "state.db")
    assert content(tmp_path) == before


def test_a_full_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setattr(state_directory, "ROOM", 1 << 62)
    with pytest.raises(QmpdError, match=r"No space left on device \(\d+ bytes are free\); make room") as error:
        Directory(str(tmp_path / "state"))
    assert error.value.kind is Kind.NO_SPACE
    assert content(tmp_path / "state") == {}


@pytest.mark.parametrize("in_the_way", ["file", "file/below"])
def test_what_is_no_directory_is_refused(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QmpdError, match=r"Cannot use state directory .*; it must be a directory"):
        Directory(str(tmp_path / in_the_way))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that is mounted read-only."""
    for command in (["mount", "--bind", tmp_path, tmp_path], ["mount", "-o", "remount,bind,ro", tmp_path]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            subprocess.run(["umount", tmp_path], capture_output=True, check=False)
            pytest.skip("may not mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_read_only_directory_is_refused(read_only: Path) -> None:
    """In words, and at once."""
    with pytest.raises(QmpdError, match="Read-only file system; it must be writable"):
        Directory(str(read_only))


def test_the_daemon_says_so_and_opens_no_image(tmp_path: Path) -> None:
    """Status 1, one line, and the image was not even looked at: it is missing."""
    with opened(tmp_path):
        pass
    newer(tmp_path / "state.db")
    words = ["--state-dir", str(tmp_path), "--blockdev", "file,node-name=f,filename=/nonexistent"]
    run = subprocess.run([sys.executable, "-m", "qmpd", *words], capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert run.stderr.startswith(f"qmpd: State '{tmp_path}/state.db' was written by a newer qmpd")
    assert run.stderr.count("\n") == 1


def test_a_state_given_up_is_not_believed_later(tmp_path: Path) -> None:
    """It is put aside with its log."""
    with opened(tmp_path) as store:
        store.apply([schema.node("n", "{}")])
        store.give_up()
        with pytest.raises(QmpdError, match="is closed"):
            store.apply([schema.node("m", "{}")])
    with opened(tmp_path) as store:
        assert store.load().nodes == {}
    assert (tmp_path / "state.db.given-up").exists()
