"""The command line of qmpctl as argparse knows it. Data, no behaviour."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from qmpd import __version__
from qmpd.ctl import commands, text
from qmpd.ctl.check import Verdict, run_check
from qmpd.ctl.commit import run_commit, run_commit_offline
from qmpd.ctl.plan import run_plan
from qmpd.ctl.watch import run_watch

_EPILOG = """\
exit status: 0 done, 1 the daemon refused or the job failed, 2 wrong usage, 3 no connection, 4 the job was cancelled,
130 interrupted (a job that was being watched goes on)"""

_VERB_HELP = {
    "pause": "hold a job",
    "resume": "let a paused job go on, or one that stopped at an error try again",
    "cancel": "end a job without its effect on the chain",
    "complete": "let a ready job take effect",
    "finalize": "let a pending job change the chain",
    "dismiss": "forget a concluded job",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="qmpctl",
        description="Look at and work with the images of a running qmpd (or qemu-storage-daemon).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"qmpctl {__version__}")
    root.add_argument(
        "-s",
        "--socket",
        metavar="PATH",
        default=os.environ.get("QMPD_SOCKET"),
        help="the daemon's monitor socket; default: the environment variable QMPD_SOCKET",
    )
    table = root.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    _queries(table.add_parser)
    _commit(table.add_parser)
    _commit_offline(table.add_parser)
    _plan(table.add_parser)
    _check(table.add_parser)
    _jobs(table.add_parser)
    _raw(table.add_parser)
    return root


def size_argument(value: str) -> int:
    """An argument with an optional size suffix, in bytes."""
    try:
        return text.parse_size(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


#: Adds a subcommand: argparse's ``add_parser``.
Add = Callable[..., argparse.ArgumentParser]


def _queries(add: Add) -> None:
    chain = add("chain", help="the chains of images, bases first")
    chain.set_defaults(run=commands.run_chain)
    _json(chain)
    jobs = add("jobs", help="the jobs")
    jobs.set_defaults(run=commands.run_jobs)
    _json(jobs)
    events = add("events", help="print events as they come, until Ctrl-C")
    events.set_defaults(run=commands.run_events)
    events.add_argument("names", metavar="NAME", nargs="*", help="only events with these names")
    events.add_argument("-n", "--count", type=int, metavar="N", help="stop after N events")
    events.add_argument("--since", type=int, metavar="N", help="begin with the events after number N (0: all kept)")
    _json(events)
    results = add("results", help="how the last jobs ended, also those that are gone")
    results.set_defaults(run=commands.run_results)
    results.add_argument("--since", type=int, metavar="N", help="only those told by an event after number N")
    _json(results)


def _commit(add: Add) -> None:
    commit = add(
        "commit",
        help="merge images into the one below them and watch it",
        description="Commit the images from --top down to, and excluding, --base into --base. Sizes take K, M, G, T.",
    )
    commit.set_defaults(run=run_commit)
    option = commit.add_argument
    _stretch(commit)
    _job_options(commit)
    option("--backing-file", metavar="NAME", help="what to write into the overlay's header instead of base's name")
    option("--backing-mask-protocol", action="store_true", help="write the format 'raw' for a bare protocol node")
    option("--filter-node-name", metavar="NODE", help="name of the filter node while the job runs")
    option("--manual-finalize", action="store_true", help="wait for 'qmpctl finalize' before the chain changes")
    option("--keep-ready", action="store_true", help="leave an active commit in sync instead of completing it")
    _start_options(commit)


def _stretch(commit: argparse.ArgumentParser) -> None:
    option = commit.add_argument
    option("device", metavar="DEVICE", help="node name of the chain's active image")
    option("--top", metavar="NODE", help="topmost image to merge; default: DEVICE itself (an active commit)")
    option("--base", metavar="NODE", help="image to merge into; default: the deepest of the chain")


def _plan(add: Add) -> None:
    plan = add(
        "plan",
        help="what would a commit do, and what would stop it?",
        description="Show what 'commit' with the same arguments would copy, how base would grow, and what would stop"
        " it. Changes nothing. Needs qmpd as the daemon.",
        epilog="exit status: 0 nothing would stop it, 1 something would",
    )
    plan.set_defaults(run=run_plan)
    _stretch(plan)
    plan.add_argument("--speed", type=size_argument, metavar="RATE", help="with this limit in bytes a second")
    _json(plan)


def _commit_offline(add: Add) -> None:
    commit = add(
        "commit-offline",
        help="merge an image nobody writes to into the one below it, and empty it",
        description="Commit DEVICE into its backing image and empty it, as qemu-img commit does. It must have no"
        " writers. The chain stays as it is. Sizes take K, M, G, T.",
    )
    commit.set_defaults(run=run_commit_offline)
    option = commit.add_argument
    option("device", metavar="DEVICE", help="node name of the image")
    option("-d", "--keep", action="store_true", help="do not empty the image")
    _job_options(commit)
    option("--manual-finalize", action="store_true", help="wait for 'qmpctl finalize' before the image is emptied")
    _start_options(commit)


def _check(add: Add) -> None:
    check = add(
        "check",
        help="is an image consistent?",
        description="Check an image that nobody writes to, as qemu-img check does. Needs qmpd as the daemon.",
        epilog="exit status: 0 clean, 1 could not be checked, 2 corrupt (or wrong usage), 3 leaks only",
    )
    check.set_defaults(run=run_check, failure=Verdict.FAILED)
    check.add_argument("node", metavar="NODE", help="node name of the image")
    check.add_argument("-r", "--repair", choices=["leaks"], help="give leaked clusters back; NODE must be writable")
    _json(check)


def _job_options(commit: argparse.ArgumentParser) -> None:
    option = commit.add_argument
    option("--job-id", metavar="ID", help="default: commit-DEVICE")
    option("--speed", type=size_argument, metavar="RATE", help="limit in bytes a second, e.g. 50M")
    option("--on-error", choices=["report", "ignore", "enospc", "stop", "auto"], help="default: report")


def _start_options(commit: argparse.ArgumentParser) -> None:
    commit.add_argument("--detach", action="store_true", help="start it and return")
    _json(commit)
    _quiet(commit)


def _jobs(add: Add) -> None:
    watch = add("watch", help="follow a job to its end")
    watch.set_defaults(run=run_watch)
    watch.add_argument("job", metavar="JOB", nargs="?", help="default: the only one there is")
    _json(watch)
    _quiet(watch)
    speed = add("speed", help="change a job's speed limit")
    speed.set_defaults(run=commands.run_speed)
    speed.add_argument("job", metavar="JOB")
    speed.add_argument("rate", metavar="RATE", type=size_argument, help="bytes a second, e.g. 50M; 0: no limit")
    for verb in commands.VERBS:
        verb_parser = add(verb, help=_VERB_HELP[verb])
        verb_parser.set_defaults(run=commands.run_verb, verb=verb)
        verb_parser.add_argument("job", metavar="JOB")
        if verb == "cancel":
            verb_parser.add_argument("--soft", action="store_true", help="let a ready job end in sync, without a pivot")


def _raw(add: Add) -> None:
    raw = add("raw", help="send any QMP command and print its result as JSON")
    raw.set_defaults(run=commands.run_raw)
    raw.add_argument("command_name", metavar="NAME", help="e.g. query-version")
    raw.add_argument(
        "arguments", metavar="ARGUMENTS", nargs="?", default="", help="a JSON object; - reads it from stdin"
    )


def _json(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("--json", action="store_true", help="print JSON for programs")


def _quiet(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("-q", "--quiet", action="store_true", help="no progress, only the end")
