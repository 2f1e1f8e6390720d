"""block-stream. Source: spec/toolbox.md section 5."""

from functools import partial
from typing import Annotated

from qmpd.commands.block_commit import OWN, UNSTABLE
from qmpd.commands.jobs import JobType
from qmpd.commands.queue import start
from qmpd.control.qapi import Bool, Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.graph.edit import Graph
from qmpd.jobs.job import OnError
from qmpd.jobs.stream import StreamJob
from qmpd.jobs.stream_plan import StreamRequest, plan_stream


class BlockStream(QapiModel):
    """Arguments of block-stream. ``base`` is a file name."""

    job_id: Str | None = None
    device: Str
    base: Str | None = None
    base_node: Str | None = None
    backing_file: Str | None = None
    backing_mask_protocol: Bool | None = None
    bottom: Str | None = None
    speed: Int | None = None  # bytes per second
    on_error: OnError | None = None
    filter_node_name: Str | None = None
    auto_finalize: Bool | None = None
    auto_dismiss: Bool | None = None
    x_qmpd_queue: Annotated[Bool | None, UNSTABLE] = None
    x_qmpd_idempotent: Annotated[Bool | None, UNSTABLE] = None


def stream_of(graph: Graph, args: BlockStream) -> StreamJob:
    """Validate; what was not given keeps the default of StreamRequest."""
    given = {name: value for name, value in args if value is not None and not name.startswith(OWN)}
    request = StreamRequest(**given)
    return StreamJob(graph, plan_stream(graph, request))


@command("block-stream")
async def block_stream(ctx: Context, args: BlockStream) -> None:
    """Start a job that moves the data of the images below ``device``, down to ``base``, into ``device``."""
    await start(ctx, "block-stream", args, JobType.STREAM, partial(stream_of, ctx.graph, args))
