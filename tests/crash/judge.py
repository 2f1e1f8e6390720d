"""Is a disk state one that may be left behind? Quickly from bytes, and thoroughly with QEMU's tools."""

from __future__ import annotations

from pathlib import Path

from qmpd.errors import QmpdError
from tests.block.qcow2.comparing import ours, theirs
from tests.crash.commit import commit
from tests.crash.contents import DamageError, Images, Structure, backing_name, open_image, snapshots, view
from tests.crash.scenarios import Prepared, run
from tests.crash.server import Server


def judge(prepared: Prepared, images: Images, *, told: bool = False) -> None:
    """Consistent structures, unchanged views, images that can be written. Raises DamageError.

    ``told``: clients know the job as complete, so they may drop what was committed.
    """
    for name, raw in images.items():
        if raw is not prepared.images[name] and name.endswith(".qcow2"):
            _judge_structure(images, name, raw)
    try:
        _judge_views(prepared, images)
        if told:
            judge_end(prepared, images)
    except (QmpdError, UnicodeDecodeError) as error:
        raise DamageError(f"not readable: {error!r}") from error


def _judge_structure(images: Images, name: str, raw: bytes) -> None:
    structure = Structure(raw)
    if structure.errors:
        raise DamageError(f"{name}: {'; '.join(structure.errors)}")
    try:
        open_image(images, raw, read_only=False).write_zeroes(0, 512)
    except QmpdError as error:
        raise DamageError(f"{name}: not writable: {error}") from error


def _judge_views(prepared: Prepared, images: Images) -> None:
    for name, expected in prepared.views.items():
        if view(images, name) != expected:
            raise DamageError(f"{name}: the guest sees other bytes")
    base = prepared.scenario.base_file
    if prepared.snapshots:
        for name, raw in snapshots(images[base]).items():
            if view(images, base, raw=raw) != prepared.snapshots[name]:
                raise DamageError(f"{base}: snapshot {name} has other bytes")


def judge_with_tools(prepared: Prepared, directory: Path) -> None:
    """The same by qemu-img: leaks are allowed, errors are not; and our own check finds the same. Raises DamageError."""
    for name in prepared.scenario.images:
        if not name.endswith(".qcow2"):
            continue
        found = theirs(directory / name)
        if found[0] not in (0, 3) and not Structure((directory / name).read_bytes()).dirty:
            raise DamageError(f"{name}: qemu-img check found {found}")
        if ours(directory / name) != found:
            raise DamageError(f"{name}: qemu-img check found {found}, but our own {ours(directory / name)}")
    for name, expected in prepared.views.items():
        _compare(directory, name, expected)
    for name, expected in prepared.snapshots.items():
        _compare(directory, prepared.scenario.base_file, expected, "-l", f"snapshot.name={name}")


def _compare(directory: Path, name: str, expected: bytes, *options: str) -> None:
    try:
        run(directory, "qemu-img", "convert", "-O", "raw", *options, name, "seen.bin")
    except AssertionError as error:
        raise DamageError(str(error)) from error
    if (directory / "seen.bin").read_bytes() != expected:
        raise DamageError(f"{name}: qemu-img reads other bytes")


def judge_with_commit(server: Server, prepared: Prepared, directory: Path) -> None:
    """Commit again, to the end: then it must be as if nothing had happened. Raises DamageError."""
    scenario = prepared.scenario
    commit(server, scenario, directory)
    images = {name: (directory / name).read_bytes() for name in scenario.files}
    judge(prepared, images, told=True)
    judge_with_tools(prepared, directory)


def judge_end(prepared: Prepared, images: Images) -> None:
    """Nobody needs the committed images any more. Raises DamageError."""
    scenario = prepared.scenario
    for name in scenario.users:
        if backing_name(images[name]) != scenario.base_file:
            raise DamageError(f"{name} is still on {backing_name(images[name])}")
    if not view(images, scenario.base_file).startswith(prepared.committed):
        raise DamageError("base does not show what was committed")
