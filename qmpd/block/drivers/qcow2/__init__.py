"""The qcow2 image format, versions 2 and 3, read and write (spec/qcow2.md).

Rooms, bottom up: :mod:`header` and :mod:`tables` are pure; :mod:`cache` holds metadata in memory and knows the order in
which it goes to disk; :mod:`refcounts`, :mod:`alloc` and :mod:`clusters` work on it under the image lock; :mod:`image`
ties them together; :mod:`reading`, :mod:`writing`, :mod:`zeroing` and :mod:`resize` are the requests; :mod:`driver` is
what the rest of the program sees, with :mod:`create` beside it. :mod:`references` counts what the mapping uses, past
the caches, for :mod:`check` and :mod:`repair`. Synchronous and thread-safe.
"""

from qmpd.block.drivers.qcow2.create import CreateOptions, create
from qmpd.block.drivers.qcow2.driver import Qcow2

__all__ = ["CreateOptions", "Qcow2", "create"]
