"""The records of a daemon with a state: everything that is told is durable first, and so is what it takes to go on.

Control thread. Source: docs/durable.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from qmpd.control.bus import Bus
from qmpd.control.exports import DELETED, Call
from qmpd.control.history import EVENTS, RESULTS, Event, Result
from qmpd.control.joblife import Life
from qmpd.control.journal import Journal
from qmpd.control.queue import KIND
from qmpd.control.records import Records
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.graph.remember import describe
from qmpd.jobs.job import Keeper, Merge
from qmpd.state import schema
from qmpd.state.schema import Change, EventRow, JobRow
from qmpd.state.store import Loaded, Store
from qmpd.steps import Steps

INTERVAL: Final = 5.0
"""Seconds between two checkpoints of a job."""

_SLACK: Final = 1000
"""So many events more than are wanted are kept before the oldest are forgotten in one go."""

#: Command -> the kind of thing that it makes, and the argument that names it. It is repeated at the next start.
#: Not exports: jobs and snapshots move them to other nodes, and one that came back on the node it was once made for
#: would let a guest write to the wrong image. What there is of them is written down with the nodes.
MAKERS: Final[Mapping[str, tuple[str, str]]] = {
    "object-add": ("object", "id"),
    "qom-set": ("property", "path"),
}
#: Command -> what is not repeated any more.
ENDERS: Final[Mapping[str, tuple[str, str]]] = {
    "object-del": ("object", "id"),
}


#: Kinds of calls about the NBD server and exports, in the order in which they are repeated.
EXPORT_KINDS: Final = ("nbd-server", "export", "deleted-export")
BUDGET: Final = "budget"
#: Those, and jobs that wait, and their budget: kept as long as there is something to bring back.
_KEPT_KINDS: Final = (*EXPORT_KINDS, KIND, BUDGET)


class DurableRecords(Records):
    """The observer of all jobs, and of the graph and the commands as well."""

    def __init__(self, bus: Bus, graph: Graph, store: Store, loaded: Loaded, interval: float = INTERVAL) -> None:
        """``interval``: seconds between two checkpoints of a job."""
        super().__init__(bus)
        self.journal = Journal(store, self._given_up)
        self.settle = self.journal.settle
        self.directory = store.directory.path
        self._graph = graph
        self._interval = interval
        self._version = graph.version
        self._lives: dict[Life, tuple[int, bool]] = {}
        self._nodes: dict[str, str] = {name: schema.dumps(row) for name, row in loaded.nodes.items()}
        #: Names of nodes that could not be opened again: they stay in the state.
        self.unrestored: set[str] = set()
        #: What brings back the NBD server and exports, where it is not the command that made them.
        self.calls: Callable[[], Mapping[str, Call]] = dict
        self._calls: dict[str, tuple[str, str]] = {
            key: (command, schema.dumps(row)) for key, command, row in loaded.calls if _kind(key) in _KEPT_KINDS
        }
        #: Keys of calls that have not been repeated yet at this start.
        self.unrepeated: set[str] = set(self._calls)
        #: Those that failed, with the node they were for: they stay in the state as long as it stays the same.
        self._failed: dict[str, Node | None] = {}
        #: Jobs that go on, by id: as they were.
        self.resuming: dict[str, JobRow] = {}
        self.partial: dict[str, dict[str, Any]] = dict(loaded.partial)
        self._passed: set[Life] = set()
        self._is_frozen = False
        bus.history.resume(loaded.log, map(_event, loaded.events), [Result(**row) for row in loaded.results])
        bus.last = bus.history.last
        bus.keep = self._keep_event
        graph.save = self._save
        graph.overlays.remember(loaded.left_behind)
        graph.overlays.on_left = self._keep_left_behind
        self._post(schema.meta("incarnation", bus.history.incarnation))

    def freeze(self) -> None:
        """The daemon is being stopped from outside: what is, is to be there again. Nothing is told any more."""
        self._is_frozen = True

    # -- events and results --------------------------------------------------------------------------------------------

    def _keep_event(self, event: Event) -> None:
        if self._is_frozen:
            return
        changes = [schema.event(EventRow(event.number, event.name, event.data, event.time))]
        if event.name == DELETED:
            changes += self._call_changes()
        if event.number % _SLACK == 0:
            changes.append(schema.forget_events(event.number - EVENTS))
        self._post(*changes, then=partial(self._bus.tell, event))

    def keep_result(self, result: Result) -> None:
        changes = [schema.result(result.number, asdict(result)), schema.forget_job(result.job_id)]
        results = self._bus.history.results
        if len(results) >= RESULTS:
            changes.append(schema.forget_results(results[-RESULTS].number))
        self._post(*changes, then=partial(super().keep_result, result))

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def began(self, life: Life) -> None:
        super().began(life)
        job, record = life.job, self._records[life]
        row = {"type": job.job_type, "is-block-job": job.is_block_job, **(job.memory() or {})}
        if job.asked is not None:
            row["asked"] = job.asked
        if job.merge is not None:
            row["merge"] = asdict(job.merge)
        if (known := self.resuming.pop(job.id, None)) is not None:
            record.began = known.began
        else:
            self._post(schema.forget_job(job.id))
        self._post(schema.job(job.id, record.began, row, life.cell.speed))
        self._mark(life, job.merge)
        job.keeper = Keeper(self._checkpoint_writer(job.id), self._interval)
        self._lives[life] = (life.cell.speed, job.user_paused)

    def concluded(self, life: Life) -> None:
        self._lives.pop(life)
        self._passed.discard(life)
        if life.job.error is None:
            self._unmark(life.job.merge)
        elif not life.cell.progress.current:
            self._unmark(life.job.merge, life.job.id)
        if self._graph.version != self._version:
            self._post_nodes()
        super().concluded(life)

    def over(self, result: Result, merge: Mapping[str, Any] | None) -> None:
        """A job of an earlier incarnation has been told to be over; ``merge`` is what it did, if it did it."""
        if merge is not None and result.error is None:
            self._unmark(Merge(merge["base"], tuple(merge["images"])))
        self.keep_result(result)

    def _checkpoint_writer(self, job_id: str) -> Callable[[dict[str, Any]], None]:
        return lambda row: self.journal.write_at_once(schema.checkpoint(job_id, row))

    def _keep_left_behind(self) -> None:
        self._post(schema.meta(schema.LEFT_BEHIND, schema.dumps(self._graph.overlays.as_rows())))

    # -- bases that hold a part of something ---------------------------------------------------------------------------

    def _mark(self, life: Life, merge: Merge | None) -> None:
        if merge is not None:
            row = {"job": life.job.id, "base": merge.base, "images": list(merge.images), "time": self._bus.clock()}
            key = json.dumps([merge.base, *merge.images])
            self.partial[key] = row
            self._post(schema.partial(key, row))

    def _unmark(self, merge: Merge | None, job_id: str | None = None) -> None:
        """All of ``merge`` is in its base, or nothing that job ``job_id`` was to bring there."""
        for key, row in list(self.partial.items()):
            if merge is None or row["base"] != merge.base or not set(row["images"]) <= set(merge.images):
                continue
            if job_id is None or job_id == row["job"]:
                del self.partial[key]
                self._post(schema.partial(key, None))

    # -- commands ------------------------------------------------------------------------------------------------------

    async def before_reply(self, command: str | None, arguments: Mapping[str, Any]) -> None:
        """A command has been carried out, or (None) has failed: what it did is durable at return."""
        if command is not None and command in MAKERS:
            self._post(schema.call(_key(MAKERS[command], arguments), command, dict(arguments)))
        elif command is not None and command in ENDERS:
            self._post(*(schema.forget_calls(pattern) for pattern in _ended(command, arguments)))
        if self._graph.version != self._version:
            self._post_nodes()
        elif changes := self._call_changes():
            self._post(*changes)
        for life, told in self._lives.items():
            now = (life.cell.speed, life.job.user_paused)
            if now != told:
                self._lives[life] = now
                self._post(schema.settings(life.job.id, now[0], paused=now[1]))
        await self.journal.settle()

    # -- the graph -----------------------------------------------------------------------------------------------------

    def _save(self) -> Steps[None]:
        self._post_nodes()
        yield from self.journal.settling()

    def _post_nodes(self) -> None:
        """What has changed since the last time, and the jobs that are past it, in one transaction."""
        self._version = self._graph.version
        lent = [node for life in self._lives for node in life.job.lent]
        now = {name: schema.dumps(row) for name, row in describe(self._graph, lent).items()}
        kept = {name: row for name, row in self._nodes.items() if name in self.unrestored and name not in now}
        self.unrestored &= kept.keys()
        now |= kept
        changes: list[Change] = [schema.node(name, row) for name, row in now.items() if self._nodes.get(name) != row]
        changes += [schema.node(name, None) for name in self._nodes.keys() - now.keys()]
        for life in [life for life in self._lives if life.job.passed and life not in self._passed]:
            self._passed.add(life)
            progress = life.cell.progress
            changes.append(schema.checkpoint(life.job.id, {"offset": progress.current, "length": progress.total}))
            changes.append(schema.passed(life.job.id))
        self._nodes = now
        changes += self._call_changes()  # in the same transaction: an export is never of a node that it has left
        if changes:
            self._post(*changes)

    # -- the NBD server and exports ------------------------------------------------------------------------------------

    def repeated(self, key: str, node_name: str | None = None, *, failed: bool = False) -> None:
        """A call of the state has been repeated; ``node_name`` is the node that it is about."""
        self.unrepeated.discard(key)
        if failed:
            self._failed[key] = self._node(node_name)

    def _call_changes(self) -> list[Change]:
        """What has changed about the server and exports since the last time."""
        now = {key: (call.command, schema.dumps(call.arguments)) for key, call in self.calls().items()}
        self._failed = {key: node for key, node in self._failed.items() if key not in now}
        now |= {key: row for key, row in self._calls.items() if key not in now and self._is_kept(key, row[1])}
        changes = [schema.kept_call(key, *row) for key, row in now.items() if self._calls.get(key) != row]
        changes += [schema.forget_calls(key) for key in self._calls.keys() - now.keys()]
        self._calls = now
        return changes

    def _is_kept(self, key: str, row: str) -> bool:
        """Is this to be tried again at the next start?"""
        if key in self._failed:
            return self._node(json.loads(row).get("node-name")) is self._failed[key]
        return key in self.unrepeated

    def _node(self, name: str | None) -> Node | None:
        return None if name is None else self._graph.find(name)

    # -- the way out ---------------------------------------------------------------------------------------------------

    def _post(self, *changes: Change, then: Callable[[], object] | None = None) -> None:
        if not self._is_frozen:
            self.journal.post(*changes, **({} if then is None else {"then": then}))

    def _given_up(self, error: QmpdError) -> None:
        self._bus.publish("X_QMPD_STATE_LOST", {"error": error.desc})


def _key(named: tuple[str, str], arguments: Mapping[str, Any]) -> str:
    kind, member = named
    if kind == "property":
        return f"property:{arguments['path']}:{arguments['property']}"
    return f"{kind}:{arguments[member]}"


def _ended(command: str, arguments: Mapping[str, Any]) -> list[str]:
    """Patterns of the keys of what is gone, with all that went with it."""
    name = arguments["id"]
    return [_key(ENDERS[command], arguments), f"property:*/{name}:*", f"property:{name}:*"]


def _kind(key: str) -> str:
    return key.partition(":")[0]


def _event(row: EventRow) -> Event:
    return Event(row.number, row.name, row.data, row.time)
