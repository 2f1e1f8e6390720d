"""What a user gets for input that cannot work: the peer's error, and a daemon, a graph and images as before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import PEER, Client, CommandError, Daemon, under_test
from tests.interop.chain import COMMIT, Chain, graph
from tests.tools import need


@dataclass(frozen=True)
class Mistake:
    """A command that must fail, what is done to the images first, and the error."""

    name: str
    command: str
    arguments: dict[str, Any]
    desc: str
    error_class: str = "GenericError"
    prepare: Callable[[Path], object] = lambda directory: None

    def __str__(self) -> str:
        return self.name


def commit(**arguments: Any) -> dict[str, Any]:
    """Arguments of the commit that would work, with changes; None leaves one out."""
    changed = COMMIT | {key.replace("_", "-"): value for key, value in arguments.items()}
    return {key: value for key, value in changed.items() if value is not None}


def add(filename: str, driver: str = "qcow2") -> dict[str, Any]:
    return {"driver": driver, "node-name": "new", "file": {"driver": "file", "filename": filename}}


def write(directory: Path, name: str, data: bytes) -> None:
    (directory / name).write_bytes(data)


NOT_IN_CHAIN = "'{}' is not in this backing file chain"

MISTAKES = [
    Mistake(
        "missing-file", "blockdev-add", add("nope.qcow2"), "Could not open 'nope.qcow2': No such file or directory"
    ),
    Mistake("file-is-a-directory", "blockdev-add", add("."), "Could not open '.': Is a directory"),
    Mistake(
        "wrong-format",
        "blockdev-add",
        add("text.qcow2"),
        "Image is not in qcow2 format",
        prepare=lambda directory: write(directory, "text.qcow2", b"To whom it may concern\n" * 1000),
    ),
    Mistake(
        "empty-file",
        "blockdev-add",
        add("empty.qcow2"),
        "Image is not in qcow2 format",
        prepare=lambda directory: write(directory, "empty.qcow2", b""),
    ),
    Mistake("image-is-open-already", "blockdev-add", add("top.qcow2"), 'Failed to get "write" lock'),
    Mistake("unknown-device", "block-commit", commit(device="nope"), "Device 'nope' not found", "DeviceNotFound"),
    Mistake("device-is-not-a-root", "block-commit", commit(device="mid"), "Need a root block node"),
    Mistake("unknown-top", "block-commit", commit(top_node="nope"), "Cannot find device='' nor node-name='nope'"),
    Mistake("unknown-base", "block-commit", commit(base_node="nope"), "Cannot find device='' nor node-name='nope'"),
    Mistake(
        "top-file-not-found", "block-commit", commit(top_node=None, top="x.qcow2"), "Top image file x.qcow2 not found"
    ),
    Mistake(
        "base-file-not-found",
        "block-commit",
        commit(base_node=None, base="x.qcow2"),
        "Can't find 'x.qcow2' in the backing chain",
    ),
    Mistake("base-above-top", "block-commit", commit(base_node="top"), NOT_IN_CHAIN.format("top")),
    Mistake("top-equals-base", "block-commit", commit(base_node="mid"), "cannot commit an image into itself"),
    Mistake("top-is-a-protocol-node", "block-commit", commit(top_node="mid-file"), NOT_IN_CHAIN.format("mid-file")),
    Mistake("no-job-id", "block-commit", commit(job_id=None), "Invalid job ID ''"),
    Mistake("bad-job-id", "block-commit", commit(job_id="1a"), "Invalid job ID '1a'"),
    Mistake("negative-speed", "block-commit", commit(speed=-1), "Parameter 'speed' expects a non-negative value"),
    Mistake("bad-filter-name", "block-commit", commit(filter_node_name="9x"), "Invalid node-name: '9x'"),
    Mistake("unknown-argument", "block-commit", commit(foo=1), "Parameter 'foo' is unexpected"),
    Mistake(
        "node-in-use", "blockdev-del", {"node-name": "base"}, "Node 'base' is busy: node is used as backing hd of 'mid'"
    ),
    Mistake("node-unknown", "blockdev-del", {"node-name": "nope"}, "Failed to find node with node-name='nope'"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_costs_an_error_and_nothing_else(chain: Chain, daemon: Daemon, mistake: Mistake) -> None:
    """The error is the peer's; the graph is as before, the commit that would work still works, no image is harmed."""
    mistake.prepare(chain.directory)
    with daemon.client() as client:
        chain.open(client)
        refused(client, mistake.command, mistake.arguments, mistake.desc, mistake.error_class)
        commit_and_quit(client)
    assert daemon.exit_status() == 0
    assert chain.backing_of("top") == "base.qcow2"
    chain.verify()


@pytest.mark.parametrize("mode", ["file", "directory"])
def test_what_file_modes_forbid(chain: Chain, mode: str) -> None:
    """A base that may not be written is refused by name. A directory that may not be does not matter: files stay."""
    (chain.directory / "base.qcow2").chmod(0o444 if mode == "file" else 0o644)
    chain.directory.chmod(0o755 if mode == "file" else 0o555)
    try:
        with under_test().bound_by_modes().start(chain.directory) as daemon, daemon.client() as client:
            chain.open(client)
            if mode == "file":
                refused(client, "block-commit", COMMIT, "Could not open 'base.qcow2': Permission denied")
            else:
                commit_and_quit(client)
                assert daemon.exit_status() == 0
    finally:
        chain.directory.chmod(0o755)
    assert chain.backing_of("top") == ("mid.qcow2" if mode == "file" else "base.qcow2")
    chain.verify()


def test_a_full_disk(tmp_path: Path) -> None:
    """A commit without room is refused beforehand; one that begins all the same runs out of space and fails with the
    errno's text. Either way the chain stays as it was and every image clean."""
    with small_disk(tmp_path, "9m") as directory:
        chain = Chain.make(directory)
        (directory / "ballast").write_bytes(bytes(free_bytes(directory) - (64 << 10)))
        with under_test().start(directory) as daemon, daemon.client() as client:
            chain.open(client)
            before = graph(client)
            if under_test() != PEER:
                assert commit_error(client).startswith("Not enough space for 'base.qcow2': the commit takes ")
                assert graph(client) == before
            forced = {} if under_test() == PEER else {"x-qmpd-force": True}
            assert "No space left on device" in commit_error(client, **forced)
            assert graph(client) == before
            client.execute("quit")
            assert daemon.exit_status() == 0
        assert chain.backing_of("top") == "mid.qcow2"
        chain.verify()


def commit_error(client: Client, **more: Any) -> str:
    """Text of the error with which the commit is refused or ends."""
    try:
        client.execute_with("block-commit", COMMIT | more)
    except CommandError as refusal:
        return refusal.desc
    ended = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
    client.wait_status("j0", "null")
    return str(ended["data"].get("error", "none"))


@contextmanager
def small_disk(tmp_path: Path, size: str) -> Iterator[Path]:
    """A file system of a given size. Needs root."""
    need("mount", "umount")
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def refused(
    client: Client, command: str, arguments: dict[str, Any], desc: str, error_class: str = "GenericError"
) -> None:
    """The command fails with this error and changes nothing."""
    before = graph(client)
    with pytest.raises(CommandError) as refusal:
        client.execute_with(command, arguments)
    assert (refusal.value.error_class, refusal.value.desc) == (error_class, desc)
    assert graph(client) == before


def commit_and_quit(client: Client) -> None:
    client.events.clear()
    client.execute_with("block-commit", COMMIT)
    ended = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
    assert "error" not in ended["data"], ended
    client.wait_status("j0", "null")
    client.execute("quit")
