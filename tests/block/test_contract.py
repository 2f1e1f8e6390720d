"""The wrapper that holds callers and drivers to their contract."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qmpd.block.api import BlockDevice, Buffer, Driver, Perm
from qmpd.block.contract import BrokenContractError, Checked
from qmpd.block.extents import Run, RunKind, Runs
from qmpd.errors import Kind, QmpdError
from qmpd.units import MAX_LENGTH

LENGTH = 1 << 20
UNIT = 4096


class Fake(Driver):
    """Records requests; answers map and place with whatever the test put there; fails on demand."""

    format_name = "fake"

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.runs: Runs | None = None
        self.error: Exception | None = None
        self.grows = False
        self.unit: int | None = UNIT
        self.left_with: BaseException | None = None

    def _note(self, name: str) -> None:
        self.requests.append(name)
        if self.error is not None:
            raise self.error

    @property
    def length(self) -> int:
        return LENGTH

    @property
    def growable(self) -> bool:
        return self.grows

    @property
    def placement_unit(self) -> int | None:
        return self.unit

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._note("readinto")

    def write(self, offset: int, data: Buffer) -> None:
        self._note("write")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._note("write_zeroes")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard")

    def flush(self) -> None:
        self._note("flush")

    def truncate(self, length: int) -> None:
        self._note("truncate")

    def map(self, offset: int, length: int) -> Runs:
        self._note("map")
        return Runs.single(offset, length, RunKind.DATA, 0) if self.runs is None else self.runs

    @contextmanager
    def place(self, offset: int, length: int) -> Iterator[Runs]:
        self._note("place")
        try:
            yield Runs.single(offset, length, RunKind.DATA, 0) if self.runs is None else self.runs
        except BaseException as error:
            self.left_with = error
            raise

    def close(self) -> None:
        pass


@pytest.fixture
def fake() -> Fake:
    return Fake()


Request = Callable[[BlockDevice], Any]


def placed(device: BlockDevice, offset: int = 0, length: int = UNIT) -> None:
    """Place and be content with it."""
    with device.place(offset, length):
        pass


REQUESTS: dict[str, Request] = {
    "readinto": lambda d: d.readinto(0, memoryview(bytearray(8))),
    "write": lambda d: d.write(0, b"x"),
    "write_zeroes": lambda d: d.write_zeroes(0, 1),
    "discard": lambda d: d.discard(0, 1),
    "flush": lambda d: d.flush(),
    "truncate": lambda d: d.truncate(512),
    "map": lambda d: d.map(0, 1),
    "place": placed,
}

#: What each request needs: any one of these bits. Reading needs none (a job reads from top without).
NEEDS: dict[str, Perm] = {
    "readinto": Perm.NONE,
    "write": Perm.WRITE | Perm.WRITE_UNCHANGED,
    "write_zeroes": Perm.WRITE | Perm.WRITE_UNCHANGED,
    "discard": Perm.WRITE,
    "flush": Perm.NONE,
    "truncate": Perm.RESIZE,
    "map": Perm.NONE,
    "place": Perm.WRITE | Perm.WRITE_UNCHANGED,
}


@pytest.mark.parametrize("perm", [Perm(bits) for bits in range(16)])
@pytest.mark.parametrize("name", REQUESTS)
def test_permissions(fake: Fake, name: str, perm: Perm) -> None:
    """Each request against each set of permissions; a refusal never reaches the driver."""
    device = Checked(fake, perm, node="n0")
    if NEEDS[name] == Perm.NONE or perm & NEEDS[name]:
        REQUESTS[name](device)
        assert fake.requests == [name]
        return
    with pytest.raises(QmpdError) as caught:
        REQUESTS[name](device)
    assert (caught.value.kind, caught.value.node, fake.requests) == (Kind.PERMISSION, "n0", [])


def test_permissions_are_looked_up_at_each_request(fake: Fake) -> None:
    """The edge's permissions change while the device lives on."""
    held = [Perm.NONE]
    device = Checked(fake, lambda: held[0], node="n0")
    with pytest.raises(QmpdError):
        device.write(0, b"x")
    held[0] = Perm.WRITE
    device.write(0, b"x")
    assert fake.requests == ["write"]


