"""Replay one recorded job: make its images, start a daemon on them, take its steps, look at the images afterwards.

A recording has ``setup`` (command lines that make the images), ``blockdevs`` (nodes to add), ``steps`` and ``after``
(checks of the images; those whose name ends in "before" ran before the daemon did). A step is a command with its reply
and the events before it, events to wait for, a query of the graph as text, or a program run against an export.

**Order.** The order among all events of a scenario is compared, and every reply. On which side of a reply an event is,
is compared in one direction: what the recording has before a reply must be there before it, the rest may come early.

**Rest.** The recordings were taken while jobs were at rest. So before each command the harness waits, within
bounds, until every job does: not busy, and no progress between two looks. A command that starts another job is sent at
once, as it was recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from qmpd.jobs.siblings import SiblingPolicy
from tests.daemons import PEER, Client, HungError, under_test
from tests.replay import hosts, normal
from tests.replay.deviations import MismatchError
from tests.replay.guest import CONNECTED_EARLIER, Guest
from tests.replay.normal import Message, StepEvent
from tests.replay.views import Views

_SENT_AT_ONCE = ("block-commit", "block-stream")
_SETTLE_LIMIT = 3.0  # seconds a job may go on before a command is sent all the same
_SETTLE_PAUSE = 0.01  # seconds between two looks
_NOTICE = 0.2  # seconds in which a job has noticed what a guest wrote
_EVENT_LIMIT = 10.0  # seconds to wait for recorded events
_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_ENCRYPTION = slice(32, 36)  # the header's field for the method, 0 for none


class UnsoundError(AssertionError):
    """An image is damaged or leaks. No deviation may do that."""


def replay(
    case: dict[str, Any],
    directory: Path,
    *,
    play: type[Play] | None = None,
    siblings: SiblingPolicy = SiblingPolicy.REFUSE,
) -> None:
    """Raise MismatchError unless the program under test does what was recorded, with its images in ``directory``.

    Raises UnsoundError if it damages one, and ChangedViewError if a guest sees something else, whatever else it does.
    """
    for argv in case["setup"]:
        subprocess.run(argv, cwd=directory, check=True, capture_output=True)
    check_images(case, directory, before=True)
    views = Views(case, directory, guarded=siblings is SiblingPolicy.REFUSE)
    unprivileged = any(argv[0] == "chmod" for argv in case["setup"])
    try:
        _converse(case, directory, play or Play, unprivileged=unprivileged, siblings=siblings)
        check_images(case, directory, before=False)
    finally:
        if under_test() != PEER:
            check_soundness(directory)
            views.compare()


def _converse(
    case: dict[str, Any], directory: Path, play: type[Play], *, unprivileged: bool, siblings: SiblingPolicy
) -> None:
    with hosts.start(directory, unprivileged=unprivileged, siblings=siblings) as host:
        with contextlib.closing(Client(host.dial())) as client:
            try:
                play(client, case, directory).run()
            except (HungError, EOFError) as problem:
                raise MismatchError(f"the conversation broke off: {problem}") from problem
        if "exit-status" in case["after"]:
            _check_end(host, case["after"]["exit-status"])


def _check_end(host: hosts.Host, recorded: int) -> None:
    """Only the recorded program may crash again."""
    if recorded < 0 and under_test() != PEER:
        raise MismatchError(f"the recorded program was ended by signal {-recorded}")
    if (status := host.exit_status()) is not None:
        expect("exit status", status, recorded)


class Play:
    """The steps of one scenario, taken one by one."""

    def __init__(self, client: Client, case: dict[str, Any], directory: Path) -> None:
        self._client = client
        self._steps = _with_nodes(case)
        self._directory = directory
        self._timing_dependent = case.get("timing-dependent", False)
        self._needs_guest = any(step.get("client", [""])[0] == CONNECTED_EARLIER for step in self._steps)
        self._guest: Guest | None = None
        self._recorded: list[StepEvent] = []
        self._arrived: list[StepEvent] = []
        self._ours = normal.Names()
        self._theirs = normal.Names()

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            self._run(stack)

    def _run(self, stack: contextlib.ExitStack) -> None:
        for number, step in enumerate(self._steps):
            if "send" in step:
                self._command(number, step)
            elif "events" in step:
                self._recorded += [(number, event) for event in step["events"]]
                self._await_recorded(number)
            elif "graph-edges" in step:
                self._graph(number, step["graph-edges"])
            else:
                self._other(step)
            self._compare_events(number)
            if self._needs_guest and step.get("send", {}).get("execute") == "block-export-add":
                self._guest = stack.enter_context(Guest(self._directory))
        self._compare_events(len(self._steps), all_of_them=True)

    def _command(self, number: int, step: dict[str, Any]) -> None:
        name = step["send"].get("execute")
        if name not in _SENT_AT_ONCE:
            self._settle(number - 1)
        self._recorded += [(number, event) for event in step.get("events-before-reply", ())]
        if step["recv"] is None:
            self._expect_end(step)
            self._collect(number)
            return
        answer = self._client.call(step["send"])
        self._collect(number)
        self._expect(f"step {number}: answer to {step['send']}", answer, step["recv"])
        if len(normal.events(self._arrived)) < len(normal.events(self._recorded)):
            self._compare_events(number)
            if not self._timing_dependent:
                raise MismatchError(
                    f"step {number}: {name} was answered before its events: {step['events-before-reply']}"
                )
            self._await_recorded(number)

    def _expect_end(self, step: dict[str, Any]) -> None:
        """The recorded program crashed here. Only the recorded program may do that again."""
        with contextlib.suppress(EOFError):
            answer = self._client.call(step["send"])
            raise MismatchError(f"{step['send']} was answered where the recorded program ended: {answer}")

    def _graph(self, number: int, recorded: list[str]) -> None:
        self._settle(number - 1)
        graph = self._client.execute("x-debug-query-block-graph")
        self._collect(number)
        self._expect(f"step {number}: graph", normal.layout(normal.edges(graph)), normal.layout(recorded))

    def _other(self, step: dict[str, Any]) -> None:
        """A program run against an export, or the guest."""
        if step["client"][0] == CONNECTED_EARLIER:
            self._connected_guest(step)
            return
        run = subprocess.run(step["client"], cwd=self._directory, capture_output=True, text=True)
        got = (run.returncode, [line.split(";")[0] for line in (run.stdout + run.stderr).splitlines()])
        expect(f"{step['client']}", got, (step["status"], step["output"]))
        time.sleep(_NOTICE)

    def _connected_guest(self, step: dict[str, Any]) -> None:
        """A request of the guest that has been connected since the export was there: held, then let go."""
        assert self._guest is not None
        if "finished-after-1.5s" in step:
            self._guest.ask(step["client"][1])
            expect("the guest is answered", self._guest.answers_within(1.5), step["finished-after-1.5s"])
        else:
            expect("the guest is answered", self._guest.answers_within(_EVENT_LIMIT), step["finished-after-finalize"])

    def _await_recorded(self, number: int) -> None:
        """Until as many events are there as were recorded so far, noise apart."""
        deadline = time.monotonic() + _EVENT_LIMIT
        wanted = len(normal.events(self._recorded))
        while len(normal.events(self._arrived)) < wanted:
            try:
                self._client.events.append(self._client.message(max(0.0, deadline - time.monotonic())))
            except HungError:
                self._compare_events(number)
                raise MismatchError(f"step {number}: waited in vain for {self._steps[number]['events']}") from None
            self._collect(number)

    def _settle(self, number: int) -> None:
        """Until no job is busy and none has moved since the last look; within bounds."""
        deadline = time.monotonic() + _SETTLE_LIMIT
        last: list[Message] | None = None
        while time.monotonic() < deadline:
            jobs = self._client.execute("query-block-jobs")
            self._collect(number)
            if jobs == last and not any(job["busy"] for job in jobs):
                return
            if jobs or last is not None:
                time.sleep(_SETTLE_PAUSE)
            last = jobs

    def _collect(self, number: int) -> None:
        self._arrived += [(number, event) for event in self._client.events]
        self._client.events.clear()

    def _compare_events(self, number: int, *, all_of_them: bool = False) -> None:
        arrived, recorded = normal.events(self._arrived), normal.events(self._recorded)
        common = len(recorded) if all_of_them else min(len(arrived), len(recorded))
        got, wanted = arrived[: None if all_of_them else common], recorded[:common]
        if got != wanted:
            raise MismatchError(f"step {number}: events\n  got      {_brief(got)}\n  recorded {_brief(wanted)}")

    def _expect(self, what: str, got: Any, recorded: Any) -> None:
        if normal.caught_in_flight(recorded):
            return
        expect(what, self._ours.apply(normal.reply(got)), self._theirs.apply(normal.reply(recorded)))


def _with_nodes(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps, with the nodes added where they were: after the objects that they use."""
    steps: list[dict[str, Any]] = case["steps"]
    objects = next((i for i, step in enumerate(steps) if step.get("send", {}).get("execute") != "object-add"), 0)
    nodes = [{"send": {"execute": "blockdev-add", "arguments": n}, "recv": {"return": {}}} for n in case["blockdevs"]]
    return [*steps[:objects], *nodes, *steps[objects:]]


