"""Statistics of nodes, and being told when a node is written far. Source: spec/toolbox.md section 10.

The peer counts requests of guest devices only, which a storage daemon has none of, so most of the numbers are 0 here as
they are there.
"""

from typing import Any, Final

from pydantic import ConfigDict

from qmpd.block.storage.file import FileStorage
from qmpd.commands.blockdev_options import BlockdevDriver
from qmpd.control.bridge import Mailbox
from qmpd.control.qapi import Bool, Int, Number, QapiModel, Str, Uint64
from qmpd.control.registry import Context, command, event
from qmpd.errors import QmpdError
from qmpd.graph.node import Node, topological

# -- types -------------------------------------------------------------------------------------------------------------


class _Underscored(QapiModel):
    """Structs from before QAPI took to dashes."""

    model_config = ConfigDict(alias_generator=None)


class BlockDeviceTimedStats(_Underscored):
    """Latencies in nanoseconds, over an interval in seconds."""

    interval_length: Int
    min_rd_latency_ns: Int
    max_rd_latency_ns: Int
    avg_rd_latency_ns: Int
    min_wr_latency_ns: Int
    max_wr_latency_ns: Int
    avg_wr_latency_ns: Int
    min_zone_append_latency_ns: Int
    max_zone_append_latency_ns: Int
    avg_zone_append_latency_ns: Int
    min_flush_latency_ns: Int
    max_flush_latency_ns: Int
    avg_flush_latency_ns: Int
    avg_rd_queue_depth: Number
    avg_wr_queue_depth: Number
    avg_zone_append_queue_depth: Number


class BlockLatencyHistogramInfo(QapiModel):
    boundaries: list[Uint64]
    bins: list[Uint64]


class BlockDeviceStats(_Underscored):
    """Bytes, operations, and times in nanoseconds."""

    rd_bytes: Int
    wr_bytes: Int
    zone_append_bytes: Int
    unmap_bytes: Int
    rd_operations: Int
    wr_operations: Int
    zone_append_operations: Int
    flush_operations: Int
    unmap_operations: Int
    rd_total_time_ns: Int
    wr_total_time_ns: Int
    zone_append_total_time_ns: Int
    flush_total_time_ns: Int
    unmap_total_time_ns: Int
    wr_highest_offset: Int
    rd_merged: Int
    wr_merged: Int
    zone_append_merged: Int
    unmap_merged: Int
    idle_time_ns: Int | None = None
    failed_rd_operations: Int
    failed_wr_operations: Int
    failed_zone_append_operations: Int
    failed_flush_operations: Int
    failed_unmap_operations: Int
    invalid_rd_operations: Int
    invalid_wr_operations: Int
    invalid_zone_append_operations: Int
    invalid_flush_operations: Int
    invalid_unmap_operations: Int
    account_invalid: Bool
    account_failed: Bool
    timed_stats: list[BlockDeviceTimedStats]
    rd_latency_histogram: BlockLatencyHistogramInfo | None = None
    wr_latency_histogram: BlockLatencyHistogramInfo | None = None
    zone_append_latency_histogram: BlockLatencyHistogramInfo | None = None
    flush_latency_histogram: BlockLatencyHistogramInfo | None = None


class BlockStatsSpecific(QapiModel, discriminator="driver"):
    driver: BlockdevDriver


class BlockStatsSpecificFile(BlockStatsSpecific, branch=(BlockdevDriver.FILE, BlockdevDriver.HOST_DEVICE)):
    discard_nb_ok: Uint64
    discard_nb_failed: Uint64
    discard_bytes_ok: Uint64


class BlockStats(QapiModel):
    device: Str | None = None
    qdev: Str | None = None
    node_name: Str | None = None
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: "BlockStats | None" = None
    backing: "BlockStats | None" = None


class QueryBlockstats(QapiModel):
    query_nodes: Bool | None = None


# -- query-blockstats --------------------------------------------------------------------------------------------------


#: What only guest devices have other values of.
_UNCOUNTED: Final[dict[str, Any]] = {
    **{name: 0 for name, field in BlockDeviceStats.model_fields.items() if field.annotation is int},
    "account_invalid": False,
    "account_failed": False,
    "timed_stats": [],
}


@command("query-blockstats", returns=list[BlockStats])
def query_blockstats(ctx: Context, args: QueryBlockstats) -> list[dict[str, Any]]:
    """Every node, oldest first, if nodes are asked for; guest devices do not exist.

    ``parent`` is, in spite of its name, the child that holds the node's own data.
    """
    if not args.query_nodes:
        return []
    nodes = ctx.graph.nodes
    known: dict[Node, dict[str, Any]] = {}
    for node in reversed(topological(nodes)):  # children first: no recursion, since clients can stack any number
        stats = known[node] = _own_stats(node).to_wire()
        if node.primary_edge is not None:
            stats["parent"] = known[node.primary_edge.node]
    return [known[node] for node in nodes]


def _own_stats(node: Node) -> BlockStats:
    return BlockStats(
        node_name=node.name,
        stats=BlockDeviceStats(**_UNCOUNTED | {"wr_highest_offset": node.written.highest}),
        driver_specific=_specific(node),
    )


def _specific(node: Node) -> BlockStatsSpecific | None:
    file = node.opened
    if not isinstance(file, FileStorage):
        return None
    return BlockStatsSpecificFile(
        driver=BlockdevDriver(file.format_name),
        discard_nb_ok=file.discard_nb_ok,
        discard_nb_failed=file.discard_nb_failed,
        discard_bytes_ok=file.discard_bytes_ok,
    )


# -- write threshold ---------------------------------------------------------------------------------------------------


class BlockWriteThreshold(QapiModel):
    """Bytes."""

    node_name: Str
    amount_exceeded: Uint64
    write_threshold: Uint64


event("BLOCK_WRITE_THRESHOLD", BlockWriteThreshold)


class BlockSetWriteThreshold(QapiModel):
    """Bytes; 0 for none."""

    node_name: Str
    write_threshold: Uint64


@command("block-set-write-threshold")
def block_set_write_threshold(ctx: Context, args: BlockSetWriteThreshold) -> None:
    """Send one event when a write ends beyond the threshold."""
    node = ctx.graph.find(args.node_name)
    if node is None:
        raise QmpdError(f"Device '{args.node_name}' not found")
    mailbox = Mailbox()

    def notify(exceeded: int, threshold: int) -> None:
        data: dict[str, Any] = BlockWriteThreshold(
            node_name=node.name, amount_exceeded=exceeded, write_threshold=threshold
        ).to_wire()
        mailbox.post(ctx.bus.publish, "BLOCK_WRITE_THRESHOLD", data)

    node.written.watch(args.write_threshold, notify)
