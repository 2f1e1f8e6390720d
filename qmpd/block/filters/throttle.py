"""The driver ``throttle``: requests wait for the limits of a throttle group (spec/block-graph.md section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from qmpd.block.api import BlockDevice, Buffer
from qmpd.block.filters.base import Filter
from qmpd.block.limits import Direction
from qmpd.block.throttling import ThrottleGroup, unknown

FindGroup = Callable[[str], ThrottleGroup | None]


class Throttle(Filter):
    """Options: ``throttle-group`` (its id), ``find-throttle-group`` (a :data:`FindGroup`, given by the graph).

    Zero requests and discards count as writes of their length, flushes not at all.
    """

    format_name = "throttle"

    def __init__(self, child: BlockDevice, group: ThrottleGroup, *, read_only: bool) -> None:
        super().__init__(child, read_only=read_only)
        self._group, self._member = group, group.join()
        self._next_group: ThrottleGroup | None = None
        self._drains = 0

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Over ``children["file"]``. Raises QmpdError if there is no such group."""
        return cls(children["file"], _find(options), read_only=read_only)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._group.pass_through(self._member, Direction.READ, len(buffer))
        self._child.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._group.pass_through(self._member, Direction.WRITE, len(data))
        self._child.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._group.pass_through(self._member, Direction.WRITE, length)
        self._child.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._group.pass_through(self._member, Direction.WRITE, length)
        self._child.discard(offset, length)

    def close(self) -> None:
        self._group.leave(self._member)

    # -- the graph's side ----------------------------------------------------------------------------------------------

    def drain_begin(self) -> None:
        self._drains += 1
        self._group.drain(self._member, 1)

    def drain_end(self) -> None:
        self._drains -= 1
        self._group.drain(self._member, -1)

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        super().reopen_prepare(read_only=read_only)
        self._next_group = None if options is None else _find(options)

    def reopen_commit(self) -> None:
        super().reopen_commit()
        group, self._next_group = self._next_group, None
        if group is None or group is self._group:
            return
        self._group.leave(self._member)
        self._group, self._member = group, group.join()
        group.drain(self._member, self._drains)

    def reopen_abort(self) -> None:
        self._next_group = None


def _find(options: Mapping[str, Any]) -> ThrottleGroup:
    name = options["throttle-group"]
    find: FindGroup = options["find-throttle-group"]
    group = find(name)
    if group is None:
        raise unknown(name)
    return group
