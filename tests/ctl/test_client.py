"""The client library against a scripted daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from qmpd.ctl.client import CommandError, ConnectError, ConnectionLostError, Event, connect
from tests.ctl.fake import FakeDaemon, fake_daemon, raises


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[FakeDaemon]:
    """A fake that is listening."""
    async with fake_daemon(tmp_path) as fake:
        yield fake


async def test_a_command_returns_its_result(daemon: FakeDaemon) -> None:
    """The arguments arrive as they are; the result comes back as it is."""
    daemon.answers["query-jobs"] = lambda arguments: [arguments]

    async with connect(daemon.path) as client:
        result = await client.execute("query-jobs", {"a": {"b-c": None}})

    assert result == [{"a": {"b-c": None}}]
    assert client.greeting["version"]["qemu"]["major"] == 10


async def test_an_error_reply_is_raised_with_its_text(daemon: FakeDaemon) -> None:
    """Class and desc are the daemon's, and the exception is not wrapped in a group."""
    daemon.answers["job-cancel"] = raises("Job not found")

    with pytest.raises(CommandError, match=r"^Job not found$") as caught:
        async with connect(daemon.path) as client:
            await client.execute("job-cancel", {"id": "x"})

    assert caught.value.error_class == "GenericError"


async def test_replies_find_their_callers(daemon: FakeDaemon) -> None:
    """Many tasks may use one client; each gets its own answer."""
    daemon.answers["echo"] = lambda arguments: arguments["n"]
    results: dict[int, int] = {}

    async def call(client: Any, number: int) -> None:
        results[number] = await client.execute("echo", {"n": number})

    async with connect(daemon.path) as client, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(call, client, number)

    assert results == {number: number for number in range(20)}


async def test_an_abandoned_command_does_not_disturb_the_next(daemon: FakeDaemon) -> None:
    """The late reply to a cancelled wait is dropped."""
    gate = trio.Event()

    async def slow(_: dict[str, Any]) -> str:
        await gate.wait()
        return "late"

    daemon.answers["slow"] = slow
    daemon.answers["fast"] = lambda _: "fast"

    async with connect(daemon.path) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "slow")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        gate.set()

        assert await client.execute("fast") == "fast"


async def test_events_come_in_order_to_those_who_subscribed(daemon: FakeDaemon) -> None:
    """A subscription sees the events it named, from its beginning on, with the daemon's time."""
    daemon.answers["query-version"] = lambda _: {}

    async with connect(daemon.path) as client:
        await daemon.emit("BEFORE")
        await client.execute("query-version")
        with client.events("A", "B") as some, client.events() as everything:
            for name in ("A", "C", "B"):
                await daemon.emit(name, some_member=name)

            assert await some.next() == Event("A", {"some-member": "A"}, 1_700_000_000.25)
            assert (await some.next()).name == "B"
            assert [(await everything.next()).name for _ in range(3)] == ["A", "C", "B"]
            assert everything.next_nowait() is None


async def test_the_end_of_the_connection_ends_everything(daemon: FakeDaemon) -> None:
    """Waiting commands, waiting readers and later commands are told; an iteration just ends."""

    async def hang_up(_: dict[str, Any]) -> None:
        await daemon.hang_up()

    daemon.answers["quit"] = hang_up
    async with connect(daemon.path) as client:
        with client.events() as events:
            with pytest.raises(ConnectionLostError):
                await client.execute("quit")
            with pytest.raises(ConnectionLostError):
                await client.execute("query-jobs")
            with pytest.raises(ConnectionLostError):
                await events.next()
            assert [event async for event in events] == []
        with client.events() as late, pytest.raises(ConnectionLostError):
            await late.next()


async def test_no_socket_is_a_sentence(tmp_path: Path) -> None:
    """The path and the reason, no traceback material."""
    with pytest.raises(ConnectError, match=r"cannot connect to .*/nothing: No such file or directory"):
        async with connect(str(tmp_path / "nothing")):
            pass


async def test_a_path_that_no_socket_can_have_is_a_sentence(tmp_path: Path) -> None:
    """UNIX socket paths are short; the system's complaint is passed on."""
    with pytest.raises(ConnectError, match="cannot connect to"):
        async with connect(str(tmp_path / ("x" * 200))):
            pass


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\r\n"])
async def test_a_server_that_is_not_qmp_is_recognised(daemon: FakeDaemon, greeting: bytes) -> None:
    """Whatever else answers is not talked to."""
    daemon.greeting = greeting

    with pytest.raises(ConnectError, match="does not speak QMP"):
        async with connect(daemon.path):
            pass


async def test_silence_is_not_waited_for_without_end(daemon: FakeDaemon, autojump_clock: MockClock) -> None:
    """A daemon that serves one client at a time leaves the second without a greeting."""
    daemon.greeting = b""

    with pytest.raises(ConnectError, match="no greeting"):
        async with connect(daemon.path):
            pass


async def test_an_exception_of_the_block_comes_out_as_it_is(daemon: FakeDaemon) -> None:
    """The nursery inside is nobody's business."""
    with pytest.raises(ZeroDivisionError):
        async with connect(daemon.path):
            raise ZeroDivisionError
