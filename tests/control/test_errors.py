"""What errors tell clients that asked for more than the peer tells."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import HINTS, Kind, QmpdError, from_oserror
from tests.inprocess import Wire, running

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_code_is_documented_and_nothing_else() -> None:
    """Programs rely on the table."""
    codes = re.findall(r"^\| `([a-z-]+)` \| [a-z]", PAGE.read_text().split("| code | when |")[1], re.MULTILINE)
    assert codes == [kind.value for kind in Kind]


@pytest.mark.parametrize("kind", Kind)
def test_the_code_is_always_there(kind: Kind) -> None:
    told = QmpdError("words", kind).told()
    assert told["code"] == kind.value
    assert told.get("hint") == HINTS.get(kind)
    assert not {"node", "path", "offset"} & told.keys()


def test_what_is_known_is_told() -> None:
    failure = from_oserror(OSError(errno.ENOSPC, "full", "a.img"))
    failure.offset, failure.details = 4096, {"held-by": []}
    told = failure.prefixed("so: ").told()
    assert told.pop("hint").startswith("make room")
    assert told == {"code": "no-space", "path": "a.img", "offset": 4096, "errno": "ENOSPC", "held-by": []}


async def test_only_subscribers_are_told() -> None:
    """The others get what the peer answers; unsubscribing ends it."""
    async with running() as core:
        plain, asked = await core.client(), await core.client()
        await asked.execute("x-qmpd-subscribe")
        errors = [await error(client) for client in (plain, asked)]
        details = errors[1].pop("x-qmpd-details")
        assert errors[0] == errors[1]
        assert (details["code"], details["path"], details["errno"]) == ("io", "/nowhere/gone.img", "ENOENT")
        await asked.execute("x-qmpd-unsubscribe")
        assert await error(asked) == errors[0]


async def error(client: Wire) -> Any:
    """The error of a command that fails."""
    arguments = {"driver": "file", "node-name": "f", "filename": "/nowhere/gone.img"}
    await client.send(json.dumps({"execute": "blockdev-add", "arguments": arguments}).encode())
    return (await client.receive())["error"]
