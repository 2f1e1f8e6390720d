"""One client's handshake: bytes in, actions out, nothing else.

The caller reads from its socket, hands the bytes to :meth:`Handshake.receive` and carries out the actions one by one.
They come from a generator, because a few bytes can ask for megabytes of answers: each is made when the one before it
was sent. Iterate it to its end, or to an action that ends the handshake.

Memory: what an option says is kept up to :data:`_KEPT` bytes; the rest is counted, not stored. Work is linear in the
bytes received. Nothing that a client sends makes it raise.

Source: the NBD protocol document; spec/nbd-export.md sections 6-8 and 11.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from qmpd.nbd import metacontext
from qmpd.nbd.constants import (
    GREETING,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    Info,
    Option,
    Reply,
)
from qmpd.nbd.exportinfo import Directory, ExportInfo, Negotiated
from qmpd.units import MIB

__all__ = ["Action", "Close", "Directory", "Enter", "ExportInfo", "Handshake", "Negotiated", "Send", "StartTls", "Tls"]


class Tls(Enum):
    """Does the connection have TLS?"""

    OFF = "off"  # neither has nor wants it
    REQUIRED = "required"  # nothing but STARTTLS is answered
    ACTIVE = "active"  # what is received here came through it


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """The last plain bytes were sent: do the TLS handshake; what is received from now on comes through it."""


@dataclass(frozen=True, slots=True)
class Enter:
    """The transmission phase begins; ``leftover`` are the first bytes of requests."""

    negotiated: Negotiated
    leftover: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection; ``reason`` is for the log (None: an orderly end)."""

    reason: str | None


Action = Send | StartTls | Enter | Close

_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_U32: Final = struct.Struct(">I")

#: Longest option that is read rather than skipped (bytes): no GO has more to say, and nobody has so many queries.
_KEPT: Final = 1 * MIB

_NAMES: Final = {
    Option.EXPORT_NAME: "export name",
    Option.ABORT: "abort",
    Option.LIST: "list",
    Option.STARTTLS: "starttls",
    Option.INFO: "info",
    Option.GO: "go",
    Option.STRUCTURED_REPLY: "structured reply",
    Option.LIST_META_CONTEXT: "list meta context",
    Option.SET_META_CONTEXT: "set meta context",
    Option.EXTENDED_HEADERS: "extended headers",
}

_WITHOUT_PAYLOAD: Final = {Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS}


