"""qmpd accepts what qemu-storage-daemon accepts, refuses what it refuses with the same words, and ends up the same."""

from __future__ import annotations

import collections
import os
import tomllib
from pathlib import Path

import pytest

from tests.sidebyside import match
from tests.sidebyside.explained import ALL_OR_NONE, EXPLANATIONS, JOB_ON_INACTIVE, STREAM_INTO_FILTER
from tests.tools import need

FEW = 12
MANY = int(os.environ.get("QMPD_SEQUENCES", "500"))
SEED = int(os.environ.get("QMPD_SEED", "1"))

DEVIATIONS = Path(__file__).parents[2] / "docs" / "deviations.toml"


def run(seeds: range, directory: Path) -> None:
    """Play the sequences of ``seeds`` and print how they ended."""
    need("qemu-storage-daemon", "qemu-img", "qemu-io")
    ends: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        place = directory / str(seed)
        place.mkdir()
        ends[match.play(seed, place) or "compared to the end"] += 1
    print(f"seeds {seeds.start} to {seeds.stop - 1}: {dict(ends)}")
    assert ends["compared to the end"] > len(seeds) * 0.8


def test_a_few_sequences(tmp_path: Path) -> None:
    """Random commands change both graphs in the same way, with the same errors, jobs and images."""
    run(range(FEW), tmp_path)


@pytest.mark.long
def test_many_sequences(tmp_path: Path) -> None:
    """The same with ``QMPD_SEQUENCES`` (500) seeds from 1000 times ``QMPD_SEED`` (1) on."""
    run(range(1000 * SEED, 1000 * SEED + MANY), tmp_path)


def test_what_is_explained_is_documented() -> None:
    """Every difference that the comparison forgives is one that users are told of."""
    titles = {entry["title"] for entry in tomllib.loads(DEVIATIONS.read_text())["deviation"]}
    assert {STREAM_INTO_FILTER, ALL_OR_NONE, JOB_ON_INACTIVE, *(known.title for known in EXPLANATIONS)} <= titles
