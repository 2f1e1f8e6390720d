"""What is looked at before a commit begins, after all that QEMU looks at. Control thread, graph lock held.

A commit that cannot come to its end is not worth beginning: it would leave a part of its data in base. What is looked
at here is what ``x-qmpd-plan-commit`` tells, as far as it is found out quickly; what takes longer is left to the job.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from qmpd.errors import Kind, QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.files import free_space, shares_blocks, storage_of
from qmpd.jobs.growth import TakesLongError, Work, no_space
from qmpd.jobs.job import Action, error_action
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.siblings import Sibling, SiblingPolicy, find_siblings, refusal
from qmpd.steps import Steps

PATIENCE: Final = 0.025
"""Seconds to look for damage and an upper bound of the space needed; as much again where that bound is not enough."""

_HINT: Final = "; x-qmpd-force begins all the same"


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a commit has to pass. ``warn`` is told of siblings that the commit is allowed to change."""

    siblings: SiblingPolicy
    #: The command said so itself; the daemon says otherwise.
    overridden: bool
    warn: Callable[[CommitPlan, list[Sibling]], object]
    #: Begin also where it can be foreseen that the commit will fail.
    force: bool = False

    def run(self, graph: Graph, plan: CommitPlan, visible_end: int) -> Steps[QmpdError | None]:
        """Why the commit must not begin; None if it may.

        ``visible_end``: how far base must come to read as zeros beyond top, in bytes.
        """
        found = yield from self._look_for_siblings(graph, plan)
        if found and self.siblings is SiblingPolicy.REFUSE:
            return refusal(found)
        # Filters may be scripted, or count what goes through them: nothing but the job is to touch them.
        if not self.force and not any(node.is_filter for node in plan.top.subtree()):
            work = Work(plan, chain.layers(plan.top, plan.base), visible_end)
            error: QmpdError | None = yield partial(_foresee, work)
            if error is not None:
                return error
        if found:
            self.warn(plan, found)
        return None

    def _look_for_siblings(self, graph: Graph, plan: CommitPlan) -> Steps[list[Sibling]]:
        if self.siblings is SiblingPolicy.ALLOW and not self.overridden:
            return []
        return (yield from find_siblings(graph, plan))


def _foresee(work: Work) -> QmpdError | None:
    """What will make the job fail, by its own error policy. Worker thread."""
    policy, base = work.plan.request.on_error, work.plan.base
    storage = storage_of(chain.skip_filters(base), data=True)
    free = None if storage is None else free_space(storage)
    work.deadline = time.monotonic() + PATIENCE
    try:
        enough = work.most()
        if storage is None or free is None or enough <= free or error_action(policy, errno.ENOSPC) is not Action.REPORT:
            return None
        work.deadline = time.monotonic() + PATIENCE
        needed = work.growth().data
    except TakesLongError:
        return None
    except QmpdError as error:
        is_fatal = error.kind is Kind.CORRUPT and error_action(policy, error.errno) is Action.REPORT
        return error.prefixed("The commit would fail: ") if is_fatal else None
    if needed <= free or any(shares_blocks(storage_of(node), storage) for node in _sources(work.plan)):
        return None
    return QmpdError(no_space(storage.path, needed, free) + _HINT, Kind.NO_SPACE, path=storage.path)


def _sources(plan: CommitPlan) -> list[Node]:
    return [chain.skip_filters(node) for node in plan.intermediates]
