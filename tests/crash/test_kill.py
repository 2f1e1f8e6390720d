"""``kill -9`` at every single system call of a commit that changes a file, before it and half way through it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.commit import commit
from tests.crash.conftest import SEED, Count
from tests.crash.contents import DamageError
from tests.crash.instrument import Orders
from tests.crash.judge import judge, judge_with_commit, judge_with_tools
from tests.crash.recording import Recording
from tests.crash.scenarios import SCENARIOS, Scenario, copy_images
from tests.crash.server import Server

Recorded = Callable[..., Recording]

#: Calls that can be cut in two.
DIVISIBLE = ("write", "zero")


def moments(recording: Recording) -> list[tuple[int, bool]]:
    """(number of the call, half way?) for all calls."""
    found = [(i, False) for i in range(len(recording.calls))]
    return found + [
        (i, True) for i, event in enumerate(recording.calls) if event.kind in DIVISIBLE and event.length > 512
    ]


def kill_at(server: Server, recording: Recording, moment: tuple[int, bool], directory: Path) -> None:
    """Kill a daemon then; nothing may be damaged, and another commit comes to its end."""
    scenario = recording.prepared.scenario
    copy_images(recording.directory, directory, scenario.files)
    number, torn = moment
    killed = not commit(server, scenario, directory, Orders(kill=number, torn=torn, reflink=scenario.reflink))
    assert killed, f"{scenario}: call {number} did not come"
    try:
        judge(recording.prepared, {name: (directory / name).read_bytes() for name in scenario.files})
        judge_with_tools(recording.prepared, directory)
        judge_with_commit(server, recording.prepared, directory)
    except DamageError as damage:
        event = recording.calls[number]
        where = f"{'half way through' if torn else 'before'} call {number} ({event.kind} of {event.name})"
        raise AssertionError(f"{scenario}, killed {where}: {damage}") from damage
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_killed_once(recorded: Recorded, server: Server, tmp_path: Path, count: Count, scenario: Scenario) -> None:
    """One moment of each commit."""
    recording = recorded(scenario)
    choice = moments(recording)
    kill_at(server, recording, choice[(SEED * 7919 + len(scenario.name)) % len(choice)], tmp_path / "k")
    count("commits killed", 1)


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_killed_everywhere(
    recorded: Recorded, server: Server, tmp_path: Path, count: Count, scenario: Scenario
) -> None:
    """All moments of each commit."""
    recording = recorded(scenario)
    for moment in moments(recording):
        kill_at(server, recording, moment, tmp_path / "k")
    count("commits killed", len(moments(recording)))
