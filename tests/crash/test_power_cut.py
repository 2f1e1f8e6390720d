"""Whenever the power fails during a commit: images without errors, and the guest's bytes unchanged.

The power cuts are made up from a recording of what a real daemon wrote and flushed. Every state is judged from its
bytes; some also by qemu-img, and by committing again to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from tests.crash.conftest import SEED, Count
from tests.crash.contents import DamageError, Images
from tests.crash.judge import judge, judge_with_commit, judge_with_tools
from tests.crash.recording import Recording
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.server import Server

Recorded = Callable[..., Recording]

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
#: (way to break the order of writing, scenario that shows it)
BROKEN = (
    ("no flush", "snapshots"),
    ("mappings before counts", "copy on write"),
    ("frees before mappings", "snapshots"),
    ("header in one write", "raw base grows"),
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_no_power_cut_damages(
    recorded: Recorded, server: Server, tmp_path: Path, count: Count, scenario: Scenario
) -> None:
    """A few dozen states of each commit, one of them judged by qemu-img and another commit."""
    recording = recorded(scenario)
    states = _some(recording.states(SEED, 3), 36)
    for label, images in states:
        _judge(recording, label, images)
    label, images = Random(SEED).choice(states)
    _judge_thoroughly(server, recording, label, images, tmp_path)
    count("states after a power cut", len(states))
    count("of them committed again", 1)


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_no_power_cut_damages_in_the_long_run(
    recorded: Recorded, server: Server, tmp_path: Path, count: Count, scenario: Scenario
) -> None:
    """Up to 2500 states of each commit; qemu-img judges every tenth, another commit every fiftieth."""
    recording = recorded(scenario)
    number = 0
    for number, (label, images) in enumerate(islice(recording.states(SEED, 400), 2500), 1):
        _judge(recording, label, images)
        if number % 50 == 1:
            _judge_thoroughly(server, recording, label, images, tmp_path)
            count("of them committed again", 1)
        elif number % 10 == 1:
            _judge_by_tools(recording, label, images, tmp_path)
            count("of them judged by qemu-img", 1)
    count("states after a power cut", number)


@pytest.mark.parametrize(("sabotage", "name"), BROKEN, ids=lambda value: value)
def test_a_broken_order_is_noticed(recorded: Recorded, sabotage: str, name: str) -> None:
    """A daemon that writes in another order leaves damage, and this harness sees it."""
    assert recorded(BY_NAME[name], sabotage).find_damage(SEED, 20) is not None


def test_flushes_that_are_left_out_are_noticed(recorded: Recorded) -> None:
    """Not every flush protects something by itself, but of those in base some do, and the last one before a header."""
    recording = recorded(BY_NAME["snapshots"])
    flushes = [i for i, event in enumerate(recording.events) if event.kind == "flush"]
    missed = [i for i in flushes if recording.without(i).find_damage(SEED, 30) is None]
    assert len(missed) <= len(flushes) - 3, f"of the flushes {flushes} nobody would miss {missed}"


def _some(states: Iterator[tuple[str, Images]], most: int) -> list[tuple[str, Images]]:
    """That many of them, from all over the commit."""
    found = list(states)
    step = max(1, -(-len(found) // most))
    return found[::step]


def _judge(recording: Recording, label: str, images: Images) -> None:
    try:
        judge(recording.prepared, images)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {label}: {damage}") from damage


def _judge_by_tools(recording: Recording, label: str, images: Images, directory: Path) -> None:
    for name, content in images.items():
        (directory / name).write_bytes(content)
    try:
        judge_with_tools(recording.prepared, directory)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {label}: {damage}") from damage


def _judge_thoroughly(server: Server, recording: Recording, label: str, images: Images, directory: Path) -> None:
    _judge_by_tools(recording, label, images, directory)
    try:
        judge_with_commit(server, recording.prepared, directory)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {label}, committed again: {damage}") from damage
