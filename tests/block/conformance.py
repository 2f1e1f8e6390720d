"""What every driver must do, whatever it is: a suite that each driver's test file imports and feeds with a factory.

Subclass :class:`Conformance` in a test module, with :meth:`Conformance.create` (a new device of a given length, all
zeros) and, for drivers that store, :meth:`Conformance.reopen`. Everything goes through the checking wrapper, so a
driver's malformed answers fail the suite too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.api import BlockDevice, Buffer, Driver, Perm
from qmpd.block.batch import Batch
from qmpd.block.contract import Checked
from qmpd.block.extents import RunKind
from qmpd.errors import Kind, QmpdError
from qmpd.units import KIB, MIB

LENGTH = 3 * MIB + 512
"""No multiple of any cluster size."""


class Conformance:
    """The cases. ``device`` is fresh for each of them."""

    #: Does the device keep what is written?
    stores = True
    #: Can its length be changed?
    resizes = True

    def create(self, directory: Path, length: int) -> Driver:
        """A new driver over new files in ``directory``, read-write, ``length`` bytes of zeros."""
        raise NotImplementedError

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        """Close and open again: what is stored must come back."""
        raise NotImplementedError

    @pytest.fixture
    def driver(self, tmp_path: Path) -> Iterator[Driver]:
        driver = self.create(tmp_path, LENGTH)
        yield driver
        driver.close()

    @pytest.fixture
    def device(self, driver: Driver) -> Checked:
        return checked(driver)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def test_length_and_info_agree(self, driver: Driver) -> None:
        """The device is as long as asked for, and says so in queries."""
        assert driver.length == LENGTH
        assert driver.info().virtual_size == LENGTH
        assert driver.info().format == driver.format_name

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (-512, 1024), (1 << 63, 1), (1 << 70, 512)])
    def test_nothing_is_read_or_written_outside_of_addresses(self, device: Checked, offset: int, length: int) -> None:
        """Offsets that no device has are the caller's bug, for every request."""
        requests = [
            lambda: read(device, offset, length),
            lambda: device.write(offset, bytes(length)),
            lambda: device.write_zeroes(offset, length),
            lambda: device.discard(offset, length),
            lambda: device.map(offset, length),
        ]
        for request in requests:
            with pytest.raises(QmpdError) as caught:
                request()
            assert caught.value.kind is Kind.RANGE

    @pytest.mark.parametrize("offset", [LENGTH - 1, LENGTH, LENGTH + 4096])
    def test_past_the_end_is_out_of_range_or_zeros(self, device: Checked, offset: int) -> None:
        """A device of fixed length refuses; one that grows with writes reads zeros there."""
        if device.growable:
            assert read(device, offset, 2) == bytes(2)
            return
        for request in (lambda: read(device, offset, 2), lambda: device.write(offset, b"xy")):
            with pytest.raises(QmpdError) as caught:
                request()
            assert caught.value.kind is Kind.RANGE

    @pytest.mark.parametrize("offset", [0, 1, LENGTH])
    def test_requests_for_nothing_do_nothing(self, device: Checked, offset: int) -> None:
        """Length 0 is fine anywhere on the device, its end included."""
        assert read(device, offset, 0) == b""
        device.write(offset, b"")
        device.write_zeroes(offset, 0)
        device.discard(offset, 0)
        assert device.length == LENGTH
        assert read(device, 0, LENGTH) == bytes(LENGTH)

    def test_the_last_byte_is_the_last(self, device: Checked) -> None:
        """Writing up to the end leaves the length alone."""
        device.write(LENGTH - 1, b"z")
        assert device.length == LENGTH
        assert read(device, LENGTH - 2, 2) == (b"\0z" if self.stores else b"\0\0")

    # -- content -------------------------------------------------------------------------------------------------------

    def test_a_new_device_is_zeros(self, device: Checked) -> None:
        """Also where the buffer was full of something else."""
        assert read(device, 0, LENGTH) == bytes(LENGTH)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_buffer_can_be_written(self, device: Checked, kind: type) -> None:
        """bytes, bytearray and memoryview mean the same."""
        device.write(1000, kind(b"payload"))
        assert read(device, 998, 11) == self.kept(b"\0\0payload\0\0")

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (511, 2), (4095, 4098), (64 * KIB - 1, 2), (64 * KIB, 64 * KIB), (100, MIB), (0, LENGTH)],
    )
    def test_what_is_written_is_read(self, device: Checked, offset: int, length: int) -> None:
        """At any alignment, and without touching the neighbours."""
        data = noise(length, offset)
        device.write(offset, data)
        assert read(device, offset, length) == self.kept(data)
        assert read(device, 0, offset) == bytes(offset)
        rest = offset + length
        assert read(device, rest, LENGTH - rest) == bytes(LENGTH - rest)

    def test_the_later_of_overlapping_writes_wins(self, device: Checked) -> None:
        """Three writes over each other."""
        expected = bytearray(LENGTH)
        for seed, (offset, length) in enumerate([(60 * KIB, 10 * KIB), (64 * KIB, 2 * KIB), (63 * KIB + 7, 90 * KIB)]):
            data = noise(length, seed)
            device.write(offset, data)
            expected[offset : offset + length] = data
        assert read(device, 0, LENGTH) == self.kept(bytes(expected))

    @pytest.mark.parametrize("unmap", [True, False])
    @pytest.mark.parametrize(("offset", "length"), [(0, LENGTH), (64 * KIB, 64 * KIB), (1, MIB), (70_000, 10)])
    def test_write_zeroes_zeroes_exactly_the_range(
        self, device: Checked, offset: int, length: int, unmap: bool
    ) -> None:
        """Whatever the alignment and whether space may be given up."""
        expected = bytearray(noise(LENGTH, 5))
        device.write(0, expected)
        device.write_zeroes(offset, length, unmap=unmap)
        expected[offset : offset + length] = bytes(length)
        assert read(device, 0, LENGTH) == self.kept(bytes(expected))
        assert device.length == LENGTH

    def test_zeroes_can_be_written_over(self, device: Checked) -> None:
        """A range that was zeroed takes data again, byte by byte."""
        device.write(0, noise(MIB, 1))
        device.write_zeroes(0, MIB)
        device.write(4097, b"again")
        assert read(device, 4096, 7) == self.kept(b"\0again\0")

    def test_discard_touches_the_range_only(self, device: Checked) -> None:
        """The content of the range is anybody's guess, but the neighbours stay and the range can be used again."""
        data = noise(LENGTH, 2)
        device.write(0, data)
        device.discard(64 * KIB + 100, MIB)
        assert read(device, 0, 64 * KIB + 100) == self.kept(data[: 64 * KIB + 100])
        behind = 64 * KIB + 100 + MIB
        assert read(device, behind, LENGTH - behind) == self.kept(data[behind:])
        device.write(64 * KIB, data[64 * KIB : 2 * MIB])
        assert read(device, 0, LENGTH) == self.kept(data)

    @settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from("wzd"), st.integers(0, LENGTH - 1), st.integers(0, 300 * KIB)), max_size=12)
    )
    def test_any_sequence_agrees_with_a_shadow(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
    ) -> None:
        """Random writes, zeroes and discards leave what the same steps leave in memory; map tells no lies."""
        shadow = bytearray(LENGTH)
        driver = self.create(tmp_path_factory.mktemp("shadow"), LENGTH)
        with contextlib.closing(driver):
            device = checked(driver)
            for number, (verb, offset, length) in enumerate(steps):
                length = min(length, LENGTH - offset)
                if verb == "w":
                    shadow[offset : offset + length] = data = noise(length, number)
                    device.write(offset, data)
                elif verb == "z":
                    shadow[offset : offset + length] = bytes(length)
                    device.write_zeroes(offset, length)
                else:
                    device.discard(offset, length)
                    shadow[offset : offset + length] = read(device, offset, length)
            assert read(device, 0, LENGTH) == self.kept(bytes(shadow))
            self.check_map(device, 0, LENGTH)

    def test_many_requests_at_once_are_so_many_requests(self, device: Checked) -> None:
        """Of a batch, what is not left to do has been done: reads as by readinto, writes as by write."""
        shadow, rng = bytearray(noise(LENGTH, 1)), random.Random(1)
        device.write(0, shadow)
        device.write_zeroes(MIB, 256 * KIB)
        shadow[MIB : MIB + 256 * KIB] = bytes(256 * KIB)
        for turn in range(6):
            places = [*sorted(rng.sample(range(0, LENGTH, 16 * KIB), 12)), LENGTH - 600]
            writes = [(at, noise(rng.randrange(1, min(16 * KIB, LENGTH - at)), turn)) for at in places]
            batch = Batch([at for at, _ in writes], [memoryview(data) for _, data in writes])
            left = device.write_many(batch)
            for index in left:
                device.write(*writes[index])
            for at, data in writes:
                shadow[at : at + len(data)] = data
            reads = [
                (at := rng.randrange(LENGTH), bytearray(rng.randrange(1, min(200 * KIB, LENGTH - at) + 1)))
                for _ in range(9)
            ]
            left = device.read_many(Batch([at for at, _ in reads], [memoryview(buffer) for _, buffer in reads]))
            for index, (at, buffer) in enumerate(reads):
                if index not in left:
                    assert buffer == self.kept(bytes(shadow[at : at + len(buffer)]))
        assert read(device, 0, LENGTH) == self.kept(bytes(shadow))

    @pytest.mark.parametrize("offset", [-1, LENGTH - 1, LENGTH])
    def test_a_batch_with_a_request_out_of_bounds_is_left(self, device: Checked, offset: int) -> None:
        """It is for the single request to say so; a device that grows may do it."""
        batch = Batch([0, offset], [memoryview(bytearray(2)), memoryview(bytearray(2))])
        if not device.growable or offset < 0:
            assert list(device.read_many(batch)) == list(device.write_many(batch)) == [0, 1]

    def test_a_batch_without_permission_is_left(self, driver: Driver) -> None:
        """A parent that may not write does not write."""
        batch = Batch([0], [memoryview(b"no")])
        device = checked(driver, Perm.CONSISTENT_READ)
        assert list(device.write_many(batch)) == [0]
        assert read(device, 0, 2) == bytes(2)

    # -- where it is ---------------------------------------------------------------------------------------------------

    def test_map_tells_the_truth(self, device: Checked) -> None:
        """Over data, zeros and untouched parts, from any offset: DATA is where map says, ZERO reads as zeros."""
        device.write(64 * KIB, noise(200 * KIB, 1))
        device.write_zeroes(128 * KIB, 64 * KIB)
        device.write(2 * MIB, noise(1, 1))
        for offset, length in [(0, LENGTH), (1, 3), (65 * KIB, 100 * KIB), (LENGTH - 1, 1)]:
            self.check_map(device, offset, length)

    def test_direct_is_the_same_place(self, device: Checked) -> None:
        """Where a file is offered, its bytes are the device's bytes."""
        device.write(1000, noise(5000, 3))
        found = device.direct(900, 5200)
        if found is not None:
            storage, position = found
            assert read(storage, position, 5200) == read(device, 900, 5200)

    def test_place_publishes_what_was_filled(self, device: Checked) -> None:
        """Bytes put at the places are the device's content afterwards, the cut-off last unit included."""
        unit = device.placement_unit
        if unit is None:
            with pytest.raises(QmpdError):
                device.place(0, LENGTH)
            return
        device.write(0, noise(LENGTH, 1))
        start = unit
        data = noise(LENGTH - start, 2)
        with device.place(start, len(data)) as runs:
            fill(device, runs, data)
        assert read(device, 0, start) == noise(LENGTH, 1)[:start]
        assert read(device, start, len(data)) == data

    def test_place_given_up_changes_nothing(self, device: Checked) -> None:
        """After an exception readers see the old content, and the device goes on working."""
        unit = device.placement_unit
        if unit is None:
            return
        old = noise(unit, 1)
        device.write(0, old)
        with pytest.raises(RuntimeError, match="no more"), device.place(0, 4 * unit) as runs:  # noqa: PT012
            fill(device, runs, noise(4 * unit, 2))
            raise RuntimeError("no more")
        assert read(device, 0, 4 * unit) == old + bytes(3 * unit)
        device.write(unit, old)
        assert read(device, 0, 3 * unit) == old + old + bytes(unit)

    # -- length --------------------------------------------------------------------------------------------------------

    def test_growth_is_zeros_and_shrinking_forgets(self, device: Checked) -> None:
        """New bytes are zeros, also where there was something before the device was made shorter."""
        if not self.resizes:
            with pytest.raises(QmpdError):
                device.truncate(LENGTH * 2)
            return
        device.write(0, noise(LENGTH, 4))
        device.truncate(MIB)
        assert device.length == MIB
        device.truncate(2 * LENGTH)
        assert device.length == 2 * LENGTH
        assert read(device, 0, MIB) == noise(LENGTH, 4)[:MIB]
        assert read(device, MIB, 2 * LENGTH - MIB) == bytes(2 * LENGTH - MIB)
        self.check_map(device, 0, 2 * LENGTH)

    # -- together and over time ----------------------------------------------------------------------------------------

    def test_threads_do_not_disturb_each_other(self, device: Checked) -> None:
        """Four writers with ranges side by side, finer than any cluster, and readers among them."""
        expected = bytearray(LENGTH)
        unit = 7 * KIB

        def work(worker: int) -> None:
            for index in range(worker, LENGTH // unit, 4):
                data = noise(unit, index)
                device.write(index * unit, data)
                expected[index * unit : (index + 1) * unit] = data
                assert read(device, index * unit, unit) == self.kept(data)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert read(device, 0, LENGTH) == self.kept(bytes(expected))

    def test_what_was_flushed_is_there_after_reopening(self, tmp_path: Path) -> None:
        """Content and length survive."""
        if not self.stores:
            return
        driver = self.create(tmp_path, LENGTH)
        device = checked(driver)
        device.write(100_000, noise(MIB, 9))
        device.write_zeroes(200_000, 100_000)
        device.flush()
        before = read(device, 0, LENGTH)
        again = self.reopen(tmp_path, driver)
        with contextlib.closing(again):
            assert again.length == LENGTH
            assert read(checked(again), 0, LENGTH) == before

    def test_close_twice_is_fine(self, tmp_path: Path) -> None:
        """Closing is idempotent."""
        driver = self.create(tmp_path, LENGTH)
        driver.close()
        driver.close()

    def check_map(self, device: BlockDevice, offset: int, length: int) -> None:
        """Does the map of the range agree with what can be read there?"""
        check_map(device, offset, length)

    def kept(self, data: bytes) -> bytes:
        """What is left of ``data`` once written."""
        return data if self.stores else bytes(len(data))


def checked(driver: BlockDevice, perm: Perm = Perm.ALL) -> Checked:
    """The device as a parent with all permissions sees it."""
    return Checked(driver, perm, node="under-test")


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """Read into a buffer that is not zero to begin with."""
    buffer = bytearray(b"\xee") * length
    device.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def noise(length: int, seed: int) -> bytes:
    """Reproducible bytes without a pattern, none of them in long runs of zeros."""
    return random.Random(seed).randbytes(length)


def fill(device: BlockDevice, runs: object, data: Buffer) -> None:
    """Put ``data`` at the places that place() gave."""
    child = device.data_child
    assert child is not None
    view, start = memoryview(data), runs.start  # type: ignore[attr-defined]
    for offset, length, kind, host in runs:  # type: ignore[attr-defined]
        assert kind == RunKind.DATA
        part = view[offset - start : offset - start + length]
        found = child.direct(host, len(part))
        if found is not None:
            found[0].write(found[1], part)
        else:
            child.write(host, part)


def check_map(device: BlockDevice, offset: int, length: int) -> None:
    """Ask for the whole range and compare each run with the content."""
    end = offset + length
    while offset < end:
        runs = device.map(offset, end - offset)
        for start, count, kind, host in runs:
            content = read(device, start, count)
            if kind in (RunKind.ZERO, RunKind.UNALLOCATED):
                assert content == bytes(count)
            elif kind == RunKind.DATA:
                assert read(device.data_child or device, host, count) == content
        offset = runs.end
