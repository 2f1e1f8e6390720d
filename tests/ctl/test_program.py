"""qmpctl as a program: what it prints, what it sends, and how it exits. Run against a scripted daemon."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qmpd.ctl.session import Exit
from tests.ctl.fake import FakeDaemon, fake_daemon, raises

MIB = 1 << 20


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[FakeDaemon]:
    """A fake that is listening."""
    async with fake_daemon(tmp_path) as fake:
        yield fake


async def qmpctl(daemon: FakeDaemon | None, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the program to its end."""
    where = ["--socket", daemon.path] if daemon else []
    return await trio.run_process(
        [sys.executable, "-m", "qmpd.ctl", *where, *arguments],
        stdin=stdin,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )


def job(**more: Any) -> dict[str, Any]:
    """A row of query-jobs."""
    base = {"id": "j0", "type": "commit", "status": "running", "current-progress": 0, "total-progress": 64 * MIB}
    return {**base, **more}


def committing(daemon: FakeDaemon, event: str = "BLOCK_JOB_COMPLETED", **more: Any) -> None:
    """Make block-commit run a whole job, as quick jobs do, before its reply."""

    async def commit(arguments: dict[str, Any]) -> dict[str, Any]:
        name = arguments["job-id"]
        await daemon.status(name, "created", "running")
        data = {"type": "commit", "device": name, "len": 64 * MIB, "offset": 64 * MIB, "speed": 0, **more}
        await daemon.emit(event, **data)
        await daemon.status(name, "concluded", "null")
        return {}

    daemon.answers["block-commit"] = commit
    daemon.answers["query-jobs"] = lambda _: []


async def test_commit_sends_what_was_asked_and_reports_the_end(daemon: FakeDaemon) -> None:
    """Options become members of block-commit; what was not said is left to the daemon."""
    committing(daemon)

    run = await qmpctl(daemon, "commit", "top", "--top", "mid", "--base", "base", "--speed", "8M", "--manual-finalize")

    assert (run.returncode, run.stderr) == (Exit.OK, b"")
    assert run.stdout.splitlines()[-1] == b"commit-top: completed"
    sent = dict(daemon.asked)["block-commit"]
    assert sent == {
        "job-id": "commit-top",
        "device": "top",
        "top-node": "mid",
        "base-node": "base",
        "speed": 8 * MIB,
        "auto-finalize": False,
    }


async def test_an_offline_commit_is_followed_in_the_same_way(daemon: FakeDaemon) -> None:
    """Another command with its own members; the job and its end look the same."""
    committing(daemon)
    daemon.answers["x-qmpd-commit-offline"] = daemon.answers["block-commit"]

    run = await qmpctl(daemon, "commit-offline", "top", "-d", "--speed", "8M", "--job-id", "j7")

    assert (run.returncode, run.stderr) == (Exit.OK, b"")
    assert run.stdout.splitlines()[-1] == b"j7: completed"
    sent = dict(daemon.asked)["x-qmpd-commit-offline"]
    assert sent == {"job-id": "j7", "device": "top", "speed": 8 * MIB, "keep": True}


async def test_a_failed_commit_is_a_failure(daemon: FakeDaemon) -> None:
    """The job's error is on standard error, the status is not zero."""
    committing(daemon, error="No space left on device")

    run = await qmpctl(daemon, "commit", "top")

    assert run.returncode == Exit.FAILED
    assert run.stderr == b"qmpctl: commit-top: No space left on device\n"


async def test_a_cancelled_commit_has_a_status_of_its_own(daemon: FakeDaemon) -> None:
    """Scripts can tell it from a failure; JSON says it in a word."""
    committing(daemon, "BLOCK_JOB_CANCELLED")

    run = await qmpctl(daemon, "commit", "top", "--json")

    assert run.returncode == Exit.CANCELLED
    assert json.loads(run.stdout) == {
        "id": "commit-top",
        "result": "cancelled",
        "error": None,
        "offset": 64 * MIB,
        "len": 64 * MIB,
    }


async def test_a_refused_commit_prints_the_daemons_words(daemon: FakeDaemon) -> None:
    """One line, no traceback."""
    daemon.answers["block-commit"] = raises("Need a root block node")

    run = await qmpctl(daemon, "commit", "mid", "--job-id", "j7")

    assert (run.returncode, run.stdout, run.stderr) == (Exit.FAILED, b"", b"qmpctl: Need a root block node\n")


