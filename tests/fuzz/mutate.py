"""Damage with an eye for the structure: wrong values where values are, not noise where nobody looks."""

from __future__ import annotations

import random
import struct
from typing import Final

from tests.fuzz.seeds import Seed

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
_NUMBERS: Final = (0, 1, 2, 3, 8, 15, 16, 63, 64, 255, 511, 512, 4096, 65535, 65536, 1 << 20, 8 << 20, (1 << 31) - 1)
_BIG: Final = (1 << 31, (1 << 32) - 1, 1 << 40, (1 << 56) - 512, 1 << 62, (1 << 63) - 512, 1 << 63, (1 << 64) - 1)


def mutated(seed: Seed, rng: random.Random) -> bytes:
    """The image with one to four things wrong (or, seldom, nothing)."""
    raw = bytearray(seed.raw)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4)) or rng.randrange(2)):
        rng.choice(_WAYS)(seed, raw, rng)
    if rng.random() < 0.08:
        _cut(seed, raw, rng)
    return bytes(raw)


def _number(raw: bytearray, width: int, old: int, seed: Seed, rng: random.Random) -> int:
    way = rng.randrange(6)
    if way == 0:
        value = old ^ 1 << rng.randrange(8 * width)
    elif way == 1:
        value = old + rng.choice((-512, -2, -1, 1, 2, 512, seed.cluster_size))
    elif way == 2:
        value = rng.choice(_BIG)
    elif way == 3:
        value = _pointer(raw, seed, rng)
    else:
        value = rng.choice(_NUMBERS)
    return value & ((1 << 8 * width) - 1)


def _pointer(raw: bytearray, seed: Seed, rng: random.Random) -> int:
    """A cluster of the file, or just behind it."""
    return rng.randrange(len(raw) // seed.cluster_size + 3) * seed.cluster_size


def _field(seed: Seed, raw: bytearray, rng: random.Random) -> None:
    offset, form = rng.choice(seed.fields)
    (old,) = struct.unpack_from(form, raw, offset)
    struct.pack_into(form, raw, offset, _number(raw, struct.calcsize(form), old, seed, rng))


def _word(seed: Seed, raw: bytearray, rng: random.Random) -> None:
    table, count = rng.choice(seed.tables)
    offset = table + 8 * rng.randrange(max(1, count))
    (old,) = struct.unpack_from(">Q", raw, offset)
    if rng.random() < 0.6:
        value = _pointer(raw, seed, rng) | rng.choice((0, COPIED, COPIED, COMPRESSED, 1, COPIED | 1, COPIED | 512))
        if value & COMPRESSED:
            value += rng.randrange(seed.cluster_size)
    else:
        value = _number(raw, 8, old, seed, rng)
    struct.pack_into(">Q", raw, offset, value)


def _bytes(seed: Seed, raw: bytearray, rng: random.Random) -> None:
    start, length = rng.choice(seed.areas)
    at = start + rng.randrange(max(1, length))
    width = rng.choice((1, 1, 2, 4))
    raw[at : at + width] = rng.choice((b"\0" * width, b"\xff" * width, rng.randbytes(width)))


def _same(seed: Seed, raw: bytearray, rng: random.Random) -> None:
    """One word of a table over another: two entries for one cluster."""
    (one, n), (other, m) = rng.choice(seed.tables), rng.choice(seed.tables)
    source, target = one + 8 * rng.randrange(max(1, n)), other + 8 * rng.randrange(max(1, m))
    raw[target : target + 8] = raw[source : source + 8]


def _cut(seed: Seed, raw: bytearray, rng: random.Random) -> None:
    length = rng.choice((0, 40, 512, len(raw) - 512, len(raw) - 100, rng.randrange(len(raw)), len(raw) + 700))
    del raw[max(0, length) :]
    raw.extend(bytes(max(0, length - len(raw))))


_WAYS: Final = (_field, _field, _word, _word, _word, _bytes, _bytes, _same)
