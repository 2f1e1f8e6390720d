"""The device that stores nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.block.api import Driver
from qmpd.block.drivers import DRIVERS
from qmpd.block.extents import RunKind
from qmpd.errors import QmpdError
from qmpd.units import GIB
from tests.block.conformance import Conformance


class TestConformance(Conformance):
    """The suite; what is written vanishes."""

    stores = False
    resizes = False

    def create(self, directory: Path, length: int) -> Driver:
        return DRIVERS["null-co"].open({}, {"size": length}, read_only=False)


class TestConformanceOfNullAio(TestConformance):
    """The other name of the same."""

    def create(self, directory: Path, length: int) -> Driver:
        return DRIVERS["null-aio"].open({}, {"size": length}, read_only=False)


def test_defaults() -> None:
    """1 GiB, and a plain name as long as nothing is out of the ordinary."""
    null = DRIVERS["null-co"].open({}, {}, read_only=False)
    assert (null.length, null.filename) == (GIB, "null-co://")
    assert DRIVERS["null-aio"].open({}, {}, read_only=False).filename == "null-aio://"
    assert DRIVERS["null-co"].open({}, {"size": 1000}, read_only=False).filename == ""


def test_length_is_rounded_up_to_sectors() -> None:
    """As for every node."""
    assert DRIVERS["null-co"].open({}, {"size": 1000}, read_only=False).length == 1024


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": -5}, "Value '-5' is out of range for parameter 'size'"),
        ({"latency-ns": -1}, "latency-ns is invalid"),
    ],
)
def test_refusals(options: dict[str, int], text: str) -> None:
    """Negative numbers are errors; one of them kills the peer."""
    with pytest.raises(QmpdError) as caught:
        DRIVERS["null-co"].open({}, options, read_only=False)
    assert str(caught.value) == text


@pytest.mark.parametrize(("known", "kind"), [(True, RunKind.ZERO), (False, RunKind.OPAQUE)])
def test_zeros_are_announced_on_demand(known: bool, kind: RunKind) -> None:
    """read-zeroes is about what map says; reads give zeros either way."""
    null = DRIVERS["null-co"].open({}, {"size": 4096, "read-zeroes": known}, read_only=False)
    assert [run.kind for run in null.map(0, 4096)] == [kind]
