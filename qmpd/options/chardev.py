"""``--chardev``, in the notation that came before key=value: flags without a value, and no nesting.

Source: spec/qmp-protocol.md section 15.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from qmpd.errors import QmpdError
from qmpd.options.keyval import HELP

_STRINGS = """
    backend chardev chardevs.0 chardevs.1 chardevs.2 chardevs.3 fd host input-path localaddr localport logfile name path
    port tls-authz tls-creds
"""
_BOOLEANS = """
    abstract append clipboard delay ipv4 ipv6 logappend mouse mux nodelay server signal telnet tight tn3270 wait
    websocket
"""
_NUMBERS = "cols debug height reconnect reconnect-ms rows to width"
_SIZES = "size"

#: Every parameter of the peer's backends -> its type. All are checked, whether the backend has a use for them or not.
PARAMETERS: Final = {
    name: kind
    for kind, names in (("str", _STRINGS), ("bool", _BOOLEANS), ("num", _NUMBERS), ("size", _SIZES))
    for name in names.split()
}

#: Parameters that would change what a backend does, and that qmpd does not have.
UNSUPPORTED: Final = {
    "": ("mux", "logfile"),
    "socket": (
        *("abstract", "telnet", "tn3270", "websocket", "tls-creds", "tls-authz"),
        *("reconnect", "reconnect-ms", "to", "ipv4", "ipv6"),
    ),
}

_BOOLEAN_TEXTS = dict.fromkeys(("on", "yes", "true", "y"), True) | dict.fromkeys(("off", "no", "false", "n"), False)
_EXPECTS = {
    "num": "a number",
    "size": "a non-negative number below 2^64\n"
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
}
_NUMBER_TEXTS = {
    "num": re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)"),
    "size": re.compile(r"(?:0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?[bkmgtpeBKMGTPE]?)"),
}
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
_VALUE = re.compile(r"(?:[^,]|,,)*", re.DOTALL)
_NAME = re.compile(r"[^=,]*")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A UNIX socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class InetAddress:
    """A TCP port; an empty host means all addresses for a server."""

    host: str
    port: str

    def __str__(self) -> str:
        return f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A socket inherited from the parent process."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@dataclass(frozen=True, slots=True)
class SocketChardev:
    """A socket: ``server`` listens, otherwise it connects. ``wait`` holds up start-up until a client has come."""

    id: str
    address: UnixAddress | InetAddress | FdAddress
    server: bool = False
    wait: bool = False
    nodelay: bool = False


@dataclass(frozen=True, slots=True)
class StdioChardev:
    """Standard input and output. ``signal`` lets the terminal's keys send signals."""

    id: str
    signal: bool = True


@dataclass(frozen=True, slots=True)
class NullChardev:
    """Nobody listens, nobody speaks."""

    id: str


Chardev = SocketChardev | StdioChardev | NullChardev


@dataclass(frozen=True, slots=True)
class ChardevHelp:
    """A request for a list: of the parameters, else of the backends."""

    parameters: bool

    def __str__(self) -> str:
        if self.parameters:
            lines = [f"  {name}=<{kind}{' (on/off)' * (kind == 'bool')}>" for name, kind in sorted(PARAMETERS.items())]
            return "\n".join(["chardev options:", *lines, ""])
        return "\n".join(["Available chardev backend types:", *(f"  {name}" for name in _BACKENDS), ""])


