"""What a node is asked to be: the plain form of a blockdev-add description.

No validation of QMP types happens here (commands do that) and no file is looked at (opening does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A description of one node; ``None`` in a common option means "not given".

    ``children`` holds only the children that were mentioned; ``options`` the driver's own options by QMP name, again
    only those mentioned. Source: spec/block-graph.md sections 3 and 4.
    """

    driver: str
    node_name: str | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    cache_direct: bool | None = None
    cache_no_flush: bool | None = None
    discard: str | None = None
    detect_zeroes: str | None = None
    active: bool | None = None
    children: Mapping[str, NodeSpec | str | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def explicit(self) -> frozenset[str]:
        """QMP names of the common options given."""
        return frozenset(name for name, attribute in COMMON.items() if getattr(self, attribute) is not None)

    def effective(self, parent: NodeSpec | None, *, backing: bool = False) -> NodeSpec:
        """All common options filled in: inherited from ``parent`` (itself effective) or default.

        Inline children other than backing follow the parent's read-only and auto-read-only; a backing child is
        read-only unless told otherwise. Cache options and force-share are followed by both. Children discard by
        default.
        """
        values: dict[str, Any] = dict(ROOT_DEFAULTS)
        if parent is not None:
            values |= {name: getattr(parent, name) for name in _FOLLOWED}
            values["discard"] = "unmap"
            values |= {"read_only": True, "auto_read_only": False} if backing else {}
        given = {name: getattr(self, name) for name in ROOT_DEFAULTS}
        values |= {name: value for name, value in given.items() if value is not None}
        return replace(self, **values)


#: QMP name of a common option -> attribute of NodeSpec.
COMMON = {
    "read-only": "read_only",
    "auto-read-only": "auto_read_only",
    "force-share": "force_share",
    "cache.direct": "cache_direct",
    "cache.no-flush": "cache_no_flush",
    "discard": "discard",
    "detect-zeroes": "detect_zeroes",
    "active": "active",
}

#: Attribute -> value of a node that has no parent to follow.
ROOT_DEFAULTS: Mapping[str, Any] = {
    "read_only": False,
    "auto_read_only": False,
    "force_share": False,
    "cache_direct": False,
    "cache_no_flush": False,
    "discard": "ignore",
    "detect_zeroes": "off",
    "active": True,
}

_FOLLOWED = ("read_only", "auto_read_only", "force_share", "cache_direct", "cache_no_flush")
