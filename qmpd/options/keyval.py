"""``k=v,k=v`` to a tree: dots nest, numbers count list elements, values stay text.

The schema turns the texts into values (:data:`qmpd.control.qapi.KEYVAL`). Source: spec/qmp-protocol.md section 14.
"""

from __future__ import annotations

import re
from typing import Any, Final

from qmpd.errors import QmpdError

MAX_PART: Final = 127
"""Characters of one part of a dotted key."""

_KEY: Final = re.compile(r"[^=,]*")
_VALUE: Final = re.compile(r"(?:[^,]|,,)*", re.DOTALL)
_PART: Final = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
_INDEX: Final = re.compile(r"[0-9]+", re.ASCII)

HELP: Final = frozenset({"help", "?"})
"""Items that ask for help instead of setting something."""


def parse_keyval(text: str, implied_key: str | None = None) -> tuple[dict[str, Any], bool]:
    """The tree of ``text``, and whether it asks for help. A first item without a key belongs to ``implied_key``.

    Raises QmpdError.
    """
    tree: dict[str, Any] = {}
    wants_help = False
    at = 0
    while at < len(text):
        key = _match(_KEY, text, at)
        has_value = text[at + len(key) : at + len(key) + 1] == "="
        if not has_value and key in HELP:
            wants_help = True
        elif not has_value and at == 0 and implied_key is not None and key:
            tree[implied_key] = key
        else:
            path = _split(key)
            if not has_value:
                raise QmpdError(f"Expected '=' after parameter '{key}'")
            value = _match(_VALUE, text, at + len(key) + 1)
            _put(tree, path, value.replace(",,", ","))
            at += 1 + len(value)
        at += len(key) + 1
    return {key: _with_lists(value, key) for key, value in tree.items()}, wants_help


def _match(pattern: re.Pattern[str], text: str, at: int) -> str:
    match = pattern.match(text, at)
    return match[0] if match else ""


def _split(key: str) -> list[str]:
    """The parts of a dotted key, indexes without leading zeros. Raises QmpdError."""
    parts: list[str] = []
    at = 0
    while True:
        index = _match(_INDEX, key, at) if parts else ""
        part = index or _match(_PART, key, at)
        end = at + len(part)
        if not part or key[end : end + 1] not in ("", "."):
            raise QmpdError(f"Invalid parameter '{key}'")
        if len(part) > MAX_PART:
            what = "Parameter" if part == key else "Parameter fragment"
            raise QmpdError(f"{what} '{part}' is too long")
        parts.append(str(int(index)) if index else part)
        if end == len(key):
            return parts
        at = end + 1


def _put(tree: dict[str, Any], path: list[str], value: str) -> None:
    """Set a leaf; an earlier one of the same key is forgotten. Raises QmpdError where a leaf meets a branch."""
    *branches, leaf = path
    node = tree
    for depth, part in enumerate(branches, 1):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise _inconsistent(".".join(path[:depth]))
    if isinstance(node.get(leaf), dict):
        raise _inconsistent(".".join(path))
    node[leaf] = value


def _with_lists(node: Any, path: str) -> Any:
    """The tree with every branch of numbers made a list. Raises QmpdError for gaps and mixtures."""
    if not isinstance(node, dict):
        return node
    children = {part: _with_lists(child, f"{path}.{part}") for part, child in node.items()}
    indexes = sum(part.isdecimal() for part in children)
    if not indexes:
        return children
    if indexes < len(children):
        raise _inconsistent(path)
    for index in range(len(children)):
        if str(index) not in children:
            raise QmpdError(f"Parameter '{path}.{index}' missing")
    return [children[str(index)] for index in range(len(children))]


def _inconsistent(path: str) -> QmpdError:
    return QmpdError(f"Parameters '{path}.*' used inconsistently")
