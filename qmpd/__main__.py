"""``qmpd`` and ``python -m qmpd``."""

from __future__ import annotations

import gc
import os
import sys


def main() -> int:
    """Run the daemon; its exit status."""
    # A daemon is to be there at once. Imports make much and drop little, so looking for garbage meanwhile is wasted;
    # plugins of pydantic and threads of a linear algebra library are not wanted at all.
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qmpd import daemon

    return daemon.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
