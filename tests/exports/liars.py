"""Conversations with an NBD server, damaged with an eye for where the fields are."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.exports import wire

#: Numbers that lengths, offsets and types are likely to be compared with.
_EDGES = (0, 1, 7, 8, 27, 28, 4095, 4096, 4097, 1 << 16, 1 << 25, (1 << 25) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

#: A field of a message: where it begins and how many bytes it has.
Fields = tuple[tuple[int, int], ...]
_OPTION_FIELDS: Fields = ((0, 8), (8, 4), (12, 4), (16, 4), (20, 4), (24, 4))
_REQUEST_FIELDS: Fields = ((0, 4), (4, 2), (6, 2), (8, 8), (16, 8), (24, 4), (28, 4))


def conversation(seed: int, export: str) -> list[bytes]:
    """What a liar sends behind the greeting, message by message. The same seed gives the same bytes."""
    rng = random.Random(seed)
    messages: list[tuple[bytes, Fields]] = [(wire.CLIENT_FLAGS, ((0, 4),))]
    options = [
        wire.option(wire.LIST),
        wire.option(wire.STRUCTURED),
        wire.option(wire.EXTENDED),
        wire.option(wire.STARTTLS),
        wire.contexts(wire.LIST_META, export),
        wire.contexts(wire.SET_META, export, "base:allocation", "qemu:allocation-depth"),
        wire.contexts(wire.SET_META, export, "base:allocation", behind=wire.option(wire.LIST)),
        wire.option(wire.INFO, wire.go(export, 3)[16:]),
    ]
    rng.shuffle(options)
    messages += [(data, _OPTION_FIELDS) for data in options[: rng.randrange(6)]]
    if rng.random() < 0.8:
        entering = wire.go(export) if rng.random() < 0.8 else wire.option(wire.EXPORT_NAME, export.encode())
        messages.append((entering, _OPTION_FIELDS))
        messages += [(_request(rng), _REQUEST_FIELDS) for _ in range(rng.randrange(12))]
    damaged = [data for data, _ in messages]
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(damaged))
        damaged[place] = rng.choice(_DAMAGES)(rng, damaged[place], messages[place][1])
    return damaged


def _request(rng: random.Random) -> bytes:
    command, length = rng.randrange(9), rng.choice((0, 1, 512, 4096, 65536))
    payload = rng.randbytes(length) if command == wire.WRITE else b""
    if rng.random() < 0.1:
        flags = rng.randrange(64)
        return wire.EXTENDED_REQUEST.pack(wire.EXTENDED_MAGIC, flags, command, 5, 0, length) + payload
    # Reads and block status anywhere, changes only in the lower half: the upper one is the witness's.
    reach = 4 << 20 if command in (wire.READ, wire.CACHE, wire.STATUS) else 1 << 20
    return wire.request(command, rng.randrange(reach), length, flags=rng.choice((0, 0, 1, 4, 8, 16)), payload=payload)


def _edge(rng: random.Random, data: bytes, fields: Fields) -> bytes:
    start, size = rng.choice([field for field in fields if sum(field) <= len(data)] or [(0, 0)])
    value = rng.choice((*_EDGES, len(data), rng.getrandbits(8 * size))) + rng.choice((0, 0, -1, 1))
    return data[:start] + (value % (1 << 8 * size)).to_bytes(size, "big") + data[start + size :]


def _flip(rng: random.Random, data: bytes, fields: Fields) -> bytes:
    changed = bytearray(data or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, fields: Fields) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _grow(rng: random.Random, data: bytes, fields: Fields) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(rng.randrange(1, 40)), data, wire.option(wire.LIST)))


def _drop(rng: random.Random, data: bytes, fields: Fields) -> bytes:
    return b""


_DAMAGES: tuple[Callable[[random.Random, bytes, Fields], bytes], ...] = (_edge, _edge, _edge, _flip, _cut, _grow, _drop)
