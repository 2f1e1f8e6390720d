"""One client's conversation: negotiation, the order of checks, ids, out-of-band requests; and the peer's recordings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from qmpd.wire import messages
from qmpd.wire.session import READ_AHEAD, Kind, Request, Session, Urgent
from tests.wire.feeding import bytewise, every_split
from tests.wire.strategies import any_bytes, values

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
ENABLE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


def ready(negotiation: bytes = NEGOTIATE, **options: Any) -> Session:
    """A session in command mode."""
    session = Session(**options)
    (reply,) = session.receive(negotiation)
    assert session.negotiated
    assert reply == b'{"return": {}}\r\n' or session.pretty
    return session


def errors(items: Iterable[Request | bytes]) -> list[tuple[str, str]]:
    replies = [json.loads(item) for item in items if isinstance(item, bytes)]
    return [(reply["error"]["class"], reply["error"]["desc"]) for reply in replies]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[1]", "QMP input must be a JSON object"),
        ('{"execute":1,"arguments":[],"x":2}', "QMP input member 'execute' must be a string"),
        ('{"execute":"a","arguments":null,"x":2}', "QMP input member 'arguments' must be an object"),
        ('{"execute":"a","y":1,"x":2}', "QMP input member 'x' is unexpected"),
        ('{"execute":"a","exec-oob":"a"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"exec-oob":"a"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"id":1}', "QMP input lacks member 'execute'"),
        ("{}", "QMP input lacks member 'execute'"),
    ],
)
def test_checks_the_form_before_anything_else(value: str, complaint: str) -> None:
    """Malformed requests draw a GenericError before negotiation and after, with their id if they are objects."""
    for session in (Session(), ready()):
        assert errors(session.receive(value.encode())) == [("GenericError", complaint)]
    if value.startswith('{"execute"'):
        (reply,) = ready().receive(value[:-1].encode() + b',"id":[7]}')
        assert json.loads(reply)["id"] == [7]  # type: ignore[arg-type]


@given(values())
def test_echoes_any_id(value: Any) -> None:
    """Whatever JSON value it is, in success and failure; absent in, absent out."""
    session = ready()
    (request,) = session.receive(json.dumps({"execute": "x", "id": value}).replace("Infinity", "1e999").encode())
    (anonymous,) = session.receive(b'{"execute":"x"}')

    assert isinstance(request, Request)
    assert isinstance(anonymous, Request)
    assert request.id == value
    assert json.loads(session.reply(request, {}))["id"] == value
    assert json.loads(session.fail(request, "GenericError", "no"))["id"] == value
    assert "id" not in json.loads(session.reply(anonymous, {}))
    assert "id" not in json.loads(session.fail(anonymous, "GenericError", "no"))


def test_nothing_but_negotiation_before_negotiation() -> None:
    """Every other command is unknown; command mode starts with the next command of the same packet."""
    session = Session()
    items = session.receive(b'{"execute":"quit"}' + NEGOTIATE + b'{"execute":"a","arguments":{"b":1},"id":2}')

    assert errors(items[:1]) == [("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")]
    assert items[1:] == [b'{"return": {}}\r\n', Request(Kind.IN_BAND, "a", {"b": 1}, 2)]
    assert (session.negotiated, session.oob, session.window) == (True, False, 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ('{"enable":null,"x":1}', "Invalid parameter type for 'enable', expected: array"),
        ('{"enable":["oob",1]}', "Invalid parameter type for 'enable[1]', expected: string"),
        ('{"enable":["foo"],"x":1}', "Parameter 'null' does not accept value 'foo'"),
        ('{"enable":[],"x":1}', "Parameter 'x' is unexpected"),
        ('{"enable":["oob"]}', "Capability oob not available"),
    ],
)
def test_negotiation_can_fail_and_be_retried(arguments: str, complaint: str) -> None:
    """A failure leaves everything as it was."""
    session = Session(offered=())

    assert errors(session.receive(NEGOTIATE[:-1] + b',"arguments":%b}' % arguments.encode())) == [
        ("GenericError", complaint)
    ]
    assert not session.negotiated
    assert session.receive(NEGOTIATE) == [b'{"return": {}}\r\n']
    assert session.negotiated


def test_negotiation_happens_once() -> None:
    """Bad arguments are still seen first; capabilities cannot be changed later."""
    session = ready()
    items = session.receive(ENABLE_OOB + ENABLE_OOB.replace(b"oob", b"no"))

    assert errors(items) == [
        ("CommandNotFound", "Capabilities negotiation is already complete, command ignored"),
        ("GenericError", "Parameter 'null' does not accept value 'no'"),
    ]
    assert not session.oob


def test_out_of_band_requests_overtake() -> None:
    """Well-formed ones are for the server to answer, malformed ones are answered; both are marked."""
    session = ready(ENABLE_OOB)
    request, clash, oob, malformed = session.receive(
        b'{"execute":"a"}{"execute":"a","exec-oob":"b"}{"exec-oob":"b","id":1}{"exec-oob":2,"id":3}'
    )

    assert session.window == READ_AHEAD
    assert isinstance(request, Request)
    assert not request.oob
    assert not isinstance(clash, Urgent)
    assert errors([clash]) == [("GenericError", "QMP input member 'execute' clashes with 'exec-oob'")]
    assert isinstance(oob, Request)
    assert oob.oob
    assert errors([session.refuse(oob)]) == [("GenericError", "The command b does not support OOB")]
    assert isinstance(malformed, Urgent)
    assert errors([malformed]) == [("GenericError", "QMP input member 'exec-oob' must be a string")]


def test_pretty_sessions_say_everything_prettily() -> None:
    """Greeting, replies, errors."""
    session = ready(pretty=True)
    (request,) = session.receive(b'{"execute":"x"}')
    assert isinstance(request, Request)
    said = [session.greeting(), session.reply(request, []), session.fail(request, "X", ""), *session.receive(b"]")]

    assert all(isinstance(line, bytes) and line.startswith(b'{\r\n    "') for line in said)


@given(any_bytes)
def test_answers_anything_in_band(data: bytes) -> None:
    """No bytes raise; each broken value is one GenericError, and the next command works."""
    session = ready(ENABLE_OOB)
    items = session.receive(data + b'\xff\n{"execute":"x"}')

    assert items[-1] == Request(Kind.IN_BAND, "x", {})
    for item in items:
        if isinstance(item, bytes):
            assert item.endswith(b"\r\n")
            assert json.loads(item)["error"]["class"] == "GenericError"


# ----------------------------------------------------------------------------------------------------------- recordings

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "protocol.jsonl").read_text(encoding="utf-8").splitlines()
]

#: Recorded answers that are not to be copied: past a limit one complaint is enough, and ``inf`` is not JSON.
INSTEAD: dict[str, Callable[[list[Any]], list[Any]]] = {
    "nesting-1024-arrays-in-object": lambda recv: [recv[0], recv[-1]],
    "nesting-1025-arrays-in-object": lambda recv: [recv[0], recv[-1]],
    "nesting-1025-objects": lambda recv: recv[:1],
    "number-float-overflow": lambda _: [{"return": [], "id": math.inf}],
    "number-float-neg-overflow": lambda _: [{"return": [], "id": -math.inf}],
}

PACKAGE = json.dumps(messages.VERSION["package"])
RECORDED_PACKAGE = json.dumps(CASES[0]["recv"][0]["QMP"]["version"]["package"])


class Unplayable(Exception):  # noqa: N818  not an error
    """The case is about a command that only the daemon knows."""


def carry_out(session: Session, request: Request) -> bytes:
    """A tiny server: two commands without arguments, and the names of all that the recordings believe in."""
    if request.name not in KNOWN:
        return session.fail(request, "CommandNotFound", f"The command {request.name} has not been found")
    if request.oob:
        return session.refuse(request)
    if request.name not in RESULTS:
        raise Unplayable(request.name)
    if request.arguments:
        return session.fail(request, "GenericError", f"Parameter '{min(request.arguments)}' is unexpected")
    return session.reply(request, RESULTS[request.name])


RESULTS: dict[str, Any] = {"query-jobs": [], "query-version": messages.VERSION}
KNOWN = {entry["name"] for case in CASES if case["case"] == "query-commands" for entry in case["recv"][0]["return"]}


def converse(case: dict[str, Any], cut: Callable[[bytes], Iterable[bytes]]) -> bytes:
    sent = bytes.fromhex(case["send_hex"]) if "send_hex" in case else case["send"].encode()
    session = Session(pretty="pretty=on" in case.get("monitor", ""))
    said = session.greeting() if case["case"].startswith("unnegotiated-") else b""
    if not said:
        session.receive(NEGOTIATE)
    for piece in cut(sent):
        for item in session.receive(piece):
            said += item if isinstance(item, bytes) else carry_out(session, item)
    return said


def check(case: dict[str, Any], said: bytes) -> None:
    """Compare byte for byte where the recording has the bytes, else message by message."""
    answers = said.decode("ascii").replace(PACKAGE, RECORDED_PACKAGE)
    instead = INSTEAD.get(case["case"])
    if "recv_raw" in case and not instead and "key-order" not in case["case"] and "id-object" not in case["case"]:
        assert case["recv_raw"] == answers
        return
    expected = instead(case["recv"]) if instead else case["recv"]
    lines = answers.split("\r\n")
    assert len(expected) == len(lines) - 1
    for answer, line in zip(expected, lines, strict=False):
        assert answer == ({"deep": line} if "deep" in answer else json.loads(line))


def whole(case: dict[str, Any]) -> bytes | None:
    """What is said if everything arrives at once; None if the case needs the daemon's own commands."""
    try:
        return converse(case, lambda sent: [sent])
    except Unplayable:
        return None


PLAYABLE = [case for case in CASES if whole(case) is not None]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["case"]) for case in PLAYABLE])
def test_answers_as_recorded(case: dict[str, Any]) -> None:
    """What the peer answered, however the bytes arrive: whole, byte by byte, and cut in two anywhere if short."""
    said = converse(case, lambda sent: [sent])
    check(case, said)

    assert said == converse(case, bytewise)
    sent = bytes.fromhex(case["send_hex"]) if "send_hex" in case else case["send"].encode()
    if len(sent) < 200:
        for pieces in every_split(sent):
            assert said == converse(case, lambda _, pieces=pieces: pieces)


def test_most_recordings_are_played() -> None:
    """Only those that need the daemon's own commands are left out."""
    assert len(PLAYABLE) > 250
