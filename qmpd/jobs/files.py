"""The files that images are in, and the room there is for them. Worker thread, but for :func:`storage_of`."""

from __future__ import annotations

import os

from qmpd.block.storage import posix
from qmpd.block.storage.file import FileStorage
from qmpd.graph.node import Node


def storage_of(node: Node, *, data: bool = False) -> FileStorage | None:
    """The file that holds the node's image, if there is one; with ``data``, that of the guest's data."""
    if data and "data-file" in node.children:
        return storage_of(node.children["data-file"].node)
    current: Node | None = node
    while current is not None:
        if isinstance(current.driver, FileStorage):
            return current.driver
        edge = current.primary_edge
        current = edge.node if edge else None
    return None


def free_space(storage: FileStorage) -> int | None:
    """Bytes that this process may still write; None where the file is none that grows."""
    if not storage.growable:
        return None
    answer = os.fstatvfs(storage.fd)
    return answer.f_frsize * (answer.f_bfree if os.geteuid() == 0 else answer.f_bavail)


def shares_blocks(source: FileStorage | None, base: FileStorage) -> bool:
    """Does the file system let the two share blocks? Tried on a file without a name, which is gone at once."""
    if source is None or os.fstat(source.fd).st_dev != os.fstat(base.fd).st_dev:
        return False
    try:
        fd = os.open(os.path.dirname(base.location) or ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        posix.clone_range(source.fd, 0, 4096, fd, 0)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
