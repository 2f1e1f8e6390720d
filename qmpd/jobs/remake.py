"""Making a job again that an earlier incarnation of the daemon did not end. Control thread, graph lock held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.jobs.active import ActiveCommitJob
from qmpd.jobs.commit import CommitJob
from qmpd.jobs.job import Job, OnError
from qmpd.jobs.offline import OfflineCommitJob, plan_offline
from qmpd.jobs.plan import CommitRequest, plan_commit
from qmpd.jobs.preflight import Preflight
from qmpd.jobs.stream import StreamJob
from qmpd.jobs.stream_plan import StreamRequest, plan_stream


def remake(graph: Graph, memory: Mapping[str, Any]) -> Job:
    """The job that told ``memory``. Raises QmpdError if the graph does not allow it now, as its command would."""
    make = _KINDS.get(memory.get("kind", ""))
    if make is None:
        raise QmpdError("A job of this kind cannot go on after the end of the daemon")
    return make(graph, memory)


def make_commit(graph: Graph, request: CommitRequest, preflight: Preflight | None = None) -> Job:
    """The kind of commit that fits the users of the images. It begins only if ``preflight`` has nothing against it."""
    plan = plan_commit(graph, request)
    job = (ActiveCommitJob if plan.active else CommitJob)(graph, plan)
    job.preflight = preflight
    return job


def _commit(graph: Graph, memory: Mapping[str, Any]) -> Job:
    return make_commit(graph, CommitRequest(**_request(memory)))


def _offline(graph: Graph, memory: Mapping[str, Any]) -> Job:
    return OfflineCommitJob(graph, plan_offline(graph, CommitRequest(**_request(memory))), keep=memory["keep"])


def _stream(graph: Graph, memory: Mapping[str, Any]) -> Job:
    return StreamJob(graph, plan_stream(graph, StreamRequest(**_request(memory))))


def _request(memory: Mapping[str, Any]) -> dict[str, Any]:
    given = memory["request"]
    return {**given, "on_error": OnError(given["on_error"])}


_KINDS: Final[Mapping[str, Callable[[Graph, Mapping[str, Any]], Job]]] = {
    "commit": _commit,
    "offline": _offline,
    "stream": _stream,
}
