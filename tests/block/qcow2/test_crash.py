"""A crash at any moment leaves an image that is consistent, and holds what was flushed."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, children, read
from tests.tools import need

LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "version": "v2"},
    {"cluster_size": 4096},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 512, "data_file": "data"},
    {"cluster_size": 4096, "data_file": "data", "data_file_raw": True},
]
KINDS = ("write", "write", "write", "zero", "discard", "grow", "flush", "place")

operations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(1, 255)), min_size=8, max_size=25
)


class PowerCutError(Exception):
    """The machine is gone."""


class Doomed(MemoryFile):
    """A file whose power is cut after a number of writes and flushes."""

    #: Writes and flushes so far, and how many there will be.
    moments = 0
    end = 1 << 60

    def __init__(self, content: bytes = b"", *, journal: bool = False) -> None:
        super().__init__(content, journal=journal)
        #: The moments right before a flush that had something to do: the worst times for a power cut.
        self.fullest: list[int] = []
        #: The file whose moments count: of an image with a data file, the image file.
        self.leader = self
        #: The data file, if there is one.
        self.data: Doomed | None = None

    def _live(self) -> None:
        if self.leader.moments >= self.leader.end:
            raise PowerCutError
        self.leader.moments += 1

    def write(self, offset: int, data: Any) -> None:
        self._live()
        super().write(offset, data)

    def flush(self) -> None:
        if self.pending:
            self.leader.fullest.append(self.leader.moments)
        self._live()
        super().flush()


def states_of(image: Qcow2, file: Doomed, operations: list[tuple[str, float, float, int]], unit: int) -> list[bytes]:
    """Run until the power is cut; returns the contents that the guest may find afterwards."""
    now = bytearray(image.length)
    states = [bytes(now)]
    try:
        for kind, where, much, fill in operations:
            offset = int(where * len(now))
            end = min(len(now), offset + 1 + int(much * 4 * unit))
            # Both the old and the new state count from before the request on: it may be cut in the middle.
            if kind == "grow":
                size = min(len(now) + int(much * 6 * unit) // 512 * 512, 60 * unit)
                states.append(bytes(now) + bytes(size - len(now)))
                image.truncate(size)
            elif kind == "flush":
                image.flush()
                states = [bytes(now)]
                continue
            else:
                if kind in ("place", "discard"):
                    offset, end = offset // unit * unit, min(-(-end // unit) * unit, len(now))
                if end <= offset:
                    continue
                after = bytearray(now)
                after[offset:end] = bytes([0 if kind in ("zero", "discard") else fill]) * (end - offset)
                states.append(bytes(after))
                request(image, file, kind, offset, end, fill)
            now = bytearray(states[-1])
    except PowerCutError:
        pass
    return states


def run_until(
    end: int, layout: dict[str, Any], operations: list[tuple[str, float, float, int]]
) -> tuple[Doomed, list[bytes]]:
    """A new image, changed until its file has seen ``end`` writes and flushes."""
    unit = layout["cluster_size"]
    file = Doomed(journal=True)
    if "data_file" in layout:
        file.data = Doomed(b"" if "data_file_raw" in layout else b"\xee" * 5 * unit, journal=True)
        file.data.leader = file
    create(file, CreateOptions(10 * unit, **layout), file.data)
    image = Qcow2.open(children(file, file.data), {"l2-cache-size": 2 * unit}, read_only=False)
    file.moments, file.end, file.fullest = 0, end, []
    return file, states_of(image, file, operations, unit)


def request(image: Qcow2, file: Doomed, kind: str, offset: int, end: int, fill: int) -> None:
    if kind == "write":
        image.write(offset, bytes([fill]) * (end - offset))
    elif kind == "zero":
        image.write_zeroes(offset, end - offset)
    elif kind == "discard":
        image.discard(offset, end - offset)
    else:
        with image.place(offset, end - offset) as runs:
            for run in runs:
                (file.data or file).write(run.host, bytes([fill]) * run.length)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
@given(operations=operations, moment=st.floats(0, 1), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_power_cut_never_damages_an_image(
    tmp_path: Path, layout: dict[str, Any], operations: list[tuple[str, float, float, int]], moment: float, seed: int
) -> None:
    """Any subset of the unflushed writes may survive: qemu-img check finds leaks at most, and every byte is the flushed
    one or one written since."""
    need("qemu-img")
    random = Random(seed)
    if "data_file" in layout:
        layout = layout | {"data_file": str(tmp_path / "data")}
    operations = [*operations, ("flush", 0.0, 0.0, 1)]
    file, _ = run_until(1 << 60, layout, operations)
    end = random.choice(file.fullest) if random.random() < 0.8 and file.fullest else int(moment * file.moments)
    file, states = run_until(end, layout, operations)
    odds = random.choice((0.0, 0.4, 0.5, 0.6, 0.8))
    for _ in range(4):
        path = tmp_path / "image.qcow2"
        path.write_bytes(file.after_crash(iter(lambda: random.random() < odds, None)))
        data = None
        if file.data is not None:
            data = MemoryFile(file.data.after_crash(iter(lambda: random.random() < odds, None)))
            (tmp_path / "data").write_bytes(data.content)
        check_clean(path, leaks=True)
        if data is not None and "data_file_raw" in layout:
            check_bytes(bytes(data.content), states)
        check_content(path.read_bytes(), states, data)


def check_content(raw: bytes, states: list[bytes], data: MemoryFile | None = None) -> None:
    """Every byte is that of some state, and the image can be written."""
    found = Qcow2.open(children(MemoryFile(raw), data), {}, read_only=False)
    assert found.length in {len(state) for state in states}
    check_bytes(read(found, 0, found.length), states)
    found.write(0, b"still writable")
    found.close()


def check_bytes(seen: bytes, states: list[bytes]) -> None:
    """Every byte is that of some state."""
    content = np.frombuffer(seen, np.uint8)
    known = np.zeros(len(content), np.bool_)
    for state in states:
        padded = state[: len(content)].ljust(len(content), b"\0")
        known |= content == np.frombuffer(padded, np.uint8)
    assert known.all(), f"byte {int((~known).argmax())} is neither old nor new"


def test_an_image_whose_header_could_not_be_written_takes_no_more_writes() -> None:
    """Nobody knows whether the header points at the old table or the new one, so nothing may rely on either."""

    class Failing(MemoryFile):
        armed = False

        def write(self, offset: int, data: Any) -> None:
            if self.armed and offset == 36:
                raise QmpdError("Input/output error")
            super().write(offset, data)

    file = Failing()
    create(file, CreateOptions(1 << 20, cluster_size=512))
    image = Qcow2.open({"file": file}, {}, read_only=False)
    file.armed = True
    with pytest.raises(QmpdError):
        image.truncate(2 << 20)
    file.armed = False
    with pytest.raises(QmpdError, match="takes no more writes"):
        image.write(0, b"x")
    assert read(image, 0, 512) == bytes(512)


def unclean(tail: int) -> bytes:
    """An image with its dirty bit set, whose last cluster in use lies ``tail`` clusters before the refcount table."""
    size = 12 << 20
    file = MemoryFile()
    create(file, CreateOptions(size, cluster_size=512))
    image = Qcow2.open({"file": file}, {}, read_only=False)
    image.write(0, b"\7" * (8600 << 10))
    image.flush()
    table = int.from_bytes(file.content[48:56], "big")
    keep = min(run.offset + table - tail * 512 - run.host for run in image.map(0, size) if 0 <= run.host < table)
    image.discard(keep, size - keep)
    image.close()
    file.content[79] |= 1
    return bytes(file.content)


def test_a_repair_that_is_cut_short_can_be_repeated() -> None:
    """Rebuilding the refcounts never writes over the old refcount table, without which nobody would open the image."""
    raw = unclean(40)
    file = Doomed(raw)
    Qcow2.open({"file": file}, {}, read_only=False).close()
    before = read(Qcow2.open({"file": MemoryFile(raw)}, {}, read_only=True), 0, 1 << 20)
    for moment in range(1, file.moments, 6):
        doomed = Doomed(raw)
        doomed.end = moment
        with pytest.raises(PowerCutError):
            Qcow2.open({"file": doomed}, {}, read_only=False)
        again = Qcow2.open({"file": MemoryFile(bytes(doomed.content))}, {}, read_only=False)
        assert read(again, 0, 1 << 20) == before
