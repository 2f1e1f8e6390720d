"""``qmpctl commit``: start a block commit and stay with it until it ends."""

from __future__ import annotations

import argparse
from typing import Any, Final

from qmpd.ctl.follow import JOB_EVENTS
from qmpd.ctl.session import Exit, Session
from qmpd.ctl.watch import watch

#: Options that go to block-commit as they are: attribute of the parsed arguments -> member of the command.
_MEMBERS: Final = {
    "device": "device",
    "top": "top-node",
    "base": "base-node",
    "backing_file": "backing-file",
    "speed": "speed",
    "on_error": "on-error",
    "filter_node_name": "filter-node-name",
}


async def run_commit(session: Session) -> Exit:
    """Start the job; wait for its end unless told not to."""
    args = session.args
    job = args.job_id or default_id(args.device)
    with session.client.events(*JOB_EVENTS) as events:
        await session.client.execute("block-commit", arguments(args, job))
        if args.detach:
            session.print_json({"id": job}) if args.json else session.say(f"{job}: started")
            return Exit.OK
        return await watch(session, events, job, complete=not args.keep_ready, until_ready=args.keep_ready)


def default_id(device: str) -> str:
    """A job id that tells what the job is for; generated node names start with a character that ids cannot have."""
    return "commit-" + device.removeprefix("#")


def arguments(args: argparse.Namespace, job: str) -> dict[str, Any]:
    """The arguments of block-commit; what was not given is left to the daemon."""
    given = {member: getattr(args, name) for name, member in _MEMBERS.items() if getattr(args, name) is not None}
    if args.backing_mask_protocol:
        given["backing-mask-protocol"] = True
    if args.manual_finalize:
        given["auto-finalize"] = False
    return {"job-id": job, **given}
