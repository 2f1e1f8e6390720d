"""Which meta contexts a client's queries mean (spec/nbd-export.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence

from qmpd.nbd.constants import ALLOCATION_DEPTH, DIRTY_BITMAP

Contexts = tuple[tuple[int, str], ...]


def identifier(position: int, name: str, contexts: Sequence[str]) -> int:
    """The id of the ``position``-th context: 0 and 1 have fixed owners, bitmaps count from 2."""
    if name == ALLOCATION_DEPTH:
        return 1
    if name.startswith(DIRTY_BITMAP):
        return 2 + sum(other.startswith(DIRTY_BITMAP) for other in contexts[:position])
    return 0


def numbered(contexts: Sequence[str]) -> Contexts:
    """All contexts of an export with their ids."""
    return tuple((identifier(position, name, contexts), name) for position, name in enumerate(contexts))


def selected(contexts: Sequence[str], queries: Sequence[bytes]) -> Contexts:
    """Those that the queries name exactly."""
    wanted = set(queries)
    return tuple((number, name) for number, name in numbered(contexts) if name.encode() in wanted)


def listed(contexts: Sequence[str], queries: Sequence[bytes]) -> Contexts:
    """Those that the queries name or cover; without queries all. Ids are 0, as nothing is selected."""
    wanted = set(queries)
    return tuple((0, name) for name in contexts if not queries or not wanted.isdisjoint(_names(name)))


def _names(context: str) -> set[bytes]:
    """The queries that cover a context."""
    namespace = context[: context.index(":") + 1]
    names = {context, namespace}
    if context.startswith(DIRTY_BITMAP):
        names.add(DIRTY_BITMAP)
    return {name.encode() for name in names}
