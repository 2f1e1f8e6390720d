"""Where a server listens, as QAPI types: flat on the command line, nested in QMP (spec/nbd-export.md section 1)."""

import os
import socket
from enum import StrEnum
from typing import Any

from qmpd.control import listen
from qmpd.control.listen import Listener
from qmpd.control.qapi import Bool, QapiModel, Str, Uint16
from qmpd.errors import Kind, QmpdError


class SocketAddressType(StrEnum):
    """Kinds of addresses."""

    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


class InetSocketAddress(QapiModel):
    """A TCP port; ``to`` is the last of a range of which the first free one is taken."""

    host: Str
    port: Str
    numeric: Bool | None = None
    to: Uint16 | None = None
    ipv4: Bool | None = None
    ipv6: Bool | None = None
    keep_alive: Bool | None = None
    mptcp: Bool | None = None


class UnixSocketAddress(QapiModel):
    """A socket file, or a name that is no file."""

    path: Str
    abstract: Bool | None = None
    tight: Bool | None = None


class VsockSocketAddress(QapiModel):
    """A port between a host and its virtual machines."""

    cid: Str
    port: Str


class FdSocketAddress(QapiModel):
    """A descriptor that a monitor was passed."""

    str: Str


# -- the two ways to write one -----------------------------------------------------------------------------------------


class SocketAddress(QapiModel, discriminator="type"):
    """Members side by side: the command line."""

    type: SocketAddressType


class FlatInet(SocketAddress, InetSocketAddress, branch=SocketAddressType.INET):
    """``type=inet,host=...``"""


class FlatUnix(SocketAddress, UnixSocketAddress, branch=SocketAddressType.UNIX):
    """``type=unix,path=...``"""


class FlatVsock(SocketAddress, VsockSocketAddress, branch=SocketAddressType.VSOCK):
    """``type=vsock,cid=...``"""


class FlatFd(SocketAddress, FdSocketAddress, branch=SocketAddressType.FD):
    """``type=fd,str=...``"""


class SocketAddressLegacy(QapiModel, discriminator="type"):
    """Members below ``data``: QMP."""

    type: SocketAddressType


class NestedInet(SocketAddressLegacy, branch=SocketAddressType.INET):
    """Data of an inet address."""

    data: InetSocketAddress


class NestedUnix(SocketAddressLegacy, branch=SocketAddressType.UNIX):
    """Data of a unix address."""

    data: UnixSocketAddress


class NestedVsock(SocketAddressLegacy, branch=SocketAddressType.VSOCK):
    """Data of a vsock address."""

    data: VsockSocketAddress


class NestedFd(SocketAddressLegacy, branch=SocketAddressType.FD):
    """Data of an fd address."""

    data: FdSocketAddress


def nested(address: SocketAddress) -> dict[str, Any]:
    """An address of the command line as QMP has it."""
    members = address.to_wire()
    return {"type": members.pop("type"), "data": members}


def absolute(address: SocketAddressLegacy) -> SocketAddressLegacy:
    """The same address from whatever directory: a socket file's path is made absolute, if it may be as long."""
    if not isinstance(address, NestedUnix) or address.data.abstract or not address.data.path:
        return address
    path = os.path.abspath(address.data.path)
    if len(os.fsencode(path)) >= listen.PATH_ROOM:
        return address
    return address.model_copy(update={"data": address.data.model_copy(update={"path": path})})


# -- listening ---------------------------------------------------------------------------------------------------------


def listen_at(address: SocketAddressLegacy) -> list[Listener]:
    """Listening sockets, at least one. Worker thread: names may have to be looked up. Raises QmpdError."""
    match address:
        case NestedUnix(data=local):
            return [_listen_unix(local)]
        case NestedInet(data=tcp):
            return _listen_inet(tcp)
        case NestedFd():
            raise QmpdError("only QEMU supports file descriptor passing", Kind.UNSUPPORTED)
        case _:
            raise QmpdError("Addresses of type vsock are not supported", Kind.UNSUPPORTED)


def _listen_unix(address: UnixSocketAddress) -> Listener:
    if address.abstract:
        return Listener(listen.bind_abstract(address.path, tight=address.tight is not False))
    if not address.path:
        raise QmpdError("UNIX socket path is empty")
    return Listener(listen.bind_unix(address.path), path=address.path)


def _listen_inet(address: InetSocketAddress) -> list[Listener]:
    if address.mptcp:
        raise QmpdError("Multipath TCP is not supported", Kind.UNSUPPORTED)
    sockets = listen.bind_every(
        address.host,
        address.port,
        family=_family(address),
        last_port=address.to or 0,
        numeric=bool(address.numeric),
    )
    for sock in sockets:  # connections inherit it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(address.keep_alive))
    return [Listener(sock) for sock in sockets]


def _family(address: InetSocketAddress) -> int:
    """One address family, if only one may be or is asked for."""
    if address.ipv4 is False and address.ipv6 is False:
        raise QmpdError("Cannot disable IPv4 and IPv6 at same time")
    if address.ipv4 and address.ipv6:
        return socket.AF_UNSPEC
    if address.ipv6 or address.ipv4 is False:
        return socket.AF_INET6
    if address.ipv4 or address.ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC
