"""A chain of many snapshots can be merged one by one or all at once: the same disk either way."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from tests.chains.images import flatten, run
from tests.daemons import Client
from tests.replay import hosts
from tests.tools import need

KIB = 1024
SIZE = 8 * KIB  # KiB of the disk


def make(directory: Path, depth: int) -> list[Path]:
    """``base`` and ``depth`` snapshots of it, each with pieces of its own that overlap those of its neighbours."""
    images = [directory / "base.qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", str(images[0]), f"{SIZE}k")
    run("qemu-io", "-c", f"write -q -P 255 0 {SIZE // 2}k", str(images[0]))
    for number in range(1, depth + 1):
        image = directory / f"snap{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", images[-1].name, "-F", "qcow2", str(image))
        first, second = number * 61 % (SIZE - 200), number * 997 % (SIZE - 64)
        commands = (f"write -q -P {number} {first}k 150k", f"write -q -z {second}k 64k")
        run("qemu-io", *(word for command in commands for word in ("-c", command)), str(image))
        images.append(image)
    return images


def merge(directory: Path, images: list[Path], tops: list[int]) -> None:
    """Commit the images ``tops``, one after the other, into base, with the last image in use above them."""
    with hosts.start(directory) as host, contextlib.closing(Client(host.dial())) as client:
        below = None
        for number, image in enumerate(images):
            client.execute(
                "blockdev-add",
                driver="qcow2",
                node_name=f"n{number}",
                file={"driver": "file", "filename": image.name},
                backing=below,
                read_only=number < len(images) - 1,
            )
            below = f"n{number}"
        for top in tops:
            client.execute("block-commit", job_id="j", device=below, top_node=f"n{top}", base_node="n0")
            client.wait_status("j", "null")
        client.execute("quit")


@pytest.mark.parametrize("depth", [10, pytest.param(100, marks=pytest.mark.long)])
def test_one_by_one_and_in_one_pass(tmp_path: Path, depth: int) -> None:
    """Both equal the disk before, leave clean images, and leave a chain of two."""
    need("qemu-img", "qemu-io")
    (origin := tmp_path / "origin").mkdir()
    flatten(make(origin, depth + 1)[-1], tmp_path / "before")

    for name, tops in (("one by one", list(range(1, depth + 1))), ("in one pass", [depth])):
        shutil.copytree(origin, place := tmp_path / name)
        images = [place / "base.qcow2", *(place / f"snap{number}.qcow2" for number in range(1, depth + 2))]
        merge(place, images, tops)
        run("qemu-img", "compare", "-F", "raw", str(images[-1]), str(tmp_path / "before"))
        for image in (images[0], images[-1]):
            run("qemu-img", "check", "-q", str(image))
        assert f"{images[0].name}" in run("qemu-img", "info", str(images[-1])).split("backing file:")[1].splitlines()[0]