def check_images(case: dict[str, Any], directory: Path, *, before: bool) -> None:
    """The recorded looks at the images: what qemu-img and qemu-io say of them."""
    for name, recorded in case["after"].items():
        kind, *rest = name.split()
        if kind in _LOOKS and (rest[-1] == "before") == before:
            expect(name, _LOOKS[kind](rest[0], recorded, directory), _LOOKED[kind](recorded))


def check_soundness(directory: Path) -> None:
    """Each qcow2 image in ``directory``, by itself, has no error and no leak: also where a deviation is expected."""
    for image in sorted(directory.iterdir()):
        if not image.is_file() or not os.access(image, os.R_OK):
            continue
        with image.open("rb") as file:
            header = file.read(_QCOW2_ENCRYPTION.stop)
        if header[:4] != _QCOW2_MAGIC or any(header[_QCOW2_ENCRYPTION]):
            continue  # qmpd opens no encrypted image, and qemu-img would want the key
        alone = {"driver": "qcow2", "file": {"driver": "file", "filename": image.name}, "backing": None}
        argv = ["qemu-img", "check", "-q", f"json:{json.dumps(alone)}"]
        run = subprocess.run(argv, cwd=directory, capture_output=True, text=True)
        if run.returncode:
            raise UnsoundError(f"{image.name}: {run.stdout}{run.stderr}")


