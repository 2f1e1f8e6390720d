"""How far a node is written, and the threshold that is told once."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.api import Perm
from qmpd.block.contract import Checked
from qmpd.block.meter import WriteMeter
from qmpd.block.storage.null import NullStorage
from qmpd.errors import QmpdError

MIB = 1 << 20


def note(meter: WriteMeter, end: int) -> None:
    """As writers do it."""
    if end > meter.alert:
        meter.passed(end)


@given(
    st.lists(
        st.one_of(st.tuples(st.just("write"), st.integers(0, 100)), st.tuples(st.just("watch"), st.integers(0, 100)))
    )
)
def test_behaves_as_if_every_write_was_looked_at(steps: list[tuple[str, int]]) -> None:
    """The comparison that writers make first hides nothing."""
    meter, told = WriteMeter(), []
    highest = threshold = 0
    expected = []
    for what, value in steps:
        if what == "watch":
            threshold = value
            meter.watch(value, lambda exceeded, limit: told.append((exceeded, limit)))
        else:
            highest = max(highest, value)
            if threshold and value > threshold:
                expected.append((value - threshold, threshold))
                threshold = 0
            note(meter, value)
        assert (meter.highest, meter.threshold, told) == (highest, threshold, expected)


def test_one_of_many_threads_tells() -> None:
    """Writers race past the threshold; the client hears of it once."""
    meter, told = WriteMeter(), []
    meter.watch(1, lambda exceeded, limit: told.append(limit))
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        for end in range(2, 200):
            note(meter, end + number)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [1]
    assert meter.highest == 199 + 7


@pytest.fixture
def meter() -> WriteMeter:
    return WriteMeter()


@pytest.fixture
def device(meter: WriteMeter) -> Checked:
    null = NullStorage.open({}, {"size": MIB}, read_only=False)
    return Checked(null, Perm.ALL, node="n", meter=meter)


def test_writes_and_zeroes_count_and_discards_do_not(device: Checked, meter: WriteMeter) -> None:
    """Each by its end."""
    device.write(512, b"x" * 512)
    assert meter.highest == 1024
    device.write_zeroes(4096, 4096)
    assert meter.highest == 8192
    device.discard(65536, 65536)
    device.readinto(MIB - 512, memoryview(bytearray(512)))
    assert meter.highest == 8192
    device.write(0, b"x")
    device.write_zeroes(MIB, 0)
    assert meter.highest == 8192


def test_bytes_written_past_the_device_count(device: Checked, meter: WriteMeter) -> None:
    """Whoever writes to the file itself says so."""
    device.note_written(12345)
    assert meter.highest == 12345


def test_refused_writes_do_not_count(meter: WriteMeter) -> None:
    """Neither without permission nor out of range."""
    null = NullStorage.open({}, {"size": MIB}, read_only=False)
    for device, offset in (
        (Checked(null, Perm.NONE, node="n", meter=meter), 0),
        (Checked(null, Perm.WRITE, node="n", meter=meter), 2 * MIB),
    ):
        with pytest.raises(QmpdError):
            device.write(offset, b"x")
    assert meter.highest == 0
