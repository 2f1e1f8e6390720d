"""The registry's two descriptions, held against the peer's (spec/qmp-protocol.md section 11)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qmpd.commands  # noqa: F401  registers everything
from qmpd.control import schema
from qmpd.control.registry import COMMANDS, EVENTS
from tests.control.schemas import Comparison, Schema
from tests.tools import need

DATA = Path(__file__).parent.parent / "data"

#: Pattern of a difference -> why it is there.
ACCEPTED = {
    r"(x-)?blockdev-(add|create|amend) arg.*: no (value|case) [a-z_-]+": "a subset of the peer's drivers",
    r"object-add arg.*: no (value|case) [a-z0-9-_]+": "a subset of the peer's object types",
    r"transaction arg.*: no (value|case) [a-z-]+": "a subset of the peer's actions",
    r"(block-export-add arg|query-block-exports ret).*: no (value|case) [a-z-]+": "NBD alone",
    r"query-blockstats ret.*: no (value|case) [a-z0-9_-]+": "a subset of the peer's drivers",
    r".*: additional (member|feature|value|case) x-qmpd-.*": "qmpd's own",
    r"blockdev-create .*encrypt<luks>\.(cipher|ivgen)-[a-z-]+: is builtin, not enum": "no encrypted image is created",
    r"query-block .*\.encrypt: (the tag is None, not format|no case (aes|luks))": "encryption is named, not described",
    r"query-block ret\[\]\.inserted\.image\.format-specific.*: no (value|case) (luks|rbd|vmdk)": "formats qmpd lacks",
}


def unexplained(theirs: list[dict[str, Any]]) -> list[str]:
    """Differences that no row of the table covers."""
    found = Comparison(Schema(schema.introspect()), Schema(theirs)).differences()
    return [line for line in found if not any(re.fullmatch(pattern, line) for pattern in ACCEPTED)]


def test_every_shared_command_and_event_has_the_peers_types() -> None:
    """Names, types, enums, optionality, order, features; of arguments and of results, at any depth."""
    recorded = json.loads((DATA / "peer-schema.json").read_text())

    assert unexplained(recorded["return"] if isinstance(recorded, dict) else recorded) == []


def test_the_recorded_schema_is_what_the_peer_says_today() -> None:
    """The same comparison with the live program, where it is installed."""
    need("qemu-storage-daemon")
    if " 10.0." not in subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("the schema recorded is that of version 10.0")
    requests = '{"execute":"qmp_capabilities"}{"execute":"query-qmp-schema"}{"execute":"quit"}'
    done = subprocess.run(
        ["qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c"],
        input=requests,
        capture_output=True,
        text=True,
        timeout=60,
    )
    live = next(reply for reply in map(json.loads, done.stdout.splitlines()) if len(reply.get("return", {})) > 100)

    assert unexplained(live["return"]) == []


def test_commands_and_events_lead_and_types_are_numbered_in_order_of_use() -> None:
    """The form that clients walk."""
    entries = schema.introspect()
    names = [entry["name"] for entry in entries]

    assert names[: len(COMMANDS) + len(EVENTS)] == [*COMMANDS, *EVENTS]
    assert len(names) == len(set(names))
    numbered = [int(name) for name in names if name.isdecimal()]
    assert sorted(numbered) == list(range(len(numbered)))


def test_every_type_that_is_mentioned_is_described() -> None:
    """No dangling name."""
    entries = schema.introspect()
    described = {entry["name"] for entry in entries}
    mentioned = set()
    for entry in entries:
        mentioned |= {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
        mentioned |= {member["type"] for member in entry.get("members", ()) if "type" in member}
        mentioned |= {variant["type"] for variant in entry.get("variants", ())}

    assert mentioned <= described


def test_json_schema_references_resolve() -> None:
    """Every $ref points to a definition in the same document."""
    for document in schema.json_schemas().values():
        references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(document)))

        assert references <= set(document["$defs"])


def test_what_is_published_is_what_the_registry_says() -> None:
    """`make schema` was run."""
    assert schema.stale(Path(__file__).parents[2] / "schema") == []
