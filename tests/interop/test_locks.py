"""Two programs never write one image: qmpd and QEMU's programs refuse each other's, in both directions."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.daemons import PEER, QMPD, Client, CommandError, Daemon, Program
from tests.interop.chain import COMMIT, Chain
from tests.tools import need

WRITER = 'Failed to get "write" lock'
READER = 'Failed to get shared "write" lock'

PAIRS = pytest.mark.parametrize(("holder", "other"), [(QMPD, PEER), (PEER, QMPD)], ids=["qmpd-first", "peer-first"])


@contextlib.contextmanager
def client_of(program: Program, chain: Chain) -> Iterator[Client]:
    need(program.argv[0])
    with program.start(chain.directory) as daemon, daemon.client() as client:
        yield client


@PAIRS
def test_an_image_open_for_writing_is_refused_by_the_other(chain: Chain, holder: Program, other: Program) -> None:
    """A writer keeps out writers and readers, with the text for each."""
    with client_of(holder, chain) as first, client_of(other, chain) as second:
        first.execute_with("blockdev-add", chain.blockdev("base"))
        for read_only, text in ((False, WRITER), (True, READER)):
            with pytest.raises(CommandError) as refusal:
                second.execute_with("blockdev-add", chain.blockdev("base", read_only=read_only))
            assert (refusal.value.error_class, refusal.value.desc) == ("GenericError", text)
        assert second.execute("query-named-block-nodes") == []
        first.execute("blockdev-del", node_name="base")
        second.execute_with("blockdev-add", chain.blockdev("base"))


@PAIRS
def test_readers_share_and_keep_out_writers(chain: Chain, holder: Program, other: Program) -> None:
    """Two daemons may read one image; neither may then write it."""
    with client_of(holder, chain) as first, client_of(other, chain) as second:
        first.execute_with("blockdev-add", chain.blockdev("base", read_only=True))
        second.execute_with("blockdev-add", chain.blockdev("base", read_only=True))
        second.execute("blockdev-del", node_name="base")
        with pytest.raises(CommandError) as refusal:
            second.execute_with("blockdev-add", chain.blockdev("base"))
        assert refusal.value.desc == WRITER


@PAIRS
def test_a_lock_dies_with_its_holder(chain: Chain, holder: Program, other: Program) -> None:
    """Killed, a program leaves nothing behind that would keep the image from the next one."""
    need(holder.argv[0], other.argv[0])
    with holder.start(chain.directory) as first, client_of(other, chain) as second:
        with first.client() as client:
            client.execute_with("blockdev-add", chain.blockdev("base"))
            with pytest.raises(CommandError):
                second.execute_with("blockdev-add", chain.blockdev("base"))
            first.process.kill()
            first.process.wait()
        second.execute_with("blockdev-add", chain.blockdev("base"))


def test_qemu_io_and_qemu_img_keep_off_a_chain_that_is_open(chain: Chain, daemon: Daemon) -> None:
    """The active layer cannot be opened at all, what lies below only for reading."""
    with daemon.client() as client:
        chain.open(client)
        assert WRITER in refusal(chain, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", "top.qcow2")
        assert READER in refusal(chain, "qemu-img", "info", "top.qcow2")
        assert WRITER in refusal(chain, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", "base.qcow2")
        chain.run("qemu-img", "check", "-q", "base.qcow2")
        chain.run("qemu-img", "info", "-U", "top.qcow2")


def test_base_is_locked_while_it_is_written_and_only_then(chain: Chain, daemon: Daemon) -> None:
    """During a commit nobody may even read base; when the job has been cancelled, readers may again."""
    with daemon.client() as client:
        chain.open(client)
        client.execute_with("block-commit", COMMIT | {"speed": 1})
        assert READER in refusal(chain, "qemu-img", "info", "base.qcow2")
        assert WRITER in refusal(chain, "qemu-io", "-f", "qcow2", "-c", "write 0 64k", "base.qcow2")
        client.execute("job-cancel", id="j0")
        client.wait_status("j0", "null")
        chain.run("qemu-img", "check", "-q", "base.qcow2")
        client.execute("quit")
    daemon.exit_status()
    chain.verify()


@pytest.mark.parametrize("held", ["base", "mid", "top"])
def test_a_chain_that_a_guest_has_open_cannot_be_opened_for_writing(chain: Chain, daemon: Daemon, held: str) -> None:
    """qemu-io stands for the guest: the image it holds is refused, with nothing left open."""
    with daemon.client() as client, held_by_qemu_io(chain, held):
        with pytest.raises(CommandError) as refusal:
            client.execute_with("blockdev-add", chain.blockdev(held))
        assert refusal.value.desc == WRITER
        assert client.execute("query-named-block-nodes") == []
        assert client.execute("x-debug-query-block-graph") == {"nodes": [], "edges": []}


def test_a_reader_of_base_prevents_the_commit_into_it(chain: Chain, daemon: Daemon) -> None:
    """Base opens with the reader, but cannot be reopened for writing: the commit is refused, the chain as before."""
    with daemon.client() as client:
        chain.open(client)
        with held_by_qemu_io(chain, "base", "-r"), pytest.raises(CommandError) as refusal:
            client.execute_with("block-commit", COMMIT)
        assert refusal.value.desc == WRITER
        client.execute_with("block-commit", COMMIT)
        client.wait_status("j0", "null")
        client.wait_status("j0", "null")
        client.execute("quit")
    daemon.exit_status()
    assert chain.backing_of("top") == "base.qcow2"
    chain.verify()


@pytest.mark.parametrize("other", [QMPD, PEER], ids=["another qmpd", "the peer"])
def test_a_crowd_at_one_image(chain: Chain, other: Program) -> None:
    """Three who open and close it as fast as they can: a writer is always alone, readers may be together."""
    inside: list[tuple[int, bool]] = []
    done: list[tuple[int, bool]] = []
    refusals: set[str] = set()
    guard = threading.Lock()

    def work(number: int, client: Client) -> None:
        rng = random.Random(number)
        for _ in range(15):
            me = number, rng.random() < 0.6
            try:
                client.execute_with("blockdev-add", chain.blockdev("base", read_only=me[1]))
            except CommandError as error:
                refusals.add(error.desc)
                continue
            with guard:
                assert not inside or (me[1] and all(reads for _, reads in inside)), (me, inside)
                inside.append(me)
                done.append(me)
            with guard:
                inside.remove(me)
            client.execute("blockdev-del", node_name="base")

    with (
        client_of(QMPD, chain) as first,
        client_of(other, chain) as second,
        client_of(other, chain) as third,
        ThreadPoolExecutor(3) as pool,
    ):
        for finished in [pool.submit(work, number, client) for number, client in enumerate((first, second, third))]:
            finished.result()
    assert refusals <= {READER, WRITER}
    assert {number for number, _ in done} == {0, 1, 2}
    assert {reads for _, reads in done} == {True, False}
    chain.run("qemu-img", "check", "-q", "base.qcow2")


def test_the_holder_of_a_lock_is_named(chain: Chain, daemon: Daemon) -> None:
    """To the log, and to clients who asked for more than the peer tells; the text is the same for all."""
    with daemon.client() as client, daemon.client() as curious, held_by_qemu_io(chain, "base") as pid:
        curious.execute("x-qmpd-subscribe")
        errors = []
        for asking in (client, curious):
            reply = asking.call({"execute": "blockdev-add", "arguments": chain.blockdev("base")})
            errors.append(reply["error"])
    assert errors[0] == {"class": "GenericError", "desc": WRITER}
    details = errors[1].pop("x-qmpd-details")
    assert errors[1] == errors[0]
    assert (details["code"], details["held-by"]) == ("locked", [{"pid": pid, "command": "qemu-io"}])
    assert f"{chain.directory}/base.qcow2: {WRITER}; held by qemu-io (pid {pid})" in daemon.stderr()


@contextlib.contextmanager
def held_by_qemu_io(chain: Chain, image: str, *options: str) -> Iterator[int]:
    """qemu-io with the image open, for writing unless ``options`` say otherwise; its process id."""
    argv = ["qemu-io", "-f", "qcow2", *options, f"{image}.qcow2"]
    with subprocess.Popen(
        argv, cwd=chain.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("read 0 512\n")
        process.stdin.flush()
        assert "read 512/512" in process.stdout.readline()
        yield process.pid
        process.stdin.write("quit\n")


def refusal(chain: Chain, *argv: str) -> str:
    """What a program that must fail says."""
    done = subprocess.run(argv, cwd=chain.directory, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0, f"{argv} was let in: {done.stdout}"
    return done.stderr + done.stdout
