"""No commit changes what images show that nobody named, unless somebody says so."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.jobs.siblings import SiblingPolicy
from tests.inprocess import CommandError, InProcess, Wire, running
from tests.jobs.rig import image, shell

SIZE = "1M"
MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """base <- low <- mid <- top, each with something of its own; the working directory."""
    monkeypatch.chdir(tmp_path)
    shell(f"qemu-img create -q -f qcow2 base.qcow2 {SIZE}")
    for below, above in (("base", "low"), ("low", "mid"), ("mid", "top")):
        overlay(above, below)
    for number, name in enumerate(("base", "low", "mid", "top")):
        shell(f"qemu-io -f qcow2 -c 'write -P {number + 1} {number * 256}k 256k' {name}.qcow2")
    return tmp_path


def overlay(name: str, below: str) -> None:
    where = os.path.relpath(f"{below}.qcow2", os.path.dirname(f"{name}.qcow2") or ".")
    shell(f"qemu-img create -q -f qcow2 -b {where} -F qcow2 {name}.qcow2")


def content(name: str) -> bytes:
    """What a guest would see, by qemu-img."""
    shell(f"qemu-img convert -U -f qcow2 -O raw {name}.qcow2 content.raw")
    return Path("content.raw").read_bytes()


async def chain(core: InProcess, *names: str) -> Wire:
    """A client, and the chain as nodes (default: all of it), base first."""
    client = await core.client()
    below: str | None = None
    for name in names or ("base", "low", "mid", "top"):
        await client.call("blockdev-add", image(name, below, read_only=name != "top"))
        below = name
    return client


async def commit(client: Wire, top: str | None, base: str, **more: Any) -> None:
    """From the command to the end of the job."""
    where = {"job_id": "j", "device": "top", "base_node": base} | ({"top_node": top} if top else {})
    await client.execute("block-commit", **where, **more)
    if top is None:
        await client.event("BLOCK_JOB_READY")
        await client.execute("job-complete", id="j")
    ended = await client.event("BLOCK_JOB_COMPLETED")
    assert "error" not in ended
    await client.event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")


def test_qemu_img_destroys_the_sibling_and_reports_success(place: Path) -> None:
    """Why there is a guard: status 0, and an image that nobody named shows something else."""
    overlay("sib", "base")
    before = content("sib")

    run = subprocess.run(["qemu-img", "commit", "-q", "-b", "base.qcow2", "top.qcow2"])

    assert run.returncode == 0
    assert content("sib") != before


#: Overlays made beside the chain (name, backing image), top and base of the commit, names of the siblings.
CASES = {
    "nothing beside the chain": ([], "mid", "base", []),
    "of base": ([("sib", "base")], "mid", "base", ["sib"]),
    "of base, in an active commit": ([("sib", "base")], None, "base", ["sib"]),
    "of an image between": ([("sib", "low")], "mid", "base", ["sib"]),
    "of top, which shows the same": ([("sib", "mid")], "mid", "base", []),
    "of top, in an active commit": ([("sib", "top")], None, "base", []),
    "of what is above top": ([("sib", "top")], "mid", "base", []),
    "of what is below base": ([("sib", "base")], "mid", "low", []),
    "of the overlay's overlay": ([("sib", "base"), ("far", "sib")], "mid", "base", ["far", "sib"]),
    "in a directory of its own, not looked at": ([("else/sib", "base")], "mid", "base", []),
}


@pytest.mark.parametrize(("beside", "top", "base", "siblings"), CASES.values(), ids=CASES)
async def test_a_commit_is_refused_for_what_it_would_change_and_nothing_else(
    place: Path, beside: list[tuple[str, str]], top: str | None, base: str, siblings: list[str]
) -> None:
    """Refused: with exactly the siblings, and no image changed. Begun: every image beside the chain shows the same."""
    os.mkdir("else")
    for name, below in beside:
        overlay(name, below)
    shows = {name: content(name) for name, _ in beside}
    async with running() as core:
        client = await chain(core)
        if siblings:
            with pytest.raises(CommandError) as refused:
                await commit(client, top, base)
            for name in shows:
                assert (f"'{place}/{name}.qcow2'" in refused.value.desc) == (name in siblings)
        else:
            await commit(client, top, base)
        plan = {"device": "top", "base_node": base} | ({"top_node": top} if top else {})
        if siblings:
            told = await client.execute("x-qmpd-plan-commit", **plan)
            assert [one["image"] for one in told["siblings"]] == [f"{place}/{name}.qcow2" for name in siblings]
            assert told["obstacles"] == [refused.value.desc]
    for name, before in shows.items():
        if not name.startswith("else/"):
            assert content(name) == before


async def test_siblings_in_image_directories_are_found(place: Path) -> None:
    """Below them as well."""
    os.makedirs("store/vm")
    overlay("store/vm/sib", "base")
    async with running() as core:
        core.ctx.graph.overlays.directories = (f"{place}/store",)
        client = await chain(core)
        with pytest.raises(CommandError, match=r"store/vm/sib\.qcow2"):
            await commit(client, "mid", "base")


async def test_siblings_in_the_graph_are_found_without_their_headers(place: Path) -> None:
    """Somebody may have put an image over base that says nothing about it, or that is in no file at all."""
    os.mkdir("else")
    shell(f"qemu-img create -q -f qcow2 else/sib.qcow2 {SIZE}")
    async with running() as core:
        client = await chain(core)
        await client.call("blockdev-add", image("sib", "base", file={"driver": "file", "filename": "else/sib.qcow2"}))
        with pytest.raises(CommandError, match=f"'{place}/else/sib.qcow2' .backed by '{place}/base.qcow2'"):
            await commit(client, "mid", "base")


async def test_other_nodes_on_files_of_the_chain_are_no_siblings(place: Path) -> None:
    """A second node on an image of the chain, or on a link to it, is that image."""
    os.symlink("mid.qcow2", "also-mid.qcow2")
    async with running() as core:
        client = await chain(core)
        file = {"driver": "file", "filename": "also-mid.qcow2", "locking": "off"}
        again = image("again", "base", file=file, read_only=True)
        await client.call("blockdev-add", again)
        await commit(client, "mid", "base")


async def test_what_a_commit_left_behind_does_not_stand_in_the_way_of_the_next(place: Path) -> None:
    """low, then mid, then top into base, with and without the nodes of those that went before."""
    async with running() as core:
        client = await chain(core)
        before = content("top")
        await commit(client, "low", "base")
        await commit(client, "mid", "base")
        await client.execute("blockdev-del", node_name="mid")
        await client.execute("blockdev-del", node_name="low")
        await commit(client, None, "base")
        await client.execute("blockdev-del", node_name="top")
        overlay("next", "base")
        await client.call("blockdev-add", image("next", "base"))
        await client.execute("block-commit", job_id="j", device="next")
        await client.event("BLOCK_JOB_READY")
    assert content("base") == before


async def test_what_a_commit_left_behind_counts_again_when_it_is_used(place: Path) -> None:
    """Written to by somebody else, or served to a client."""
    async with running() as core:
        client = await chain(core)
        await commit(client, "mid", "low")
        address = {"type": "unix", "data": {"path": "nbd.sock"}}
        await client.execute("nbd-server-start", addr=address)
        await client.execute("block-export-add", id="e", type="nbd", node_name="mid")
        with pytest.raises(CommandError, match=r"mid\.qcow2"):
            await commit(client, None, "low")
        await client.execute("block-export-del", id="e")
        await client.event("BLOCK_EXPORT_DELETED")
        await client.execute("blockdev-del", node_name="mid")
        shell("qemu-io -f qcow2 -c 'write -P 9 0 64k' mid.qcow2")
        with pytest.raises(CommandError, match=r"mid\.qcow2"):
            await commit(client, None, "low")


async def test_what_is_backed_by_what_a_commit_left_behind_is_a_sibling(place: Path) -> None:
    """It was none as long as that image was top; the next commit changes what is below it."""
    overlay("sib", "mid")
    before = content("sib")
    async with running() as core:
        client = await chain(core)
        await commit(client, "mid", "low")
        assert content("sib") == before
        with pytest.raises(CommandError, match=f"'{place}/sib.qcow2' .backed by '{place}/mid.qcow2'"):
            await commit(client, None, "low")


async def test_the_offline_commit_is_guarded_too(place: Path) -> None:
    """What is backed by its base is changed, what is backed by the image is not."""
    overlay("sib", "mid")
    async with running() as core:
        client = await chain(core)
        with pytest.raises(CommandError, match=r"sib\.qcow2"):
            await client.execute("x-qmpd-commit-offline", job_id="j", device="top")
        os.unlink("sib.qcow2")
        overlay("over", "top")
        before = content("over")
        await client.execute("x-qmpd-commit-offline", job_id="j", device="top")
        await client.event("BLOCK_JOB_COMPLETED")
    assert content("over") == before


async def test_in_a_transaction_none_begins(place: Path) -> None:
    """The refusal of one is the refusal of all."""
    overlay("sib", "base")
    data = {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"}
    async with running() as core:
        client = await chain(core)
        with pytest.raises(CommandError, match=r"sib\.qcow2"):
            await client.execute("transaction", actions=[{"type": "x-qmpd-block-commit", "data": data}])
        assert await client.execute("query-jobs") == []


async def test_what_qemu_finds_wrong_is_told_first(place: Path) -> None:
    """In its words, whatever siblings there are."""
    overlay("sib", "base")
    async with running() as core:
        client = await chain(core)
        for arguments, text in (
            ({"base_node": "nope"}, "Cannot find device='' nor node-name='nope'"),
            ({"job_id": "%"}, "Invalid job ID '%'"),
            ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
            ({"filter_node_name": "base"}, "Duplicate nodes with node-name='base'"),
        ):
            with pytest.raises(CommandError, match=text):
                await client.execute("block-commit", **{"job_id": "j", "device": "top", "top_node": "mid"} | arguments)
        reader = image("reader", None, file={"driver": "file", "filename": "base.qcow2"}, read_only=True)
        await client.call("blockdev-add", reader)
        with pytest.raises(CommandError, match="lock"):
            await commit(client, "mid", "base")


@pytest.mark.parametrize(
    ("policy", "said", "told"),
    [
        (SiblingPolicy.WARN, None, "warn"),
        (SiblingPolicy.ALLOW, None, None),
        (SiblingPolicy.ALLOW, "warn", "warn"),
        (SiblingPolicy.REFUSE, "allow", "allow"),
        (SiblingPolicy.REFUSE, "warn", "warn"),
        (SiblingPolicy.ALLOW, "refuse", "refused"),
        (SiblingPolicy.WARN, "refuse", "refused"),
    ],
)
async def test_what_is_allowed_is_not_silent(
    place: Path, caplog: pytest.LogCaptureFixture, policy: SiblingPolicy, said: str | None, told: str | None
) -> None:
    """The log names the image; subscribers have an event, others have not. Only a daemon told to allow it is silent."""
    overlay("sib", "base")
    caplog.set_level(logging.WARNING)
    async with running() as core:
        core.core.guard.policy = policy
        client, plain = await chain(core), await core.client()
        await client.execute("x-qmpd-subscribe")
        override = {} if said is None else {"x_qmpd_siblings": said}
        if told == "refused":
            with pytest.raises(CommandError, match=r"sib\.qcow2"):
                await commit(client, "mid", "base", **override)
            return
        await commit(client, "mid", "base", **override)
        events = [event["data"] for event in client.events if event["event"] == "X_QMPD_SIBLINGS"]
        await plain.execute("query-jobs")
        assert "X_QMPD_SIBLINGS" not in {event["event"] for event in plain.events}
    pair = {"image": f"{place}/sib.qcow2", "backing": f"{place}/base.qcow2"}
    assert events == ([] if told is None else [{"id": "j", "policy": told, "siblings": [pair]}])
    assert ("sib.qcow2" in caplog.text) == (told is not None)
