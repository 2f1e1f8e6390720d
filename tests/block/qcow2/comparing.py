"""The consistency check held against that of qemu-img."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.findings import CheckResult
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from tests.block.qcow2.support import children

#: Members of qemu-img's answer, left out there when they are 0.
COUNTS = (
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)

Answer = tuple[int, dict[str, int] | None]


@contextmanager
def image(path: Path, *, read_only: bool = True) -> Iterator[Qcow2]:
    file = FileStorage.open({}, {"filename": str(path), "locking": "off"}, read_only=read_only)
    try:
        named = Qcow2.named_data_file(file)
        data = FileStorage.open({}, {"filename": str(path.parent / named)}, read_only=read_only) if named else None
        driver = Qcow2.open(children(file, data), {}, read_only=read_only)
        try:
            yield driver
        finally:
            driver.close()
    finally:
        file.close()


def check(driver: Qcow2, *, fix_leaks: bool = False) -> CheckResult:
    return driver.check(fix_leaks=fix_leaks, pulse=lambda: None)


def status(result: CheckResult) -> int:
    if result.check_errors:
        return 1
    if result.corruptions:
        return 2
    return 3 if result.leaks else 0


def ours(path: Path) -> Answer:
    """Exit status and counts; no counts if not everything could be checked."""
    try:
        with image(path) as driver:
            result = check(driver)
    except QmpdError:
        return 1, None
    counts = {name: getattr(result, name.replace("-", "_")) for name in COUNTS}
    return status(result), None if result.check_errors else counts


def theirs(path: Path, *options: str) -> Answer:
    """The same from qemu-img."""
    # The image alone, whatever it names as its backing file, as the driver looks at it.
    file = {"driver": "file", "filename": str(path)}
    name = "json:" + json.dumps({"driver": "qcow2", "file": file, "backing": None})
    command = ["qemu-img", "check", "--output=json", *options, name]
    # Data files are looked for from the working directory.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=path.parent)
    if done.returncode == 1:
        return 1, None
    answer = json.loads(done.stdout)
    return done.returncode, {name: answer.get(name, 0) for name in COUNTS}
