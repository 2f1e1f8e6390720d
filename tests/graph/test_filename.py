"""File names of nodes: plain when the name says it all, json: when not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qmpd.block.api import BackingReference, Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph import filename
from qmpd.graph.edit import Graph
from qmpd.graph.node import Edge, Node
from tests.graph.fakes import FILTERED, IMAGE, add, add_image, fake, make


def file(graph: Graph, name: str, path: str) -> Node:
    node = add(graph, name, options={"filename": path})
    fake(node).path = path
    return node


def over(graph: Graph, name: str, driver: str, child: Node, role: Role = FILTERED, **options: Any) -> Node:
    node = make(name, driver, options={key.replace("_", "-"): value for key, value in options.items()})
    node.driver.is_filter = driver not in ("raw", "qcow2")  # type: ignore[union-attr,misc]
    with graph.edit() as edit:
        edit.add_node(node)
        edit.attach(node, "image" if driver == "blkdebug" else "file", child, role)
    return node


def image(graph: Graph, name: str, path: str, backing: Node | None = None, stored: str | None = None) -> Node:
    node = add_image(graph, name, backing, read_only=True)
    inner = graph.get(f"{name}-file")
    fake(inner).path = path
    inner.spec = inner.spec.__class__("file", options={"filename": path}).effective(None)
    fake(node).reference = BackingReference(stored, "qcow2") if stored is not None else None
    return node


@pytest.fixture
def graph() -> Graph:
    return Graph()


def options_of(node: Node) -> Any:
    assert node.filename.startswith("json:")
    return json.loads(node.filename.removeprefix("json:"))


def test_a_file_goes_by_its_path_as_given(graph: Graph) -> None:
    """Nothing is resolved or normalised."""
    assert file(graph, "f", "./a//b.img").filename == "./a//b.img"


def test_a_format_goes_by_its_files_name(graph: Graph) -> None:
    """If it was given no option that matters."""
    assert over(graph, "r", "raw", file(graph, "f", "a.img")).filename == "a.img"
    assert image(graph, "q", "q.qcow2").filename == "q.qcow2"


def test_strong_options_show(graph: Graph) -> None:
    """A window of a file is not the file."""
    node = over(graph, "r", "raw", file(graph, "f", "a.img"), offset=512)
    assert options_of(node) == {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "a.img"}}
    assert filename.exact_filename(node) == ""


def test_weak_options_do_not_show(graph: Graph) -> None:
    """They do not change what a guest sees."""
    node = over(graph, "q", "qcow2", file(graph, "f", "a.qcow2"), IMAGE, lazy_refcounts=True)
    assert node.filename == "a.qcow2"


def test_a_format_over_a_format_is_described(graph: Graph) -> None:
    """Opening the file's name would not give it."""
    inner = image(graph, "q", "q.qcow2")
    node = over(graph, "r", "raw", inner)
    expected = {"driver": "raw", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "q.qcow2"}}}
    assert options_of(node) == expected


def test_filters_are_described(graph: Graph) -> None:
    """They cannot be probed."""
    node = over(graph, "c", "compress", image(graph, "q", "q.qcow2"))
    assert options_of(node)["driver"] == "compress"


@pytest.mark.parametrize("driver", ["commit_top", "mirror_top"])
def test_job_filters_go_by_the_node_below(graph: Graph, driver: str) -> None:
    """So an overlay still shows its backing file's name while a job runs."""
    below = image(graph, "q", "q.qcow2")
    node = make("flt", driver, is_filter=True, read_only=True)
    with graph.edit() as edit:
        edit.add_node(node)
        edit.attach(node, "backing", below, FILTERED)
    assert node.filename == "q.qcow2"


def test_blkdebug_has_a_name_of_its_own(graph: Graph) -> None:
    """With rules given as options it has none."""
    plain = file(graph, "f", "raw.img")
    assert over(graph, "b", "blkdebug", plain).filename == "blkdebug::raw.img"
    assert over(graph, "c", "blkdebug", plain, config="rules").filename == "blkdebug:rules:raw.img"
    assert options_of(over(graph, "d", "blkdebug", plain, inject_error=[]))["image"]["filename"] == "raw.img"


