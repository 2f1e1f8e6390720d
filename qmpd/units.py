"""Sizes, limits and the address types that must not be mixed up."""

from __future__ import annotations

from typing import Final, NewType

GuestOffset = NewType("GuestOffset", int)
"""A byte position on the virtual disk."""

HostOffset = NewType("HostOffset", int)
"""A byte position in an image file."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SECTOR: Final = 512
"""QEMU counts node lengths in these (spec/block-graph.md section 1)."""

MAX_LENGTH: Final = (1 << 63) - (1 << 30)
"""Upper limit of any length in bytes."""


def align_down(value: int, unit: int) -> int:
    """The largest multiple of ``unit`` not above ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` not below ``value``."""
    return -(-value // unit) * unit


def ceil_div(value: int, unit: int) -> int:
    """Number of ``unit``-sized pieces needed to cover ``value``."""
    return -(-value // unit)
