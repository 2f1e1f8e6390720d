"""Chains as trees, from recorded answers' shape."""

from __future__ import annotations

from typing import Any

from qmpd.ctl import chain

MIB = 1 << 20


def node(name: str, driver: str = "qcow2", *, size: int = 64 * MIB, ro: bool = True) -> dict[str, Any]:
    """A row of query-named-block-nodes, as far as the tree looks at it."""
    image = {"virtual-size": size, "actual-size": MIB}
    return {"node-name": name, "drv": driver, "file": f"{name}.img", "ro": ro, "image": image}


def graph(*edges: tuple[str, str, str], jobs: tuple[str, ...] = ()) -> dict[str, Any]:
    """x-debug-query-block-graph with edges (parent, name, child)."""
    names = dict.fromkeys([name for parent, _, child in edges for name in (parent, child)])
    ids = {name: number for number, name in enumerate(names, 1)}
    return {
        "nodes": [
            {"id": number, "name": name, "type": "block-job" if name in jobs else "block-driver"}
            for name, number in ids.items()
        ],
        "edges": [{"parent": ids[parent], "name": name, "child": ids[child]} for parent, name, child in edges],
    }


def outline(layers: list[chain.Layer]) -> list[Any]:
    """Names only."""
    return [[layer.node, *outline(layer.overlays)] for layer in layers]


def test_overlays_grow_out_of_their_base() -> None:
    """Newest-first rows become trees from the base; files of formats stay out of sight."""
    nodes = [node("sib"), node("top", ro=False), node("mid"), node("base"), node("base-file", "file")]
    edges = graph(
        ("top", "backing", "mid"), ("mid", "backing", "base"), ("sib", "backing", "base"), ("base", "file", "base-file")
    )

    assert outline(chain.build(nodes, edges)) == [["base", ["mid", ["top"]], ["sib"]]]


def test_filters_are_layers_and_say_whose_they_are() -> None:
    """During a commit its filter stands above the top of the range, and the nodes name their job."""
    nodes = [node("#block1", "commit_top"), node("top"), node("mid"), node("base")]
    edges = graph(
        ("top", "backing", "#block1"),
        ("#block1", "backing", "mid"),
        ("mid", "backing", "base"),
        ("j0", "base", "base"),
        ("j0", "root", "base"),
        jobs=("j0",),
    )

    trees = chain.build(nodes, edges)

    assert outline(trees) == [["base", ["mid", ["#block1", ["top"]]]]]
    assert trees[0].jobs == ["j0"]


def test_a_raw_node_hides_its_file_but_not_an_image_under_it() -> None:
    """The storage of raw is part of it; a format under raw is a layer."""
    nodes = [node("r", "raw"), node("f", "file"), node("window", "raw"), node("q"), node("t", "throttle")]
    edges = graph(("r", "file", "f"), ("window", "file", "q"), ("t", "file", "r"))

    assert outline(chain.build(nodes, edges)) == [["q", ["window"]], ["r", ["t"]]]


def test_a_lone_file_is_a_chain() -> None:
    """A protocol node that nobody sits on is shown."""
    assert outline(chain.build([node("f", "file")], graph())) == [["f"]]


def test_the_tree_is_drawn_with_sizes() -> None:
    """One line a node, aligned."""
    nodes = [node("sib"), node("top", ro=False), node("mid"), node("base", size=1 << 30)]
    edges = graph(("top", "backing", "mid"), ("mid", "backing", "base"), ("sib", "backing", "base"))

    assert chain.render(chain.build(nodes, edges)) == [
        "NODE       DRIVER  SIZE    ON DISK  MODE  JOBS  FILE",
        "base       qcow2   1 GiB   1 MiB    ro    -     base.img",
        "├─ mid     qcow2   64 MiB  1 MiB    ro    -     mid.img",
        "│  └─ top  qcow2   64 MiB  1 MiB    rw    -     top.img",
        "└─ sib     qcow2   64 MiB  1 MiB    ro    -     sib.img",
    ]


def test_nothing_is_said_to_be_nothing() -> None:
    """An empty daemon has a line too."""
    assert chain.render([]) == ["no nodes"]
