"""Where clients come from: UNIX and TCP sockets, bound here, inherited or connected to.

A socket file is taken over only if nothing answers behind it; a live daemon's socket and anything that is no socket are
left alone (the peer unlinks both). Control thread. Source: spec/qmp-protocol.md sections 13 and 15.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any, Final

import trio

from qmpd.control.registry import Client
from qmpd.errors import Kind, QmpdError, strerror

_log = logging.getLogger(__name__)

BACKLOG: Final = 128
"""Connections that may wait in the kernel while the daemon is busy."""

PATH_ROOM: Final = 108
"""Bytes of a UNIX socket's path, its end included."""

_UCRED: Final = struct.Struct("3i")

#: accept() errors that pass when other connections end.
_SHORTAGES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def bind_unix(path: str) -> socket.socket:
    """A listening UNIX socket at ``path``, which replaces a stale one. Raises QmpdError."""
    _check_path(path)
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_bind(path, error.errno) from None
    return sock


def bind_abstract(name: str, *, tight: bool = True) -> socket.socket:
    """A listening UNIX socket that is no file; not ``tight``: its name is padded to the longest. Raises QmpdError."""
    _check_path(name)
    address = b"\0" + os.fsencode(name)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(address if tight else address.ljust(PATH_ROOM, b"\0"))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_bind(name, error.errno) from None
    return sock


def bind_tcp(host: str, port: str) -> socket.socket:
    """A listening TCP socket; an empty host means every address, port 0 any port. Raises QmpdError."""
    failure = errno.EADDRNOTAVAIL
    for family, _kind, _protocol, _name, address in _resolve(host, port, passive=True):
        try:
            return _listening(family, address)
        except OSError as error:
            failure = error.errno or failure
    raise QmpdError(f"Failed to find an available port: {strerror(failure)}", Kind.IO, errno=failure)


def bind_every(
    host: str, port: str, *, family: int = socket.AF_UNSPEC, last_port: int = 0, numeric: bool = False
) -> list[socket.socket]:
    """Listening TCP sockets, one for each address that the name stands for; at least one, others may fail.

    The first free port from ``port`` to ``last_port`` is taken. Raises QmpdError. Blocks while names are looked up.
    """
    listening: list[socket.socket] = []
    failure = errno.EADDRNOTAVAIL
    for found, _kind, _protocol, _name, address in _resolve(host, port, passive=True, family=family, numeric=numeric):
        try:
            listening.append(_on_first_port(found, address, last_port))
        except OSError as error:
            failure = error.errno or failure
    if not listening:
        text = "Failed to find an available port" if failure == errno.EADDRINUSE else "Failed to bind socket"
        raise QmpdError(f"{text}: {strerror(failure)}", Kind.IO, errno=failure)
    return listening


def _on_first_port(family: int, address: tuple[Any, ...], last: int) -> socket.socket:
    host, first, *rest = address
    for port in range(first, max(first, last) + 1):
        try:
            return _listening(family, (host, port, *rest), only_own_family=True)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port >= last:
                raise
    raise AssertionError("unreachable")


