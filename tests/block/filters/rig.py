"""Filters over real files, closed together with what is below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmpd.block.api import BlockDevice, Driver
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.drivers.qcow2.create import CreateOptions, create
from qmpd.block.limits import Limits
from qmpd.block.storage.file import FileStorage, create_file
from qmpd.block.throttling import ThrottleGroup
from tests.block.conformance import checked

SLOTS = {"blkdebug": "image"}


def new_file(path: Path, length: int = 0) -> FileStorage:
    """A file of zeros, open read-write."""
    create_file(str(path), length)
    return open_file(path)


def open_file(path: Path) -> FileStorage:
    return FileStorage.open({}, {"filename": str(path)}, read_only=False)


def new_qcow2(path: Path, length: int, over: BlockDevice | None = None) -> Qcow2:
    """An empty image in a new file, or on another device for its file."""
    device = over or checked(new_file(path))
    create(device, CreateOptions(size=length))
    return Qcow2.open({"file": device}, {}, read_only=False)


def group(**limits: int) -> ThrottleGroup:
    """A throttle group called g; names with ``_`` for ``-``."""
    return ThrottleGroup("g", Limits().merged({name.replace("_", "-"): value for name, value in limits.items()}))


def filter_over(name: str, child: BlockDevice, **options: Any) -> Any:
    """A filter by its driver's name; option names with ``_`` for ``-``."""
    given = {key.replace("_", "-"): value for key, value in options.items()}
    if name == "throttle":
        found = given.pop("group", None) or group()
        given |= {"throttle-group": "g", "find-throttle-group": lambda _: found}
    return DRIVERS[name].open({SLOTS.get(name, "file"): child}, given, read_only=False)  # type: ignore[attr-defined]


def owning(driver: Driver, below: Driver) -> Driver:
    """``driver``, whose close closes ``below`` as well: from the top down, as the graph does."""
    close = driver.close

    def close_both() -> None:
        close()
        below.close()

    driver.close = close_both  # type: ignore[method-assign]
    return driver