OUTSIDE: dict[str, Request] = {
    "read before": lambda d: d.readinto(-1, memoryview(bytearray(1))),
    "read behind": lambda d: d.readinto(LENGTH, memoryview(bytearray(1))),
    "read across": lambda d: d.readinto(LENGTH - 1, memoryview(bytearray(2))),
    "write across": lambda d: d.write(LENGTH - 1, b"xy"),
    "write before": lambda d: d.write(-1, b"x"),
    "zero across": lambda d: d.write_zeroes(LENGTH - 1, 2),
    "zero backwards": lambda d: d.write_zeroes(10, -1),
    "discard across": lambda d: d.discard(0, LENGTH + 1),
    "map nothing": lambda d: d.map(0, 0),
    "map across": lambda d: d.map(LENGTH - 1, 2),
    "direct across": lambda d: d.direct(LENGTH - 1, 2),
    "place ragged start": lambda d: placed(d, 1, UNIT),
    "place ragged end": lambda d: placed(d, 0, UNIT - 1),
    "place nothing": lambda d: placed(d, 0, 0),
    "shrink below nothing": lambda d: d.truncate(-1),
    "grow beyond everything": lambda d: d.truncate(MAX_LENGTH + 1),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_ranges(fake: Fake, name: str) -> None:
    """Kind RANGE with the node and the numbers; the driver is not asked."""
    with pytest.raises(QmpdError) as caught:
        OUTSIDE[name](Checked(fake, Perm.ALL, node="n0"))
    assert caught.value.kind is Kind.RANGE
    assert "'n0'" in caught.value.desc
    assert fake.requests == []


def test_growable_devices_pass_their_end(fake: Fake) -> None:
    """Reads do, writes with RESIZE do, and the addresses end at the largest length."""
    fake.grows = True
    Checked(fake, Perm.NONE, node="n0").readinto(LENGTH, memoryview(bytearray(1)))
    Checked(fake, Perm.WRITE | Perm.RESIZE, node="n0").write(LENGTH, b"x")
    assert fake.requests == ["readinto", "write"]
    for perm, offset in [(Perm.WRITE, LENGTH), (Perm.ALL, MAX_LENGTH)]:
        with pytest.raises(QmpdError) as caught:
            Checked(fake, perm, node="n0").write(offset, b"x")
        assert caught.value.kind is Kind.RANGE


def test_the_end_of_the_device_may_cut_the_last_unit(fake: Fake) -> None:
    """A device need not be a multiple of the unit long."""
    fake.unit = 3 * UNIT
    start = LENGTH - LENGTH % fake.unit
    placed(Checked(fake, Perm.ALL, node="n0"), start, LENGTH - start)
    assert fake.requests == ["place"]


def test_no_unit_no_placement(fake: Fake) -> None:
    """The error says unsupported, before anything happens."""
    fake.unit = None
    with pytest.raises(QmpdError) as caught:
        placed(Checked(fake, Perm.ALL, node="n0"))
    assert caught.value.kind is Kind.UNSUPPORTED


MALFORMED = {
    "starts elsewhere": [Run(1, 9, RunKind.DATA, 0)],
    "too long": [Run(0, 11, RunKind.DATA, 0)],
    "gap": [Run(0, 4, RunKind.DATA, 0), Run(5, 5, RunKind.DATA, 0)],
    "overlap": [Run(0, 6, RunKind.DATA, 0), Run(5, 5, RunKind.DATA, 0)],
    "empty run": [Run(0, 0, RunKind.DATA, 0), Run(0, 10, RunKind.DATA, 0)],
    "no run": [],
    "data nowhere": [Run(0, 10, RunKind.DATA, -1)],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_bugs(fake: Fake, name: str) -> None:
    """A driver that answers nonsense is caught at once, by an error that no client sees as its own."""
    fake.runs = Runs.of(MALFORMED[name])
    with pytest.raises(BrokenContractError, match="Fake of node 'n0'"):
        Checked(fake, Perm.NONE, node="n0").map(0, 10)


@pytest.mark.parametrize(
    "runs", [[Run(0, UNIT - 1, RunKind.DATA, 0)], [Run(0, UNIT, RunKind.ZERO, -1)]], ids=["short", "not data"]
)
def test_places_are_complete(fake: Fake, runs: list[Run]) -> None:
    """All of the range, and all of it places to write to."""
    fake.runs = Runs.of(runs)
    with pytest.raises(BrokenContractError):
        placed(Checked(fake, Perm.ALL, node="n0"))


def test_a_callers_failure_inside_place_reaches_the_driver(fake: Fake) -> None:
    """The driver must know, to take everything back."""
    error = RuntimeError("disk on fire")
    with pytest.raises(RuntimeError, match="fire"), Checked(fake, Perm.ALL, node="n0").place(0, UNIT):
        raise error
    assert fake.left_with is error


def test_a_callers_error_inside_place_stays_the_callers(fake: Fake) -> None:
    """It may be about another node, which must not be blamed on this one."""
    with pytest.raises(QmpdError) as caught, Checked(fake, Perm.ALL, node="n0").place(0, UNIT):
        raise QmpdError("source failed", Kind.IO)
    assert caught.value.node is None


@pytest.mark.parametrize("name", REQUESTS)
def test_errors_leave_with_the_nodes_name(fake: Fake, name: str) -> None:
    """QmpdErrors keep what they say and OSErrors become one, with errno."""
    device = Checked(fake, Perm.ALL, node="n0")
    fake.error = QmpdError("text", Kind.CORRUPT)
    with pytest.raises(QmpdError) as caught:
        REQUESTS[name](device)
    assert (caught.value.desc, caught.value.kind, caught.value.node) == ("text", Kind.CORRUPT, "n0")
    fake.error = QmpdError("text", node="deeper")
    with pytest.raises(QmpdError) as caught:
        REQUESTS[name](device)
    assert caught.value.node == "deeper"
    fake.error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(QmpdError) as caught:
        REQUESTS[name](device)
    assert (caught.value.kind, caught.value.errno, caught.value.node) == (Kind.NO_SPACE, errno.EDQUOT, "n0")


def test_buffers_count_in_bytes(fake: Fake) -> None:
    """A view of wider items would silently cut the request short."""
    device = Checked(fake, Perm.ALL, node="n0")
    wide = memoryview(bytearray(64)).cast("Q")
    with pytest.raises(TypeError):
        device.readinto(0, wide)
    with pytest.raises(TypeError):
        device.write(0, wide)


def test_it_is_a_block_device(fake: Fake) -> None:
    """What drivers get as children fits the protocol."""
    assert isinstance(Checked(fake, Perm.ALL, node="n0"), BlockDevice)
