"""``python -m tests.bench [TOPIC...]``: measure, print a Markdown table; exit 1 if a goal is missed at full scale."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.bench import commits, exports, monitor, reflink
from tests.bench.runner import HEADER, RUNS, SCALE, Row
from tests.daemons import PEER, QMPD

TOPICS = {topic.name: topic for topic in (*commits.TOPICS, *reflink.TOPICS, *monitor.TOPICS, *exports.TOPICS)}


def main(names: list[str]) -> int:
    """Measure the named topics, or all."""
    if unknown := [name for name in names if name not in TOPICS]:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(TOPICS)}", file=sys.stderr)
        return 2
    print(f"{QMPD.version()} against {PEER.version()}; scale {SCALE:g}, {RUNS} runs of each, in turn\n")
    print(HEADER, flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as directory:
        for name in names or TOPICS:
            for row in TOPICS[name].measure(Path(directory)):
                rows.append(row)
                print(row, flush=True)
    return 1 if SCALE >= 1 and not all(row.met for row in rows) else 0


sys.exit(main(sys.argv[1:]))
