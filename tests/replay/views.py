"""What a guest sees of the images of a scenario, before and after it.

A job moves data from file to file and must not change what the topmost image of a chain shows, however it ends. So
copies of all files are kept, and ``qemu-img compare`` looks at both afterwards. Left out are scenarios in which
somebody writes, resizes, or gives an image another backing file on purpose, and chains that only nodes make.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

#: Commands after which a guest may see something else.
_CHANGING = frozenset(
    {"block_resize", "change-backing-file", "blockdev-create", "x-blockdev-amend", "x-blockdev-change"}
)
_WRITING = ("write", "discard", "zero", "trim")

#: Scenarios whose images show something else in the end where siblings are not guarded, and why.
EXCEPTIONS = {
    "sibling-overlay-of-base": "another overlay of base shows what was committed",
    "sibling-overlay-of-base-exported": "another overlay of base shows what was committed",
    "users-block-commit-start": "another overlay of base shows what was committed",
    "change-backing-file-errors": "another overlay of base shows what was committed",
}


class ChangedViewError(AssertionError):
    """A guest sees something else. No deviation may do that."""


class Views:
    """The topmost images of a scenario, as they were before it."""

    def __init__(self, case: dict[str, Any], directory: Path, *, guarded: bool) -> None:
        """``guarded``: no commit that would change what other images show is allowed to begin."""
        self._directory = directory
        self._before = directory / "before"
        self._tops: list[str] = []
        expected = not guarded and case["case"] in EXCEPTIONS
        if not expected and not any(_changes(step) for step in case["steps"]):
            self._keep()

    def _keep(self) -> None:
        below = {name: _backing(path) for name, path in _files(self._directory).items()}
        tops = [name for name, backing in below.items() if backing and name not in below.values()]
        self._tops = [name for name in tops if _opens(self._directory / name)]
        if self._tops:
            self._before.mkdir()
            for path in _files(self._directory).values():
                subprocess.run(["cp", "--sparse=always", path, self._before], check=True)

    def compare(self) -> None:
        """Raise ChangedViewError if one of them shows something else now."""
        for name in self._tops:
            old, new = self._before / name, self._directory / name
            argv = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", old, new]
            # Names inside json: count from the working directory.
            run = subprocess.run(argv, cwd=self._directory, capture_output=True, text=True)
            if run.returncode:
                raise ChangedViewError(f"{name}: {run.stdout}{run.stderr}")


def _files(directory: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}


def _backing(path: Path) -> str | None:
    """The backing file named in a qcow2 header that qemu-img can read."""
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", path]
    run = subprocess.run(argv, capture_output=True, text=True)
    name: str | None = json.loads(run.stdout).get("backing-filename") if run.returncode == 0 else None
    return name


def _opens(path: Path) -> bool:
    """Can qemu-img open the whole chain?"""
    argv = ["qemu-img", "info", "--backing-chain", "-f", "qcow2", path]
    return subprocess.run(argv, capture_output=True).returncode == 0


def _changes(step: dict[str, Any]) -> bool:
    """May a guest see something else after this?"""
    if "client" in step:
        return any(word in argument for argument in step["client"] for word in _WRITING)
    if "do" in step:
        return True
    sent = step.get("send", {})
    arguments = sent.get("arguments", {}) if isinstance(sent, dict) else {}
    return sent.get("execute") in _CHANGING or "backing-file" in arguments
