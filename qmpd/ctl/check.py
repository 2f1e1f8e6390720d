"""``qmpctl check NODE``: is an image consistent?"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from qmpd.ctl import text
from qmpd.ctl.session import Session


class Verdict(IntEnum):
    """Exit statuses of ``qmpctl check``, those of ``qemu-img check``; docs/qmpctl.md lists them for users."""

    CLEAN = 0
    FAILED = 1  # not everything could be checked
    CORRUPT = 2
    LEAKS = 3


async def run_check(session: Session) -> Verdict:
    """Have the daemon check, show what it found."""
    arguments = {"node-name": session.args.node}
    if session.args.repair:
        arguments["fix"] = session.args.repair
    result = await session.client.execute("x-qmpd-check", arguments)
    if session.args.json:
        session.print_json(result)
    else:
        session.say(*_lines(result))
    return verdict(result)


def verdict(result: dict[str, Any]) -> Verdict:
    """The worst that was found."""
    if result["check-errors"]:
        return Verdict.FAILED
    if result["corruptions"]:
        return Verdict.CORRUPT
    return Verdict.LEAKS if result["leaks"] else Verdict.CLEAN


#: Member of the result, what is said of it if it is not 0.
_SUMMARY = (
    ("leaks-fixed", "leaked clusters given back: {}"),
    ("corruptions-fixed", "corruptions repaired: {}"),
    ("check-errors", "could not be checked: {}"),
    ("corruptions", "corruptions: {}; data may be wrong, or become so when the image is written"),
    ("leaks", "leaked clusters: {}; space is lost, but no data"),
)


def _lines(result: dict[str, Any]) -> list[str]:
    rows = [
        [finding["severity"], f"{finding['field']} at {finding['offset']:#x} is {finding['value']:#x}", finding["text"]]
        for finding in result["findings"]
    ]
    found = sum(result[member] for member in ("check-errors", "corruptions", "leaks"))
    lines = text.columns([["FINDING", "WHERE", "WHAT"], *rows]) if rows else []
    if found > len(rows):
        lines.append(f"... {found} in all")
    lines += [said.format(result[member]) for member, said in _SUMMARY if result[member]]
    if not found:
        lines.append("no errors were found")
    return [*lines, _usage(result)]


def _usage(result: dict[str, Any]) -> str:
    total, allocated = result["total-clusters"], result["allocated-clusters"]
    share = f"{100 * allocated / total:.1f}%" if total else "-"
    return (
        f"{allocated} of {total} clusters allocated ({share}), {result['fragmented-clusters']} fragmented,"
        f" {result['compressed-clusters']} compressed; the image ends at {text.size(result['image-end-offset'])}"
    )
