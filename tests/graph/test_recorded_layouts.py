"""The permissions that the peer was seen to have while jobs ran, rebuilt edit by edit.

The recordings are steps of tests/data/jobs.jsonl that list all edges of the graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, JobParent
from tests.graph.fakes import FILTERED, add_image, make, show

CR, W, WU, R, NONE, ALL = (
    Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE, Perm.NONE, Perm.ALL,
)  # fmt: skip

RECORDINGS = Path(__file__).parent.parent / "data" / "jobs.jsonl"
CASES: dict[str, dict[str, Any]] = {case["case"]: case for case in map(json.loads, RECORDINGS.read_text().splitlines())}


def recorded(case: str, index: int) -> set[str]:
    """The edges that the case's step lists, with the filter's generated name as ours."""
    return {line.replace("#blockAUTO0", "cflt") for line in CASES[case]["steps"][index]["graph-edges"]}


def present(graph: Graph) -> set[str]:
    return {show(edge) for node in graph.nodes for edge in node.parents}


def is_plain(case: dict[str, Any]) -> bool:
    """Does it begin with a graph made of nothing but images with named files?"""
    return "graph-edges" in case["steps"][0] and all(
        node["driver"] == "qcow2" and isinstance(node["file"], dict) and isinstance(node.get("backing", 0), str | None)
        for node in case["blockdevs"]
    )


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if is_plain(case)])
def test_a_graph_at_rest(case: str) -> None:
    """Chains as blockdev-add makes them."""
    graph = Graph()
    for described in CASES[case]["blockdevs"]:
        backing = graph.get(described["backing"]) if described.get("backing") else None
        add_image(graph, described["node-name"], backing, read_only=described.get("read-only", False))
    assert present(graph) == recorded(case, 0)


class Chain:
    """base, mid and top as most cases have them."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.base = add_image(self.graph, "base", read_only=True)
        self.mid = add_image(self.graph, "mid", self.base, read_only=True)
        self.top = add_image(self.graph, "top", self.mid)


def test_an_intermediate_commit() -> None:
    """The filter above mid, the job's five holds, base reopened read-write; and all of it undone at the end."""
    chain = Chain()
    job = JobParent("commit", "j0")
    filter_node = make("cflt", "commit_top", is_filter=True, read_only=True)
    with chain.graph.edit() as edit:
        edit.set_read_only(chain.base, False)
        edit.add_node(filter_node)
        edit.attach(filter_node, "backing", chain.mid, FILTERED)
        edit.move_parents(chain.mid, filter_node)
        held = [
            edit.attach(job, "main node", chain.top, Role.NONE),
            edit.attach(job, "intermediate node", chain.mid, Role.NONE, shared=W | WU),
            edit.attach(job, "base", chain.base, Role.NONE),
            edit.attach(Backend(), "root", chain.mid, Role.NONE),
            edit.attach(Backend(), "root", chain.base, Role.NONE, perm=CR | W, shared=CR | WU),
        ]
    assert present(chain.graph) == recorded("commit-mid-filter-node-name", 1)
    with chain.graph.edit() as edit:
        for edge in held:
            edit.detach(edge)
        edit.move_parents(filter_node, chain.base)
        edit.remove_node(filter_node)
        edit.set_read_only(chain.base, True)
    assert present(chain.graph) == recorded("commit-mid-filter-node-name", 6)


def test_an_active_commit() -> None:
    """The mirror filter above top, base the target."""
    graph = Graph()
    base = add_image(graph, "base", read_only=True)
    top = add_image(graph, "top", base)
    filter_node = make("cflt", "mirror_top", is_filter=True)
    filter_node.driver.active_commit = True  # type: ignore[union-attr]
    job = JobParent("commit", "j0")
    with graph.edit() as edit:
        edit.set_read_only(base, False)
        edit.add_node(filter_node)
        edit.attach(filter_node, "backing", top, FILTERED)
        edit.attach(job, "main node", filter_node, Role.NONE, perm=CR, shared=CR | W | WU)
        edit.attach(job, "source", top, Role.NONE, shared=CR | W | WU)
        edit.attach(job, "target", base, Role.NONE)
        edit.attach(Backend(), "root", base, Role.NONE, perm=W, shared=CR | W | WU)
    assert present(graph) == recorded("active-complete", 5)
