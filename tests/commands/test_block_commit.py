"""block-commit and the job commands as clients call them: arguments, refusals in the peer's order and wording."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from qmpd.commands import block_commit, jobs
from qmpd.control.bus import Bus
from qmpd.control.registry import Context, lookup
from qmpd.errors import QmpdError
from qmpd.graph.edit import Edit
from tests.jobs.rig import CHAIN, Rig, image, running, shell

Execute = Callable[..., Awaitable[Any]]

assert block_commit
assert jobs


@pytest.fixture
async def rig(tmp_path: Path, mock_clock: trio.testing.MockClock) -> AsyncIterator[Rig]:
    """base <- mid <- top with data in mid, and an image that has nothing to do with them."""
    async with running(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 base.qcow2 2M",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
            "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
            "qemu-img create -q -f qcow2 other.qcow2 2M",
            "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' mid.qcow2",
        )
        await made.add(*CHAIN, image("other"))
        yield made


@pytest.fixture
def execute(rig: Rig) -> Execute:
    """Call a command by name with its arguments as on the wire, '_' for '-'."""

    async def quit_() -> None:
        raise AssertionError("nobody asked to quit")

    ctx = Context(rig.graph, rig.jobs, Bus(), None, quit_, rig.lock)  # type: ignore[arg-type]  no objects here

    async def run(name: str, **arguments: Any) -> Any:
        return await lookup(name).call(ctx, {key.replace("_", "-"): value for key, value in arguments.items()})

    return run


async def refusal(call: Awaitable[Any]) -> tuple[str, str]:
    """(class, text) of the error that a call raises."""
    with pytest.raises(QmpdError) as error:
        await call
    return error.value.qmp_class, str(error.value)


GENERIC = [
    ({}, "Parameter 'device' is missing"),
    ({"device": "top", "foo": 1}, "Parameter 'foo' is unexpected"),
    ({"device": "top", "speed": "1"}, "Invalid parameter type for 'speed', expected: integer"),
    ({"device": "top", "speed": 1 << 63}, "Invalid parameter type for 'speed', expected: integer"),
    ({"device": "top", "on_error": "bogus"}, "Parameter 'on-error' does not accept value 'bogus'"),
    ({"device": "base"}, "Need a root block node"),
    ({"device": "top", "top": "x", "top_node": "mid"}, "'top-node' and 'top' are mutually exclusive"),
    ({"device": "top", "top_node": "nope"}, "Cannot find device='' nor node-name='nope'"),
    ({"device": "top", "top_node": "other"}, "'other' is not in this backing file chain"),
    ({"device": "top", "top_node": "top-file"}, "'top-file' is not in this backing file chain"),
    ({"device": "top", "top": "nope.qcow2"}, "Top image file nope.qcow2 not found"),
    ({"device": "top", "base": "x", "base_node": "base"}, "'base-node' and 'base' are mutually exclusive"),
    ({"device": "top", "base_node": "nope"}, "Cannot find device='' nor node-name='nope'"),
    ({"device": "top", "base_node": "other"}, "'other' is not in this backing file chain"),
    ({"device": "top", "base_node": "mid-file"}, "'mid-file' is not in this backing file chain"),
    ({"device": "top", "base": "nope.qcow2"}, "Can't find 'nope.qcow2' in the backing chain"),
    ({"device": "top", "top_node": "mid", "base_node": "top"}, "'top' is not in this backing file chain"),
    ({"device": "top", "top_node": "base", "base_node": "mid"}, "'mid' is not in this backing file chain"),
    ({"device": "top", "top_node": "mid", "base_node": "mid"}, "cannot commit an image into itself"),
    ({"device": "top", "top_node": "base"}, "cannot commit an image into itself"),
    ({"device": "other"}, "cannot commit an image into itself"),
    ({"device": "top", "backing_file": "x"}, "'backing-file' specified, but 'top' is the active layer"),
    ({"device": "top", "filter_node_name": "9x"}, "Invalid node-name: '9x'"),
    ({"device": "top", "filter_node_name": "base"}, "Duplicate nodes with node-name='base'"),
    ({"device": "top"}, "Invalid job ID ''"),
]


async def test_refused_before_a_job_exists(rig: Rig, execute: Execute) -> None:
    """Exact texts, no events, nothing changed."""
    before = rig.edges()

    for arguments, text in GENERIC:
        assert await refusal(execute("block-commit", **arguments)) == ("GenericError", text)
    for device in ("nope", ""):
        gone = ("DeviceNotFound", f"Device '{device}' not found")
        assert await refusal(execute("block-commit", device=device, top="x", top_node="y")) == gone

    assert rig.told() == ""
    assert rig.edges() == before


@pytest.mark.parametrize("bad", [None, "", "1a", "a b", "#x", "ä", "j0/x", "-a", "_a"])
async def test_ids(rig: Rig, execute: Execute, bad: str | None) -> None:
    """Ill-formed ids, and none at all, are noticed after all nodes have been found."""
    named = {} if bad is None else {"job_id": bad}

    assert await refusal(execute("block-commit", device="top", top_node="nope", **named)) == (
        "GenericError",
        "Cannot find device='' nor node-name='nope'",
    )
    assert await refusal(execute("block-commit", device="top", top_node="mid", **named)) == (
        "GenericError",
        f"Invalid job ID '{bad or ''}'",
    )
    assert rig.told() == ""


async def test_a_busy_chain(rig: Rig, execute: Execute) -> None:
    """A job is a parent that is no backend, hence the text for nodes below others; the same id comes later."""
    await execute("block-commit", job_id="j0", device="top", top_node="mid", speed=1)

    for job_id in ("j0", "j1"):
        busy = await refusal(execute("block-commit", job_id=job_id, device="top", top_node="mid"))
        assert busy == ("GenericError", "Need a root block node")


async def test_blocked_nodes(rig: Rig, execute: Execute) -> None:
    """Operations refused on the device, or on a node of the chain, name the node and the reason."""
    edit: Edit
    with rig.graph.edit() as edit:
        edit.block_ops(rig.node("mid"), "it is looked after")

    assert await refusal(execute("block-commit", job_id="j0", device="top", top_node="mid")) == (
        "GenericError",
        "Node 'mid' is busy: it is looked after",
    )


async def test_defaults(rig: Rig, execute: Execute) -> None:
    """base is the deepest node; no speed; the job finalizes and dismisses itself."""
    await execute("block-commit", job_id="j0", device="top", top_node="mid", speed=1)
    await rig.rested()
    (info,) = await execute("query-block-jobs")

    assert info["auto-finalize"]
    assert info["auto-dismiss"]
    assert any(line.startswith("j0 -base-> base") for line in rig.edges())

    await execute("block-job-set-speed", device="j0", speed=0)
    await rig.gone()


async def test_file_names(rig: Rig, execute: Execute) -> None:
    """top and base may be given as the file names of the links."""
    await execute("block-commit", job_id="j0", device="top", top="mid.qcow2", base="base.qcow2", auto_dismiss=False)
    await rig.until(lambda: rig.jobs.query_jobs()[0]["status"] == "concluded")

    assert rig.node("top").backing is rig.node("base")

    await execute("job-dismiss", id="j0")

    assert await execute("query-jobs") == []


async def test_verbs_by_both_names(rig: Rig, execute: Execute) -> None:
    """Pause, resume, cancel and dismiss under job-* and block-job-* are the same."""
    start = {"job_id": "j0", "device": "top", "top_node": "mid", "speed": 1, "auto_dismiss": False}

    await execute("block-commit", **start)
    await rig.rested()
    await execute("job-pause", id="j0")
    await execute("block-job-resume", device="j0")
    await execute("block-job-pause", device="j0")
    await execute("job-resume", id="j0")
    await execute("block-job-cancel", device="j0")
    await execute("block-job-dismiss", id="j0")
    await execute("block-commit", **start)
    await rig.rested()
    await execute("job-cancel", id="j0")
    await execute("job-dismiss", id="j0")

    assert rig.told().split(", ").count("null") == 2


@pytest.mark.parametrize("finalize", ["job-finalize", "block-job-finalize"])
async def test_finalize_by_both_names(rig: Rig, execute: Execute, finalize: str) -> None:
    """A pending job takes its last step before the reply."""
    await execute("block-commit", job_id="j0", device="top", top_node="mid", auto_finalize=False)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])

    await execute(finalize, id="j0")

    assert rig.node("top").backing is rig.node("base")


VERBS = [
    ("job-pause", "id", {}),
    ("job-resume", "id", {}),
    ("job-cancel", "id", {}),
    ("job-complete", "id", {}),
    ("job-finalize", "id", {}),
    ("job-dismiss", "id", {}),
    ("block-job-pause", "device", {}),
    ("block-job-resume", "device", {}),
    ("block-job-cancel", "device", {}),
    ("block-job-complete", "device", {}),
    ("block-job-set-speed", "device", {"speed": -1}),
    ("block-job-finalize", "id", {}),
    ("block-job-dismiss", "id", {}),
    ("block-job-change", "id", {"type": "mirror", "copy_mode": "write-blocking"}),
]


@pytest.mark.parametrize(("verb", "key", "more"), VERBS, ids=[verb for verb, *_ in VERBS])
async def test_unknown_jobs(rig: Rig, execute: Execute, verb: str, key: str, more: dict[str, Any]) -> None:
    """Two spellings of "no such job"; the lookup comes before any check of values."""
    unknown = (
        ("DeviceNotActive", "Block job 'nope' not found")
        if verb.startswith("block")
        else ("GenericError", "Job not found")
    )

    assert await refusal(execute(verb, **{key: "nope"}, **more)) == unknown
    assert await refusal(execute(verb, **more)) == ("GenericError", f"Parameter '{key}' is missing")


async def test_change_of_a_commit(rig: Rig, execute: Execute) -> None:
    """Refused whatever type is named; a mirror's arguments are checked first."""
    await execute("block-commit", job_id="j0", device="top", top_node="mid", speed=1)
    never = ("GenericError", "Job type does not support change")

    assert await refusal(execute("block-job-change", id="j0", type="commit")) == never
    assert await refusal(execute("block-job-change", id="j0", type="mirror", copy_mode="background")) == never
    assert await refusal(execute("block-job-change", id="j0", type="mirror")) == (
        "GenericError",
        "Parameter 'copy-mode' is missing",
    )


async def test_speed_values(rig: Rig, execute: Execute) -> None:
    """Any int64 is an integer; a negative one is refused, the largest is fine."""
    await execute("block-commit", job_id="j0", device="top", top_node="mid", speed=1)
    await rig.rested()
    await execute("job-pause", id="j0")
    for bad in (1.5, "10", 1 << 63, -(1 << 63) - 1, True, None):
        text = "Invalid parameter type for 'speed', expected: integer"
        assert await refusal(execute("block-job-set-speed", device="j0", speed=bad)) == ("GenericError", text)
    for negative in (-1, -(1 << 63)):
        text = "Parameter 'speed' expects a non-negative value"
        assert await refusal(execute("block-job-set-speed", device="j0", speed=negative)) == ("GenericError", text)

    await execute("block-job-set-speed", device="j0", speed=(1 << 63) - 1)

    assert (await execute("query-block-jobs"))[0]["speed"] == (1 << 63) - 1
