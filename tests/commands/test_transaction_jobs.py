"""Jobs in transactions: all start or none, and grouped ones end together or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import Kind, QmpdError
from tests.commands.served import Served, serving
from tests.jobs.rig import backing, check, image, reads, shell

GROUPED = {"completion-mode": "grouped"}


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """Two chains of three, a2 on a1 on a0 and b2 on b1 on b0, with 16 MiB in the middle ones."""
    async with serving(tmp_path) as made:
        for chain in "ab":
            shell(f"qemu-img create -q -f qcow2 {chain}0.qcow2 16M")
            for number in (1, 2):
                shell(f"qemu-img create -q -f qcow2 -b {chain}{number - 1}.qcow2 -F qcow2 {chain}{number}.qcow2")
            shell(f"qemu-io -f qcow2 -c 'write -P 0x1{chain} 0 16M' {chain}1.qcow2")
            for number in range(3):
                below = f"{chain}{number - 1}" if number else None
                await made.rig.add(image(f"{chain}{number}", below, read_only=number < 2))
        yield made


def commit(chain: str, job_id: str | None = None, **more: Any) -> dict[str, Any]:
    data = {"job-id": job_id or f"j{chain}", "device": f"{chain}2", "top-node": f"{chain}1", "base-node": f"{chain}0"}
    return {"type": "x-qmpd-block-commit", "data": data | {key.replace("_", "-"): more[key] for key in more}}


def stream(chain: str, **more: Any) -> dict[str, Any]:
    data = {"job-id": f"j{chain}", "device": f"{chain}2"}
    return {"type": "x-qmpd-block-stream", "data": data | {key.replace("_", "-"): more[key] for key in more}}


def life(daemon: Served, job: str | None = None) -> list[str]:
    """What clients were told: "ja running" for a status, "ja COMPLETED" for the end of a block job."""
    told = []
    for name, data in daemon.rig.events:
        if name == "JOB_STATUS_CHANGE":
            told.append(f"{data['id']} {data['status']}")
        elif name.startswith("BLOCK_JOB"):
            told.append(f"{data.get('device', data.get('id'))} {name.removeprefix('BLOCK_JOB_')}")
    return [line for line in told if job is None or line.startswith(f"{job} ")]


def statuses(daemon: Served) -> dict[str, str]:
    return {job["id"]: job["status"] for job in daemon.ctx.jobs.query_jobs()}


async def until(daemon: Served, **wanted: str) -> None:
    await daemon.rig.until(lambda: statuses(daemon) == wanted)


def merged(chain: str) -> None:
    """The overlay is on base now, which has everything."""
    assert backing(f"{chain}2.qcow2") == (f"{chain}0.qcow2", "qcow2")
    check(*(f"{chain}{number}.qcow2" for number in range(3)))
    reads(f"{chain}2.qcow2", f"0x1{chain} 0 16M")


def unmerged(chain: str) -> None:
    assert backing(f"{chain}2.qcow2") == (f"{chain}1.qcow2", "qcow2")
    check(*(f"{chain}{number}.qcow2" for number in range(3)))
    reads(f"{chain}2.qcow2", f"0x1{chain} 0 16M")


async def test_grouped_jobs_end_together(daemon: Served) -> None:
    """The fast one waits for the slow one; the last steps come one after the other, the last named first."""
    actions = [commit("a", speed=1), commit("b")]
    assert await daemon.call("transaction", actions=actions, properties=GROUPED) == {}
    assert life(daemon)[:4] == ["ja created", "jb created", "jb running", "ja running"]
    await until(daemon, ja="running", jb="waiting")
    await daemon.call("block-job-set-speed", device="ja", speed=0)
    await daemon.rig.gone()
    assert life(daemon)[4:] == [
        *("jb waiting", "ja waiting", "jb pending", "ja pending"),
        *("jb COMPLETED", "jb concluded", "jb null", "ja COMPLETED", "ja concluded", "ja null"),
    ]
    await daemon.rig.close()
    merged("a")
    merged("b")


async def test_individual_jobs_end_each_by_itself(daemon: Served) -> None:
    await daemon.call("transaction", actions=[commit("a", speed=1), commit("b")])
    await until(daemon, ja="running")
    await daemon.call("job-cancel", id="ja")
    await daemon.rig.gone()
    assert life(daemon, "jb")[-3:] == ["jb COMPLETED", "jb concluded", "jb null"]
    assert life(daemon, "ja")[-4:] == ["ja aborting", "ja CANCELLED", "ja concluded", "ja null"]
    await daemon.rig.close()
    unmerged("a")
    merged("b")


async def test_cancelling_one_of_a_group_cancels_all(daemon: Served) -> None:
    """Also the one that has all its data over, and the reply comes when both are gone."""
    await daemon.call("transaction", actions=[commit("a", speed=1), commit("b")], properties=GROUPED)
    await until(daemon, ja="running", jb="waiting")
    daemon.rig.events.clear()
    await daemon.call("job-cancel", id="ja")
    await daemon.rig.gone()
    assert life(daemon) == [
        *("ja aborting", "jb aborting", "jb CANCELLED", "jb concluded", "jb null"),
        *("ja CANCELLED", "ja concluded", "ja null"),
    ]
    await daemon.rig.close()
    unmerged("a")
    unmerged("b")


async def test_a_failure_of_one_cancels_the_others(daemon: Served) -> None:
    """The one that failed says why; the others were cancelled."""
    shell("qemu-img create -q -f qcow2 c0.qcow2 16M", "qemu-img create -q -f qcow2 -b c0.qcow2 -F qcow2 c1.qcow2")
    shell("qemu-img create -q -f qcow2 -b c1.qcow2 -F qcow2 c2.qcow2", "qemu-io -f qcow2 -c 'write 0 1M' c1.qcow2")
    file = {"driver": "file", "filename": "c0.qcow2"}
    faulty = {"driver": "blkdebug", "image": file, "inject-error": [{"event": "write_aio", "errno": 5}]}
    await daemon.rig.add(image("c0", read_only=True) | {"file": faulty})
    await daemon.rig.add(image("c1", "c0", read_only=True))
    await daemon.rig.add(image("c2", "c1"))
    await daemon.call("transaction", actions=[commit("a", speed=1), commit("c")], properties=GROUPED)
    await daemon.rig.gone()
    [failed] = [data for name, data in daemon.rig.events if name == "BLOCK_JOB_COMPLETED"]
    assert (failed["device"], failed["error"]) == ("jc", "Input/output error")
    assert life(daemon, "ja")[-4:] == ["ja aborting", "ja CANCELLED", "ja concluded", "ja null"]
    await daemon.rig.close()
    unmerged("a")


async def test_finalizing_one_of_a_group_finalizes_all(daemon: Served) -> None:
    """One that is to be finalized by hand holds all of them in pending."""
    actions = [commit("a", auto_finalize=False), commit("b")]
    await daemon.call("transaction", actions=actions, properties=GROUPED)
    await until(daemon, ja="pending", jb="pending")
    assert life(daemon)[-3:] == ["jb pending", "ja pending", "ja PENDING"]
    await daemon.call("job-finalize", id="jb")
    await daemon.rig.gone()
    assert "ja COMPLETED" in life(daemon)
    await daemon.rig.close()
    merged("a")
    merged("b")


async def test_cancelling_a_pending_group(daemon: Served) -> None:
    await daemon.call("transaction", actions=[commit("a"), commit("b", auto_finalize=False)], properties=GROUPED)
    await until(daemon, ja="pending", jb="pending")
    await daemon.call("job-cancel", id="jb")
    await daemon.rig.gone()
    await daemon.rig.close()
    unmerged("a")
    unmerged("b")


async def test_members_that_stay_can_be_dismissed_in_any_order(daemon: Served) -> None:
    actions = [commit("a", auto_dismiss=False), commit("b", auto_dismiss=False)]
    await daemon.call("transaction", actions=actions, properties=GROUPED)
    await until(daemon, ja="concluded", jb="concluded")
    await daemon.call("job-dismiss", id="ja")
    await daemon.call("job-dismiss", id="jb")
    assert statuses(daemon) == {}


async def test_active_commits_pivot_together(daemon: Served) -> None:
    """Each is completed by hand; the first one waits for the second before its users move."""
    actions = [commit(chain, top_node=f"{chain}2", base_node=f"{chain}0") for chain in "ab"]
    await daemon.call("transaction", actions=actions, properties=GROUPED)
    await until(daemon, ja="ready", jb="ready")
    await daemon.call("job-complete", id="ja")
    await until(daemon, ja="waiting", jb="ready")
    await daemon.call("job-complete", id="jb")
    await daemon.rig.gone()
    await daemon.rig.close()
    for chain in "ab":
        check(f"{chain}0.qcow2")
        reads(f"{chain}0.qcow2", f"0x1{chain} 0 16M")


async def test_commit_and_stream_in_one_group(daemon: Served) -> None:
    await daemon.call("transaction", actions=[commit("a"), stream("b")], properties=GROUPED)
    await daemon.rig.gone()
    assert [line for line in life(daemon) if "COMPLETED" in line] == ["jb COMPLETED", "ja COMPLETED"]
    await daemon.rig.close()
    merged("a")
    assert backing("b2.qcow2") == (None, None)
    reads("b2.qcow2", "0x1b 0 16M")


@pytest.mark.parametrize("properties", [{}, GROUPED])
@pytest.mark.parametrize(
    ("second", "text"),
    [
        (commit("b", device="nope"), "Device 'nope' not found"),
        (commit("b", job_id="ja"), "Job ID 'ja' already in use"),
        (commit("b", speed=-1), "Parameter 'speed' expects a non-negative value"),
        (commit("a", job_id="other"), "Need a root block node"),
    ],
)
async def test_none_starts_if_one_cannot(
    daemon: Served, second: dict[str, Any], text: str, properties: dict[str, str]
) -> None:
    """The first one is created and undone, without having run; the graph is as it was."""
    actions = [commit("a"), second]
    assert await daemon.refused("transaction", actions=actions, properties=properties) == text
    assert life(daemon, "ja") == ["ja created", "ja aborting", "ja concluded", "ja null"]
    assert statuses(daemon) == {}
    await daemon.call("transaction", actions=[commit("a"), commit("b")], properties=properties)
    await daemon.rig.gone()
    await daemon.rig.close()
    merged("a")
    merged("b")


async def test_jobs_and_changes_do_not_mix(daemon: Served) -> None:
    """Both lists are looked at before anything runs."""
    internal = {"type": "blockdev-snapshot-internal-sync", "data": {"device": "a2", "name": "s"}}
    text = await daemon.refused("transaction", actions=[commit("b"), internal])
    assert text == (
        "Action 'blockdev-snapshot-internal-sync' cannot be in one transaction with 'x-qmpd-block-commit', which starts"
        " a job"
    )
    text = await daemon.refused("transaction", actions=[commit("b"), internal], properties=GROUPED)
    kind = "blockdev-snapshot-internal-sync"
    assert text == f"Action '{kind}' does not support transaction property completion-mode = grouped"
    assert daemon.rig.events == []


async def test_the_last_step_of_one_that_fails_leaves_the_others_unmerged(daemon: Served) -> None:
    """The last named goes first: when its header cannot be rewritten, the other one has not taken its last step."""
    actions = [commit("a", auto_finalize=False), commit("b")]
    await daemon.call("transaction", actions=actions, properties=GROUPED)
    await until(daemon, ja="pending", jb="pending")
    b2 = daemon.graph.get("b2").opened

    def fail(reference: object) -> None:
        raise QmpdError("Input/output error", Kind.IO)

    b2.change_backing_reference = fail  # type: ignore[method-assign,assignment]
    await daemon.call("job-finalize", id="ja")
    await daemon.rig.gone()
    assert "ja CANCELLED" in life(daemon)
    await daemon.rig.close()
    unmerged("a")
    unmerged("b")
