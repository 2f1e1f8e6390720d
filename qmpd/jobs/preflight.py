"""What is looked at before a commit begins, after all that QEMU looks at. Control thread, graph lock held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.siblings import Sibling, SiblingPolicy, find_siblings, refusal
from qmpd.steps import Steps


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a commit has to pass. ``warn`` is told of siblings that the commit is allowed to change."""

    siblings: SiblingPolicy
    #: The command said so itself; the daemon says otherwise.
    overridden: bool
    warn: Callable[[CommitPlan, list[Sibling]], object]

    def run(self, graph: Graph, plan: CommitPlan) -> Steps[QmpdError | None]:
        """Why the commit must not begin; None if it may."""
        if self.siblings is SiblingPolicy.ALLOW and not self.overridden:
            return None
        found = yield from find_siblings(graph, plan)
        if found and self.siblings is SiblingPolicy.REFUSE:
            return refusal(found)
        if found:
            self.warn(plan, found)
        return None