@pytest.mark.parametrize(
    ("options", "name"), [({}, "null-co://"), ({"size": 5}, 'json:{"driver": "null-co", "size": 5}')]
)
def test_null(graph: Graph, options: dict[str, Any], name: str) -> None:
    """Plain with default options only."""
    assert add(graph, "n", "null-co", options=options).filename == name


# -- backing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["base.qcow2", "./base.qcow2", "../d1/base.qcow2"])
def test_backing_as_the_header_says(graph: Graph, stored: str) -> None:
    """However it spells the path."""
    base = image(graph, "base", "d1/base.qcow2")
    top = image(graph, "top", "d1/top.qcow2", base, stored)
    assert top.filename == "d1/top.qcow2"
    assert not filename.is_backing_overridden(top)


def test_backing_other_than_the_header_says(graph: Graph) -> None:
    """The description has the backing node in it."""
    base = image(graph, "base", "other.qcow2")
    top = image(graph, "top", "top.qcow2", base, "base.qcow2")
    assert options_of(top)["backing"] == {"driver": "qcow2", "file": {"driver": "file", "filename": "other.qcow2"}}
    assert filename.is_backing_overridden(top)
    assert options_of(image(graph, "new", "new.qcow2", base))["backing"]["file"]["filename"] == "other.qcow2"


def test_no_backing_although_the_header_names_one(graph: Graph) -> None:
    """As recorded: keys in alphabetical order."""
    top = image(graph, "top", "top.qcow2", None, "base.qcow2")
    assert top.filename == (
        'json:{"backing": null, "driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}'
    )


def test_deep_chains_stay_cheap_and_names_are_cut(graph: Graph) -> None:
    """Every level overridden: linear work, no recursion, 4095 characters."""
    node = image(graph, "q0", "q0.qcow2")
    for number in range(1, 1500):
        child, node = node, make(f"q{number}", "raw")
        # By hand: an edit of its own for every level would check all levels below each time.
        node.children["file"] = edge = Edge(node, "file", child, FILTERED, Perm.NONE, Perm.ALL)
        child.parents.append(edge)
    assert len(node.filename) == 4095
    assert node.filename.endswith("...")


# -- names in headers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_path", "name", "combined"),
    [
        ("top.qcow2", "base.qcow2", "base.qcow2"),
        ("d2/top.qcow2", "base.qcow2", "d2/base.qcow2"),
        ("d2/top.qcow2", "../d1/base.qcow2", "d2/../d1/base.qcow2"),
        ("/a/top.qcow2", "base.qcow2", "/a/base.qcow2"),
        ("d2/top.qcow2", "/base.qcow2", "/base.qcow2"),
        ("d2/top.qcow2", "nbd:x", "nbd:x"),
        ("d2/top.qcow2", "./a:b", "d2/./a:b"),
    ],
)
def test_combining(image_path: str, name: str, combined: str) -> None:
    """Relative to the image's directory, unless absolute or a protocol."""
    assert filename.combine(image_path, name) == combined


@pytest.mark.parametrize(
    ("name", "expected"), [("nbd:x", True), ("json:{}", True), ("./a:b", False), ("a/b:c", False), ("plain", False)]
)
def test_protocols(name: str, expected: bool) -> None:
    """A colon before any slash."""
    assert filename.has_protocol(name) is expected


def test_nothing_to_resolve_against(graph: Graph) -> None:
    """An image that is not in a file has no directory."""
    inner = add(graph, "n", "null-co", options={"size": 512})
    node = over(graph, "q", "qcow2", inner, IMAGE)
    with pytest.raises(QmpdError, match="Cannot use relative backing file names for 'json:"):
        filename.resolve_backing(node, BackingReference("base.qcow2", None))
    assert filename.resolve_backing(node, BackingReference("/base.qcow2", None)) == "/base.qcow2"
