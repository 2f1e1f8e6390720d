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
from tests.block.qcow2.support import MemoryFile, check_clean, read
from tests.tools import need

LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "version": "v2"},
    {"cluster_size": 4096},
    {"cluster_size": 16384, "extended_l2": True},
]
KINDS = ("write", "write", "write", "zero", "discard", "grow", "flush", "place")

operations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(1, 255)), min_size=3, max_size=25
)


class PowerCutError(Exception):
    """The machine is gone."""


class Doomed(MemoryFile):
    """A file whose power is cut after a number of writes and flushes."""

    left = 1 << 60

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerCutError

    def write(self, offset: int, data: Any) -> None:
        self._live()
        super().write(offset, data)

    def flush(self) -> None:
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
                file.write(run.host, bytes([fill]) * run.length)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
@given(operations=operations, writes=st.integers(1, 120), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_power_cut_never_damages_an_image(
    tmp_path: Path, layout: dict[str, Any], operations: list[tuple[str, float, float, int]], writes: int, seed: int
) -> None:
    """Any subset of the unflushed writes may survive: qemu-img check finds leaks at most, and every byte is the flushed
    one or one written since."""
    need("qemu-img")
    file, unit = Doomed(journal=True), layout["cluster_size"]
    create(file, CreateOptions(10 * unit, **layout))
    image = Qcow2.open({"file": file}, {"l2-cache-size": 2 * unit}, read_only=False)
    file.left = writes
    states = states_of(image, file, operations, unit)
    random = Random(seed)
    odds = random.choice((0.0, 0.3, 0.7, 1.0))
    path = tmp_path / "image.qcow2"
    path.write_bytes(file.after_crash(iter(lambda: random.random() < odds, None)))
    check_clean(path, leaks=True)
    found = Qcow2.open({"file": MemoryFile(path.read_bytes())}, {}, read_only=False)
    assert found.length in {len(state) for state in states}
    content = np.frombuffer(read(found, 0, found.length), np.uint8)
    known = np.zeros(len(content), np.bool_)
    for state in states:
        padded = state[: len(content)].ljust(len(content), b"\0")
        known |= content == np.frombuffer(padded, np.uint8)
    assert known.all(), f"byte {int((~known).argmax())} is neither old nor new"
    found.write(0, b"still writable")


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