class _RefusedError(Exception):
    """The option is answered with an error; the handshake goes on."""

    def __init__(self, reply: Reply, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class Handshake:
    """The state of one client from its greeting to the transmission phase. One thread at a time."""

    def __init__(self, directory: Directory, *, tls: Tls = Tls.OFF) -> None:
        self._directory = directory
        self._tls = tls
        self._buffer = bytearray()
        #: Bytes of an option still to be thrown away, and the answer when they are.
        self._skip = 0
        self._after: Iterator[Action] = iter(())
        self._flags: ClientFlag | None = None
        #: (number, length) of the option whose data is awaited.
        self._option: tuple[int, int] | None = None
        self._structured = False
        self._extended = False
        #: Export name and contexts of the last successful SET_META_CONTEXT.
        self._selection: tuple[str, metacontext.Contexts] = ("", ())
        self._over = False
        self._answers: dict[int, Callable[[_Payload], Iterator[Action]]] = {
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._meta_context,
            Option.SET_META_CONTEXT: self._meta_context,
            Option.EXTENDED_HEADERS: self._extended_headers,
        }

    def greeting(self) -> bytes:
        """What the server says first."""
        return GREETING

    def lost(self) -> str | None:
        """Why it is not an orderly end if the client leaves now; None if it is."""
        if self._over or self._flags is None:
            return None
        between = not self._buffer and self._option is None and not self._skip
        what = "data" if between else "bytes"
        where = "Failed to read opts magic" if self._option is None and not self._skip else "Failed to read option data"
        return f"{where}: Unexpected end-of-file before all {what} were read"

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Action]:
        """What to do about the next bytes of the client, whatever way they are cut. Nothing after Enter or Close."""
        if self._over:
            return
        self._buffer += data
        while not self._over:
            actions = self._step()
            if actions is None:
                return
            for action in actions:
                if isinstance(action, Enter | Close):
                    self._over = True
                    self._buffer.clear()
                yield action

    # -- cutting the bytes into options --------------------------------------------------------------------------------

    def _step(self) -> Iterator[Action] | None:
        """Take one thing off the buffer; None if it is not all there yet."""
        if self._skip:
            dropped = min(self._skip, len(self._buffer))
            self._take(dropped)
            self._skip -= dropped
            return None if self._skip else self._after
        if self._flags is None:
            return self._client_flags(self._take(4)) if len(self._buffer) >= 4 else None
        if self._option is None:
            return self._header(*_OPTION.unpack(self._take(16))) if len(self._buffer) >= 16 else None
        number, length = self._option
        if len(self._buffer) < length:
            return None
        self._option = None
        return self._answered(number, self._take(length))

    def _take(self, count: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:count])
        del self._buffer[:count]  # moves a start index, not the bytes
        return taken

    def _client_flags(self, data: bytes) -> Iterator[Action]:
        (value,) = _U32.unpack(data)
        unknown = value & ~3
        self._flags = ClientFlag(value & 3)
        if unknown:
            yield Close(f"Unknown client flags 0x{unknown:x} received")

    def _header(self, magic: int, number: int, length: int) -> Iterator[Action]:
        refusal = self._refusal(magic, number, length)
        if refusal is not None:
            yield Close(refusal)
            return
        early = self._tls is Tls.REQUIRED and number != Option.STARTTLS
        if not early and (number == Option.EXPORT_NAME or (number in self._answers and self._wants(number, length))):
            self._option = number, length
            return
        self._skip, self._after = length, self._too_early(number) if early else self._unread(number, length)
        if not length:
            yield from self._after

    def _refusal(self, magic: int, number: int, length: int) -> str | None:
        """Why the connection cannot go on behind this header."""
        if magic != OPTION_MAGIC:
            return "Bad magic received"
        if length > MAX_PAYLOAD:
            return f"len ({length}) is larger than max len ({MAX_PAYLOAD})"
        fixed = self._flags is not None and bool(self._flags & ClientFlag.FIXED)
        if self._tls is Tls.REQUIRED:
            if not fixed:
                return f"Unsupported option 0x{number:x}"
            return f"Option 0x{number:x} not permitted before TLS" if number == Option.EXPORT_NAME else None
        if number == Option.EXPORT_NAME:
            if self._extended:
                return "Extended headers already negotiated"
            return "Bad length received" if length > MAX_STRING else None
        return None if fixed else f"Unsupported option {number} ({_name(number)})"

    def _wants(self, number: int, length: int) -> bool:
        return length <= _KEPT and number != Option.ABORT and not (length and number in _WITHOUT_PAYLOAD)

    def _too_early(self, number: int) -> Iterator[Action]:
        yield self._error(number, Reply.ERR_TLS_REQD, f"Option 0x{number:x} not permitted before TLS")
        if number == Option.ABORT:
            yield Close(None)

    def _unread(self, number: int, length: int) -> Iterator[Action]:
        """Answer an option whose data is skipped."""
        if number == Option.ABORT:
            yield from self._abort(_Payload(number, b""))
        elif number not in self._answers:
            yield self._error(number, Reply.ERR_UNSUP, f"Unsupported option {number} (<unknown>)")
        elif number in _WITHOUT_PAYLOAD:
            text = f"option '{_name(number)}' has unexpected length"
            yield self._error(number, Reply.ERR_INVALID, text)
            if self._tls is Tls.REQUIRED:
                yield Close(text)
        else:
            if number == Option.SET_META_CONTEXT:
                self._selection = "", ()
            text = f"option '{_name(number)}' of {length} bytes is too long, limit is {_KEPT}"
            yield self._error(number, Reply.ERR_TOO_BIG, text)

    def _answered(self, number: int, data: bytes) -> Iterator[Action]:
        if number == Option.EXPORT_NAME:
            yield from self._export_name(data)
            return
        try:
            yield from self._answers[number](_Payload(number, data))
        except _RefusedError as refused:
            yield self._error(number, refused.reply, refused.text)

    # -- the options ---------------------------------------------------------------------------------------------------

    def _export_name(self, data: bytes) -> Iterator[Action]:
        export = self._directory.find(_text(data.split(b"\0", 1)[0]))
        if export is None:
            yield Close("export not found")
            return
        flags = export.flags(structured=self._structured)
        padding = b"" if self._flags and self._flags & ClientFlag.NO_ZEROES else bytes(124)
        yield Send(struct.pack(">QH", export.size, flags) + padding)
        yield self._enter(export)

    def _abort(self, payload: _Payload) -> Iterator[Action]:
        yield self._ack(payload.number)
        yield Close(None)

    def _list(self, payload: _Payload) -> Iterator[Action]:
        for export in self._directory.exports():
            name = _bytes(export.name)
            data = _U32.pack(len(name)) + name + _bytes(export.description)
            yield self._reply(payload.number, Reply.SERVER, data)
        yield self._ack(payload.number)

    def _starttls(self, payload: _Payload) -> Iterator[Action]:
        if self._tls is Tls.OFF:
            raise _RefusedError(Reply.ERR_POLICY, "TLS not configured")
        if self._tls is Tls.ACTIVE:
            raise _RefusedError(Reply.ERR_INVALID, "TLS already enabled")
        # Plain bytes sent in advance must not be taken for what came through TLS.
        if self._buffer:
            yield Close("TLS handshake failed: data received before the answer to STARTTLS")
            return
        yield self._ack(payload.number)
        self._tls = Tls.ACTIVE
        yield StartTls()

    def _structured_reply(self, payload: _Payload) -> Iterator[Action]:
        if self._extended:
            raise _RefusedError(Reply.ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._structured:
            raise _RefusedError(Reply.ERR_INVALID, "structured reply already negotiated")
        self._structured = True
        yield self._ack(payload.number)

    def _extended_headers(self, payload: _Payload) -> Iterator[Action]:
        if self._extended:
            raise _RefusedError(Reply.ERR_INVALID, "extended headers already negotiated")
        self._structured = self._extended = True
        yield self._ack(payload.number)

    def _info(self, payload: _Payload) -> Iterator[Action]:
        export, wanted = self._asked(payload)
        yield from self._described(payload.number, export, wanted, export.minimum, payload_flag=self._extended)
        if export.minimum > 1 and Info.BLOCK_SIZE not in wanted:
            text = "request NBD_INFO_BLOCK_SIZE to use this export"
            yield self._error(payload.number, Reply.ERR_BLOCK_SIZE_REQD, text)
        else:
            yield self._ack(payload.number)

    def _go(self, payload: _Payload) -> Iterator[Action]:
        export, wanted = self._asked(payload)
        minimum = export.minimum if Info.BLOCK_SIZE in wanted else 1
        chosen = self._extended and bool(self._contexts_for(export))
        yield from self._described(payload.number, export, wanted, minimum, payload_flag=chosen)
        yield self._ack(payload.number)
        yield self._enter(export)

    def _asked(self, payload: _Payload) -> tuple[ExportInfo, set[int]]:
        """The export and the info types of an INFO or GO."""
        name = payload.name()
        wanted = {payload.u16() for _ in range(payload.u16())}
        payload.end()
        return self._found(name), wanted

    def _described(
        self, number: int, export: ExportInfo, wanted: set[int], minimum: int, *, payload_flag: bool
    ) -> Iterator[Action]:
        def info(kind: Info, data: bytes) -> Action:
            return self._reply(number, Reply.INFO, struct.pack(">H", kind) + data)

        if Info.NAME in wanted:
            yield info(Info.NAME, _bytes(export.name))
        if export.description:
            yield info(Info.DESCRIPTION, _bytes(export.description))
        preferred = max(export.preferred, minimum)
        yield info(Info.BLOCK_SIZE, struct.pack(">III", minimum, preferred, export.maximum))
        flags = export.flags(structured=self._structured, payload=payload_flag)
        yield info(Info.EXPORT, struct.pack(">QH", export.size, flags))

    def _meta_context(self, payload: _Payload) -> Iterator[Action]:
        choosing = payload.number == Option.SET_META_CONTEXT
        if choosing:
            self._selection = "", ()
            if not self._structured:
                text = f"request option '{_name(payload.number)}' when structured reply is not negotiated"
                raise _RefusedError(Reply.ERR_INVALID, text)
        export = self._found(payload.name())
        queries = [payload.take(payload.u32()) for _ in range(payload.count(4))]
        payload.end()
        contexts = (metacontext.selected if choosing else metacontext.listed)(export.contexts, queries)
        for identifier, name in contexts:
            yield self._reply(payload.number, Reply.META_CONTEXT, _U32.pack(identifier) + name.encode())
        if choosing:
            self._selection = export.name, contexts
        yield self._ack(payload.number)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _found(self, name: bytes) -> ExportInfo:
        export = self._directory.find(_text(name))
        if export is None:
            shown = _text(name) if len(name) <= 80 else _text(name[:80]) + "..."
            raise _RefusedError(Reply.ERR_UNKNOWN, f"export '{shown}' not present")
        return export

    def _contexts_for(self, export: ExportInfo) -> metacontext.Contexts:
        name, contexts = self._selection
        return contexts if name == export.name else ()

    def _enter(self, export: ExportInfo) -> Action:
        contexts = self._contexts_for(export)
        return Enter(Negotiated(export.name, self._structured, self._extended, contexts), bytes(self._buffer))

    def _ack(self, number: int) -> Action:
        return self._reply(number, Reply.ACK)

    def _error(self, number: int, reply: Reply, text: str) -> Action:
        return self._reply(number, reply, _bytes(text))

    def _reply(self, number: int, reply: Reply, data: bytes = b"") -> Action:
        return Send(_REPLY.pack(OPTION_REPLY_MAGIC, number, reply, len(data)) + data)


class _Payload:
    """The data of an option, read from its start; what does not fit refuses the option."""

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self._at + count
        if end > len(self._data):
            raise _RefusedError(Reply.ERR_INVALID, f"Inconsistent lengths in option {_name(self.number)}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def count(self, each: int) -> int:
        """A 32 bit number of things of at least ``each`` bytes, which must have room in what is left."""
        number = self.u32()
        if number * each > len(self._data) - self._at:
            raise _RefusedError(Reply.ERR_INVALID, f"Inconsistent lengths in option {_name(self.number)}")
        return number

    def name(self) -> bytes:
        """An export name with its length in front."""
        length = self.u32()
        if length > MAX_STRING:
            raise _RefusedError(Reply.ERR_INVALID, f"Invalid name length: {length}")
        name = self.take(length)
        if b"\0" in name:
            raise _RefusedError(Reply.ERR_INVALID, f"Unexpected embedded NUL in option {_name(self.number)}")
        return name

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise _RefusedError(Reply.ERR_INVALID, f"option '{_name(self.number)}' has unexpected length")


def _name(number: int) -> str:
    return _NAMES.get(Option(number), "<unknown>") if number in _NAMES else "<unknown>"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
