"""Numbers for people."""

from __future__ import annotations

import pytest

from qmpd.ctl import text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64k", 65536),
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64MB", 64 << 20),
        ("10MiB/s", 10 << 20),
        ("1.5G", 3 << 29),
        (" 2 T ", 2 << 40),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes_are_read_as_people_write_them(written: str, expected: int) -> None:
    """Suffixes are powers of 1024, exact where no fraction is written."""
    assert text.parse_size(written) == expected


@pytest.mark.parametrize("written", ["", "M", "-1", "1e3", "1.G", "12X", "1 2", "0x10", "1Mi"])
def test_what_is_no_size_is_refused(written: str) -> None:
    """No guessing."""
    with pytest.raises(ValueError, match="not a size"):
        text.parse_size(written)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        (100 << 20, "100 MiB"),
        (1023 << 20, "1023 MiB"),
        (3 << 40, "3 TiB"),
        (1 << 63, "8 EiB"),
        (1 << 75, "32768 EiB"),
    ],
)
def test_sizes_are_written_shortly(count: int, expected: str) -> None:
    """Binary units and one decimal at most."""
    assert text.size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "-"), (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_written_in_two_units(seconds: float | None, expected: str) -> None:
    """The unit changes with the size, and a rounded minute is a minute."""
    assert text.duration(seconds) == expected


def test_columns_are_aligned_without_trailing_blanks() -> None:
    """Each column is as wide as its widest cell."""
    assert text.columns([["a", "bb", "c"], ["aaa", "b", ""]]) == ["a    bb  c", "aaa  b"]
