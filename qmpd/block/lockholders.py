"""Who holds a lock on an image file, as far as the kernel tells: /proc/locks does not know whose the locks of open file
descriptions are, but each descriptor's entry in /proc/PID/fdinfo lists those of its own.

Only for words to people: processes of other users and other PID namespaces may stay unseen, and whoever is found may
have gone meanwhile. Any thread; it takes some milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: Descriptors looked at, so that a machine full of them does not hold anybody up.
_MOST_DESCRIPTORS: Final = 50_000


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A process, and the name of its program (at most 15 bytes, as the kernel keeps it)."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def find_holders(fd: int, byte: int) -> list[Holder]:
    """The processes that have the lock byte of the file behind ``fd`` locked; not by ``fd`` itself. Raises nothing."""
    try:
        status = os.fstat(fd)
        found = {pid for pid, number in _openers((status.st_dev, status.st_ino), fd) if _locks(pid, number, byte)}
    except OSError:
        return []
    return sorted(Holder(pid, _command(pid)) for pid in found)


def _openers(file: tuple[int, int], own: int) -> Iterator[tuple[int, int]]:
    """(process, descriptor) of everybody who has the file open, but for our descriptor ``own``."""
    left = _MOST_DESCRIPTORS
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            numbers = os.listdir(f"/proc/{name}/fd")
        except OSError:  # gone, or another user's
            continue
        left -= len(numbers)
        if left < 0:
            return
        for number in numbers:
            if int(number) == own and int(name) == os.getpid():
                continue
            try:
                status = os.stat(f"/proc/{name}/fd/{number}")
            except OSError:
                continue
            if (status.st_dev, status.st_ino) == file:
                yield int(name), int(number)


def _locks(pid: int, number: int, byte: int) -> bool:
    """Has the descriptor a lock on that byte? A line is ``lock: 1: OFDLCK ADVISORY READ -1 DEVICE:INODE START END``."""
    try:
        with open(f"/proc/{pid}/fdinfo/{number}") as file:
            lines = [line.split() for line in file if line.startswith("lock:")]
    except OSError:
        return False
    return any(int(words[-2]) <= byte and (words[-1] == "EOF" or byte <= int(words[-1])) for words in lines)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
