"""What a commit will work on: the checks of block-commit, in QEMU's order, before anything is touched.

Control thread. Source: spec/jobs-and-commit.md sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpd.block.api import Perm
from qmpd.errors import Kind, QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.job import OnError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """The arguments of block-commit; None is "not given"."""

    device: str
    #: Without a block backend to name it, a job not named has no valid id.
    job_id: str = ""
    top_node: str | None = None
    top: str | None = None
    base_node: str | None = None
    base: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    #: Bytes per second, 0 for no limit.
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """The nodes of a commit that may begin. ``top`` is below ``device``, ``base`` below ``top``."""

    request: CommitRequest
    device: Node
    top: Node
    base: Node

    @property
    def intermediates(self) -> list[Node]:
        """From top down to the last node above base: what the commit makes superfluous."""
        return [edge.parent for edge in chain.stretch(self.top, self.base) if isinstance(edge.parent, Node)]


def plan_commit(graph: Graph, request: CommitRequest) -> CommitPlan:
    """Find the nodes of a commit, or raise what block-commit answers. Changes nothing."""
    device = _find_device(graph, request.device)
    device.check_op("commit-source")
    top = _find_top(graph, request, device)
    base = _find_base(graph, request, top)
    for node in _down_to(top, base):
        node.check_op("commit-target")
    if top is base:
        raise QmpdError("cannot commit an image into itself")
    _refuse_active(request, device, top)
    overlay = chain.find_overlay(device, top)
    if overlay is not None:
        overlay.check_op("commit-target")
    if chain.skip_filters(top) is chain.skip_filters(base):
        raise QmpdError("Invalid files for merge: top and base are the same")
    return CommitPlan(request, device, top, base)


def _find_device(graph: Graph, name: str) -> Node:
    device = graph.find(name)
    if device is None:
        raise QmpdError(f"Device '{name}' not found", Kind.DEVICE_NOT_FOUND)
    device.check_root()
    return device


def _find_top(graph: Graph, request: CommitRequest, device: Node) -> Node:
    if request.top_node is not None and request.top is not None:
        raise QmpdError("'top-node' and 'top' are mutually exclusive")
    if request.top_node is not None:
        return chain.get_in_chain(graph, request.top_node, device)
    if request.top is None or request.top == device.filename:
        return device
    top = chain.find_by_file(device, request.top)
    if top is None:
        raise QmpdError(f"Top image file {request.top} not found")
    return top


def _find_base(graph: Graph, request: CommitRequest, top: Node) -> Node:
    if request.base_node is not None and request.base is not None:
        raise QmpdError("'base-node' and 'base' are mutually exclusive")
    if request.base_node is not None:
        return chain.get_in_chain(graph, request.base_node, top)
    if request.base is None:
        return chain.bottom(top)
    base = chain.find_by_file(top, request.base)
    if base is None:
        raise QmpdError(f"Can't find '{request.base}' in the backing chain")
    return base


def _down_to(top: Node, base: Node) -> list[Node]:
    return [*(node for edge in chain.stretch(top, base) if isinstance(node := edge.parent, Node)), base]


def _refuse_active(request: CommitRequest, device: Node, top: Node) -> None:
    """Whether the job must follow a writer on top is decided here; only jobs that need not are made so far."""
    is_active_layer = chain.skip_filters(top) is chain.skip_filters(device)
    perm, _ = top.cumulative()
    if not is_active_layer and not perm & Perm.WRITE:
        return
    why = "is the active layer" if is_active_layer else "has a writer on it"
    if request.backing_file is not None:
        raise QmpdError(f"'backing-file' specified, but 'top' {why}")
    raise QmpdError(f"Active commit is not available: '{top.name}' {why}", Kind.UNSUPPORTED, node=top.name)
