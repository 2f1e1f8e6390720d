"""Character devices: the ends that monitors are put on. Control thread.

Source: spec/qmp-protocol.md sections 13 and 15.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import trio

from qmpd.control import listen
from qmpd.control.channel import Channel
from qmpd.control.objects import Thing
from qmpd.control.registry import Client
from qmpd.errors import QmpdError

Attach = Callable[[Channel, Client], None]
"""Takes over the byte stream of a client."""


class Chardev(Thing, ABC):
    """One end, usable by one monitor."""

    def __init__(self, chardev_id: str) -> None:
        self.id = chardev_id
        self.in_use = False

    async def open(self) -> None:
        """Bind, connect or wait for a client, as described. Raises QmpdError."""

    @abstractmethod
    async def serve(self, attach: Attach) -> None:
        """Hand over every client there is and will be; returns when there will be no more."""

    def close(self) -> None:
        """Stop listening; clients that were handed over stay. Nobody may be in :meth:`serve`."""


@dataclass(frozen=True, kw_only=True)
class SocketAddress:
    """One of ``path``, ``host`` with ``port``, and ``fd``, an inherited socket."""

    path: str | None = None
    host: str | None = None
    port: str | None = None
    fd: int | None = None

    def listen(self) -> listen.Listener:
        """Raises QmpdError."""
        if self.fd is not None:
            return listen.Listener(listen.inherit(self.fd))
        if self.path is not None:
            return listen.Listener(listen.bind_unix(self.path), path=self.path)
        return listen.Listener(listen.bind_tcp(self.host or "", self.port or ""))

    def connect(self) -> socket.socket:
        """Raises QmpdError."""
        if self.fd is not None:
            return listen.inherit(self.fd)
        if self.path is not None:
            return listen.connect_unix(self.path)
        return listen.connect_tcp(self.host or "", self.port or "")


class SocketChardev(Chardev):
    """A socket: a server for any number of clients, or a client itself."""

    type_name = "chardev-socket"

    def __init__(
        self, chardev_id: str, address: SocketAddress, *, server: bool, on_wait: Callable[[str], None] | None = None
    ) -> None:
        """With ``on_wait``, :meth:`open` waits for the first client, having told ``on_wait`` where it does."""
        super().__init__(chardev_id)
        self._address = address
        self._server = server
        self._on_wait = on_wait
        self._listener: listen.Listener | None = None
        self._early: list[socket.socket] = []

    async def open(self) -> None:
        """Bind or connect; raises QmpdError."""
        if not self._server:
            self._early.append(self._address.connect())
            return
        self._listener = self._address.listen()
        if self._on_wait is not None:
            self._on_wait(f"disconnected:{self._listener.address},server=on")
            try:
                self._early.append(await self._listener.accept())
            except trio.Cancelled:
                self._listener.close()
                raise

    async def serve(self, attach: Attach) -> None:
        """The connections that are there, then those that come."""

        def take(sock: socket.socket) -> None:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reply is not to wait for the next one
            attach(Channel.of_socket(sock), listen.peer(sock, self.id))

        while self._early:
            take(self._early.pop(0))
        if self._listener is not None:
            await self._listener.serve(take)

    def close(self) -> None:
        """A UNIX socket's file is removed."""
        for sock in self._early:
            sock.close()
        if self._listener is not None:
            self._listener.close()


class StdioChardev(Chardev):
    """Standard input and output. End of input does not end the daemon."""

    type_name = "chardev-stdio"

    async def serve(self, attach: Attach) -> None:
        """There is one client."""
        attach(Channel.of_stdio(), Client(self.id))


class NullChardev(Chardev):
    """Nobody will ever call."""

    type_name = "chardev-null"

    async def serve(self, attach: Attach) -> None:
        """No client."""


class Chardevs:
    """The character devices by id; ``content`` is what qom-list shows of them."""

    def __init__(self, content: dict[str, Thing]) -> None:
        self._by_id: dict[str, Chardev] = {}
        self._content = content

    async def add(self, chardev: Chardev) -> None:
        """Open and remember. Raises QmpdError."""
        if chardev.id in self._by_id:
            is_socket = isinstance(chardev, SocketChardev)
            duplicate = f"attempt to add duplicate property '{chardev.id}' to object (type 'container')"
            raise QmpdError("duplicate yank instance" if is_socket else duplicate)
        if isinstance(chardev, StdioChardev) and any(isinstance(other, StdioChardev) for other in self._by_id.values()):
            raise QmpdError("cannot use stdio by multiple character devices")
        await chardev.open()
        self._by_id[chardev.id] = self._content[chardev.id] = chardev

    def take(self, chardev_id: str) -> Chardev:
        """The one called so, for one monitor. Raises QmpdError."""
        chardev = self._by_id.get(chardev_id)
        if chardev is None:
            raise QmpdError(f'chardev "{chardev_id}" not found')
        if chardev.in_use:
            raise QmpdError(f"chardev '{chardev_id}' is already in use")
        chardev.in_use = True
        return chardev

    def close(self) -> None:
        """Close all."""
        for chardev in self._by_id.values():
            chardev.close()