async def test_detach_returns_at_once(daemon: FakeDaemon) -> None:
    """The job is the daemon's; nothing but its start is waited for."""
    daemon.answers["block-commit"] = lambda _: {}

    run = await qmpctl(daemon, "commit", "top", "--detach")

    assert (run.returncode, run.stdout) == (Exit.OK, b"commit-top: started\n")


async def test_jobs_are_a_table_or_json(daemon: FakeDaemon) -> None:
    """Both queries are put together; JSON keeps every member."""
    daemon.answers["query-jobs"] = lambda _: [job(), job(id="c0", type="create", error="File too large")]
    daemon.answers["query-block-jobs"] = lambda _: [{"device": "j0", "speed": 8 * MIB, "io-status": "ok"}]

    table = await qmpctl(daemon, "jobs")
    data = await qmpctl(daemon, "jobs", "--json")

    assert table.stdout.decode().splitlines() == [
        "JOB  TYPE    STATUS   DONE  OF      SPEED LIMIT  ERROR",
        "j0   commit  running  0 B   64 MiB  8 MiB/s      -",
        "c0   create  running  0 B   64 MiB  -            File too large",
    ]
    assert json.loads(data.stdout)[0]["io-status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "command", "sent"),
    [
        (["pause", "j0"], "job-pause", {"id": "j0"}),
        (["resume", "j0"], "job-resume", {"id": "j0"}),
        (["cancel", "j0"], "job-cancel", {"id": "j0"}),
        (["cancel", "j0", "--soft"], "block-job-cancel", {"device": "j0"}),
        (["complete", "j0"], "job-complete", {"id": "j0"}),
        (["finalize", "j0"], "job-finalize", {"id": "j0"}),
        (["dismiss", "j0"], "job-dismiss", {"id": "j0"}),
        (["speed", "j0", "50M"], "block-job-set-speed", {"device": "j0", "speed": 50 * MIB}),
    ],
)
async def test_each_verb_is_one_command(
    daemon: FakeDaemon, arguments: list[str], command: str, sent: dict[str, Any]
) -> None:
    """Silent success, as tools do."""
    daemon.answers[command] = lambda _: {}

    run = await qmpctl(daemon, *arguments)

    assert (run.returncode, run.stdout, run.stderr) == (Exit.OK, b"", b"")
    assert daemon.asked[-1] == (command, sent)


@pytest.mark.parametrize(
    ("arguments", "stdin"), [(["{'id': 'x'}"], b""), (["-"], b'{"id": "x"}\n')], ids=["argument", "stdin"]
)
async def test_raw_sends_anything(daemon: FakeDaemon, arguments: list[str], stdin: bytes) -> None:
    """Arguments in QEMU's dialect of JSON, from the command line or from standard input; the result is JSON."""
    daemon.answers["x-something"] = lambda given: [given]

    run = await qmpctl(daemon, "raw", "x-something", *arguments, stdin=stdin)

    assert json.loads(run.stdout) == [{"id": "x"}]


