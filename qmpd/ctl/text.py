"""Numbers as people write and read them. Pure functions."""

from __future__ import annotations

import re
from typing import Final

_SUFFIXES: Final = "KMGTPE"
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(?:i?B)?|B)?(?:/s)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``64M``, ``1.5GiB`` or ``10MiB/s``; suffixes are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: '{text}' (examples: 4096, 64M, 1.5GiB)")
    number, suffix = match.groups()
    shift = 10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 0
    return int(number) << shift if number.isdigit() else int(float(number) * (1 << shift))


def size(count: float) -> str:
    """``1.5 GiB`` from a number of bytes: binary units, one decimal at most."""
    power = -1
    while abs(count) >= 1024 and power < len(_SUFFIXES) - 1:
        count, power = count / 1024, power + 1
    if power < 0:
        return f"{count:.0f} B"
    digits = 0 if abs(count) >= 99.95 else 1
    return f"{count:.{digits}f}".removesuffix(".0") + f" {_SUFFIXES[power]}iB"


def rate(bytes_per_second: float | None) -> str:
    """``8 MiB/s``; a dash while it is not known."""
    return "-" if bytes_per_second is None else f"{size(bytes_per_second)}/s"


def duration(seconds: float | None) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 05 min``; a dash while it is not known."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def columns(rows: list[list[str]]) -> list[str]:
    """Lines with the cells aligned; no trailing blanks. Rows must be of equal length."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
