"""Active commits of real images: graph, verbs, refusals, errors, sizes. Graphs and events are those of the peer."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Backend
from qmpd.jobs.job import OnError
from tests.jobs.guest import Guest
from tests.jobs.rig import ALL, CHAIN, MIB, QUIET, STARTED, Rig, backing, check, image, reads, shell, spy

KIB = 1024
LEN = MIB + 64 * KIB
VIEW = ("0x33 0 1M", "0x11 1M 1M", "0x44 2M 64k", "0x11 2112k 1984k")
SHARED = "consistent-read,write,write-unchanged"
PAIR = (image("base", read_only=True), image("top", "base"))
AT_REST = [
    f"top -file-> top-file perm=consistent-read,resize,write shared={QUIET}",
    f"top -backing-> base perm=- shared={ALL}",
    f"base -file-> base-file perm=consistent-read shared={QUIET}",
]
WHILE_READY = [
    f"mflt -backing-> top perm=- shared={SHARED}",
    *AT_REST[:2],
    f"base -file-> base-file perm=consistent-read,resize,write shared={QUIET}",
    f"j0 -main node-> mflt perm=consistent-read shared={SHARED}",
    f"j0 -source-> top perm=- shared={SHARED}",
    f"j0 -target-> base perm=- shared={ALL}",
    f"block-backend -root-> base perm=write shared={SHARED}",
]
AFTERWARDS = [*AT_REST[:2], f"base -file-> base-file perm=consistent-read,resize,write shared={QUIET}"]
READY = f"ready, READY len={LEN} offset={LEN} speed=0"
DONE = f"waiting, pending, COMPLETED len={LEN} offset={LEN} speed=0, concluded, null"
CANCELLED = f"aborting, CANCELLED len={LEN} offset={LEN} speed=0, concluded, null"


@pytest.fixture
def pair(tmp_path: Path) -> None:
    """base <- top of 4 MiB: 0x11 everywhere; 0x33 in the first MiB and 0x44 in the cluster at 2 MiB are in top."""
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 4M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x11 0 4M' base.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x33 0 1M' -c 'write -P 0x44 2M 64k' top.qcow2",
        cwd=tmp_path,
    )


async def ready(rig: Rig, **more: Any) -> None:
    """Start the commit of top into base and wait until it is ready and rests."""
    await rig.commit(**{"top": None, "filter_node_name": "mflt"} | more)
    await rig.until(lambda: any(line.startswith("READY") for line in rig.log))
    await rig.rested()


def complete(rig: Rig) -> None:
    rig.jobs.complete(rig.jobs.find("j0"))


# -- graph and verbs ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pair")
async def test_the_pivot(rig: Rig) -> None:
    """Ready, then completed: users are on base, which stays writable; top and both headers are as before."""
    await rig.add(*PAIR)
    assert rig.edges() == AT_REST

    await ready(rig)
    assert rig.edges() == WHILE_READY
    assert rig.told() == f"{STARTED}, {READY}"

    complete(rig)
    await rig.gone()
    assert rig.told() == DONE
    assert rig.edges() == AFTERWARDS
    assert [blocker.reason for blocker in rig.node("base").blockers] == ["node is used as backing hd of 'top'"]
    await rig.close()
    check("base.qcow2", "top.qcow2")
    reads("base.qcow2", *VIEW)
    reads("top.qcow2", *VIEW)
    assert backing("top.qcow2") == ("base.qcow2", "qcow2")


@pytest.mark.usefixtures("pair")
async def test_cancel_before_ready_is_forced(rig: Rig) -> None:
    """One step was copied; the old chain is left, base is read-only again, and another commit may follow."""
    await rig.add(*PAIR)
    await rig.commit(top=None, speed=1)
    held = await rig.rested()
    assert (held["offset"], held["len"]) == (MIB, LEN)
    rig.told()

    await rig.jobs.cancel(rig.jobs.find("j0"), force=False)

    assert rig.told() == f"aborting, CANCELLED len={LEN} offset={MIB} speed=1, concluded, null"
    assert rig.edges() == AT_REST
    await ready(rig)
    await rig.close()
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("pair")
async def test_soft_cancel_when_ready(rig: Rig) -> None:
    """A success without pivot: base is a full copy and left writable, users stay; completing is refused then."""
    await rig.add(*PAIR)
    guest = Guest(rig, "top")
    await ready(rig)
    guest.device.write(3 * MIB, b"x" * 512)
    rig.told()
    life = rig.jobs.find("j0")

    await rig.jobs.cancel(life, force=False)
    with pytest.raises(QmpdError, match=r"^The active block job 'j0' cannot be completed$"):
        life.job.complete()
    await rig.gone()

    total = LEN + 64 * KIB
    assert rig.told() == f"waiting, pending, COMPLETED len={total} offset={total} speed=0, concluded, null"
    assert guest.edge is not None
    assert guest.edge.node is rig.node("top")
    guest.detach(rig)
    assert rig.edges() == AFTERWARDS
    await rig.close()
    reads("base.qcow2", "0x78 3M 512", "0x33 0 1M")


@pytest.mark.usefixtures("pair")
async def test_forced_cancel_when_ready(rig: Rig) -> None:
    """Base is read-only again."""
    await rig.add(*PAIR)
    await ready(rig)
    rig.told()

    await rig.jobs.cancel(rig.jobs.find("j0"), force=True)

    assert rig.told() == CANCELLED
    assert rig.edges() == AT_REST


@pytest.mark.usefixtures("pair")
async def test_standby(rig: Rig) -> None:
    """A ready job that is paused takes complete, twice, and acts on it when resumed."""
    await rig.add(*PAIR)
    await ready(rig)
    rig.told()
    life = rig.jobs.find("j0")

    rig.jobs.pause(life)
    assert rig.told() == "standby"
    complete(rig)
    complete(rig)
    await rig.rested()
    assert rig.told() == ""
    await rig.jobs.resume(life)
    assert rig.log[0] == "ready"
    await rig.gone()
    assert rig.told() == f"ready, {DONE}"


@pytest.mark.usefixtures("pair")
async def test_completed_under_a_low_speed(rig: Rig) -> None:
    """The debt of earlier copying does not hold up the end."""
    await rig.add(*PAIR)
    await ready(rig, speed=1 << 30)
    rig.jobs.set_speed(rig.jobs.find("j0"), 7)
    complete(rig)
    await rig.gone()

    assert "COMPLETED" in rig.told()


# -- users -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pair")
async def test_users_are_moved(rig: Rig) -> None:
    """To the filter at the start, to base at the pivot; what they write meanwhile counts in len and is copied."""
    await rig.add(*PAIR)
    guest = Guest(rig, "top")
    assert guest.edge is not None
    await ready(rig)
    assert guest.edge.node is rig.node("mflt")
    assert f"mflt -backing-> top perm=write shared={SHARED}" in rig.edges()

    guest.device.write(3 * MIB, b"\x66" * 128 * KIB)
    guest.device.write_zeroes(0, 64 * KIB)
    guest.device.write(3 * MIB, b"\x67" * 512)  # dirty already
    complete(rig)
    await rig.gone()

    assert f"COMPLETED len={LEN + 192 * KIB} offset={LEN + 192 * KIB}" in rig.told()
    assert guest.edge.node is rig.node("base")
    guest.device.write(3 * MIB + 64 * KIB, b"\x68" * 512)
    guest.detach(rig)
    await rig.close()
    reads("base.qcow2", "0 0 64k", "0x33 64k 960k", "0x67 3M 512", "0x66 3146240 65024", "0x68 3136k 512")


@pytest.mark.usefixtures("pair")
async def test_written_while_pending(rig: Rig) -> None:
    """Nobody is held while the job is pending, and nothing written then is lost when it is finalised."""
    await rig.add(*PAIR)
    guest = Guest(rig, "top")
    await ready(rig, auto_finalize=False)
    complete(rig)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    pending = rig.jobs.query_block_jobs()[0]

    assert (pending["status"], pending["paused"], pending["offset"]) == ("pending", True, LEN)
    guest.device.write(3 * MIB, b"\x66" * 512)
    late = Guest(rig, "mflt")
    late.device.write(3 * MIB + 512, b"\x67" * 512)
    await rig.jobs.finalize(rig.jobs.find("j0"))

    for user in (guest, late):
        assert user.edge is not None
        assert user.edge.node is rig.node("base")
        user.detach(rig)
    await rig.close()
    reads("base.qcow2", "0x66 3M 512", "0x67 3146240 512", "0x11 3147264 512")


@pytest.mark.usefixtures("pair")
async def test_cancelled_while_pending(rig: Rig) -> None:
    """Users stay on top, base is read-only again."""
    await rig.add(*PAIR)
    await ready(rig, auto_finalize=False)
    complete(rig)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    rig.told()

    await rig.jobs.cancel(rig.jobs.find("j0"), force=True)

    assert rig.told() == CANCELLED
    assert rig.edges() == AT_REST


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize(("node", "name"), [("base", "target"), ("top", "source")])
async def test_other_writers_are_refused(rig: Rig, node: str, name: str) -> None:
    """Writes that the job would not see, or that it would overwrite, cannot come in; readers can."""
    await rig.add(*PAIR)
    await ready(rig)
    text = (
        f"Permission conflict on node '{node}': permissions 'write' are both required by an unnamed block device (uses "
        f"node '{node}' as 'root' child) and unshared by commit job 'j0' (uses node '{node}' as '{name}' child)."
    )

    with pytest.raises(QmpdError) as refusal:
        Guest(rig, node)
    assert str(refusal.value) == text
    assert rig.edges() == WHILE_READY

    reader = Backend()
    with rig.graph.edit() as edit:
        edit.attach(reader, "root", rig.node(node), Role.NONE, perm=Perm.CONSISTENT_READ)
    complete(rig)
    await rig.gone()
    assert reader.edge is not None
    assert reader.edge.node is rig.node("base")
    with rig.graph.edit() as edit:
        edit.detach(reader.edge)


@pytest.mark.usefixtures("pair")
async def test_a_writer_on_base_is_refused_at_the_start(rig: Rig) -> None:
    """After created; nothing is left behind."""
    await rig.add(image("base"), PAIR[1])
    guest = Guest(rig, "base")
    before = rig.edges()

    with pytest.raises(QmpdError, match=r"^Permission conflict on node 'base': permissions 'write' are both required"):
        await rig.commit(top=None)

    assert rig.told() == "created, null"
    assert rig.edges() == before
    guest.detach(rig)


@pytest.mark.usefixtures("pair")
async def test_what_is_refused_meanwhile(rig: Rig) -> None:
    """Another commit, the other operations, and changes to the links."""
    await rig.add(*PAIR)
    await ready(rig)

    for device in ("top", "mflt"):
        with pytest.raises(QmpdError, match=r"^Need a root block node$"):
            await rig.commit(device=device, top=None, job_id="j1")
    for name in ("top", "mflt", "base"):
        text = f"^Node '{name}' is busy: block device is in use by block job: commit$"
        with pytest.raises(QmpdError, match=text):
            rig.node(name).check_op("resize")
    for upper, lower in (("mflt", "top"), ("top", "base")):
        text = f"^Cannot change frozen 'backing' link from '{upper}' to '{lower}'$"
        with pytest.raises(QmpdError, match=text), rig.graph.edit() as edit:
            edit.detach(rig.node(upper).children["backing"])


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize(
    ("arguments", "text", "events"),
    [
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value", "created, null"),
        ({"speed": -1, "filter_node_name": "9x"}, "Invalid node-name: '9x'", ""),
        ({"job_id": "1a", "filter_node_name": "base"}, "Duplicate nodes with node-name='base'", ""),
        ({"job_id": "1a"}, "Invalid job ID '1a'", ""),
        ({"backing_file": "x"}, "'backing-file' specified, but 'top' is the active layer", ""),
    ],
)
async def test_refusals_in_order(rig: Rig, arguments: dict[str, Any], text: str, events: str) -> None:
    """What an active commit finds out before there is a job has no events; nothing is changed by any of it."""
    await rig.add(*PAIR)

    with pytest.raises(QmpdError) as refusal:
        await rig.commit(**{"top": None} | arguments)

    assert str(refusal.value) == text
    assert rig.told() == events
    assert rig.edges() == AT_REST
    assert rig.node("base").read_only


async def test_base_that_cannot_be_written(rig: Rig) -> None:
    """Its file was asked for read-only: refused before there is a job, with base as it was."""
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 1M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    )
    file = {"driver": "file", "node-name": "base-file", "filename": "base.qcow2", "read-only": True}
    await rig.add(image("base", read_only=True, file=file), PAIR[1])

    with pytest.raises(QmpdError, match=r"^Block node is read-only$"):
        await rig.commit(top=None)

    assert rig.told() == ""
    assert rig.node("base").read_only


# -- an intermediate top -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chain")
async def test_an_intermediate_top_with_a_writer(rig: Rig) -> None:
    """The overlay is led to base, but its header is left; base hides what the overlay never saw."""
    shell("qemu-img resize -q -f qcow2 mid.qcow2 --shrink 3M", "qemu-img resize -q -f qcow2 top.qcow2 5M")
    await rig.add(CHAIN[0], image("mid", "base"), CHAIN[2])
    guest = Guest(rig, "mid")
    text = "^'backing-file' specified, but 'top' has a writer on it$"
    with pytest.raises(QmpdError, match=text):
        await rig.commit(backing_file="zz")

    await ready(rig, top="mid")
    assert f"top -backing-> mflt perm=- shared={ALL}" in rig.edges()
    with pytest.raises(QmpdError, match="frozen"), rig.graph.edit() as edit:
        edit.detach(rig.node("top").children["backing"])
    guest.device.write(MIB, b"\x66" * 512)
    complete(rig)
    await rig.gone()

    assert f"top -backing-> base perm=- shared={ALL}" in rig.edges()
    guest.detach(rig)
    await rig.close()
    assert backing("top.qcow2") == ("mid.qcow2", "qcow2")
    shell("qemu-img rebase -q -u -f qcow2 -b base.qcow2 -F qcow2 top.qcow2")
    reads("top.qcow2", "0x33 0 64k", "0x22 64k 960k", "0x66 1M 512", "0x11 2M 1M", "0 3M 2M")
    check("base.qcow2")


@pytest.mark.usefixtures("chain")
async def test_intermediates_are_copied_too(rig: Rig) -> None:
    """top over mid into base; nobody may read mid meanwhile, for it is about to go stale."""
    await rig.add(*CHAIN)
    await ready(rig, top=None)

    assert "j0 -intermediate node-> mid perm=- shared=write,write-unchanged" in rig.edges()
    with pytest.raises(QmpdError, match="permissions 'consistent read'"), rig.graph.edit() as edit:
        edit.attach(Backend(), "root", rig.node("mid"), Role.NONE, perm=Perm.CONSISTENT_READ)
    complete(rig)
    await rig.gone()
    await rig.close()
    reads("base.qcow2", "0x33 0 64k", "0x22 64k 1984k", "0x11 2M 2M")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["qcow2", "raw"])
async def test_base_grows(rig: Rig, base: str) -> None:
    """Resize is asked for only now. Only what is allocated counts in len."""
    shell(
        f"qemu-img create -q -f {base} base.{base} 1M",
        f"qemu-img create -q -f qcow2 -b base.{base} -F {base} top.qcow2 2M",
        f"qemu-io -f {base} -c 'write -P 0x11 0 1M' base.{base}",
        "qemu-io -f qcow2 -c 'write -P 0x22 1536k 64k' top.qcow2",
    )
    below = {"driver": "file", "node-name": "base-file", "filename": f"base.{base}"}
    await rig.add({"driver": base, "node-name": "base", "read-only": True, "file": below}, PAIR[1])
    await ready(rig)

    assert f"READY len={64 * KIB} offset={64 * KIB} speed=0" in rig.log
    assert f"block-backend -root-> base perm=resize,write shared={SHARED}" in rig.edges()
    complete(rig)
    await rig.gone()
    await rig.close()
    shell(f"qemu-img compare -q -f qcow2 -F {base} top.qcow2 base.{base}")


async def test_length_zero(rig: Rig) -> None:
    """Ready in front of the reply."""
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 0",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    )
    await rig.add(*PAIR)
    await rig.commit(top=None)
    assert rig.told() == "created, running, ready, READY len=0 offset=0 speed=0, R"

    complete(rig)
    await rig.gone()
    assert rig.told() == "waiting, pending, COMPLETED len=0 offset=0 speed=0, concluded, null"


@pytest.mark.parametrize(
    ("cluster", "grain"), [("512", 4096), ("4k", 4096), ("32k", 32 << 10), ("64k", 65536), ("2M", 65536)]
)
async def test_granularity(rig: Rig, cluster: str, grain: int) -> None:
    """Base's cluster size within limits; a granule at the end counts what there is of it."""
    size = 3 * MIB + 512
    shell(
        f"qemu-img create -q -f qcow2 -o cluster_size={cluster} base.qcow2 {size}",
        "qemu-img create -q -f qcow2 -o cluster_size=512 -b base.qcow2 -F qcow2 top.qcow2",
        f"qemu-io -f qcow2 -c 'write -P 0x22 1M 512' -c 'write -P 0x23 {size - 512} 512' top.qcow2",
    )
    await rig.add(*PAIR)
    await ready(rig)

    total = grain + 512
    assert f"READY len={total} offset={total} speed=0" in rig.log
    complete(rig)
    await rig.gone()
    await rig.close()
    check("base.qcow2")
    reads("base.qcow2", "0x22 1M 512", f"0x23 {size - 512} 512", "0 0 1M", "0 1049088 512")


