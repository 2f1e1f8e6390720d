"""Everything a server says, spelled: greeting, success, error, event; bytes that end with CR LF.

``id`` is the request's, or :data:`NO_ID` if it had none. ``pretty`` is the form with one member a line.
Source: spec/qmp-protocol.md sections 1, 2, 6 and 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

from qmpd import QMP_LEVEL, __version__
from qmpd.wire.dialect import dumps


class _Absent(Enum):
    NO_ID = "no id"


#: The request had no ``id``, which is not the same as null.
NO_ID: Final = _Absent.NO_ID

#: What query-version returns and the greeting tells.
VERSION: Final[Mapping[str, Any]] = {
    "qemu": {"micro": QMP_LEVEL[2], "minor": QMP_LEVEL[1], "major": QMP_LEVEL[0]},
    "package": f"qmpd {__version__}",
}

_DONE: Final = b'{"return": {}}\r\n'


def greeting(capabilities: Sequence[str], *, pretty: bool = False) -> bytes:
    """The first line on a connection, with the capabilities on offer."""
    return _line({"QMP": {"version": VERSION, "capabilities": list(capabilities)}}, pretty)


def success(result: Any, id: Any = NO_ID, *, pretty: bool = False) -> bytes:  # noqa: A002  the protocol's name
    """The reply to a command that worked; ``result`` is ``{}`` if it has nothing to tell."""
    if id is NO_ID:
        return _DONE if result == {} and not pretty else _line({"return": result}, pretty)
    return _line({"return": result, "id": id}, pretty)


def error(
    qmp_class: str,
    desc: str,
    id: Any = NO_ID,  # noqa: A002
    *,
    details: Mapping[str, Any] | None = None,
    pretty: bool = False,
) -> bytes:
    """The reply to a command that failed, or that none could be made of; ``details`` only qmpd's errors have."""
    complaint: dict[str, Any] = {"class": qmp_class, "desc": desc}
    if details is not None:
        complaint["x-qmpd-details"] = details
    return _line({"error": complaint} if id is NO_ID else {"id": id, "error": complaint}, pretty)


def event(
    name: str,
    data: Mapping[str, Any] | None,
    seconds: int,
    microseconds: int,
    *,
    number: int | None = None,
    pretty: bool = False,
) -> bytes:
    """An event; ``data`` is left out if the event has none, and so is ``number``, which only qmpd's events have.

    The time is the wall clock's, since the epoch.
    """
    message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name}
    if data is not None:
        message["data"] = data
    if number is not None:
        message["x-qmpd-number"] = number
    return _line(message, pretty)


def _line(message: Any, pretty: bool) -> bytes:
    return dumps(message, pretty) + b"\r\n"