def parse_chardev(text: str, warn: Callable[[str], None]) -> Chardev | ChardevHelp:
    """What ``text`` describes. ``warn`` is told about outdated spelling. Raises QmpdError."""
    items = list(_items(text))
    device_id = next((value for name, value in items if name == "id"), None)
    if device_id is not None and not _IDENTIFIER.fullmatch(device_id or ""):
        raise QmpdError(
            "Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        )
    parameters: dict[str, str] = {}
    wants_parameters = False
    for name, value in items:
        if value is None and name in HELP:
            wants_parameters = True
            continue
        name, value = (name, value) if value is not None else _flag(name, warn)
        if name != "id":
            _check(name, value)
        parameters[name] = value
    if wants_parameters or parameters.get("backend") in HELP:
        return ChardevHelp(wants_parameters)
    return _make(device_id or parameters.get("id"), parameters)


def _items(text: str) -> Iterator[tuple[str, str | None]]:
    """Names and values; a flag has none. The first value may come without a name."""
    at = 0
    while at < len(text):
        name = _match(_NAME, text, at)
        value: str | None = None
        if text[at + len(name) : at + len(name) + 1] == "=":
            at += len(name) + 1
            value = _match(_VALUE, text, at)
        elif at == 0:
            name, value = "backend", _match(_VALUE, text, 0)
        yield name, value.replace(",,", ",") if value is not None else None
        at += len(name if value is None else value) + 1


def _match(pattern: re.Pattern[str], text: str, at: int) -> str:
    match = pattern.match(text, at)
    return match[0] if match else ""


def _flag(name: str, warn: Callable[[str], None]) -> tuple[str, str]:
    """What a parameter without a value means: ``server`` is ``server=on``, ``nowait`` is ``wait=off``."""
    meant, value = (name[2:], "off") if name.startswith("no") else (name, "on")
    better = f"{meant}={value}"
    if meant == "delay":
        better = "nodelay=off" if value == "on" else "nodelay=on"
    warn(f"short-form boolean option '{name}' deprecated\nPlease use {better} instead")
    return meant, value


def _check(name: str, value: str) -> None:
    kind = PARAMETERS.get(name)
    if kind is None:
        raise QmpdError(f"Invalid parameter '{name}'")
    if kind == "bool" and value not in _BOOLEAN_TEXTS:
        raise QmpdError(f"Parameter '{name}' expects 'on' or 'off'")
    if kind in _EXPECTS and not _NUMBER_TEXTS[kind].fullmatch(value):
        raise QmpdError(f"Parameter '{name}' expects {_EXPECTS[kind]}")


def _make(device_id: str | None, parameters: dict[str, str]) -> Chardev:
    if device_id is None:
        raise QmpdError("chardev: no id specified")
    backend = parameters.get("backend")
    if backend is None:
        raise QmpdError(f'chardev: "{device_id}" missing backend')
    if backend not in _BACKENDS:
        raise QmpdError(f"'{backend}' is not a valid char driver name")
    chardev = _BACKENDS[backend](device_id, parameters)
    for name in (*UNSUPPORTED[""], *UNSUPPORTED.get(backend, ())):
        if name in parameters and _flag_of(parameters, name, True):
            raise QmpdError(f"Parameter '{name}' is not supported")
    return chardev


def _flag_of(parameters: dict[str, str], name: str, default: bool) -> bool:
    """A boolean parameter; any other that is given counts as on."""
    return _BOOLEAN_TEXTS.get(parameters[name], True) if name in parameters else default


def _null(device_id: str, _parameters: dict[str, str]) -> NullChardev:
    return NullChardev(device_id)


def _stdio(device_id: str, parameters: dict[str, str]) -> StdioChardev:
    return StdioChardev(device_id, _flag_of(parameters, "signal", True))


def _socket(device_id: str, parameters: dict[str, str]) -> SocketChardev:
    if sum(name in parameters for name in ("path", "fd", "host")) > 1:
        raise QmpdError("None or one of 'path', 'fd' or 'host' option required.")
    if "host" in parameters and "port" not in parameters:
        raise QmpdError("chardev: socket: no port given")
    if "delay" in parameters and "nodelay" in parameters:
        raise QmpdError("'delay' and 'nodelay' are mutually exclusive")
    server = _flag_of(parameters, "server", False)
    if not server and "wait" in parameters:
        raise QmpdError("'wait' option is incompatible with socket in client connect mode")
    if server and "reconnect" in parameters:
        raise QmpdError("'reconnect' option is incompatible with socket in server listen mode")
    nodelay = _flag_of(parameters, "nodelay", not _flag_of(parameters, "delay", True))
    wait = server and _flag_of(parameters, "wait", True)
    return SocketChardev(device_id, _address(parameters), server, wait, nodelay)


def _address(parameters: dict[str, str]) -> UnixAddress | InetAddress | FdAddress:
    if "path" in parameters:
        return UnixAddress(parameters["path"])
    if "port" in parameters and "fd" not in parameters:
        return InetAddress(parameters.get("host", ""), parameters["port"])
    number = parameters.get("fd", "")
    if not re.fullmatch(r"-?[0-9]{1,9}", number):
        raise QmpdError(f"Unable to parse FD number {number}")
    return FdAddress(int(number))


_BACKENDS: Final[dict[str, Callable[[str, dict[str, str]], Chardev]]] = {
    "null": _null,
    "socket": _socket,
    "stdio": _stdio,
}
