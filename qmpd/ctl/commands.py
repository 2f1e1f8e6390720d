"""The short subcommands: one query or one verb each."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any, Final

from qmpd.ctl import chain, text
from qmpd.ctl.client import ClientError, CommandError, Event
from qmpd.ctl.session import Exit, Session
from qmpd.wire.dialect import DialectError, parse

#: Verbs that every job knows, as subcommands and, with ``job-`` in front, as QMP commands.
VERBS: Final = ("pause", "resume", "cancel", "complete", "finalize", "dismiss")


async def run_chain(session: Session) -> Exit:
    """``qmpctl chain``"""
    chains = await chain.query(session.client)
    if session.args.json:
        session.print_json([base.as_json() for base in chains])
    else:
        session.say(*chain.render(chains))
    return Exit.OK


async def run_jobs(session: Session) -> Exit:
    """``qmpctl jobs``: every job; block jobs with what only those have."""
    details = {row["device"]: row for row in await session.client.execute("query-block-jobs")}
    jobs = [{**details.get(row["id"], {}), **row} for row in await session.client.execute("query-jobs")]
    if session.args.json:
        session.print_json(jobs)
    else:
        session.say(*_job_table(jobs))
    return Exit.OK


def _job_table(jobs: list[dict[str, Any]]) -> list[str]:
    if not jobs:
        return ["no jobs"]
    rows = [["JOB", "TYPE", "STATUS", "DONE", "OF", "SPEED LIMIT", "ERROR"]]
    rows.extend(
        [
            row["id"],
            row["type"],
            row["status"],
            text.size(row["current-progress"]),
            text.size(row["total-progress"]),
            text.rate(row.get("speed") or None),
            row.get("error", "-"),
        ]
        for row in jobs
    )
    return text.columns(rows)


async def run_verb(session: Session) -> Exit:
    """``qmpctl pause|resume|cancel|complete|finalize|dismiss JOB``"""
    verb, job = session.args.verb, session.args.job
    if verb == "cancel" and session.args.soft:
        await session.client.execute("block-job-cancel", {"device": job})
    else:
        await session.client.execute(f"job-{verb}", {"id": job})
    return Exit.OK


async def run_speed(session: Session) -> Exit:
    """``qmpctl speed JOB RATE``"""
    arguments = {"device": session.args.job, "speed": session.args.rate}
    await session.client.execute("block-job-set-speed", arguments)
    return Exit.OK


async def run_events(session: Session) -> Exit:
    """``qmpctl events [NAME...]``: one line each, until the count is reached, the daemon ends or somebody presses
    Ctrl-C. ``--since N`` begins with those after number N."""
    args = session.args
    left = args.count or math.inf
    with session.client.events(*args.names) as events:
        log = await session.client.subscribe(progress="X_QMPD_JOB_PROGRESS" in args.names, since=args.since)
        if args.since is not None:
            if log is None:
                raise CommandError("CommandNotFound", "this daemon does not keep events")
            if not log["complete"]:
                print(f"qmpctl: not all events since {args.since} are kept", file=session.err)
        while left > 0:
            event = await events.next()
            if args.since is not None and event.number is None:
                continue  # came before the subscription, which told it again
            session.say(_event_line(event, as_json=args.json))
            left -= 1
    return Exit.OK


def _event_line(event: Event, *, as_json: bool) -> str:
    if as_json:
        row = {"event": event.name, "data": event.data, "time": event.time}
        return json.dumps(row if event.number is None else {"number": event.number, **row})
    clock = time.strftime("%H:%M:%S", time.localtime(event.time)) + f"{event.time % 1:.3f}"[1:]
    number = "" if event.number is None else f"#{event.number}"
    words = [clock, number, event.name, *(f"{key}={value}" for key, value in event.data.items())]
    return " ".join(word for word in words if word)


async def run_results(session: Session) -> Exit:
    """``qmpctl results``: how the last jobs ended."""
    arguments = {} if session.args.since is None else {"since": session.args.since}
    rows = await session.client.execute("x-qmpd-job-results", arguments)
    if session.args.json:
        session.print_json(rows)
    elif rows:
        session.say(*_result_table(rows))
    else:
        session.say("no results")
    return Exit.OK


def _result_table(rows: list[dict[str, Any]]) -> list[str]:
    table = [["NUMBER", "ENDED", "JOB", "TYPE", "OUTCOME", "DONE", "OF", "ERROR"]]
    table.extend(
        [
            str(row["number"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["ended"]["seconds"])),
            row["id"],
            row["type"],
            row["outcome"],
            text.size(row["offset"]),
            text.size(row["len"]),
            row.get("error", "-"),
        ]
        for row in rows
    )
    return text.columns(table)


async def run_raw(session: Session) -> Exit:
    """``qmpctl raw COMMAND [ARGUMENTS]``: any command; the result as JSON. ``-`` reads the arguments from stdin."""
    given = session.args.arguments
    raw = sys.stdin.buffer.read() if given == "-" else given.encode()
    try:
        arguments = parse(raw) if raw.strip() else {}
    except DialectError as error:
        raise ClientError(f"the arguments: {error}") from None
    if not isinstance(arguments, dict):
        raise ClientError("the arguments must be a JSON object")
    session.print_json(await session.client.execute(session.args.command_name, arguments))
    return Exit.OK
