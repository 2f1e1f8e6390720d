"""No driver without the conformance suite."""

from __future__ import annotations

import contextlib
import pkgutil
from pathlib import Path

import pytest

import qmpd.block.filters
from qmpd.block.api import Driver
from qmpd.block.drivers import DRIVERS
from qmpd.block.filters.commit_top import CommitTop
from qmpd.block.filters.mirror_top import MirrorTop
from tests.block import test_file, test_null, test_raw
from tests.block.conformance import LENGTH, Conformance
from tests.block.filters import test_conformance as filters
from tests.block.qcow2 import test_conformance as qcow2

#: Who passes the suite for each driver.
SUITES: dict[str, type[Conformance]] = {
    "blkdebug": filters.TestBlkdebug,
    "copy-on-read": filters.TestCopyOnRead,
    "file": test_file.TestConformance,
    "null-aio": test_null.TestConformanceOfNullAio,
    "null-co": test_null.TestConformance,
    "preallocate": filters.TestPreallocate,
    "qcow2": qcow2.TestConformance,
    "raw": test_raw.TestConformance,
    "throttle": filters.TestThrottle,
}
#: A device of the host takes one to test with, and is a file in all that the suite looks at.
WITHOUT = {"host_device": "file"}


#: What only jobs make nodes of.
OF_JOBS = {CommitTop: filters.TestCommitTop, MirrorTop: filters.TestMirrorTop}


def test_every_driver_has_its_suite() -> None:
    """A driver added to the table, or to the filters of jobs, needs a row here, and so a suite."""
    assert set(DRIVERS) == set(SUITES) | set(WITHOUT)
    modules = {name for _, name, _ in pkgutil.iter_modules(qmpd.block.filters.__path__)}
    known = {driver.__module__.rpartition(".")[2] for driver in [*(DRIVERS[name] for name in SUITES), *OF_JOBS]}
    assert modules - known == {"base", "shape"}
    for name, model in WITHOUT.items():
        assert issubclass(DRIVERS[name], DRIVERS[model])


@pytest.mark.parametrize("driver", OF_JOBS)
def test_the_suite_of_a_filter_of_jobs(driver: type[Driver], tmp_path: Path) -> None:
    """The same for those."""
    with contextlib.closing(OF_JOBS[driver]().create(tmp_path, LENGTH)) as device:
        assert isinstance(device, driver)


@pytest.mark.parametrize("name", SUITES)
def test_the_suite_is_about_that_driver(name: str, tmp_path: Path) -> None:
    """What it makes is of the driver's class."""
    with contextlib.closing(SUITES[name]().create(tmp_path, LENGTH)) as device:
        assert isinstance(device, DRIVERS[name])
