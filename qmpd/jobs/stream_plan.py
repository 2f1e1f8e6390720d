"""What a stream will work on: the checks of block-stream, in QEMU's order, before anything is touched.

Control thread. Source: spec/toolbox.md section 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.job import OnError


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """The arguments of block-stream; None is "not given"."""

    device: str
    #: Without a block backend to name it, a job not named has no valid id.
    job_id: str = ""
    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    #: Bytes per second, 0 for no limit.
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """The nodes of a stream that may begin: ``base`` is in the chain of ``device``, None for the whole chain."""

    request: StreamRequest
    device: Node
    base: Node | None

    @property
    def image(self) -> Node:
        """What holds the data of device, and names its backing file."""
        return chain.skip_filters(self.device)

    @property
    def intermediates(self) -> list[Node]:
        """From below device down to the last node above base: what the stream makes superfluous."""
        return list(_between(self.device, self.base))[1:]


def plan_stream(graph: Graph, request: StreamRequest) -> StreamPlan:
    """Find the nodes of a stream, or raise what block-stream answers. Changes nothing."""
    _check_exclusive(request)
    device = graph.get(request.device, request.device)
    base = _find_base(graph, request, device)
    for node in _between(device, base):
        node.check_op("stream")
    if request.backing_file is not None and (base is None or request.bottom is not None):
        raise QmpdError("backing file specified, but streaming the entire chain")
    if base is not None and chain.contains(base, chain.skip_filters(device)):
        raise QmpdError(f"'{base.name}' is not in the backing chain of '{device.name}'")
    graph.rehearse(lambda edit: edit.set_read_only(device, False))
    _check_filter_name(graph, request)
    return StreamPlan(request, device, base)


def _check_exclusive(request: StreamRequest) -> None:
    for one, other in (("base", "base_node"), ("base", "bottom"), ("bottom", "base_node")):
        if getattr(request, one) is not None and getattr(request, other) is not None:
            names = f"'{one}' and '{other.replace('_', '-')}'"
            raise QmpdError(f"{names} cannot be specified at the same time")


def _find_base(graph: Graph, request: StreamRequest, device: Node) -> Node | None:
    if request.base is not None:
        base = chain.find_by_file(device, request.base)
        if base is None:
            raise QmpdError(f"Can't find '{request.base}' in the backing chain")
        return base
    if request.base_node is not None:
        base = graph.get(request.base_node)
        if base is device or not chain.contains(device, base):
            raise QmpdError(f"Node '{base.name}' is not a backing image of '{device.name}'")
        return base
    if request.bottom is not None:
        bottom = graph.get(request.bottom)
        if bottom.is_filter:
            raise QmpdError(f"Node '{bottom.name}' is a filter, use a non-filter node as 'bottom'")
        if not chain.contains(device, bottom):
            raise QmpdError(f"Node '{bottom.name}' is not in a chain starting from '{device.name}'")
        return bottom.backing
    return None


def _between(device: Node, base: Node | None) -> Iterator[Node]:
    """From device down to the last node above base."""
    for node in chain.walk(device):
        if node is base:
            return
        yield node


def _check_filter_name(graph: Graph, request: StreamRequest) -> None:
    if request.filter_node_name is None:
        return
    try:
        graph.check_new_name(request.filter_node_name)
    except QmpdError as error:
        raise QmpdError(f"Could not create node: {error.desc}") from error
