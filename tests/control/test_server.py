"""Clients of a running core: greeting, order, fairness, events, the end.

Source: spec/qmp-protocol.md sections 8, 9, 12 and 13.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qmpd.control import channel, registry
from qmpd.control.qapi import QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from tests.inprocess import CommandError, Wire, running


class Gate:
    """What the commands of this module wait for and write to."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.done: list[str] = []


class Named(QapiModel):
    """Arguments of the commands made for these tests."""

    name: Str


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Registers x-wait (returns when the gate opens), x-mark, x-fail and x-event."""
    before = dict(registry.COMMANDS)
    gate = Gate()

    @command("x-wait")
    async def x_wait(_ctx: Context, args: Named) -> None:
        await gate.opened.wait()
        gate.done.append(args.name)

    @command("x-mark")
    def x_mark(_ctx: Context, args: Named) -> dict[str, Any]:
        gate.done.append(args.name)
        return {"name": args.name}

    @command("x-fail")
    def x_fail(_ctx: Context) -> None:
        raise ZeroDivisionError("a bug")

    @command("x-event")
    def x_event(ctx: Context, args: Named) -> None:
        ctx.bus.publish("X_EVENT", {"name": args.name})

    yield gate
    registry.COMMANDS.clear()
    registry.COMMANDS.update(before)


def request(name: str, id_: Any = None, /, **arguments: Any) -> bytes:
    """A command as bytes, without a line end."""
    message: dict[str, Any] = {"execute": name}
    if arguments:
        message["arguments"] = arguments
    if id_ is not None:
        message["id"] = id_
    return json.dumps(message).encode()


async def take(wire: Wire, count: int) -> list[Any]:
    """The next messages."""
    return [await wire.receive() for _ in range(count)]


async def test_every_client_is_greeted_at_once() -> None:
    """Also the hundredth, and whether or not the others say anything."""
    async with running() as core:
        wires = [core.connect() for _ in range(100)]
        greetings = [await wire.receive() for wire in reversed(wires)]

        assert all(greeting["QMP"]["capabilities"] == ["oob"] for greeting in greetings)
        assert core.core.server.clients == 100


async def test_an_answer_keeps_its_place(gate: Gate) -> None:
    """Replies, refusals and syntax errors come in the order of what they answer, also in one packet."""
    async with running() as core:
        wire = await core.client()
        await wire.send(
            request("x-mark", 1, name="a") + b"]" + request("nope", 2) + b"[]" + request("x-mark", 3, name="b")
        )
        replies = await take(wire, 5)

        assert [reply.get("id") for reply in replies] == [1, None, 2, None, 3]
        assert gate.done == ["a", "b"]


async def test_commands_before_negotiation_are_refused() -> None:
    """Even quit; and the state belongs to the connection."""
    async with running() as core:
        await core.client()
        raw = core.connect()
        await raw.send(request("quit") + request("qmp_capabilities") + request("query-version"))
        _greeting, refused, negotiated, version = await take(raw, 4)

        assert refused["error"]["class"] == "CommandNotFound"
        assert negotiated == {"return": {}}
        assert version["return"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}


async def test_a_waiting_command_holds_up_its_own_client_only(gate: Gate) -> None:
    """The peer lets every client wait for one."""
    async with running() as core:
        slow, quick = await core.client(), await core.client()
        await slow.send(
            request("x-mark", 1, name="before") + request("x-wait", 2, name="slow") + request("x-mark", 3, name="after")
        )
        before = await slow.receive()  # answers that are ready do not wait either
        await quick.execute("x-mark", name="quick")
        gate.opened.set()
        replies = await take(slow, 2)

        assert before["id"] == 1
        assert [reply["id"] for reply in replies] == [2, 3]
        assert gate.done == ["before", "quick", "slow", "after"]


async def test_out_of_band_requests_overtake_up_to_seven(gate: Gate) -> None:
    """Read-ahead: with seven waiting an exec-oob is seen at once, with eight after the backlog has moved."""
    for waiting, overtakes in ((7, True), (8, False)):
        gate.opened = trio.Event()
        async with running() as core:
            wire = await core.client("oob")
            batch = b"".join(request("x-wait", index, name=str(index)) for index in range(1 + waiting))
            await wire.send(batch + b'{"exec-oob":"query-version","id":"oob"}')
            await wait_all_tasks_blocked()
            gate.opened.set()
            replies = await take(wire, waiting + 2)

            assert (replies[0]["id"] == "oob") is overtakes
            assert [reply["id"] for reply in replies if reply["id"] != "oob"] == list(range(1 + waiting))


async def test_no_command_runs_out_of_band() -> None:
    """Known ones refuse, unknown ones are unknown."""
    async with running() as core:
        wire = await core.client("oob")
        await wire.send(b'{"exec-oob":"query-version"}{"exec-oob":"nope"}')
        known, unknown = await take(wire, 2)

        assert known["error"] == {"class": "GenericError", "desc": "The command query-version does not support OOB"}
        assert unknown["error"]["class"] == "CommandNotFound"


async def test_events_reach_every_negotiated_client_before_the_reply(gate: Gate) -> None:
    """And no client that has not negotiated; a timestamp is in microseconds."""
    async with running() as core:
        cause, other, silent = await core.client(), await core.client(), core.connect()
        await cause.send(request("x-event", 1, name="e"))
        event, reply = await take(cause, 2)
        heard = await other.event("X_EVENT")
        await silent.send(request("qmp_capabilities"))
        await silent.finish_sending()

        assert event["event"] == "X_EVENT"
        assert event["timestamp"].keys() == {"seconds", "microseconds"}
        assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
        assert reply == {"return": {}, "id": 1}
        assert heard == {"name": "e"}
        assert ["event" in message for message in await silent.rest()] == [False, False]


async def test_a_client_that_negotiates_and_causes_an_event_in_one_packet_hears_it(gate: Gate) -> None:
    """Command mode starts with the very next command."""
    async with running() as core:
        wire = core.connect()
        await wire.send(request("qmp_capabilities", 1) + request("x-event", 2, name="e"))
        _greeting, negotiated, event, reply = await take(wire, 4)

        assert (negotiated["id"], event["event"], reply["id"]) == (1, "X_EVENT", 2)


async def test_half_close_answers_everything(gate: Gate) -> None:
    """40 replies of the size of the schema arrive, then the end; with out-of-band enabled as well."""
    for enable in ((), ("oob",)):
        async with running() as core:
            wire = await core.client(*enable)
            await wire.send(request("query-qmp-schema") * 40)
            await wire.finish_sending()
            replies = await wire.rest()

            assert len(replies) == 40
            assert all("return" in reply for reply in replies)


async def test_a_handlers_bug_costs_one_command(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets a plain text, the log the traceback, and the connection goes on."""
    async with running() as core:
        wire = await core.client()
        with caplog.at_level(logging.ERROR), pytest.raises(CommandError) as caught:
            await wire.execute("x-fail")
        await wire.execute("x-mark", name="alive")

        assert caught.value.error_class == "GenericError"
        assert "ZeroDivisionError" not in caught.value.desc
        assert "a bug" in caplog.text


