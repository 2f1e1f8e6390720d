"""Carrying out requests: the checks in the peer's order, then the work (spec/nbd-export.md sections 9 and 10)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qmpd.block.api import BlockDevice, Driver
from qmpd.block.batch import Batch
from qmpd.block.extents import RunKind
from qmpd.errors import QmpdError
from qmpd.export.intake import Intake
from qmpd.export.replies import Pieces, Replies
from qmpd.export.status import extents
from qmpd.nbd.constants import BASE_ALLOCATION, MAX_PAYLOAD, Command, CommandFlag
from qmpd.nbd.exportinfo import ExportInfo, Negotiated
from qmpd.nbd.transmission import COMMAND_NAMES, Buffer, Raw, Request, Wire, wire_errno
from qmpd.units import KIB, MIB, SECTOR, align_down, align_up

_FUA: Final = int(CommandFlag.FUA)
_READ: Final = int(Command.READ)
_FIRST: Final = (0,)
_WRITING: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_LIMITED: Final = frozenset({Command.READ, Command.WRITE, Command.CACHE})

#: Where what was read may be a hole (bytes): its first and its last sector are looked at, and one in so many bytes
#: between. Finding out for certain costs more than to send some zeros.
_STRETCH: Final = 32 * KIB

_FAILED: Final = {
    Command.READ: "reading from file failed",
    Command.WRITE: "writing to file failed",
    Command.WRITE_ZEROES: "writing to file failed",
    Command.FLUSH: "flush failed",
    Command.TRIM: "discard failed",
    Command.CACHE: "caching data failed",
    Command.BLOCK_STATUS: "can't get block status",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What requests go to, as long as they are inside the gate."""

    device: BlockDevice
    #: The images of the chain from the top down, filters left out.
    layers: Sequence[Driver]
    #: May space be given back?
    unmap: bool
    active: bool


