"""Several changes to the graph, all of them or none. Source: spec/toolbox.md section 13.

Users of the nodes stand still from the first step to the last, as they do in the peer's drained section. Whatever takes
time (flushing, making and opening images) is done before the graph is touched; then all actions are applied in one
edit, in their order, each seeing what those before it did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from qmpd.errors import QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Node
from qmpd.jobs.surgery import while_quiet
from qmpd.steps import Steps


class Action(ABC):
    """One change. Control thread, graph lock held."""

    #: Names of the nodes that it is about; some may not exist.
    names: Sequence[str] = ()

    def nodes(self, graph: Graph) -> Sequence[Node]:
        """Those whose users must stand still, as far as they exist."""
        return [node for name in self.names if (node := graph.find(name)) is not None]

    def prepare(self, graph: Graph, before: Sequence[Action]) -> Steps[None]:
        """Do what takes time and is not seen in the graph. ``before`` are prepared, but not applied.

        What fails here must be what the client is to be told first, with ``before`` applied. :meth:`undo` follows a
        failure.
        """
        yield from ()

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Change the graph; called more than once where later actions rehearse. Raises QmpdError."""

    def undo(self, graph: Graph) -> Steps[None]:
        """The transaction failed and the graph is as before: take back what :meth:`prepare` did. Must not fail."""
        yield from ()


class Abort(Action):
    """Fails, so that a client can try whether the actions before it would work."""

    def apply(self, edit: Edit) -> None:
        raise QmpdError("Transaction aborted using Abort action")


def run(graph: Graph, actions: Sequence[Action]) -> Steps[None]:
    """Carry out all actions. The first failure is raised, with everything taken back in reverse order."""
    nodes = dict.fromkeys(node for action in actions for node in action.nodes(graph))
    yield from while_quiet(graph, nodes, lambda: _carry_out(graph, actions))


def _carry_out(graph: Graph, actions: Sequence[Action]) -> Steps[None]:
    begun: list[Action] = []
    try:
        for action in actions:
            begun.append(action)
            yield from action.prepare(graph, begun[:-1])
        with graph.edit() as edit:
            for action in actions:
                action.apply(edit)
    except Exception:
        for action in reversed(begun):
            yield from action.undo(graph)
        raise
