"""What is taken out of recorded and replayed jobs before they are compared, and why.

Some things in a recording say nothing about the recorded program's contract:

* **Generated node names.** ``#block123`` counts all nodes since the daemon's start. Both sides are renumbered in order
  of first appearance (``#blockAUTO0`` ...).
* **Drain noise.** While another command drains a running job's nodes, the job flips to paused and back to running (a
  ready one to standby and back), any number of times. Rule: two status changes of the same job that follow each other
  within one step, paused then running, or standby then ready, are both dropped. A pause that a user asked for is
  followed by its resume in a later step, and so is kept; so is running followed by paused (an error that stops again).
* **Floods.** With on-error "ignore" a job reports an error again at every attempt. Equal reports in a row count once.
* **Moments.** A query that caught a job with I/O in flight (``busy`` true) says how far it had come at that moment;
  such a reply is not compared.
* **Order of members.** Also inside file names of the form ``json:{...}``, and of the properties of an object, which
  the recorded program keeps in a hash table.
* **Sizes on disk and timestamps.** ``actual-size`` depends on the file system, the clock on the day.
* **Being in step.** Whether a mirror has just caught up with its writers (``actively-synced``) is a matter of moments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tests.replay.conversation import anonymous

Message = dict[str, Any]
StepEvent = tuple[int, Message]

_GENERATED = re.compile(r"#block(?:AUTO)?\d+")
_EDGE = re.compile(r"(\S+) -([^>]+)-> (\S+) (.*)")
_MOMENTARY = ("actual-size", "actively-synced")
_CLOCKS = ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")  # of an internal snapshot
_FLIPS = {("paused", "running"), ("standby", "ready")}
_TIMING = re.compile(r"(ops; ).*$")


class Names:
    """Renumbers generated node names in order of first appearance."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def apply(self, value: Any) -> Any:
        """A copy of a JSON value with every generated name renumbered."""
        return json.loads(_GENERATED.sub(self._rename, json.dumps(value, sort_keys=True)))

    def _rename(self, match: re.Match[str]) -> str:
        return self._seen.setdefault(match.group(), f"#blockAUTO{len(self._seen)}")


def events(numbered: Sequence[StepEvent]) -> list[Message]:
    """All events of a run, oldest first, timestamps zeroed, drain noise removed. Each comes with its step's number."""
    kept: list[StepEvent] = []
    for step, event in numbered:
        last = next((i for i in reversed(range(len(kept))) if _job(kept[i][1]) == _job(event)), None)
        if last is not None and kept[last][0] == step and (_status(kept[last][1]), _status(event)) in _FLIPS:
            del kept[last]
        elif not (kept and event["data"].get("action") == "ignore" and _job_error(kept[-1][1]) == _job_error(event)):
            kept.append((step, event))
    return [anonymous(event) for _, event in kept]


def reply(value: Any) -> Any:
    """A reply without sizes on disk; a block graph as its set of edges."""
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, dict) and {"nodes", "edges"} <= value.keys():
        return layout(edges(value))
    if isinstance(value, dict):
        return {key: 0 if key in _CLOCKS else reply(member) for key, member in value.items() if key not in _MOMENTARY}
    if isinstance(value, list):
        members = [reply(member) for member in value]
        properties = all(isinstance(member, dict) and member.keys() == {"name", "type"} for member in members)
        return sorted(members, key=lambda member: str(member["name"])) if properties else members
    return value


def _name(text: str) -> str:
    """A file name; the members of a complete json: name are put in order."""
    try:
        return (
            "json:" + json.dumps(json.loads(text.removeprefix("json:")), sort_keys=True)
            if text[:5] == "json:"
            else text
        )
    except ValueError:
        return text


def edges(graph: Message) -> list[str]:
    """x-debug-query-block-graph as text, an edge a line, in the reply's order."""
    names = {node["id"]: node["name"] or node["type"] for node in graph["nodes"]}
    return [
        f"{names[edge['parent']]} -{edge['name']}-> {names[edge['child']]} "
        f"perm={_permissions(edge['perm'])} shared={_permissions(edge['shared-perm'])}"
        for edge in graph["edges"]
    ]


def layout(text: Sequence[str]) -> list[str]:
    """Edges as a sorted list, in which a generated name is replaced by the way there from a named parent."""
    links = [_EDGE.fullmatch(line) for line in text]
    ways: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for link in sorted((match.groups() for match in links if match), key=str):
            parent, name, child, _ = link
            if _GENERATED.fullmatch(child) and child not in ways and (parent in ways or not _GENERATED.match(parent)):
                ways[child] = f"<{ways.get(parent, parent)}.{name}>"
                changed = True
    return sorted(_GENERATED.sub(lambda match: ways.get(match.group(), "<root>"), line) for line in text)


def caught_in_flight(value: Any) -> bool:
    """Whether a reply is a list of jobs one of which was busy."""
    jobs = value.get("return") if isinstance(value, dict) else None
    return isinstance(jobs, list) and any(isinstance(job, dict) and job.get("busy") for job in jobs)


def program_output(lines: str) -> list[str]:
    """Output of qemu-io with its timings left out."""
    return [_TIMING.sub(r"\1T (T and T)", line) for line in lines.splitlines()]


def _permissions(names: list[str]) -> str:
    return ",".join(sorted(names)) or "-"


def _job(event: Message) -> str:
    data = event["data"]
    return str(data.get("id", data.get("device")))


def _job_error(event: Message) -> tuple[str, Message]:
    return event["event"], event["data"]


def _status(event: Message) -> str | None:
    return event["data"].get("status") if event["event"] == "JOB_STATUS_CHANGE" else None
