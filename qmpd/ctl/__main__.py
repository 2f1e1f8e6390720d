"""The program qmpctl: arguments in, exit status out. Errors are one line on standard error, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

import trio

from qmpd.ctl.cli import parser
from qmpd.ctl.client import ClientError, CommandError, ConnectError, ConnectionLostError, connect
from qmpd.ctl.session import Exit, Session

#: Exit status of each way to fail; the first match counts.
_EXIT_OF_ERROR = (
    (CommandError, Exit.FAILED),
    (ConnectError, Exit.NO_CONNECTION),
    (ConnectionLostError, Exit.NO_CONNECTION),
    (ClientError, Exit.USAGE),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status; ``--help`` and wrong usage leave through SystemExit."""
    command_line = parser()
    args = command_line.parse_args(argv)
    if args.socket is None:
        command_line.error("say which daemon: --socket PATH, or set QMPD_SOCKET")
    try:
        return trio.run(partial(_run, args))
    except ClientError as error:
        print(f"qmpctl: {error}", file=sys.stderr)
        # A subcommand whose exit statuses mean something else has one for all failures.
        default = next(status for kind, status in _EXIT_OF_ERROR if isinstance(error, kind))
        return int(getattr(args, "failure", default))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED


async def _run(args: argparse.Namespace) -> int:
    async with connect(args.socket) as client:
        status: int = await args.run(Session(args, client, sys.stdout, sys.stderr))
        return status


if __name__ == "__main__":
    sys.exit(main())
