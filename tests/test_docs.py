"""The documentation is true: the tour works as printed, generated pages are current, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qmpd.ctl.cli import parser
from qmpd.ctl.session import Exit
from tests.tools import need

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
RECORDINGS = ROOT / "tests" / "data"


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are marked with ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script from the root of the checkout, with ``folder`` for temporary files; leaves no process behind."""
    environment = {**os.environ, "TMPDIR": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("QMPD_SOCKET", None)
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(90)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return subprocess.CompletedProcess(script, status, output.read(), None)


def test_the_tour_of_the_readme_works(tmp_path: Path) -> None:
    """A newcomer who types the blocks one after the other gets to the end, and the images are as promised."""
    need("qemu-img", "qemu-io", "socat")
    blocks = fenced(README, "sh")

    run = run_shell("\n".join(blocks), tmp_path)

    assert len(blocks) > 5
    assert run.returncode == 0, run.stdout
    assert '"error"' not in run.stdout
    assert "commit-top: completed" in run.stdout
    assert "Pattern verification failed" not in run.stdout


def test_the_demo_succeeds(tmp_path: Path) -> None:
    """`make demo` ends well, in plain lines where there is no terminal, and cleans up after itself."""
    run = run_shell(f"{sys.executable} demo/commit.py", tmp_path)

    assert run.returncode == 0, run.stdout
    assert "All is well." in run.stdout
    assert "\x1b" not in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


def test_the_compatibility_page_is_up_to_date() -> None:
    """What is checked in is what `make docs` would write."""
    run = subprocess.run([sys.executable, ROOT / "tools" / "compat.py", "--check"], capture_output=True, check=False)

    assert run.returncode == 0, run.stderr


def deviations() -> list[dict[str, Any]]:
    """All entries of the list."""
    entries: list[dict[str, Any]] = tomllib.loads((ROOT / "docs" / "deviations.toml").read_text())["deviation"]
    return entries


@pytest.mark.parametrize("entry", deviations(), ids=lambda entry: entry.get("title"))
def test_a_deviation_is_complete(entry: dict[str, Any]) -> None:
    """Every entry says what, where and why; recorded cases exist under their names."""
    required = {"area", "title", "peer", "qmpd", "reason"}
    optional = {"cases", "commands-missing", "commands-added"}
    recording = RECORDINGS / f"{entry['area']}.jsonl"

    assert required <= set(entry)
    assert set(entry) <= required | optional
    if entry.get("cases"):
        recorded = {json.loads(line)["case"] for line in recording.read_text().splitlines()}
        assert set(entry["cases"]) <= recorded


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_python(page: Path) -> None:
    """They compile, and what they import from qmpd is there."""
    for source in fenced(page, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qmpd"):
                module = __import__(node.module or "", fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_make_targets_that_are_mentioned_exist() -> None:
    """No page sends anybody to a target that is not in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = {
        name for page in PAGES for name in re.findall(r"^make ([a-z-]+)$|`make ([a-z-]+)", page.read_text(), re.M)
    }
    names = {first or second for first, second in mentioned}

    assert {"demo", "test", "help"} <= names <= targets


def test_qmpctl_is_described_completely() -> None:
    """Every subcommand, every option of commit and every exit status is on its page."""
    page = (ROOT / "docs" / "qmpctl.md").read_text()
    subcommands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    options = {name for action in subcommands["commit"]._actions for name in action.option_strings if name[:2] == "--"}

    assert {name for name in subcommands if f"`{name}" not in page} == set()
    assert {name for name in options - {"--help"} if f"`{name}" not in page and f"[{name}" not in page} == set()
    assert {status for status in Exit if f"| {status.value} |" not in page} == set()