async def test_events_are_printed_as_they_come(daemon: FakeDaemon) -> None:
    """A line each, for people or for programs, until the count is reached."""

    async def burst() -> None:
        while "qmp_capabilities" not in dict(daemon.asked):
            await trio.lowlevel.checkpoint()
        while not runs:
            await daemon.status("j0", "running")
            await trio.sleep(0)

    runs: list[subprocess.CompletedProcess[bytes]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(burst)
        runs.append(await qmpctl(daemon, "events", "--json", "-n", "2", "JOB_STATUS_CHANGE"))

    lines = [json.loads(line) for line in runs[0].stdout.splitlines()]
    assert (
        lines
        == [{"event": "JOB_STATUS_CHANGE", "data": {"id": "j0", "status": "running"}, "time": 1_700_000_000.25}] * 2
    )


@pytest.mark.parametrize(
    ("jobs", "text"),
    [([], "no jobs"), ([job(), job(id="j1")], "name the job to watch: j0, j1")],
    ids=["none", "several"],
)
async def test_watch_without_a_name_needs_exactly_one_job(
    daemon: FakeDaemon, jobs: list[dict[str, Any]], text: str
) -> None:
    """It does not guess."""
    daemon.answers["query-jobs"] = lambda _: jobs

    run = await qmpctl(daemon, "watch")

    assert (run.returncode, run.stderr.decode()) == (Exit.FAILED, f"qmpctl: {text}\n")


async def started(daemon: FakeDaemon, *arguments: str, stdin: int = subprocess.DEVNULL) -> trio.Process:
    """A program that is following a job; everything it could miss is set up."""
    daemon.answers["query-jobs"] = lambda _: [job()]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "qmpd.ctl", "--socket", daemon.path, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not daemon.asked or daemon.asked[-1][0] != "query-jobs":
        await trio.sleep(0)
    return process


async def read_until(stream: Any, text: bytes) -> bytes:
    """What the stream says up to and including ``text``."""
    seen = b""
    while text not in seen:
        part = await stream.receive_some()
        assert part, seen
        seen += part
    return seen


async def test_ctrl_c_leaves_the_job_running_where_nobody_can_answer(daemon: FakeDaemon) -> None:
    """The watching ends, the job does not; the last line says how to look again."""
    process = await started(daemon, "watch", "j0")

    process.send_signal(signal.SIGINT)
    await read_until(process.stderr, b"j0 goes on; 'qmpctl watch j0' looks at it again")

    assert await process.wait() == Exit.INTERRUPTED
    assert "job-cancel" not in dict(daemon.asked)


async def question(daemon: FakeDaemon, keyboard: int, terminal: int, answer: bytes) -> trio.Process:
    """A program that has been interrupted and has got its answer."""
    process = await started(daemon, "watch", "j0", stdin=terminal)
    process.send_signal(signal.SIGINT)
    await read_until(process.stderr, b"go on watching (w)? ")
    os.write(keyboard, answer)
    return process


async def conclude(daemon: FakeDaemon, event: str) -> dict[str, Any]:
    """The end of j0."""
    await daemon.emit(event, type="commit", device="j0", len=64 * MIB, offset=0, speed=0)
    await daemon.status("j0", "concluded", "null")
    return {}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


async def test_ctrl_c_at_a_terminal_can_cancel(daemon: FakeDaemon, terminal: tuple[int, int]) -> None:
    """'c' cancels the job and waits for its end."""
    daemon.answers["job-cancel"] = lambda _: conclude(daemon, "BLOCK_JOB_CANCELLED")

    process = await question(daemon, *terminal, b"c\n")

    assert await process.wait() == Exit.CANCELLED


async def test_ctrl_c_at_a_terminal_can_be_taken_back(daemon: FakeDaemon, terminal: tuple[int, int]) -> None:
    """'w' goes on watching to the end, which is a success."""
    process = await question(daemon, *terminal, b"w\n")
    await conclude(daemon, "BLOCK_JOB_COMPLETED")

    assert await process.wait() == Exit.OK
    assert "job-cancel" not in dict(daemon.asked)


async def test_ctrl_c_twice_leaves(daemon: FakeDaemon, terminal: tuple[int, int]) -> None:
    """The question can be answered with a second Ctrl-C."""
    process = await question(daemon, *terminal, b"")
    process.send_signal(signal.SIGINT)

    assert await process.wait() == Exit.INTERRUPTED


async def test_a_daemon_that_goes_away_ends_the_watching(daemon: FakeDaemon) -> None:
    """One line, no traceback, and a status of its own."""
    process = await started(daemon, "watch", "j0")

    await daemon.hang_up()
    said = await read_until(process.stderr, b"\n")

    assert said == b"qmpctl: the daemon closed the connection\n"
    assert await process.wait() == Exit.NO_CONNECTION


def replaying(daemon: FakeDaemon, *, complete: bool) -> None:
    """A client that subscribes hears one numbered event, after one without a number that it replaces."""

    async def subscribe(arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments == {"progress": False, "since": 4}
        await daemon.status("j0", "created")
        await daemon.emit("JOB_STATUS_CHANGE", 5, id="j0", status="created")
        return {"log": "l", "incarnation": "i", "last": 5, "complete": complete}

    daemon.answers["x-qmpd-subscribe"] = subscribe


@pytest.mark.parametrize("complete", [True, False])
async def test_events_can_begin_in_the_past(daemon: FakeDaemon, complete: bool) -> None:
    """With their numbers, each once; what is lost is said."""
    replaying(daemon, complete=complete)

    run = await qmpctl(daemon, "events", "--since", "4", "-n", "1", "--json")

    assert (run.returncode, json.loads(run.stdout)["number"]) == (Exit.OK, 5)
    assert run.stderr == (b"" if complete else b"qmpctl: not all events since 4 are kept\n")


async def test_a_daemon_without_a_log_cannot_begin_in_the_past(daemon: FakeDaemon) -> None:
    """It is said, not ignored."""
    run = await qmpctl(daemon, "events", "--since", "4")

    assert (run.returncode, run.stderr) == (Exit.FAILED, b"qmpctl: this daemon does not keep events\n")


async def test_results_are_a_table_or_json(daemon: FakeDaemon) -> None:
    """Also of jobs that are gone."""
    stamp = {"seconds": 1_700_000_000, "microseconds": 0}
    result = {"number": 7, "id": "j0", "type": "commit", "outcome": "failed", "error": "Input/output error"}
    result |= {"offset": MIB, "len": 2 * MIB, "began": stamp, "ended": stamp, "incarnation": "i"}
    daemon.answers["x-qmpd-job-results"] = lambda _: [result]

    table = await qmpctl(daemon, "results", "--since", "3")
    as_json = await qmpctl(daemon, "results", "--json")

    assert daemon.asked[1] == ("x-qmpd-job-results", {"since": 3})
    head, row = table.stdout.decode().splitlines()
    assert head.split() == ["NUMBER", "ENDED", "JOB", "TYPE", "OUTCOME", "DONE", "OF", "ERROR"]
    assert row.endswith("j0   commit  failed   1 MiB  2 MiB  Input/output error")
    assert json.loads(as_json.stdout) == [result]


async def test_no_daemon_is_a_status_of_its_own(tmp_path: Path) -> None:
    """Scripts can tell a missing daemon from a refused command."""
    run = await qmpctl(None, "--socket", str(tmp_path / "nothing"), "jobs")

    assert run.returncode == Exit.NO_CONNECTION
    assert run.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["jobs"], ["--socket", "x", "speed", "j0", "fast"], ["--socket", "x", "nonsense"]],
    ids=["nothing", "no socket", "bad size", "unknown"],
)
async def test_wrong_usage_is_explained(arguments: list[str]) -> None:
    """argparse's usage line and status 2."""
    run = await qmpctl(None, *arguments)

    assert run.returncode == Exit.USAGE
    assert run.stderr.startswith(b"usage: qmpctl")


