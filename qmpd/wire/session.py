"""One client's side of the protocol: what it may say when, and what it is told at once.

A server feeds what it receives and takes out, in order, requests to carry out and replies that are ready. It sends all
of them in that order, except that out-of-band requests are answered right away, ahead of all that waits. How much may
wait is :attr:`Session.window`::

    for item in session.receive(data):
        if isinstance(item, Urgent):
            ...                     # send now
        elif isinstance(item, bytes):
            ...                     # an error or the answer to qmp_capabilities: send it in its place
        elif item.oob:
            ...                     # answer now; see Session.refuse
        else:
            ...                     # queue; go no further while session.window of them wait behind the running one

Source: spec/qmp-protocol.md sections 6, 8 and 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from typing import Any, Final, NamedTuple

from qmpd.wire import messages
from qmpd.wire.dialect import DialectError
from qmpd.wire.messages import NO_ID
from qmpd.wire.stream import Framer

READ_AHEAD: Final = 8
"""Requests that may wait behind the running one when out-of-band execution is enabled."""

CAPABILITIES: Final = ("oob",)
"""Every capability there is."""


class Kind(Enum):
    """How a command wants to be run, by the member that names it."""

    IN_BAND = "execute"
    OUT_OF_BAND = "exec-oob"


class Request(NamedTuple):
    """A well-formed command, known or not. ``id`` is :data:`NO_ID` if there was none."""

    kind: Kind
    name: str
    arguments: dict[str, Any]
    id: Any = NO_ID

    @property
    def oob(self) -> bool:
        """To be answered at once, out of order."""
        return self.kind is Kind.OUT_OF_BAND


class Urgent(bytes):
    """The reply to a malformed out-of-band request, which overtakes what waits just as a well-formed one's does."""


class Phase(Enum):
    """Where a connection is; the second is never left."""

    NEGOTIATION = "negotiation"
    COMMAND = "command"


class Malformed(Exception):  # noqa: N818  what a client sent, not what went wrong here
    """A value that is no command; the text is for the client, the class is GenericError."""


class Session:
    """The state of one connection. ``offered`` are the capabilities in its greeting."""

    def __init__(self, pretty: bool = False, offered: tuple[str, ...] = CAPABILITIES) -> None:
        self.pretty = pretty
        self.phase = Phase.NEGOTIATION
        self.enabled: frozenset[str] = frozenset()
        self._offered = offered
        self._framer = Framer()

    @property
    def negotiated(self) -> bool:
        """Whether the client is in command mode, and so hears events."""
        return self.phase is Phase.COMMAND

    @property
    def oob(self) -> bool:
        """Whether the client may use ``exec-oob``."""
        return "oob" in self.enabled

    @property
    def window(self) -> int:
        """Number of requests that may wait behind the running one before reading stops."""
        return READ_AHEAD if self.oob else 0

    def greeting(self) -> bytes:
        """What the server says first."""
        return messages.greeting(self._offered, pretty=self.pretty)

    def receive(self, data: bytes) -> list[Request | bytes]:
        """What to do about ``data``, in order: requests to carry out, and replies that are ready.

        Raises nothing. Replies stand in for broken input, for all that is said before negotiation, and for
        ``qmp_capabilities``. If ``negotiated`` turns true, the replies up to that of ``qmp_capabilities`` lead the
        list, and must be on their way before the first event is.
        """
        return [self._answer(value) for value in self._framer.feed(data)]

    def reply(self, request: Request, result: Any) -> bytes:
        """The success of ``request``; ``result`` is made of JSON values, ``{}`` if there is nothing to tell."""
        return messages.success(result, request.id, pretty=self.pretty)

    def fail(self, request: Request, qmp_class: str, desc: str, details: Mapping[str, Any] | None = None) -> bytes:
        """The failure of ``request``."""
        return messages.error(qmp_class, desc, request.id, details=details, pretty=self.pretty)

    def refuse(self, request: Request) -> bytes:
        """The answer to every out-of-band request for a command that exists: no command takes part."""
        return self.fail(request, "GenericError", f"The command {request.name} does not support OOB")

    def _answer(self, value: Any) -> Request | bytes:
        if isinstance(value, DialectError):
            return messages.error("GenericError", value.desc, pretty=self.pretty)
        if not isinstance(value, dict):
            return messages.error("GenericError", "QMP input must be a JSON object", pretty=self.pretty)
        try:
            request = _request(value, self.oob)
        except Malformed as mistake:
            reply = messages.error("GenericError", str(mistake), value.get("id", NO_ID), pretty=self.pretty)
            return Urgent(reply) if self.oob and "exec-oob" in value and "execute" not in value else reply
        if request.name == "qmp_capabilities" and not request.oob:
            return self._negotiate(request)
        if self.phase is Phase.NEGOTIATION:
            return self.fail(request, "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        return request

    def _negotiate(self, request: Request) -> bytes:
        try:
            wanted = _wanted(request.arguments)
            unavailable = [name for name in wanted if name not in self._offered]
            if unavailable:
                raise Malformed(f"Capability {unavailable[0]} not available")
        except Malformed as mistake:
            return self.fail(request, "GenericError", str(mistake))
        if self.phase is Phase.COMMAND:
            desc = "Capabilities negotiation is already complete, command ignored"
            return self.fail(request, "CommandNotFound", desc)
        self.enabled = frozenset(wanted)
        self.phase = Phase.COMMAND
        return self.reply(request, {})


_MEMBERS: Final = frozenset({"execute", "arguments", "id"})


def _request(value: dict[str, Any], oob: bool) -> Request:
    """The command that ``value`` spells. Raises Malformed."""
    name = value.get("execute")
    arguments = value.get("arguments", {})
    if type(name) is str and type(arguments) is dict and _MEMBERS.issuperset(value):
        return Request(Kind.IN_BAND, name, arguments, value.get("id", NO_ID))
    kinds = {kind.value: kind for kind in (Kind.IN_BAND, *([Kind.OUT_OF_BAND] if oob else []))}
    named = [member for member in kinds if member in value]
    _check_members(value, named, kinds.keys() | _MEMBERS)
    return Request(kinds[named[0]], value[named[0]], arguments, value.get("id", NO_ID))


def _check_members(value: dict[str, Any], named: list[str], members: Set[str]) -> None:
    """Raise Malformed for what is wrong with the top level of a command.

    ``named`` are the members that name the command, ``members`` all that are allowed.
    """
    for member in named:
        if not isinstance(value[member], str):
            raise Malformed(f"QMP input member '{member}' must be a string")
    if len(named) > 1:
        raise Malformed("QMP input member 'execute' clashes with 'exec-oob'")
    if not isinstance(value.get("arguments", {}), dict):
        raise Malformed("QMP input member 'arguments' must be an object")
    if unexpected := value.keys() - members:
        raise Malformed(f"QMP input member '{min(unexpected)}' is unexpected")
    if not named:
        raise Malformed("QMP input lacks member 'execute'")


def _wanted(arguments: dict[str, Any]) -> list[str]:
    """The capabilities asked for by ``qmp_capabilities``. Raises Malformed."""
    enable = arguments.get("enable", [])
    if not isinstance(enable, list):
        raise Malformed("Invalid parameter type for 'enable', expected: array")
    for index, name in enumerate(enable):
        if not isinstance(name, str):
            raise Malformed(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if name not in CAPABILITIES:
            raise Malformed(f"Parameter 'null' does not accept value '{name}'")
    if unexpected := arguments.keys() - {"enable"}:
        raise Malformed(f"Parameter '{min(unexpected)}' is unexpected")
    return enable
