"""Where the two may answer differently, and why: the same reasons as in docs/deviations.toml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Reply = dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """``fits`` a command with the text of our error and of the peer's ('' for success)."""

    title: str  # of the entry in docs/deviations.toml
    fits: Callable[[dict[str, Any], str, str], bool]


def _conflict_with(job: str) -> Callable[[dict[str, Any], str, str], bool]:
    return lambda _command, ours, _theirs: f"unshared by {job} job" in ours


STREAM_INTO_FILTER = "A stream into a filter"
ALL_OR_NONE = "Nodes become inactive together or not at all"
JOB_ON_INACTIVE = "A job that only reads stays a reader of inactive nodes"


def _without_prefix(_command: dict[str, Any], ours: str, theirs: str) -> bool:
    return bool(ours) and theirs == f"Could not create node: {ours}"


def _link_to_base(command: dict[str, Any], ours: str, theirs: str) -> bool:
    return (
        command["execute"] in ("block-stream", "block-commit") and "Cannot change 'backing' link" in ours and not theirs
    )


EXPLANATIONS: tuple[Explanation, ...] = (
    Explanation("A stream whose filter finds no room", _without_prefix),
    Explanation("The link from the last streamed image to base is frozen", _link_to_base),
    Explanation("Other writers beside an active commit", _conflict_with("commit")),
    Explanation("Other writers beside a stream", _conflict_with("stream")),
)


def explain(command: dict[str, Any], ours: Reply, theirs: Reply) -> str | None:
    """The title of the deviation that a pair of differing replies comes from."""
    texts = [reply.get("error", {}).get("desc", "") for reply in (ours, theirs)]
    return next((known.title for known in EXPLANATIONS if known.fits(command, *texts)), None)


def explain_state(command: dict[str, Any], reply: Reply, ours: Any, theirs: Any) -> str:
    """The title of the deviation that makes a part of the states differ after ``command``; '' for none."""
    if command["execute"] == "blockdev-set-active" and "error" in reply:
        return ALL_OR_NONE
    if command["execute"] == "blockdev-set-active" and any("-main node->" in str(line) for line in ours):
        return JOB_ON_INACTIVE
    if command["execute"] == "block-stream" and isinstance(ours, list):
        held = [line for line in ours if line not in theirs]
        if any("-intermediate node->" in str(line) for line in held):
            return STREAM_INTO_FILTER
    return ""
