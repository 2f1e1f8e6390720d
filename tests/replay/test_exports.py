"""99 recorded scenarios of NBD exports: replies, events, clients that stay connected, the graph, and command lines."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from qmpd import daemon, options
from tests.daemons import PATIENCE, PEER, under_test
from tests.replay import deviations, scenario
from tests.replay.nbdclient import NbdClient
from tests.tools import need

AREA = "exports"
RECORDINGS = Path(__file__).parents[1] / "data" / "exports.jsonl"

#: Members of a step that say what was done rather than what came out.
_ASKED = {"nbd-client", "do", "export", "offset", "length", "byte", "timeout", "no_wait", "timed", "after-seconds"}


#: Which of two requests is answered before the end depends on whether one read brings both.
_BY_CHANCE = {"quit-with-request-in-flight"}


def recordings() -> list[dict[str, Any]]:
    cases = [json.loads(line) for line in RECORDINGS.read_text().splitlines()]
    return [case for case in cases if case["case"] not in _BY_CHANCE]


@pytest.mark.parametrize("case", deviations.parametrize(AREA, recordings()))
def test_goes_as_recorded(case: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every reply, every event in its order, what clients get, and how a command line ends."""
    need("qemu-img", "qemu-io", "nbdinfo", "openssl")
    for argv in case["setup"]:
        subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    if case["case"].startswith("cmdline-"):
        command_line(case, tmp_path, capsys)
    else:
        scenario.replay(case | {"setup": [], "steps": [*objects(case), *case["steps"]]}, tmp_path, play=Play)
        if "sector-bytes" in case["after"]:
            data = (tmp_path / "disk.raw").read_bytes()
            found = [f"{data[number * 512]:02x}" for number in range(len(case["after"]["sector-bytes"]))]
            scenario.expect("sectors", found, case["after"]["sector-bytes"])


def objects(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The --object options of a recording as steps."""
    words = case["daemon-args"]
    made = []
    for option, value in itertools.pairwise(words):
        if option == "--object":
            kind, *rest = value.split(",")
            pairs = (word.split("=") for word in rest)
            members = {key: int(text) if text.isdecimal() else text for key, text in pairs}
            step = {"execute": "object-add", "arguments": {"qom-type": kind} | members}
            made.append({"send": step, "recv": {"return": {}}})
    return made


class Play(scenario.Play):
    """A scenario whose steps include NBD connections and looks at files."""

    _nbd: dict[str, NbdClient]

    def _run(self, stack: contextlib.ExitStack) -> None:
        self._nbd = {}
        self._stack = stack
        super()._run(stack)

    def _other(self, step: dict[str, Any]) -> None:
        if "nbd-client" in step:
            self._act(step)
        elif "path-exists" in step:
            scenario.expect(f"{step}", (self._directory / step["path-exists"]).exists(), step["result"])
        elif "truncate" in step:
            os.truncate(self._directory / step["truncate"], step["to"])
        else:
            self._tool(step)

    def _act(self, step: dict[str, Any]) -> None:
        name = step["nbd-client"]
        if name not in self._nbd:
            self._nbd[name] = self._stack.enter_context(contextlib.closing(NbdClient(self._directory / "nbd.sock")))
        if "reply-cookies-in-order" in step:
            scenario.expect("cookies", self._nbd[name].crowd(), step["reply-cookies-in-order"])
            return
        recorded = {key: value for key, value in step.items() if key not in _ASKED}
        scenario.expect(f"{step}", self._nbd[name].act(step), recorded)

    def _tool(self, step: dict[str, Any]) -> None:
        """A program: its status, and the recorded lines, which are not all."""
        run = subprocess.run(step["client"], cwd=self._directory, capture_output=True, text=True)
        scenario.expect(f"{step['client']}: status", run.returncode, step["status"])
        lines = [line.split(";")[0].strip() for line in (run.stdout + run.stderr).splitlines()]
        if not self._timing_dependent:
            missing = [line for line in step["output"] if line.strip() not in lines]
            scenario.expect(f"{step['client']}: lines missing in {lines}", missing, [])


def command_line(case: dict[str, Any], directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start with the recorded words; a daemon that serves is ended by a signal."""
    recorded = case["after"]
    words = case["daemon-args"]
    runs = recorded["exit-status"] != 1
    program = under_test()
    if program == PEER:
        argv = [*program.argv, *words, "--pidfile", "pid"]
        process = subprocess.Popen(argv, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if runs:
            while process.poll() is None and not (directory / "pid").exists():
                pass
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        status = process.returncode
    else:
        with contextlib.chdir(directory):
            line = options.scan(words, daemon.PROGRAM)
            status = trio.run(daemon.Daemon(line).run, lambda: signal.raise_signal(signal.SIGTERM))
        errors = capsys.readouterr().err.replace(f"{daemon.PROGRAM}:", f"{PEER.name}:")
    scenario.expect("exit status", status, 0 if runs else 1)
    told = [line for line in errors.splitlines() if line.startswith(PEER.name)]
    scenario.expect("standard error", told, recorded["stderr"])
