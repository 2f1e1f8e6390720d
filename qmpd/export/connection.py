"""The transmission phase of one client, on one worker thread.

Requests are taken off the socket as many as one read brought, carried out together inside the gate, and answered
together. Reading and sending happen outside of the gate: a client that does not take its replies holds nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from qmpd.export.commands import Commands, Target
from qmpd.export.gate import Gate
from qmpd.export.intake import EndError, Intake, Transport
from qmpd.export.replies import Replies
from qmpd.nbd.exportinfo import ExportInfo, Negotiated
from qmpd.nbd.transmission import Wire

_log = logging.getLogger(__name__)


def converse(
    transport: Transport,
    info: ExportInfo,
    negotiated: Negotiated,
    leftover: bytes,
    *,
    gate: Gate,
    target: Callable[[], Target],
    writethrough: bool,
) -> None:
    """Serve one client until it leaves or was cut off. Raises OSError if the connection breaks.

    ``leftover`` came with the handshake. ``target`` is asked inside the gate, for each round.
    """
    wire = Wire(structured=negotiated.structured, extended=negotiated.extended)
    intake, replies = Intake(transport, wire, info, leftover), Replies(wire)
    commands = Commands(info, negotiated, wire, replies, writethrough=writethrough)
    try:
        while True:
            intake.next()
            with gate:
                commands.run(target(), intake)
            for piece in replies.take():
                transport.sendall(piece)
    except EndError as end:
        if end.last_words:
            transport.sendall(end.last_words)
        if end.args[0]:
            _log.info("NBD client disconnected: %s", end)
