"""``qmpd`` and ``python -m qmpd``."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import sys
from collections.abc import Callable


def _find_library(name: str, search: Callable[[str], str | None] = ctypes.util.find_library) -> str | None:
    """What trio asks for where threads get their names, without running ldconfig, which takes 10 ms."""
    known = f"lib{name}.so.0"
    try:
        ctypes.CDLL(known)
    except OSError:
        return search(name)
    return known


def main() -> int:
    """Run the daemon; its exit status."""
    # A daemon is to be there at once. Imports make much and drop little, so looking for garbage meanwhile is wasted;
    # plugins of pydantic and threads of a linear algebra library are not wanted at all.
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    find_library = ctypes.util.find_library
    ctypes.util.find_library = _find_library
    try:
        from qmpd import daemon
    finally:
        ctypes.util.find_library = find_library

    return daemon.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
