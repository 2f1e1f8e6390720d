"""What start-up has to do, in the order of the command line: the plain form between options and daemon.

Everything is done strictly left to right, so things are defined before they are used. Source: spec/qmp-protocol.md
sections 14 and 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.control.chardev import Chardev
from qmpd.control.qapi import Source


@dataclass(frozen=True)
class Step:
    """``option`` is the option as typed, for error messages: ``--blockdev driver=raw,...``."""

    option: str


@dataclass(frozen=True)
class AddChardev(Step):
    """``--chardev``: bind, connect or wait for a client."""

    chardev: Chardev


@dataclass(frozen=True)
class AddMonitor(Step):
    """``--monitor``: serve the clients of a character device."""

    chardev_id: str
    pretty: bool = False


@dataclass(frozen=True)
class RunCommand(Step):
    """Any other option is a command in disguise; ``source`` tells whether its arguments are JSON or key=value text."""

    command: str
    arguments: Mapping[str, Any]
    source: Source


@dataclass(frozen=True)
class Plan:
    """A whole command line. ``pid_file`` is written after the last step, before anybody is served."""

    steps: tuple[Step, ...] = ()
    pid_file: str | None = None
    daemonize: bool = False
