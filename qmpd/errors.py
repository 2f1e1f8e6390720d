"""The one error root of qmpd.

Everything that can go wrong on behalf of a client is a :class:`QmpdError`. ``desc`` is the text that clients match on
(QEMU's where QEMU has one), ``kind`` decides the QMP class and what a job's error policy makes of it, and the other
fields say where it happened. Any other exception type that escapes is a bug of ours.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any


class Kind(Enum):
    """What went wrong, small enough to switch on."""

    INVALID = "invalid"  # an argument or a state that does not allow the request
    COMMAND_NOT_FOUND = "command-not-found"
    DEVICE_NOT_FOUND = "device-not-found"
    DEVICE_NOT_ACTIVE = "device-not-active"
    IO = "io"  # the operating system failed a request; errno is set
    NO_SPACE = "no-space"  # ENOSPC or EDQUOT
    CORRUPT = "corrupt"  # an image contradicts its format
    UNSUPPORTED = "unsupported"  # a feature by name that qmpd does not have
    PERMISSION = "permission"  # a graph permission or a node's read-only flag
    LOCKED = "locked"  # another program holds the image
    RANGE = "range"  # a request outside the device: a caller's bug
    CANCELLED = "cancelled"


#: QMP error class of each kind; every kind not listed is a GenericError.
QMP_CLASS = {
    Kind.COMMAND_NOT_FOUND: "CommandNotFound",
    Kind.DEVICE_NOT_FOUND: "DeviceNotFound",
    Kind.DEVICE_NOT_ACTIVE: "DeviceNotActive",
}

#: What to do about it, for people; kinds whose text says all there is to say have none.
HINTS = {
    Kind.COMMAND_NOT_FOUND: "query-commands lists what there is; what is missing on purpose is in the documentation",
    Kind.DEVICE_NOT_FOUND: "query-named-block-nodes lists the nodes",
    Kind.DEVICE_NOT_ACTIVE: "query-jobs lists the jobs; one that has ended may be in x-qmpd-job-results",
    Kind.NO_SPACE: "make room, then resume the job or send the command again",
    Kind.CORRUPT: "do not write to the image; x-qmpd-check or qemu-img check tells what is wrong with it",
    Kind.PERMISSION: "x-debug-query-block-graph shows who uses the node, and for what",
    Kind.LOCKED: "end the program that has the image open; to look only, open it read-only with force-share",
}

#: errno of kinds that carry none of their own (for job results and NBD replies).
_KIND_ERRNO = {
    Kind.NO_SPACE: _errno.ENOSPC,
    Kind.CORRUPT: _errno.EIO,
    Kind.UNSUPPORTED: _errno.ENOTSUP,
    Kind.PERMISSION: _errno.EPERM,
    Kind.RANGE: _errno.EINVAL,
    Kind.INVALID: _errno.EINVAL,
    Kind.CANCELLED: _errno.ECANCELED,
}


class QmpdError(Exception):
    """An answerable failure. ``str(error)`` is the text sent to the client."""

    def __init__(
        self,
        desc: str,
        kind: Kind = Kind.INVALID,
        *,
        node: str | None = None,
        path: str | None = None,
        offset: int | None = None,
        errno: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """``details``: JSON that clients see who have subscribed to more than the peer tells."""
        super().__init__(desc)
        self.desc = desc
        self.kind = kind
        self.node = node
        self.path = path
        self.offset = offset
        self.details = details
        self.errno = errno if errno is not None else _KIND_ERRNO.get(kind, _errno.EIO)

    @property
    def qmp_class(self) -> str:
        """The QMP error class, e.g. ``GenericError``."""
        return QMP_CLASS.get(self.kind, "GenericError")

    def told(self) -> dict[str, Any]:
        """The same for programs, as JSON: a stable ``code``, where it happened, ``errno`` by name, a ``hint``.

        Source: the table in docs/errors.md.
        """
        known = {
            "code": self.kind.value,
            "node": self.node,
            "path": self.path,
            "offset": self.offset,
            "errno": _errno.errorcode.get(self.errno),
            "hint": HINTS.get(self.kind),
        }
        return {name: value for name, value in known.items() if value is not None} | dict(self.details or {})

    @property
    def strerror(self) -> str:
        """The errno as text, as QEMU reports it in ``BLOCK_JOB_COMPLETED.error``."""
        return strerror(self.errno)

    def prefixed(self, prefix: str) -> QmpdError:
        """The same error with ``prefix`` in front of its text (QEMU's error_prepend)."""
        return QmpdError(
            prefix + self.desc,
            self.kind,
            node=self.node,
            path=self.path,
            offset=self.offset,
            errno=self.errno,
            details=self.details,
        )


def strerror(number: int) -> str:
    """Text of an errno, in QEMU's spelling (glibc's)."""
    return os.strerror(number)


def from_oserror(error: OSError, desc: str | None = None, *, path: str | None = None) -> QmpdError:
    """Convert an OSError; ``desc`` defaults to the strerror text alone.

    ENOSPC and EDQUOT become :attr:`Kind.NO_SPACE`, all others :attr:`Kind.IO`.
    """
    number = error.errno or _errno.EIO
    kind = Kind.NO_SPACE if number in (_errno.ENOSPC, _errno.EDQUOT) else Kind.IO
    where = path if path is not None else (error.filename if isinstance(error.filename, str) else None)
    return QmpdError(desc if desc is not None else strerror(number), kind, path=where, errno=number)
