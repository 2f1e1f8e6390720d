"""``qmpctl commit`` and ``commit-offline``: start a block commit and stay with it until it ends."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
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


#: The same for x-qmpd-commit-offline.
_OFFLINE_MEMBERS: Final = {"device": "device", "speed": "speed", "on_error": "on-error"}


async def run_commit(session: Session) -> Exit:
    """Start the job; wait for its end unless told not to."""
    args = session.args
    job = args.job_id or default_id(args.device)
    return await _run(session, "block-commit", arguments(args, job), keep_ready=args.keep_ready)


async def run_commit_offline(session: Session) -> Exit:
    """The same for an image without writers."""
    args = session.args
    job = args.job_id or default_id(args.device)
    return await _run(session, "x-qmpd-commit-offline", offline_arguments(args, job))


async def _run(session: Session, command: str, arguments: dict[str, Any], *, keep_ready: bool = False) -> Exit:
    args, job = session.args, arguments["job-id"]
    with session.client.events(*JOB_EVENTS) as events:
        await session.client.execute(command, arguments)
        if args.detach:
            session.print_json({"id": job}) if args.json else session.say(f"{job}: started")
            return Exit.OK
        return await watch(session, events, job, complete=not keep_ready, until_ready=keep_ready)


def default_id(device: str) -> str:
    """A job id that tells what the job is for; generated node names start with a character that ids cannot have."""
    return "commit-" + device.removeprefix("#")


def arguments(args: argparse.Namespace, job: str) -> dict[str, Any]:
    """The arguments of block-commit; what was not given is left to the daemon."""
    given = _given(args, job, _MEMBERS)
    if args.backing_mask_protocol:
        given["backing-mask-protocol"] = True
    return given


def offline_arguments(args: argparse.Namespace, job: str) -> dict[str, Any]:
    """The arguments of x-qmpd-commit-offline; what was not given is left to the daemon."""
    given = _given(args, job, _OFFLINE_MEMBERS)
    if args.keep:
        given["keep"] = True
    return given


def _given(args: argparse.Namespace, job: str, members: Mapping[str, str]) -> dict[str, Any]:
    given = {member: getattr(args, name) for name, member in members.items() if getattr(args, name) is not None}
    if args.manual_finalize:
        given["auto-finalize"] = False
    return {"job-id": job, **given}