@pytest.mark.usefixtures("pair")
async def test_a_read_only_top(rig: Rig) -> None:
    """Base ends up as read-only as top is, even if it was not before."""
    await rig.add(image("base"), image("top", "base", read_only=True))
    await ready(rig)
    complete(rig)
    await rig.gone()

    assert rig.node("base").read_only
    await rig.close()
    reads("base.qcow2", *VIEW)


# -- errors ------------------------------------------------------------------------------------------------------------


def fail_base(rig: Rig, *numbers: int) -> list[int]:
    """Let the next writes to base fail with these errnos; what is left of them."""
    base, failures = rig.node("base").opened, list(numbers)

    def failing(real: Any) -> Any:
        def call(*args: Any) -> Any:
            if failures:
                raise QmpdError("x", Kind.IO, errno=failures.pop())
            return real(*args)

        return call

    for method in ("place", "place_ranges", "write"):
        setattr(base, method, failing(getattr(base, method)))
    return failures


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize(
    ("policy", "number", "action"),
    [
        ("report", errno.EIO, "report"),
        ("enospc", errno.ENOSPC, "stop"),
        ("enospc", errno.EIO, "report"),
        ("auto", errno.ENOSPC, "stop"),
        ("stop", errno.EIO, "stop"),
        ("ignore", errno.EIO, "ignore"),
    ],
)
async def test_on_error(rig: Rig, mock_clock: Any, policy: str, number: int, action: str) -> None:
    """What failed is dirty again: tried once more it ends in ready. A report leaves the old chain."""
    await rig.add(*PAIR)
    fail_base(rig, number)
    await rig.commit(top=None, on_error=OnError(policy))
    await rig.until(lambda: f"ERROR operation=write action={action}" in rig.log)

    if action == "report":
        await rig.gone()
        error = "No space left on device" if number == errno.ENOSPC else "Input/output error"
        assert f"aborting, COMPLETED len={LEN} offset=0 speed=0 error={error}, concluded, null" in rig.told()
        assert rig.edges() == AT_REST
        return
    if action == "stop":
        await rig.until(lambda: rig.log[-1] == "paused")
        info = rig.jobs.query_block_jobs()[0]
        assert (info["offset"], info["len"]) == (0, LEN)
        assert info["io-status"] == ("nospace" if number == errno.ENOSPC else "failed")
        await rig.jobs.resume(rig.jobs.find("j0"))
    else:
        mock_clock.jump(1)
    await rig.until(lambda: any(line.startswith("READY") for line in rig.log))
    complete(rig)
    await rig.gone()
    assert rig.told().endswith(DONE)
    await rig.close()
    reads("base.qcow2", *VIEW)


