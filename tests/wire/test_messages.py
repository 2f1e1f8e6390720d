"""What a server says, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.wire import messages


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (messages.success({}), b'{"return": {}}'),
        (messages.success([]), b'{"return": []}'),
        (messages.success({"a": 1}, 7), b'{"return": {"a": 1}, "id": 7}'),
        (messages.success({}, None), b'{"return": {}, "id": null}'),
        (messages.success({}, pretty=True), b'{\r\n    "return": {\r\n    }\r\n}'),
        (messages.error("GenericError", "no"), b'{"error": {"class": "GenericError", "desc": "no"}}'),
        (messages.error("X", "é", [1]), b'{"id": [1], "error": {"class": "X", "desc": "\\u00E9"}}'),
        (
            messages.event("STOP", None, 1, 2),
            b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}',
        ),
        (
            messages.event("E", {"x": 0.5}, 1, 2),
            b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "E", "data": {"x": 0.5}}',
        ),
    ],
)
def test_one_message_a_line(message: bytes, line: bytes) -> None:
    """Members in the peer's order, blanks behind comma and colon, CR LF at the end."""
    assert line + b"\r\n" == message


@pytest.mark.parametrize("result", [False, 0, None, "", []])
def test_only_an_empty_object_is_an_empty_result(result: Any) -> None:
    """Other values that Python takes for false keep their spelling."""
    assert messages.success(result) != messages.success({})
