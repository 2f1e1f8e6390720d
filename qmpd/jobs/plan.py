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
    """The nodes of a commit that may begin. ``top`` is in the chain of ``device``, ``base`` below ``top``."""

    request: CommitRequest
    device: Node
    top: Node
    base: Node
    #: Somebody writes to top, or may: the job has to follow (section 7), else nothing there changes (section 4).
    active: bool = False

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
    active = _is_active(request, device, top)
    overlay = None if active else chain.find_overlay(device, top)
    if overlay is not None:
        overlay.check_op("commit-target")
    is_same = chain.skip_filters(top) is chain.skip_filters(base)
    if is_same and not active:
        raise QmpdError("Invalid files for merge: top and base are the same")
    if active:
        _check_start(graph, request, base, is_same=is_same)
    return CommitPlan(request, device, top, base, active)


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


def _is_active(request: CommitRequest, device: Node, top: Node) -> bool:
    """Must the job follow a writer on top?"""
    is_active_layer = chain.skip_filters(top) is chain.skip_filters(device)
    perm, _ = top.cumulative()
    if not is_active_layer and not perm & Perm.WRITE:
        return False
    if request.backing_file is not None:
        why = "is the active layer" if is_active_layer else "has a writer on it"
        raise QmpdError(f"'backing-file' specified, but 'top' {why}")
    return True


def _check_start(graph: Graph, request: CommitRequest, base: Node, *, is_same: bool) -> None:
    """What an active commit finds out before there is a job: section 3.2, step 10."""
    graph.rehearse(lambda edit: edit.set_read_only(base, False))
    if is_same:
        raise QmpdError("Can't mirror node into itself")
    if request.filter_node_name is not None:
        graph.check_new_name(request.filter_node_name)
