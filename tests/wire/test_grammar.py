"""Properties of the patterns themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from qmpd.wire import grammar

# The parser of the standard library: the only one that knows how a pattern is understood.
from re import _constants, _parser  # type: ignore[attr-defined]  # isort: skip

PATTERNS = {name: value for name, value in vars(grammar).items() if isinstance(value, re.Pattern)}
PATTERNS["express"] = grammar.express()
_ONE_BYTE = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY)


def _possessive_bodies(parsed: Any) -> Iterator[list[Any]]:
    """The bodies of all possessive repeats, at any depth."""
    for operator, argument in parsed:
        if operator is _constants.POSSESSIVE_REPEAT:
            yield list(argument[2])
        for part in argument if isinstance(argument, (tuple, list)) else [argument]:
            if isinstance(part, _parser.SubPattern):
                yield from _possessive_bodies(part)
            elif isinstance(part, list):
                for inner in part:
                    if isinstance(inner, _parser.SubPattern):
                        yield from _possessive_bodies(inner)


def _is_sound(body: list[Any]) -> bool:
    return len(body) == 1 and body[0][0] in (*_ONE_BYTE, _constants.ATOMIC_GROUP)


@pytest.mark.parametrize("name", PATTERNS)
def test_possessive_repeats_are_of_bytes_or_atomic_groups(name: str) -> None:
    """CPython before 3.11.5 mismatches a possessive repeat of any other group."""
    pattern = PATTERNS[name]
    bodies = list(_possessive_bodies(_parser.parse(pattern.pattern, pattern.flags)))

    assert all(_is_sound(body) for body in bodies)


def test_the_walk_sees_an_unsound_body() -> None:
    """The check above can fail, also for a repeat that is deep inside."""
    bodies = list(_possessive_bodies(_parser.parse(rb"a(?:b(?=(?:cd?e)*+))?|f")))

    assert [_is_sound(body) for body in bodies] == [False]
