"""Reading a monitor's output as the recordings have it."""

from __future__ import annotations

import json
import re
from typing import Any

#: JSON nested deeper than this is recorded as text.
_READER_DEPTH = 900

_PACKAGE = re.compile(r'"package": "[^"]*"')


def split_messages(text: str) -> list[str]:
    """Cut output into messages: a line each, or, pretty-printed, up to the line that closes the object."""
    messages: list[str] = []
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if line.startswith("}") or not line.startswith((" ", "{\r")):
            messages.append("".join(lines))
            lines = []
    return [*messages, *(["".join(lines)] if lines else [])]


def parse(message: str) -> Any:
    """A message as the recordings have it: parsed, timestamps zeroed, this build's package name left out."""
    text = message.removesuffix("\r\n")
    if _depth(text) > _READER_DEPTH:
        return {"deep": text}
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return {"unparseable": text}
    return anonymous(value)


def anonymous(value: Any) -> Any:
    """Zero an event's timestamp and blank the package name of a version, which differ between runs and builds."""
    if isinstance(value, dict):
        if "event" in value:
            value = value | {"timestamp": {"seconds": 0, "microseconds": 0}}
        return {key: "" if key == "package" else anonymous(member) for key, member in value.items()}
    if isinstance(value, list):
        return [anonymous(member) for member in value]
    return value


def anonymous_text(text: str) -> str:
    """The same for text that is compared byte by byte."""
    return _PACKAGE.sub('"package": ""', text)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _refuse(constant: str) -> None:
    raise ValueError(constant)
