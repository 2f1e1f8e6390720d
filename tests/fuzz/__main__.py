"""Fuzz the qcow2 driver: ``python -m tests.fuzz --seed 1 --count 1000000``. See ``make test-fuzz``.

Every execution has a number; ``--seed S --first N --count 1`` repeats number N. Failures are printed with what repeats
them, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from types import FrameType

from tests.fuzz.execute import FoundError, execute
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import seeds

#: Seconds of the processor that one execution may take: far more than any needs.
PATIENCE = 60
#: One that waits for something that never comes takes none: after so many times as much by the clock it has failed too.
_BUSY = 60
#: Address space for the whole program, bytes: who asks for more gets a MemoryError.
MEMORY = 2 << 30
#: Every so many executions the memory is measured.
MEASURE = 499
_MAX_FAILURES = 20
#: After so many executions there is a word of how it goes.
_STRETCH = 20_000


def run(
    seed: int, first: int, count: int, *, patience: int = PATIENCE, tell: Callable[[str], object] = lambda line: None
) -> tuple[Counter[str], list[str]]:
    """Executions ``first`` and following; what happened, and a line for each failure, which is told at once."""
    sources, outcomes, failures = seeds(), Counter[str](), list[str]()
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        source = rng.choice(sources)
        raw = mutated(source, rng)
        if patience:
            signal.setitimer(signal.ITIMER_PROF, patience)
            signal.alarm(patience * _BUSY)
        try:
            execute(raw, source.data, rng, outcomes, measure=number % MEASURE == 0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it was found
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(
                f"--seed {seed} --first {number} --count 1 ({source.name}): {type(error).__name__}: {error}"
                f" [{where.filename.rpartition('/')[2]}:{where.lineno}]"
            )
            tell(failures[-1])
            if len(failures) >= _MAX_FAILURES:
                break
        outcomes["executions"] += 1
        if outcomes["executions"] % _STRETCH == 0:
            tell(f"{outcomes['executions']} executions, {len(failures)} failures")
    if patience:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return outcomes, failures


def _too_long(_: int, __: FrameType | None) -> None:
    raise FoundError(f"no end after {PATIENCE} seconds of work, or {PATIENCE * _BUSY} of waiting")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    for end in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(end, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    start = time.monotonic()
    outcomes, failures = run(
        options.seed, options.first, options.count, tell=lambda line: print(line, file=sys.stderr, flush=True)
    )
    elapsed = time.monotonic() - start
    print("\n".join(failures))
    done = outcomes.pop("executions", 0)
    print(f"seed {options.seed}, from {options.first}: {done} executions, {done / elapsed:.0f} a second")
    print(", ".join(f"{number} {what}" for what, number in sorted(outcomes.items())))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
