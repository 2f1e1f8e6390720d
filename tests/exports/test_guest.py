"""A real guest lives on an export while the chain below it is reshaped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.exports.serving import Server, run
from tests.exports.virtual import boot, kernel
from tests.tools import need


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_guest_does_not_notice_what_happens_below_its_file_system(server: Server, tmp_path: Path) -> None:
    """Snapshots, an intermediate commit and an active commit that pivots: no I/O error, no wrong byte, a clean disk."""
    need("e2fsck", "qemu-img")
    kernel()
    base = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "64M")
    server.open("base", [base])
    server.export("base", name="disk")
    client = server.client
    with boot(tmp_path, server.url("disk")) as guest:
        guest.more_rounds(3)
        for below, above in (("base", "mid"), ("mid", "top")):
            file = str(tmp_path / f"{above}.qcow2")
            names = {"node_name": below, "snapshot_node_name": above}
            client.execute("blockdev-snapshot-sync", snapshot_file=file, format="qcow2", **names)
            guest.more_rounds(3)
        client.execute("block-commit", job_id="inner", device="top", top_node="mid", base_node="base")
        client.wait_status("inner", "null", patience=120)
        guest.more_rounds(2)
        client.execute("block-commit", job_id="active", device="top", base_node="base")
        client.wait_status("active", "ready", patience=120)
        guest.more_rounds(2)
        client.execute("block-job-complete", device="active")
        client.wait_status("active", "null", patience=120)
        guest.more_rounds(3)
        exports = {export["id"]: export["node-name"] for export in client.execute("query-block-exports")}
        assert exports == {"base": "base"}
        guest.finish()
    client.execute("quit")
    assert server.daemon.exit_status() == 0
    run("qemu-img", "check", "-q", base)
    run("qemu-img", "convert", "-O", "raw", base, tmp_path / "disk")
    checked = subprocess.run(["e2fsck", "-fn", tmp_path / "disk"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
