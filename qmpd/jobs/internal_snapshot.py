"""Taking snapshots inside an image, alone and in transactions, and deleting them. Source: spec/toolbox.md section 12.

Deviation: a name longer than 255 bytes is refused; the peer cuts it, and does not find the snapshot again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from qmpd.block.api import Driver, InternalSnapshot
from qmpd.errors import Kind, QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Node
from qmpd.jobs.surgery import while_quiet
from qmpd.jobs.transaction import Action
from qmpd.steps import Steps

_log = logging.getLogger(__name__)


class SnapshotInternal(Action):
    """blockdev-snapshot-internal-sync: keep what the disk holds now."""

    def __init__(self, device: str, name: str) -> None:
        self.names = (device,)
        self._name = name
        #: The driver that keeps the snapshot, and its id there, once it is taken.
        self._taken: tuple[Driver, str] | None = None

    def nodes(self, graph: Graph) -> Sequence[Node]:
        """Also whoever uses the image below a filter."""
        device = super().nodes(graph)
        return [*device, *(keeper for node in device if (keeper := _keeper(node)) is not None)]

    def prepare(self, graph: Graph, before: Sequence[Action]) -> Steps[None]:
        found: list[Driver] = []

        def change(edit: Edit) -> None:
            for action in before:
                action.apply(edit)
            found.append(self._check(graph))

        graph.rehearse(change)
        [driver] = found
        try:
            taken = yield partial(driver.take_snapshot, self._name, time.time_ns())
        except QmpdError as error:
            raise error.prefixed(f"Failed to create snapshot '{self._name}' on device '{self.names[0]}': ") from None
        self._taken = driver, taken.id

    def _check(self, graph: Graph) -> Driver:
        """The driver to do it. The order is the peer's."""
        [device] = self.names
        node = graph.get(device, device)
        node.check_root()
        node.check_op("internal-snapshot")
        if node.read_only:
            raise QmpdError(f"Device '{device}' is read only", Kind.PERMISSION, node=node.name)
        keeper = _keeper(node)
        if keeper is None or keeper.read_only or not keeper.active:
            text = f"Block format '{node.driver_name}' used by device '{device}' does not support internal snapshots"
            raise QmpdError(text, Kind.UNSUPPORTED, node=node.name)
        driver = keeper.opened
        if not self._name:
            raise QmpdError("Name is empty")
        if any(known.name == self._name for known in driver.snapshots):
            raise QmpdError(f"Snapshot with name '{self._name}' already exists on device '{device}'", node=node.name)
        return driver

    def apply(self, edit: Edit) -> None:
        """The graph stays as it is."""

    def undo(self, graph: Graph) -> Steps[None]:
        if self._taken is None:
            return
        driver, key = self._taken
        try:
            yield partial(driver.delete_snapshot, key)
        except QmpdError as error:
            _log.error("snapshot '%s' of '%s' could not be taken back: %s", self._name, self.names[0], error)


def delete(graph: Graph, device: str, key: str | None, name: str | None) -> Steps[dict[str, Any]]:
    """blockdev-snapshot-delete-internal-sync: the entry of what was deleted. Both must match where both are given."""
    node = graph.get(device, device)
    node.check_root()
    if not key and not name:
        raise QmpdError("Name or id must be provided")
    node.check_op("internal-snapshot-delete")
    keeper = _keeper(node)
    if keeper is None:
        text = "Failed to get a snapshot list: Operation not supported"
        raise QmpdError(text, Kind.UNSUPPORTED, node=node.name)
    driver = keeper.opened
    snapshot = _find(driver, key, name)
    if snapshot is None:
        words = " and ".join(f"{what} '{value or 'null'}'" for what, value in (("id", key), ("name", name)))
        raise QmpdError(f"Snapshot with {words} does not exist on device '{device}'", node=node.name)
    if keeper.read_only or not keeper.active:
        state = "read only" if keeper.read_only else "inactive"
        raise QmpdError(f"Device '{device}' is {state}", Kind.PERMISSION, node=node.name)
    entry = snapshot.info()
    yield from while_quiet(graph, [node, keeper], partial(_delete, driver, snapshot.id))
    return entry


def _delete(driver: Driver, key: str) -> Steps[None]:
    try:
        yield partial(driver.delete_snapshot, key)
    except QmpdError as error:
        raise error.prefixed("Failed to delete snapshot: ") from None


def _find(driver: Driver, key: str | None, name: str | None) -> InternalSnapshot | None:
    for known in driver.snapshots:
        if (not key or known.id == key) and (not name or known.name == name):
            return known
    return None


def _keeper(node: Node) -> Node | None:
    """The node that keeps the snapshots of ``node``: itself, or one below that holds all that it is made of."""
    below: Node | None = node
    while below is not None and not below.opened.supports_snapshots:
        edges = list(below.children.values())
        below = edges[0].node if len(edges) == 1 else None
    return below