def _listening(family: int, address: tuple[Any, ...], *, only_own_family: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if only_own_family and family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def connect_unix(path: str) -> socket.socket:
    """A connection to the UNIX socket at ``path``. Raises QmpdError."""
    _check_path(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise _cannot_connect(path, error.errno) from None
    return sock


def connect_tcp(host: str, port: str) -> socket.socket:
    """A connection to a TCP port. Raises QmpdError."""
    failure = errno.ECONNREFUSED
    for family, kind, protocol, _name, address in _resolve(host, port, passive=False):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error.errno or failure
        else:
            return sock
    raise _cannot_connect(f"{host}:{port}", failure)


def inherit(fd: int) -> socket.socket:
    """The socket that the parent process left open as ``fd``, listening or connected. Raises QmpdError."""
    try:
        return socket.socket(fileno=fd)
    except (OSError, ValueError):
        raise QmpdError(f"File descriptor '{fd}' is not a socket") from None


def is_listening(sock: socket.socket) -> bool:
    """Whether connections can be accepted from it."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def peer(sock: socket.socket, label: str) -> Client:
    """Who is at the other end; a UNIX socket tells the process and its user."""
    if sock.family != socket.AF_UNIX:
        return Client(label)
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Client(label, uid=uid, gid=gid, pid=pid)


class Listener:
    """A listening socket; the file of a UNIX socket it has bound goes away with it."""

    def __init__(self, sock: socket.socket, *, path: str | None = None) -> None:
        """``path`` is the file to be removed, made absolute here since a daemon changes its directory.

        Without a name, the kernel has chosen one that is no file.
        """
        sock.setblocking(False)
        self._sock = sock
        self._short = False
        self._path = os.path.abspath(path) if path else None
        self._identity = _identity(self._path)

    @property
    def address(self) -> str:
        """As QEMU prints it, e.g. ``unix:/run/s`` or ``tcp:127.0.0.1:4444``."""
        name = self._sock.getsockname()
        if self._sock.family == socket.AF_UNIX:
            return f"unix:{name}"
        return f"tcp:{name[0]}:{name[1]}"

    async def accept(self) -> socket.socket:
        """The next connection."""
        while True:
            await self.ready()
            if (sock := self.take()) is not None:
                return sock

    async def ready(self) -> None:
        """Until there may be a connection to :meth:`take`."""
        if self._short:
            self._short = False
            await trio.sleep(0.1)
        await trio.lowlevel.wait_readable(self._sock)

    def take(self) -> socket.socket | None:
        """A connection that is there; None if there is none, or no descriptor for it."""
        try:
            return self._sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in _SHORTAGES:
                raise
            _log.warning("cannot accept a connection: %s", strerror(error.errno))
            self._short = True
            return None

    async def serve(self, attach: Callable[[socket.socket], None]) -> None:
        """Hand every connection to ``attach``, for ever."""
        while True:
            attach(await self.accept())

    def close(self) -> None:
        """Stop listening. Nobody may be waiting in :meth:`accept`."""
        self._sock.close()
        # Somebody may have put another socket in its place by now.
        if self._path is not None and self._identity is not None and _identity(self._path) == self._identity:
            os.unlink(self._path)


def _identity(path: str | None) -> tuple[int, int] | None:
    try:
        status = os.lstat(path) if path is not None else None
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status is not None else None


def _check_path(path: str) -> None:
    if len(os.fsencode(path)) >= PATH_ROOM:
        raise QmpdError(f"UNIX socket path '{path}' is too long")


def _clear_stale(path: str) -> None:
    """Remove a socket file that nobody listens at. Raises QmpdError if something else is there."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # bind() says what is wrong, if anything
    if not stat.S_ISSOCK(mode) or _answers(path):
        raise _cannot_bind(path, errno.EADDRINUSE)
    os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a full backlog, or no permission to ask
        return True


def _resolve(
    host: str, port: str, *, passive: bool, family: int = socket.AF_UNSPEC, numeric: bool = False
) -> list[tuple[Any, ...]]:
    if port.isdecimal() and int(port) >= 1 << 16:
        raise QmpdError(f"address resolution failed for {host}:{port}: port is out of range [0, 65535]")
    flags = (socket.AI_PASSIVE if passive else 0) | (socket.AI_NUMERICHOST if numeric else 0)
    try:
        return list(socket.getaddrinfo(host or None, port or None, family, socket.SOCK_STREAM, flags=flags))
    except socket.gaierror as error:
        raise QmpdError(f"address resolution failed for {host}:{port}: {error.strerror}", Kind.IO) from None


def _cannot_bind(path: str, number: int | None) -> QmpdError:
    number = number or errno.EIO
    return QmpdError(f"Failed to bind socket to {path}: {strerror(number)}", Kind.IO, path=path, errno=number)


def _cannot_connect(where: str, number: int | None) -> QmpdError:
    number = number or errno.EIO
    return QmpdError(f"Failed to connect to '{where}': {strerror(number)}", Kind.IO, errno=number)