@pytest.mark.usefixtures("pair")
async def test_the_policy_counts_to_the_last(rig: Rig) -> None:
    """A disk that is full when the job is told to complete stops it, and does not end it."""
    await rig.add(*PAIR)
    guest = Guest(rig, "top")
    await ready(rig, on_error=OnError.STOP)
    guest.device.write(3 * MIB, b"x" * 512)
    fail_base(rig, errno.ENOSPC)

    complete(rig)
    await rig.until(lambda: rig.log[-1] == "standby")
    await rig.jobs.resume(rig.jobs.find("j0"))
    await rig.gone()

    assert "COMPLETED" in rig.told()
    guest.detach(rig)
    await rig.close()
    reads("base.qcow2", "0x78 3M 512")


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("method", ["map", "flush"])
async def test_failures_that_nobody_retries(rig: Rig, method: str) -> None:
    """Looking for what is allocated counts as reading; a failed sync of base always ends the job."""
    await rig.add(*PAIR)
    node, operation = {"map": ("top", "read"), "flush": ("base", "write")}[method]
    spy(rig.node(node), method, [], QmpdError("x", Kind.IO, errno=5), once=method == "flush")
    await rig.commit(top=None)
    await rig.gone()

    assert f"ERROR operation={operation} action=report, aborting, COMPLETED" in rig.told()
    assert rig.edges() == AT_REST


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("where", ["copy", "flush", "graph"])
async def test_a_failure_at_the_pivot(rig: Rig, where: str) -> None:
    """With users held already: they go on where they were, with all they ever wrote."""
    await rig.add(*PAIR)
    guest = Guest(rig, "top")
    await ready(rig, auto_finalize=False)
    complete(rig)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    guest.device.write(3 * MIB, b"x" * 512)
    failure = QmpdError("x", Kind.IO, errno=5)
    if where == "copy":
        fail_base(rig, errno.EIO)
    elif where == "flush":
        spy(rig.node("base"), "flush", [], failure, once=True)
    else:
        spy(rig.node("base"), "permissions_check", [], failure, once=True)
    rig.told()

    await rig.jobs.finalize(rig.jobs.find("j0"))

    assert "aborting, COMPLETED" in rig.told()
    assert guest.edge is not None
    assert guest.edge.node is rig.node("top")
    assert not guest.is_held
    guest.detach(rig)
    assert rig.edges() == AT_REST
    await rig.close()
    reads("top.qcow2", "0x78 3M 512", "0x33 0 1M")
    check("base.qcow2", "top.qcow2")
