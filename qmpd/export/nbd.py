"""An NBD export as a parent of its node."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

from qmpd.block.api import Driver, Perm
from qmpd.export.commands import Target
from qmpd.export.connection import converse
from qmpd.export.gate import Gate
from qmpd.export.intake import Transport
from qmpd.graph import chain
from qmpd.graph.node import Backend, Edge, Node
from qmpd.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION
from qmpd.nbd.exportinfo import ExportInfo, Negotiated
from qmpd.units import SECTOR, align_down

_log = logging.getLogger(__name__)

SHARED = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED


class NbdExport(Backend):
    """One export. Made before it is attached; :meth:`begin` follows once ``edge`` leads to the node.

    Control thread, but for :meth:`serve` (one worker thread a connection), :meth:`quiesce` (worker) and :meth:`info`,
    :attr:`connections` (any). The size is that of the node at :meth:`begin`, for good.
    """

    def __init__(
        self,
        export_id: str,
        name: str,
        *,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        allocation_depth: bool = False,
        allow_inactive: bool = False,
        multi_conn: bool = True,
    ) -> None:
        super().__init__()
        self.id = export_id
        self.name = name
        self.description = description
        self.writable = writable
        self.writethrough = writethrough
        self.allocation_depth = allocation_depth
        self.multi_conn = multi_conn
        self.allow_inactive = allow_inactive
        self.waives = (self.perm, SHARED) if allow_inactive or not writable else None
        self._gate = Gate()
        self._target: Target | None = None
        self._info: ExportInfo | None = None
        self._lock = threading.Lock()
        self._transports: set[Transport] = set()
        self._ended = False

    @property
    def perm(self) -> Perm:
        """What :meth:`Edit.attach` is to be given; ``SHARED`` with it."""
        return Perm.CONSISTENT_READ | (Perm.WRITE if self.writable else Perm.NONE)

    def begin(self) -> None:
        """Look at the node that ``edge`` leads to. After the attaching edit."""
        if self.edge is None:
            raise RuntimeError(f"export {self.id} is not attached")
        self._look(self.edge)
        contexts = (BASE_ALLOCATION, ALLOCATION_DEPTH) if self.allocation_depth else (BASE_ALLOCATION,)
        self._info = ExportInfo(
            name=self.name,
            size=align_down(self.edge.node.length, SECTOR),
            writable=self.writable,
            description=self.description,
            multi_conn=self.multi_conn,
            minimum=getattr(self.edge.node.driver, "request_alignment", 1),
            contexts=contexts,
        )

    def info(self) -> ExportInfo:
        """What clients are told."""
        if self._info is None:
            raise RuntimeError(f"export {self.id} has not begun")
        return self._info

    @property
    def connections(self) -> int:
        """Clients in the transmission phase."""
        with self._lock:
            return len(self._transports)

    # -- the graph -----------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        self._gate.close()

    def resume(self) -> None:
        if self.edge is not None and self._target is not None:
            self._look(self.edge)  # images below may have gone, options may be others
        self._gate.open()

    def retargeted(self, edge: Edge) -> None:
        self._look(edge)

    def _look(self, edge: Edge) -> None:
        image = chain.skip_filters(edge.node)
        self._target = Target(edge.device, _layers(edge), image.spec.discard == "unmap", image.active)

    # -- clients -------------------------------------------------------------------------------------------------------

    def serve(self, transport: Transport, negotiated: Negotiated, leftover: bytes) -> None:
        """The transmission phase: returns when the client has left or was cut off. The caller closes the socket.

        Raises for nothing that a client does. Worker thread.
        """
        with self._lock:
            if self._ended:
                return
            self._transports.add(transport)
        try:
            converse(
                transport,
                self.info(),
                negotiated,
                leftover,
                gate=self._gate,
                target=self._current,
                writethrough=self.writethrough,
            )
        except OSError as error:
            _log.info("export %s: client cut off: %s", self.id, error)
        except Exception:  # noqa: BLE001  a bug of ours, or no memory: the others go on
            _log.exception("export %s: client cut off", self.id)
        finally:
            with self._lock:
                self._transports.discard(transport)

    def hang_up(self) -> None:
        """Cut all clients off, those to come included; requests in flight still end."""
        with self._lock:
            self._ended = True
            for transport in self._transports:
                with contextlib.suppress(OSError):
                    transport.shutdown(socket.SHUT_RDWR)

    def _current(self) -> Target:
        if self._target is None:
            raise RuntimeError(f"export {self.id} has not begun")
        return self._target


def _layers(edge: Edge) -> list[Driver]:
    """The images of the chain from the top down."""
    layers: list[Driver] = []
    node: Node | None = chain.skip_filters(edge.node)
    while node is not None:
        layers.append(node.opened)
        node = chain.next_image(node)
    return layers