def _info(image: str, recorded: Any, directory: Path) -> Any:
    """The recorded fields of qemu-img info, and any of the backing fields that are there but were not."""
    keys = {*recorded, "backing-filename", "full-backing-filename", "backing-filename-format"}
    run = subprocess.run(["qemu-img", "info", "--output=json", image], cwd=directory, capture_output=True, text=True)
    if run.returncode:
        return {"error": run.stderr.strip()}
    info = json.loads(run.stdout)
    return normal.reply({key: value for key, value in info.items() if key in keys})


def _map(image: str, recorded: Any, directory: Path) -> Any:
    """The extents of qemu-img map without their places in the file."""
    extents = json.loads(_output(directory, "qemu-img", "map", "--output=json", image))
    return [{key: extent[key] for key in recorded[0]} for extent in extents]


def _verify(_: str, recorded: Any, directory: Path) -> Any:
    """Status and output of the recorded reads."""
    run = subprocess.run(recorded["argv"], cwd=directory, capture_output=True, text=True)
    return run.returncode, normal.program_output(run.stdout + run.stderr)


def _exists(name: str, _: Any, directory: Path) -> bool:
    """Is there such a file?"""
    return (directory / name).exists()


_LOOKS = {"exists": _exists, "info": _info, "map": _map, "verify": _verify}
_LOOKED = {
    "exists": lambda recorded: recorded,
    "info": normal.reply,
    "map": lambda recorded: recorded,
    "verify": lambda recorded: (recorded["status"], recorded["output"]),
}


def _output(directory: Path, *argv: str) -> str:
    return subprocess.run(argv, cwd=directory, check=True, capture_output=True, text=True).stdout


def expect(what: str, got: Any, recorded: Any) -> None:
    if got != recorded:
        raise MismatchError(f"{what}\n  got      {_brief(got)}\n  recorded {_brief(recorded)}")


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 4000 else f"{text[:4000]} ... ({len(text)} characters)"
