"""Coming back: the objects, nodes, exports and jobs that an earlier incarnation left in the state.

What cannot be brought back is told, and stays in the state: the next start tries again, unless clients have put
something else in its place by then. Control thread. Source: docs/durable.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from qmpd.control.bridge import run_steps
from qmpd.control.durable import BUDGET, EXPORT_KINDS, DurableRecords
from qmpd.control.history import Result
from qmpd.control.queue import KIND
from qmpd.control.registry import Context, lookup
from qmpd.errors import QmpdError
from qmpd.graph.open import close_unreferenced
from qmpd.graph.remember import restore, with_all_below
from qmpd.jobs.job import Job
from qmpd.jobs.remake import remake
from qmpd.jobs.table import Status
from qmpd.state.schema import JobRow
from qmpd.state.store import Loaded

_log = logging.getLogger(__name__)

#: Kinds of things that nodes need.
_BEFORE_NODES = ("object", "property")


class Revival:
    """One start on a state. ``waits``: jobs begin paused, until a client resumes them."""

    def __init__(self, ctx: Context, records: DurableRecords, loaded: Loaded, *, waits: bool = False) -> None:
        self._ctx = ctx
        self._records = records
        self._loaded = loaded
        self._waits = waits
        #: Kind and id of what is there again, so that the command line need not make it.
        self.things: set[str] = set()

    async def run(self) -> None:
        """Bring back everything, in the order in which it can be."""
        await self._repeat(_BEFORE_NODES)
        await self._open_nodes()
        await self._repeat((*EXPORT_KINDS, BUDGET))
        async with self._ctx.graph_lock:
            await run_steps(close_unreferenced(self._ctx.graph))
        if self._loaded.incarnation is not None:
            self._ctx.bus.publish(
                "X_QMPD_RESTARTED",
                {"incarnation": self._ctx.bus.history.incarnation, "previous": self._loaded.incarnation},
            )
        for row in self._loaded.jobs:
            await self._bring_back(row)
        await self._requeue()
        await self._records.before_reply(None, {})

    # -- things and nodes ----------------------------------------------------------------------------------------------

    async def _repeat(self, kinds: Iterable[str]) -> None:
        for kind in kinds:
            for key, command, arguments in self._loaded.calls:
                if key.partition(":")[0] != kind:
                    continue
                if kind == "deleted-export":
                    self._records.repeated(key)
                    self._ctx.bus.publish(command, arguments)
                    continue
                self.things.add(key)
                try:
                    await lookup(command).call(self._ctx, arguments)
                    self._records.repeated(key)
                except QmpdError as error:
                    self._failed(*key.partition(":")[::2], error)
                    self._records.repeated(key, arguments.get("node-name"), failed=True)

    async def _open_nodes(self) -> None:
        async with self._ctx.graph_lock:
            failed = await run_steps(restore(self._ctx.graph, self._loaded.nodes))
        self._records.unrestored |= with_all_below(self._loaded.nodes, failed)
        self.things |= {f"node:{name}" for name in self._loaded.nodes.keys() - failed.keys()}
        for name, error in failed.items():
            self._failed("node", name, error)

    def _failed(self, kind: str, name: str, error: QmpdError) -> None:
        _log.error("%s %s could not be brought back: %s", kind, name, error.desc)
        self._ctx.bus.publish("X_QMPD_RESTORE_FAILED", {"kind": kind, "name": name, "error": error.desc})

    async def _requeue(self) -> None:
        """Jobs that waited, in their order; one may have begun just when the daemon ended."""
        running = {life.job.id for life in self._ctx.jobs.lives}
        for key, command, arguments in self._loaded.calls:
            kind, _, name = key.partition(":")
            if kind != KIND:
                continue
            try:
                if name not in running:
                    await lookup(command).call(self._ctx, arguments)
            except QmpdError as error:
                self._failed("job", name, error)
            self._records.repeated(key)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    async def _bring_back(self, row: JobRow) -> None:
        if row.passed:
            self._conclude(row, None)
        elif "kind" not in row.row:
            self._conclude(row, "Interrupted by the end of the daemon")
        else:
            await self._resume(row)

    async def _resume(self, row: JobRow) -> None:
        """Start the job anew; what its checkpoint vouches for it skips."""
        graph, waits = self._ctx.graph, self._waits or row.paused

        def make() -> Job:
            job = remake(graph, row.row)
            job.checkpoint = row.checkpoint
            job.asked = row.row.get("asked")
            return job

        self._records.resuming[row.id] = row
        try:
            await self._ctx.jobs.launch(make, speed=row.speed, paused=waits)
        except QmpdError as error:
            self._records.resuming.pop(row.id, None)
            self._failed("job", row.id, error)
            return
        offset = row.checkpoint["offset"] if row.checkpoint else 0
        data = {"id": row.id, "type": row.row["type"], "offset": offset, "waiting": waits}
        self._ctx.bus.publish("X_QMPD_JOB_RESUMED", data)

    def _conclude(self, row: JobRow, error: str | None) -> None:
        """Tell the end that nobody was told of, as the job itself would have."""
        bus, where = self._ctx.bus, row.checkpoint or {"offset": 0, "length": 0}
        statuses = [Status.CONCLUDED, Status.NULL]
        if error is not None:
            statuses.insert(0, Status.ABORTING)
        if row.row["is-block-job"]:
            data: dict[str, Any] = {"device": row.id, "len": where["length"], "offset": where["offset"]}
            data |= {"speed": row.speed, "type": row.row["type"]} | ({} if error is None else {"error": error})
            bus.publish("BLOCK_JOB_COMPLETED", data)
        for status in statuses:
            bus.publish("JOB_STATUS_CHANGE", {"status": status.value, "id": row.id})
            if status is Status.CONCLUDED:
                number = bus.last
        self._records.over(
            Result(
                number=number,
                job_id=row.id,
                job_type=row.row["type"],
                outcome="completed" if error is None else "failed",
                error=error,
                offset=where["offset"],
                length=where["length"],
                began=row.began,
                ended=bus.clock(),
                incarnation=bus.history.incarnation,
            ),
            row.row.get("merge"),
        )
