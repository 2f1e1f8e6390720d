"""Rules from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.block.debug import Event, InjectError, IoType, SetState
from qmpd.block.debug_config import load
from qmpd.errors import QmpdError

EVERYTHING = """
# comment
[inject-error "one"]
event = "read_aio"
state = "2"
iotype = "read"
errno = "28"
sector = "0x10"
once = "on"
immediately = "off"

[set-state]
  event = "write_aio"
new_state = "5"
"""


def test_every_member(tmp_path: Path) -> None:
    """Of both groups."""
    (tmp_path / "rules").write_text(EVERYTHING)
    errors, states = load(str(tmp_path / "rules"))
    assert errors == [InjectError(Event.READ_AIO, 2, IoType.READ, 28, 16, once=True)]
    assert states == [SetState(Event.WRITE_AIO, 5)]


@pytest.mark.parametrize("name", ["nope", ""])
def test_no_file(name: str) -> None:
    """The reason is told."""
    with pytest.raises(QmpdError, match=r"^Could not read blkdebug config file: No such file or directory$"):
        load(name)


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("[inject-error]", "Missing event name for rule"),
        ("[bogus]", "There is no option group 'bogus'"),
        ("garbage", "no group defined"),
        ('event = "x"', "no group defined"),
        ("[set-state]\nevent = read_aio", "parse error in blkdebug config file: event = read_aio"),
        ('[inject-error]\nbogus = "1"', "Invalid parameter 'bogus'"),
        ('[inject-error]\nevent = "nope"', "invalid parameter value: nope"),
        ('[inject-error]\nevent = "none"\niotype = "zz"', "invalid parameter value: zz"),
        ('[inject-error]\nevent = "none"\nerrno = "x"', "Parameter 'errno' expects a number"),
        ('[inject-error]\nevent = "none"\nonce = "maybe"', "Parameter 'once' expects 'on' or 'off'"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, desc: str) -> None:
    """In the peer's words where it has some."""
    (tmp_path / "rules").write_text(text)
    with pytest.raises(QmpdError) as caught:
        load(str(tmp_path / "rules"))
    assert caught.value.desc == desc


def test_state_zero_if_the_new_one_is_not_told(tmp_path: Path) -> None:
    """As the peer has it."""
    (tmp_path / "rules").write_text('[set-state]\nevent = "none"')
    assert load(str(tmp_path / "rules"))[1] == [SetState(Event.NONE, 0)]
