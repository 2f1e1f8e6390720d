"""What every subcommand gets: the parsed arguments, the connection, and where to write; and the exit statuses."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TextIO

from qmpd.ctl.client import Client
from qmpd.ctl.follow import Ending, Outcome


class Exit(IntEnum):
    """Exit statuses of qmpctl; docs/qmpctl.md lists them for users."""

    OK = 0
    FAILED = 1  # the daemon refused the command, or the job failed
    USAGE = 2
    NO_CONNECTION = 3
    CANCELLED = 4  # the job was cancelled, here or elsewhere
    INTERRUPTED = 130  # Ctrl-C; a job that was being watched goes on


#: What the end of a job means for the exit status.
EXIT_OF_OUTCOME = {
    Outcome.COMPLETED: Exit.OK,
    Outcome.READY: Exit.OK,
    Outcome.FAILED: Exit.FAILED,
    Outcome.CANCELLED: Exit.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a subcommand."""

    args: argparse.Namespace
    client: Client
    out: TextIO
    err: TextIO

    def say(self, *lines: str) -> None:
        """Lines for people, on standard output."""
        for line in lines:
            print(line, file=self.out, flush=True)

    def print_json(self, value: Any) -> None:
        """A result for programs: indented JSON."""
        self.say(json.dumps(value, indent=2))

    def finish(self, ending: Ending) -> Exit:
        """Report how a job ended, in the form asked for."""
        if self.args.json:
            self.print_json(
                {
                    "id": ending.job,
                    "result": ending.outcome.value,
                    "error": ending.error,
                    "offset": ending.offset,
                    "len": ending.length,
                }
            )
        elif ending.outcome is Outcome.FAILED:
            print(f"qmpctl: {ending.job}: {ending.error}", file=self.err)
        else:
            self.say(f"{ending.job}: {ending.outcome.value}")
        return EXIT_OF_OUTCOME[ending.outcome]
