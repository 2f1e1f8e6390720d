"""Rewriting a header: whatever sectors arrive, the image is on its old backing file or on its new one."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.api import BackingReference
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.drivers.qcow2 import header as hdr
from tests.block.qcow2.support import MemoryFile

SECTOR = 512
REFERENCES = st.none() | st.builds(
    BackingReference, st.text("abcdef/.", min_size=1, max_size=300), st.sampled_from([None, "raw", "qcow2", "a-filter"])
)


class Sectors(MemoryFile):
    """Collects what a power cut may leave: between two flushes each sector is old or new."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.left: list[bytes] = []
        self._old = bytes(content)

    def flush(self) -> None:
        now = bytes(self.content)
        changed = [i for i in range(0, len(now), SECTOR) if now[i : i + SECTOR] != self._old[i : i + SECTOR]]
        for arrived in product((False, True), repeat=len(changed)):
            state = bytearray(self._old)
            for start, is_new in zip(changed, arrived, strict=True):
                if is_new:
                    state[start : start + SECTOR] = now[start : start + SECTOR]
            self.left.append(bytes(state))
        self._old = now


def image(first: BackingReference | None, **options: Any) -> bytes:
    file = MemoryFile()
    create(file, CreateOptions(1 << 20, **options))
    device = Qcow2.open({"file": file}, {}, read_only=False)
    device.change_backing_reference(first)
    return bytes(file.content)


def named(raw: bytes) -> BackingReference | None:
    return hdr.parse(raw, read_only=True).backing


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"version": "v2"}, {"compression_type": "zstd"}])
@given(references=st.lists(REFERENCES, min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_every_torn_state_is_one_of_two(options: dict[str, Any], references: list[BackingReference | None]) -> None:
    """Names and formats come, go and change their length, several times over; no mixture of two is ever found."""
    raw = image(references[0], **options)
    for old, new in pairwise(references):
        file = Sectors(raw)
        Qcow2.open({"file": file}, {}, read_only=False).change_backing_reference(new)
        for state in file.left:
            assert named(state) in (old, new)
        raw = bytes(file.content)
        assert named(raw) == new


def test_the_feature_names_stay_while_there_is_room_for_them() -> None:
    """A header that already has a format keeps all that it says when the name changes."""
    raw = image(BackingReference("old.qcow2", "qcow2"))
    file = MemoryFile(raw)
    Qcow2.open({"file": file}, {}, read_only=False).change_backing_reference(BackingReference("newer.raw", "raw"))
    found = hdr.parse(bytes(file.content), read_only=True)
    assert found.extension(hdr.EXT_FEATURE_NAMES) == hdr.feature_table()


def test_a_full_cluster_is_rewritten_at_once() -> None:
    """Where two names do not fit, the new one takes the place of the old."""
    raw = image(BackingReference("a" * 600, "qcow2"), cluster_size=1024)
    file = MemoryFile(raw)
    wanted = BackingReference("b" * 700, "qcow2")
    Qcow2.open({"file": file}, {}, read_only=False).change_backing_reference(wanted)
    assert named(bytes(file.content)) == wanted
