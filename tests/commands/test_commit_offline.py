"""x-qmpd-commit-offline as clients call it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.inprocess import CommandError, running
from tests.jobs.rig import image, reads, shell


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base <- top with data in top, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 2M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' top.qcow2",
    )


@pytest.mark.usefixtures("images")
async def test_from_the_command_to_the_images() -> None:
    """A job of type commit; afterwards base has the data and top has none."""
    async with running() as core:
        client = await core.client()
        await client.call("blockdev-add", image("base", read_only=True))
        await client.call("blockdev-add", image("top", "base"))

        with pytest.raises(CommandError, match="Image does not have a backing file"):
            await client.execute("x-qmpd-commit-offline", job_id="j0", device="base-file")
        for device, text in (("nope", "Cannot find device='nope' nor node-name='nope'"), ("top", "Invalid job ID ''")):
            with pytest.raises(CommandError, match=text):
                await client.execute("x-qmpd-commit-offline", device=device)

        await client.execute("x-qmpd-commit-offline", job_id="j0", device="top")
        ended = await client.event("BLOCK_JOB_COMPLETED")
        assert ended == {"device": "j0", "type": "commit", "len": 2 << 20, "offset": 2 << 20, "speed": 0}
        await client.event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")

    reads("base.qcow2", "0x22 0 2M")
    info = subprocess.run(["qemu-img", "map", "--output=json", "top.qcow2"], check=True, capture_output=True)
    assert {extent["depth"] for extent in json.loads(info.stdout)} == {1}


@pytest.mark.usefixtures("images")
async def test_it_is_told_to_be_unstable_and_qmpds_own() -> None:
    """In the introspection, with all its members."""
    async with running() as core:
        client = await core.client()
        schema = {entry["name"]: entry for entry in await client.execute("query-qmp-schema")}
    entry = schema["x-qmpd-commit-offline"]

    assert entry["features"] == ["unstable"]
    members = {member["name"] for member in schema[entry["arg-type"]]["members"]}
    usual = {"job-id", "device", "keep", "speed", "on-error", "auto-finalize", "auto-dismiss"}
    assert members == {*usual, *(f"x-qmpd-{name}" for name in ("siblings", "force", "queue", "idempotent"))}