class RefusedError(Exception):
    """The request is answered with an error; ``number`` is as on the wire."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number
        self.text = text


class Commands:
    """The commands of one connection. One thread at a time; what touches the device happens inside the gate."""

    def __init__(
        self, info: ExportInfo, negotiated: Negotiated, wire: Wire, replies: Replies, *, writethrough: bool
    ) -> None:
        self._info = info
        self._wire = wire
        self._replies = replies
        self._writethrough = writethrough
        self._contexts = negotiated.contexts
        self._allowed = _allowed(wire)
        self._work: dict[int, Callable[[Target, Request, Buffer], Pieces]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.BLOCK_STATUS: self._block_status,
        }

    def run(self, target: Target, intake: Intake) -> None:
        """Carry out a round of requests and answer it. Raises for nothing that a client or an image does.

        Its plain requests are under way together as far as the client knows: any order is right.
        """
        if intake.other is not None:
            self._run(target, *intake.other)
        if intake.writes and target.active:
            self._write_all(target.device, intake.writes, intake.payloads)
        else:
            for raw, payload in zip(intake.writes, intake.payloads, strict=True):
                self._run(target, Request._make(raw), payload)
        if intake.reads:
            self._read_all(target, intake.reads)

    def _run(self, target: Target, request: Request, payload: Buffer) -> None:
        try:
            self._check(request)
            if not target.active and request.command != _READ:
                raise RefusedError(wire_errno(errno.EPERM), "export is inactive")
            self._replies.add(self._work[request.command](target, request, payload))
        except RefusedError as refused:
            self._replies.add([self._wire.error(request.cookie, request.offset, refused.number, refused.text)])
        except QmpdError as error:
            self._fail(request, error)

    def _fail(self, request: Raw, error: QmpdError) -> None:
        _, _, command, cookie, offset, _ = request
        self._replies.add([self._wire.error(cookie, offset, wire_errno(error.errno), _FAILED[Command(command)])])

    # -- plain reads and writes ----------------------------------------------------------------------------------------

    def _read_all(self, target: Target, reads: list[Raw]) -> None:
        """Into the places that the data are sent from."""
        start = self._replies.filled
        places = self._replies.add_reads(reads)
        left: Sequence[int] = _FIRST
        if len(reads) > 1:
            left = target.device.read_many(Batch([raw[4] for raw in reads], places))
        failed: list[int] = []
        for index in left:
            try:
                target.device.readinto(reads[index][4], places[index])
            except QmpdError as error:
                failed.append(index)
                self._fail(reads[index], error)
        if failed or self._wire.structured:
            self._replace(target, reads, failed, start)

    def _replace(self, target: Target, reads: list[Raw], failed: list[int], start: int) -> None:
        """Take the answers of failed reads back, and those with holes, to tell these as such.

        The answers begin at ``start`` of what is to be sent, behind those of the round's writes.
        """
        for index, raw in enumerate(reads):
            start += self._wire.data_head
            if index in failed:
                self._replies.drop(start, raw[5])
            elif self._wire.structured and self._looks_sparse(start, raw[4], raw[5]):
                self._replies.drop(start, raw[5])
                try:
                    self._replies.add(self._read_sparse(target, Request._make(raw)))
                except QmpdError as error:
                    self._fail(raw, error)
            start += raw[5]

    def _write_all(self, device: BlockDevice, writes: list[Raw], payloads: list[memoryview]) -> None:
        """From where they were received; those that must be stable are made so together."""
        left: Sequence[int] = _FIRST
        if len(writes) > 1:
            left = device.write_many(Batch([raw[4] for raw in writes], payloads))
        failed: dict[int, QmpdError] = {}
        for index in left:
            try:
                device.write(writes[index][4], payloads[index])
            except QmpdError as error:
                failed[index] = error
        stable = [index for index, raw in enumerate(writes) if self._writethrough or raw[1]]
        if stable:
            try:
                device.flush()
            except QmpdError as error:
                failed = dict.fromkeys(stable, error) | failed
        for index, raw in enumerate(writes):
            if index in failed:
                self._fail(raw, failed[index])
            else:
                self._replies.add_done(raw)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        _, flags, command, _, offset, length = request
        if length > MAX_PAYLOAD and command in _LIMITED:
            raise RefusedError(wire_errno(errno.EINVAL), f"len ({length}) is larger than max len ({MAX_PAYLOAD})")
        if command in _WRITING and not self._info.writable:
            raise RefusedError(wire_errno(errno.EPERM), "Export is read-only")
        size = self._info.size
        reach = 0 if command == Command.BLOCK_STATUS and flags & CommandFlag.PAYLOAD_LEN else length
        if offset + reach > size:
            text = f"operation past EOF; From: {offset}, Len: {length}, Size: {size}"
            raise RefusedError(wire_errno(errno.ENOSPC if command in _WRITING else errno.EINVAL), text)
        if flags & ~self._allowed.get(command, int(_FUA)):  # plain numbers: ~ of an IntFlag forgets unknown bits
            name = COMMAND_NAMES.get(Command(command), "<unknown>") if command in COMMAND_NAMES else "<unknown>"
            raise RefusedError(wire_errno(errno.EINVAL), f"unsupported flags for command {name} (got 0x{flags:x})")
        if command not in self._work:
            raise RefusedError(wire_errno(errno.EINVAL), f"invalid request type ({command}) received")

    # -- the commands --------------------------------------------------------------------------------------------------

    def _read(self, target: Target, request: Request, _: Buffer) -> Pieces:
        """Reads that are long, or not plain."""
        wire, cookie, offset, length = self._wire, request.cookie, request.offset, request.length
        if request.flags & _FUA:
            target.device.flush()
        if wire.structured and length and not request.flags & CommandFlag.DF:
            return self._read_sparse(target, request)
        data = bytearray(length)
        if length:
            target.device.readinto(offset, memoryview(data))
        return [wire.data(cookie, offset, offset, length), data]

    def _read_sparse(self, target: Target, request: Request) -> Pieces:
        """Data and holes in ascending order."""
        wire, cookie, offset, length = self._wire, request.cookie, request.offset, request.length
        pieces: Pieces = []
        end = offset + length
        for size, flags in extents(target.layers, BASE_ALLOCATION, offset, length, one=False):
            last = offset + size == end
            if flags:
                pieces.append(wire.hole(cookie, request.offset, offset, size, last=last))
            else:
                data = bytearray(size)
                target.device.readinto(offset, memoryview(data))
                pieces += [wire.data(cookie, request.offset, offset, size, last=last), data]
            offset += size
        return pieces

    def _write(self, target: Target, request: Request, payload: Buffer) -> Pieces:
        if request.length:
            target.device.write(request.offset, payload)
        return self._stable(target, request)

    def _flush(self, target: Target, request: Request, _: Buffer) -> Pieces:
        target.device.flush()
        return self._done(request)

    def _trim(self, target: Target, request: Request, _: Buffer) -> Pieces:
        if target.unmap and request.length:
            target.device.discard(request.offset, request.length)
        return self._stable(target, request)

    def _write_zeroes(self, target: Target, request: Request, _: Buffer) -> Pieces:
        flags, offset, length = request.flags, request.offset, request.length
        if flags & CommandFlag.FAST_ZERO and length and _needs_writing(target.device, offset, length):
            raise RefusedError(wire_errno(errno.ENOTSUP), _FAILED[Command.WRITE_ZEROES])
        if length:
            unmap = target.unmap and not flags & CommandFlag.NO_HOLE
            target.device.write_zeroes(offset, length, unmap=unmap)
        return self._stable(target, request)

    def _cache(self, target: Target, request: Request, _: Buffer) -> Pieces:
        position, end = request.offset, request.offset + request.length
        buffer = memoryview(bytearray(min(request.length, MIB)))
        while position < end:
            piece = buffer[: end - position]
            target.device.readinto(position, piece)
            position += len(piece)
        return self._done(request)

    def _block_status(self, target: Target, request: Request, payload: Buffer) -> Pieces:
        _, flags, _, cookie, offset, length = request
        if not self._contexts:
            raise RefusedError(wire_errno(errno.EINVAL), "CMD_BLOCK_STATUS not negotiated")
        contexts = self._contexts
        if flags & CommandFlag.PAYLOAD_LEN:
            length, contexts = self._asked(payload)
            if offset + length > self._info.size:
                text = f"operation past EOF; From: {offset}, Len: {length}, Size: {self._info.size}"
                raise RefusedError(wire_errno(errno.EINVAL), text)
        if not length:
            raise RefusedError(wire_errno(errno.EINVAL), "need non-zero length")
        one = bool(flags & CommandFlag.REQ_ONE)
        last = contexts[-1]
        return [
            self._wire.status(
                cookie,
                offset,
                context[0],
                extents(target.layers, context[1], offset, length, one=one),
                last=context is last,
            )
            for context in contexts
        ]

    def _asked(self, payload: Buffer) -> tuple[int, tuple[tuple[int, str], ...]]:
        """The length and the contexts that a BLOCK_STATUS payload selects."""
        data = bytes(payload)
        ids = [int.from_bytes(data[at : at + 4], "big") for at in range(8, len(data), 4)]
        known = {number for number, _ in self._contexts}
        if len(data) < 12 or len(data) % 4 or len(set(ids)) != len(ids) or not known.issuperset(ids):
            raise RefusedError(wire_errno(errno.EINVAL), "CMD_BLOCK_STATUS payload not valid")
        return int.from_bytes(data[:8], "big"), tuple(one for one in self._contexts if one[0] in ids)

    def _looks_sparse(self, at: int, offset: int, length: int) -> bool:
        """May there be a hole in what was read at ``offset``? Holes begin and end with sectors."""
        is_zero, end = self._replies.is_zero, at + length
        if is_zero(at, min(length, SECTOR - offset % SECTOR)):
            return True
        last = (offset + length) % SECTOR or SECTOR
        if last < length and is_zero(end - last, last):
            return True
        inner = at - offset % SECTOR + _STRETCH
        return any(is_zero(place, SECTOR) for place in range(inner, end - SECTOR, _STRETCH))

    # -- what they share -----------------------------------------------------------------------------------------------

    def _stable(self, target: Target, request: Request) -> Pieces:
        if request.flags & _FUA or self._writethrough:
            target.device.flush()
        return self._done(request)

    def _done(self, request: Request) -> Pieces:
        return [self._wire.done(request.cookie, request.offset)]


def _allowed(wire: Wire) -> dict[int, int]:
    """Command -> flags it may have."""
    payload = CommandFlag.PAYLOAD_LEN if wire.extended else 0
    return {
        Command.READ: int(_FUA | (CommandFlag.DF if wire.structured else 0)),
        Command.WRITE: int(_FUA | payload),
        Command.WRITE_ZEROES: int(_FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
        Command.BLOCK_STATUS: int(_FUA | CommandFlag.REQ_ONE | payload),
    }


def _needs_writing(device: BlockDevice, offset: int, length: int) -> bool:
    """Would zeroing have to store zeroes, as in a cluster of which something else is to be kept?"""
    unit, end = device.placement_unit or 1, offset + length
    head, tail = align_up(offset, unit), align_down(end, unit)
    edges = [(offset, min(head, end)), (max(tail, offset), end)]
    return any(_has_data(device, start, stop) for start, stop in edges if start < stop)


def _has_data(device: BlockDevice, start: int, end: int) -> bool:
    while start < end:
        runs = device.map(start, end - start)
        if any(kind not in (RunKind.UNALLOCATED, RunKind.ZERO) for kind in runs.kind.tolist()):
            return True
        start = runs.end
    return False
