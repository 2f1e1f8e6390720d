"""Random requests against a bytearray: whatever the format's parameters, the guest reads what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.api import BackingReference
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.extents import RunKind
from tests.block.qcow2.support import MemoryFile, check_clean, children, new_image, read
from tests.tools import need

LAYOUTS: list[dict[str, Any]] = [
    *({"cluster_size": 512, "refcount_bits": bits} for bits in (1, 2, 4, 8, 16, 32, 64)),
    {"cluster_size": 512, "version": "v2"},
    {"cluster_size": 4096},
    {"cluster_size": 65536, "version": "v2"},
    {"cluster_size": 65536},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 2 << 20},
    {"cluster_size": 512, "data_file": "data"},
    {"cluster_size": 65536, "data_file": "data"},
    {"cluster_size": 4096, "data_file": "data", "data_file_raw": True},
    {"cluster_size": 16384, "extended_l2": True, "data_file": "data"},
    {"cluster_size": 16384, "extended_l2": True, "data_file": "data", "data_file_raw": True},
]
KINDS = ("write", "write", "write", "zero", "zero-keep", "discard", "place", "resize", "flush", "reopen", "swap-name")

operations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=25
)


class Shadow:
    """The image under test next to the bytes it must hold."""

    def __init__(self, layout: dict[str, Any], below: bytes | None) -> None:
        self.unit = layout["cluster_size"]
        self.limit = 24 * self.unit
        size = 10 * self.unit // 512 * 512
        self.raw = bool(layout.get("data_file_raw"))
        if self.raw:
            below = None  # the data file says it all
        self.below = MemoryFile(below) if below is not None else None
        extra = {"backing_file": "below.raw", "backing_fmt": "raw"} if below is not None else {}
        # What a data file has before is never seen.
        self.data = MemoryFile(b"" if self.raw else b"\xee" * 30 * self.unit) if "data_file" in layout else None
        self.file, self.image = new_image(size=size, data=self.data, **layout, **extra)
        self.image.attach("backing", self.below)
        self.bytes = bytearray((below or b"")[:size].ljust(size, b"\0"))

    def apply(self, kind: str, where: float, much: float, fill: int) -> None:
        size = len(self.bytes)
        offset = int(where * size)
        if fill % 2:
            offset = offset // 512 * 512
        length = min(size - offset, 1 + int(much * much * 6 * self.unit))
        if kind == "reopen":
            self.image.close()
            below = children(self.file, self.data)
            self.image = Qcow2.open(below, {"l2-cache-size": 4 * self.unit}, read_only=False)
            self.image.attach("backing", self.below)
        elif kind == "flush":
            self.image.flush()
        elif kind == "swap-name":
            self.image.change_backing_reference(
                BackingReference("./" * (fill // 2) + "below.raw", "raw") if self.below is not None else None
            )
        elif kind == "resize":
            self._resize(int(much * self.limit) // 512 * 512)
        elif length > 0:
            self._change(kind, offset, length, fill)

    def _resize(self, size: int) -> None:
        self.image.truncate(size)
        old = len(self.bytes)
        self.bytes = self.bytes[:size] + bytes(max(0, size - old))

    def _change(self, kind: str, offset: int, length: int, fill: int) -> None:
        end = offset + length
        if kind == "write":
            self.image.write(offset, bytes([fill]) * length)
            self.bytes[offset:end] = bytes([fill]) * length
        elif kind.startswith("zero"):
            self.image.write_zeroes(offset, length, unmap=kind == "zero")
            self.bytes[offset:end] = bytes(length)
        elif kind == "discard":
            before = bytes(self.bytes[offset:end])
            self.image.discard(offset, length)
            after = read(self.image, offset, length)
            # Discarded bytes keep their value or become zero; never anything else.
            assert all(new in (0, old) for old, new in zip(before, after, strict=True))
            self.bytes[offset:end] = after
        else:
            self._place(offset // self.unit * self.unit, end, fill)

    def _place(self, offset: int, end: int, fill: int) -> None:
        end = min(-(-end // self.unit) * self.unit, len(self.bytes))
        with self.image.place(offset, end - offset) as runs:
            assert (runs.start, runs.end) == (offset, end)
            for run in runs:
                assert run.kind == RunKind.DATA
                (self.data or self.file).write(run.host, bytes([fill]) * run.length)
        self.bytes[offset:end] = bytes([fill]) * (end - offset)

    def verify(self) -> None:
        assert self.image.length == len(self.bytes)
        if self.bytes:
            assert read(self.image, 0, len(self.bytes)) == self.bytes
        if self.raw and self.data is not None:
            assert self.data.content == self.bytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
@given(operations=operations, overlay=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_requests_leaves_a_clean_image_with_the_right_bytes(
    tmp_path: Path, layout: dict[str, Any], operations: list[tuple[str, float, float, int]], overlay: bool
) -> None:
    """Reads agree with the shadow all along, and qemu-img check finds neither errors nor leaks at the end."""
    need("qemu-img")
    below = bytes(range(1, 256)) * (7 * layout["cluster_size"] // 255) if overlay else None
    if "data_file" in layout:
        layout = layout | {"data_file": str(tmp_path / "data")}
    shadow = Shadow(layout, below)
    for operation in operations:
        shadow.apply(*operation)
    shadow.verify()
    shadow.image.close()
    path = tmp_path / "image.qcow2"
    path.write_bytes(shadow.file.content)
    if shadow.data is not None:
        (tmp_path / "data").write_bytes(shadow.data.content)
    (tmp_path / "below.raw").write_bytes(below or b"")
    check_clean(path)
