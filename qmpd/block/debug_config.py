"""Blkdebug's rules from a file (option ``config``), in QEMU's configuration format.

Groups ``[inject-error]`` and ``[set-state]`` (a quoted id may follow the name), each with lines ``key = "value"``;
lines that begin with ``#`` and blank ones say nothing. Error texts are the peer's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from qmpd.block.debug import Event, InjectError, IoType, SetState
from qmpd.block.trust import OpenFile
from qmpd.errors import QmpdError, from_oserror

_GROUP: Final = re.compile(r'\[([^\s"\]]+)(?:\s+"[^"]*")?\]')
_MEMBER: Final = re.compile(r'([A-Za-z0-9\-_]+)\s*=\s*"([^"]*)"')


def load(path: str, open_file: OpenFile = os.open) -> tuple[list[InjectError], list[SetState]]:
    """The rules in a file. Worker thread. Raises QmpdError."""
    try:
        text = _read(path, open_file) if path else _missing()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise from_oserror(error, f"Could not read blkdebug config file: {reason}", path=path) from None
    errors, states = [], []
    for group, members in _groups(text, path):
        if group == "inject-error":
            errors.append(InjectError.of(_values(members, _INJECT_ERROR)))
        else:
            states.append(SetState.of({"new_state": 0} | _values(members, _SET_STATE)))
    return errors, states


def _read(path: str, open_file: OpenFile) -> str:
    fd = open_file(path, os.O_RDONLY | os.O_CLOEXEC, 0)
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _missing() -> str:
    raise FileNotFoundError(2, os.strerror(2))


def _groups(text: str, path: str) -> list[tuple[str, dict[str, str]]]:
    found: list[tuple[str, dict[str, str]]] = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if match := _GROUP.fullmatch(line):
            name = match[1]
            if name not in ("inject-error", "set-state"):
                raise QmpdError(f"There is no option group '{name}'", path=path)
            found.append((name, {}))
        elif not found:
            raise QmpdError("no group defined", path=path)
        elif match := _MEMBER.fullmatch(line):
            found[-1][1][match[1]] = match[2]
        else:
            raise QmpdError(f"parse error in blkdebug config file: {line}", path=path)
    return found


def _event(_key: str, text: str) -> str:
    if text not in list(Event):
        raise QmpdError(f"invalid parameter value: {text}")
    return text


def _io_type(_key: str, text: str) -> str:
    if text not in list(IoType):
        raise QmpdError(f"invalid parameter value: {text}")
    return text


def _number(key: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise QmpdError(f"Parameter '{key}' expects a number") from None


def _switch(key: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise QmpdError(f"Parameter '{key}' expects 'on' or 'off'")
    return text == "on"


_Parser = Callable[[str, str], Any]

_INJECT_ERROR: Mapping[str, _Parser] = {
    "event": _event,
    "state": _number,
    "iotype": _io_type,
    "errno": _number,
    "sector": _number,
    "once": _switch,
    "immediately": _switch,
}
_SET_STATE: Mapping[str, _Parser] = {"event": _event, "state": _number, "new_state": _number}


def _values(members: Mapping[str, str], parsers: Mapping[str, _Parser]) -> dict[str, Any]:
    for key in members:
        if key not in parsers:
            raise QmpdError(f"Invalid parameter '{key}'")
    values = {key: parsers[key](key, text) for key, text in members.items()}
    if "event" not in values:
        raise QmpdError("Missing event name for rule")
    return values