async def test_quit_tells_the_others_answers_and_ends(gate: Gate) -> None:
    """Events, the reply, end of file; what was sent after quit is never answered nor carried out."""
    async with running() as core:
        quitter, other = await core.client(), await core.client()
        await quitter.send(request("x-event", 1, name="last") + request("quit", 2) + request("x-mark", 3, name="never"))

        assert [message.get("id") for message in await quitter.rest()] == [None, 1, 2]
        assert [message["event"] for message in await other.rest()] == ["X_EVENT"]
        assert gate.done == []


async def test_quit_does_not_wait_for_a_client_that_hangs(gate: Gate, autojump_clock: trio.testing.MockClock) -> None:
    """Neither for its command nor for it to read."""
    async with running() as core:
        stuck, deaf, quitter = await core.client(), await core.client(), await core.client()
        await stuck.send(request("x-wait", 1, name="x"))
        await deaf.send(request("query-qmp-schema") * 100)
        await wait_all_tasks_blocked()

        assert await quitter.execute("quit") == {}
        assert await stuck.rest() == []


async def test_commands_are_not_started_for_a_client_that_does_not_read(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replies are all there when it reads at last; nothing is dropped, and the neighbour is served meanwhile."""
    monkeypatch.setattr(channel, "SOFT_LIMIT", 200_000)
    async with running() as core:
        deaf, other = await core.client(), await core.client()
        await deaf.send(request("query-qmp-schema") * 100 + request("x-mark", 1, name="deaf"))
        await wait_all_tasks_blocked()
        await other.execute("x-mark", name="other")

        assert gate.done == ["other"]
        assert (await take(deaf, 101))[-1]["id"] == 1
        assert gate.done == ["other", "deaf"]


async def test_a_client_that_does_not_read_its_events_loses_its_connection(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the hard limit; the others keep theirs."""
    monkeypatch.setattr(channel, "HARD_LIMIT", 100_000)
    async with running() as core:
        deaf, other = await core.client(), await core.client()
        for _ in range(400):
            await other.execute("x-event", name="x" * 2000)
            if core.core.server.clients == 1:
                break

        assert core.core.server.clients == 1
        assert len([message for message in await deaf.rest() if "event" in message]) < 400
        await other.execute("x-mark", name="alive")


async def test_clients_take_turns(gate: Gate) -> None:
    """One that sends thousands of commands at once does not keep the other from being answered in between."""
    async with running() as core:
        greedy, modest = await core.client(), await core.client()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greedy.send, request("x-mark", name="greedy") * 1000)
            nursery.start_soon(modest.send, request("x-mark", name="modest"))
            await modest.receive()
            answered = gate.done.index("modest")
            await take(greedy, 1000)

        assert answered < 500


