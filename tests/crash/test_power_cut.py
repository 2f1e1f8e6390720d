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
from tests.crash.contents import DamageError
from tests.crash.judge import judge, judge_with_commit, judge_with_tools
from tests.crash.powercut import State
from tests.crash.recording import Recording
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.server import Server

Recorded = Callable[..., Recording]

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
#: (way to break the order of writing, scenario that shows it)
BROKEN = (
    ("no flush", "snapshots"),
    ("mappings before counts", "version 2"),
    ("frees before mappings", "snapshots"),
    ("header in one write", "raw base grows"),
    ("data not flushed", "data file"),
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_no_power_cut_damages(
    recorded: Recorded, server: Server, tmp_path: Path, count: Count, scenario: Scenario
) -> None:
    """A few dozen states of each commit, one of them judged by qemu-img and another commit."""
    recording = recorded(scenario)
    states = _some(recording.states(SEED, 2), 30)
    for state in states:
        _judge(recording, state)
    _judge_thoroughly(server, recording, Random(SEED).choice(states), tmp_path)
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
    for number, state in enumerate(islice(recording.states(SEED, 400), 2500), 1):
        _judge(recording, state)
        if number % 50 == 1:
            _judge_thoroughly(server, recording, state, tmp_path)
            count("of them committed again", 1)
        elif number % 10 == 1:
            _judge_by_tools(recording, state, tmp_path)
            count("of them judged by qemu-img", 1)
    count("states after a power cut", number)


@pytest.mark.parametrize(("sabotage", "name"), BROKEN, ids=lambda value: value)
def test_a_broken_order_is_noticed(recorded: Recorded, sabotage: str, name: str) -> None:
    """A daemon that writes in another order leaves damage, and this harness sees it."""
    assert recorded(BY_NAME[name], sabotage).find_damage(SEED, 8) is not None


def test_flushes_that_are_left_out_are_noticed(recorded: Recorded) -> None:
    """Some flushes only repeat others, but four each protect something by themselves: counts before mappings, base
    before the header, the name in the header before what refers to it, and the header before clients hear of the end.
    """
    recording = recorded(BY_NAME["in place and new"])
    flushes = [i for i, event in enumerate(recording.events) if event.kind == "flush"]
    noticed = [i for i in flushes if recording.without(i).find_damage(SEED, 8) is not None]
    assert [recording.events[i].name for i in noticed] == ["base.qcow2", "base.qcow2", "top.qcow2", "top.qcow2"]


def _some(states: Iterator[State], most: int) -> list[State]:
    """That many of them, from all over the commit."""
    found = list(states)
    step = max(1, -(-len(found) // most))
    return found[::step]


def _judge(recording: Recording, state: State) -> None:
    try:
        judge(recording.prepared, state.images, told=state.told)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {state.label}: {damage}") from damage


def _judge_by_tools(recording: Recording, state: State, directory: Path) -> None:
    for name, content in state.images.items():
        (directory / name).write_bytes(content)
    try:
        judge_with_tools(recording.prepared, directory)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {state.label}: {damage}") from damage


def _judge_thoroughly(server: Server, recording: Recording, state: State, directory: Path) -> None:
    _judge_by_tools(recording, state, directory)
    try:
        judge_with_commit(server, recording.prepared, directory)
    except DamageError as damage:
        raise AssertionError(f"{recording.prepared.scenario}, {state.label}, committed again: {damage}") from damage
