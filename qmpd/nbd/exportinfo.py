"""What the protocol says about an export, and where the handshake finds exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qmpd.nbd.constants import BASE_ALLOCATION, MAX_PAYLOAD, ExportFlag


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as clients see it; sizes in bytes. ``contexts`` names its meta contexts in the order of their ids."""

    name: str
    size: int
    writable: bool = False
    description: str = ""
    multi_conn: bool = True
    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)

    def flags(self, *, structured: bool = False, payload: bool = False) -> ExportFlag:
        """Transmission flags; ``structured`` or extended replies, block status with a ``payload``."""
        flags = ExportFlag.HAS_FLAGS | ExportFlag.FLUSH | ExportFlag.FUA | ExportFlag.CACHE
        if self.writable:
            flags |= ExportFlag.TRIM | ExportFlag.WRITE_ZEROES | ExportFlag.FAST_ZERO
        else:
            flags |= ExportFlag.READ_ONLY
        if self.multi_conn:
            flags |= ExportFlag.MULTI_CONN
        if structured:
            flags |= ExportFlag.DF
        if payload:
            flags |= ExportFlag.BLOCK_STATUS_PAYLOAD
        return flags


class Directory(Protocol):
    """The exports there are now."""

    def exports(self) -> Sequence[ExportInfo]:
        """All of them, oldest first."""

    def find(self, name: str) -> ExportInfo | None:
        """The one of that name, compared byte by byte."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What a client and the server agreed on: all that the transmission phase needs to know of the handshake."""

    name: str
    structured: bool = False
    #: Extended headers; replies are chunks then, whatever ``structured`` says.
    extended: bool = False
    #: (id, name) of the meta contexts selected, in id order.
    contexts: tuple[tuple[int, str], ...] = ()
