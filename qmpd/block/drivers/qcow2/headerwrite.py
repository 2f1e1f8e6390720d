"""Replacing the header so that a crash leaves the old one or the new one (spec/qcow2.md section 1.2).

Only a sector is sure to be written whole, and the header of a usual image is longer: the backing name lies behind the
feature names, in the second sector. A name without its format, or cut to the length of another, would show the guest
somebody else's bytes. So everything but the first sector is written to where the old header has nothing; then the
first sector, which says where everything is, changes over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qmpd.block.api import BlockDevice
from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.header import EXT_FEATURE_NAMES, Header
from qmpd.errors import QmpdError
from qmpd.units import SECTOR, align_up


def rewrite(file: BlockDevice, current: Header, new: Header) -> Header:
    """Write ``new`` over ``current``, durable at return; returns it with its places.

    Image lock held. Raises ENOSPC with nothing written, and the file's errors with either header in force.
    """
    plain = new.serialise()
    old = bytes(read_padded(file, 0, current.cluster_size))
    for header, name_offset in _arrangements(current, new):
        content = _content(old, header, name_offset)
        if content is not None and _spares(current, old, content):
            if _write(file, old, content, SECTOR, len(old)):
                file.flush()
            _write(file, old, content, 0, SECTOR)
            file.flush()
            return header.placed(name_offset)
    # No room for both: a small cluster, nearly full. All at once, as others do it.
    _write(file, old, plain + old[len(plain) :], 0, len(old))
    file.flush()
    return new.placed()


def _arrangements(current: Header, new: Header) -> Iterator[tuple[Header, int]]:
    """Ways to place the new header, the most desirable first: (header, offset of the name)."""
    behind = align_up(max(end for _, end in current.areas), 8)
    offsets = [0, behind]
    if new.backing_name == current.backing_name:
        offsets.insert(0, current.name_offset)
    # The feature names are a courtesy to programs that lack a feature. Without them all extensions fit one sector.
    courtesy = [pair for pair in new.extensions if pair[0] != EXT_FEATURE_NAMES]
    for header in (new, replace(new, extensions=tuple(courtesy))):
        for offset in offsets:
            yield header, offset


def _content(old: bytes, header: Header, name_offset: int) -> bytes | None:
    """Cluster 0 with ``header`` in it and all else as it was; None if it does not fit."""
    try:
        raw = header.serialise(name_offset)
    except QmpdError:
        return None
    content = bytearray(old)
    for low, high in header.placed(name_offset).areas:
        content[low:high] = raw[low:high]
    return bytes(content)


def _spares(current: Header, old: bytes, content: bytes) -> bool:
    """Does the content leave alone what the current header uses behind the first sector?"""
    return all(content[max(low, SECTOR) : high] == old[max(low, SECTOR) : high] for low, high in current.areas)


def _write(file: BlockDevice, old: bytes, new: bytes, start: int, end: int) -> bool:
    """Write the sectors of ``[start, end)`` that change; False if there are none."""
    changed = [i for i in range(start, end, SECTOR) if old[i : i + SECTOR] != new[i : i + SECTOR]]
    if changed:
        file.write(changed[0], new[changed[0] : changed[-1] + SECTOR])
    return bool(changed)