async def test_a_hang_up_drops_what_was_queued_and_nothing_else(gate: Gate) -> None:
    """The running command is finished, the daemon and the other clients do not notice."""
    async with running() as core:
        gone, other = await core.client(), await core.client()
        await gone.send(request("x-wait", 1, name="running"))
        await wait_all_tasks_blocked()
        await gone.close()
        gate.opened.set()
        await other.execute("x-mark", name="alive")
        await wait_all_tasks_blocked()

        assert sorted(gate.done) == ["alive", "running"]
        assert core.core.server.clients == 1


async def test_pretty_output_is_still_one_message_at_a_time() -> None:
    """Replies and events in several lines, each ending in CR LF."""
    async with running() as core:
        wire = core.connect(pretty=True)
        await wire.send(request("qmp_capabilities", 1))
        await wire.finish_sending()
        text = b""
        while (line := await wire.receive_raw()) is not None:
            text += line

        assert b'    "return": {\r\n' in text


async def test_arguments_are_checked_before_anything_happens(gate: Gate) -> None:
    """A wrong member is refused and the handler is not called."""
    async with running() as core:
        wire = await core.client()
        with pytest.raises(CommandError, match="Parameter 'extra' is unexpected"):
            await wire.call("x-mark", {"name": "a", "extra": 1})
        with pytest.raises(CommandError, match="Parameter 'x' is unexpected"):
            await wire.call("query-version", {"x": 1})

        assert gate.done == []


async def test_internal_calls_need_no_client(gate: Gate) -> None:
    """The command line uses the same handlers."""
    async with running() as core:
        assert await registry.lookup("x-mark").call(core.ctx, {"name": "a"}) == {"name": "a"}
        with pytest.raises(QmpdError, match="The command nope has not been found"):
            registry.lookup("nope")