async def test_bad_arguments_for_raw_are_wrong_usage(daemon: FakeDaemon) -> None:
    """Nothing is sent."""
    run = await qmpctl(daemon, "raw", "query-jobs", "{")

    assert run.returncode == Exit.USAGE
    assert b"premature EOI" in run.stderr


def checked(**found: Any) -> dict[str, Any]:
    """An answer of x-qmpd-check."""
    members = ("check-errors", "corruptions", "leaks", "corruptions-fixed", "leaks-fixed", "fragmented-clusters")
    clusters = {"total-clusters": 64, "allocated-clusters": 16, "compressed-clusters": 0, "image-end-offset": 2 * MIB}
    base = {"filename": "top.qcow2", "format": "qcow2", **dict.fromkeys(members, 0), **clusters, "findings": []}
    return {**base, **found}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({}, 0),
        ({"leaks-fixed": 3}, 0),
        ({"check-errors": 1, "corruptions": 1}, 1),
        ({"corruptions": 1, "leaks": 1}, 2),
        ({"leaks": 1}, 3),
    ],
    ids=["clean", "repaired", "could not check", "corrupt", "leaks"],
)
async def test_check_exits_like_qemu_img_check(daemon: FakeDaemon, found: dict[str, Any], status: int) -> None:
    """0 clean, 1 could not check, 2 corrupt, 3 leaks."""
    daemon.answers["x-qmpd-check"] = lambda _: checked(**found)

    run = await qmpctl(daemon, "check", "top", "-r", "leaks", "--json")

    assert (run.returncode, json.loads(run.stdout)) == (status, checked(**found))
    assert daemon.asked[-1] == ("x-qmpd-check", {"node-name": "top", "fix": "leaks"})


async def test_check_shows_what_was_found(daemon: FakeDaemon) -> None:
    """Where to look, how many there are, and what that means."""
    finding = {"severity": "leak", "offset": 0x50006, "field": "refcount", "value": 1, "text": "cluster 3 ..."}
    daemon.answers["x-qmpd-check"] = lambda _: checked(leaks=2, findings=[finding])

    run = await qmpctl(daemon, "check", "top")

    assert run.stdout.decode().splitlines() == [
        "FINDING  WHERE                       WHAT",
        "leak     refcount at 0x50006 is 0x1  cluster 3 ...",
        "... 2 in all",
        "leaked clusters: 2; space is lost, but no data",
        "16 of 64 clusters allocated (25.0%), 0 fragmented, 0 compressed; the image ends at 2 MiB",
    ]
    assert daemon.asked[-1] == ("x-qmpd-check", {"node-name": "top"})


async def test_check_without_a_daemon_does_not_look_like_leaks(tmp_path: Path) -> None:
    """3 means something else here."""
    run = await qmpctl(None, "--socket", str(tmp_path / "nothing"), "check", "top")

    assert run.returncode == 1
