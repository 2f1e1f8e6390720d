"""Queries about nodes and the graph. Nothing here changes anything. Source: spec/block-graph.md section 7."""

from enum import StrEnum

from pydantic import Field

from qmpd.block.api import Perm
from qmpd.commands.block_info import BlockDeviceInfo, device_infos
from qmpd.control.qapi import Bool, QapiModel, Str, Uint64
from qmpd.control.registry import Context, command
from qmpd.graph.edit import Graph
from qmpd.graph.node import Edge, Parent


class QueryNamedBlockNodes(QapiModel):
    flat: Bool | None = None


@command("query-named-block-nodes", returns=list[BlockDeviceInfo])
def query_named_block_nodes(ctx: Context, args: QueryNamedBlockNodes) -> list[BlockDeviceInfo]:
    """Every node, newest first."""
    return device_infos(reversed(ctx.graph.nodes), flat=bool(args.flat))


class BlockDeviceIoStatus(StrEnum):
    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class BlockInfo(QapiModel):
    device: Str
    qdev: Str | None = None
    type_: Str
    removable: Bool
    locked: Bool
    inserted: BlockDeviceInfo | None = None
    tray_open: Bool | None = Field(default=None, alias="tray_open")
    io_status: BlockDeviceIoStatus | None = None


@command("query-block", returns=list[BlockInfo])
def query_block(ctx: Context) -> list[BlockInfo]:
    """Guest devices, of which a storage daemon has none."""
    return []


# -- the graph itself --------------------------------------------------------------------------------------------------


class XDbgBlockGraphNodeType(StrEnum):
    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class XDbgBlockGraphNode(QapiModel):
    id: Uint64
    type_: XDbgBlockGraphNodeType
    name: Str


class BlockPermission(StrEnum):
    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class XDbgBlockGraphEdge(QapiModel):
    parent: Uint64
    child: Uint64
    name: Str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(QapiModel):
    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


@command("x-debug-query-block-graph", returns=XDbgBlockGraph, features=("unstable",))
def query_block_graph(ctx: Context) -> XDbgBlockGraph:
    """Nodes with their parents and permissions: nodes newest first, then jobs, then backends."""
    return block_graph(ctx.graph)


def block_graph(graph: Graph) -> XDbgBlockGraph:
    """The graph as QAPI types. Ids are made up for the call, starting at 1."""
    others = sorted(graph.parents, key=lambda parent: (parent.type_name, parent.serial), reverse=True)
    members: list[Parent] = [*reversed(graph.nodes), *others]
    ids = {member: number for number, member in enumerate(reversed(members), 1)}
    held: dict[Parent, list[Edge]] = {member: [] for member in members}
    for edge in sorted((e for node in graph.nodes for e in node.parents), key=lambda edge: edge.serial):
        if edge.parent in held:
            held[edge.parent].append(edge)
    return XDbgBlockGraph(
        nodes=[
            XDbgBlockGraphNode(id=ids[m], type_=XDbgBlockGraphNodeType(m.type_name), name=m.graph_name) for m in members
        ],
        edges=[_edge(edge, ids) for member in members for edge in held[member]],
    )


def _edge(edge: Edge, ids: dict[Parent, int]) -> XDbgBlockGraphEdge:
    return XDbgBlockGraphEdge(
        parent=ids[edge.parent],
        child=ids[edge.node],
        name=edge.name,
        perm=_permissions(edge.perm),
        shared_perm=_permissions(edge.shared),
    )


def _permissions(perm: Perm) -> list[BlockPermission]:
    """Highest bit first, as the peer lists them."""
    return [BlockPermission(name) for name in reversed(perm.names())]
