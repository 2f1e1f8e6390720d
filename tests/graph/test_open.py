"""Opening and closing trees of real images, on good paths and bad ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import BackingReference
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.storage.file import FileStorage
from qmpd.block.trust import Trust
from qmpd.commands.blockdev_options import parse_description
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.graph.open import close_node, close_nodes, close_unreferenced, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.steps import run_steps
from tests.tools import need

Run = Callable[..., None]


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def create(name: str, *more: str, size: str = "1M") -> str:
    run("qemu-img", "create", "-q", "-f", "qcow2", *more, name, size)
    return name


def overlay(name: str, stored: str, fmt: str | None = "qcow2") -> str:
    """An image that names a backing file, which need not exist."""
    create(name)
    run("qemu-img", "rebase", "-u", "-b", stored, "-F", fmt or "raw", name)
    if fmt is None:
        without_format(name)
    return name


def without_format(name: str) -> None:
    """Overwrite the type of the header extension that holds the format with an unknown one."""
    data = bytearray(Path(name).read_bytes())
    at = data.index(b"\xe2\x79\x2a\xca")
    data[at : at + 4] = b"\x12\x34\x56\x78"
    Path(name).write_bytes(data)


def is_free(name: str) -> bool:
    """Can another program write to the image?"""
    return subprocess.run(["qemu-io", "-c", "write 0 512", name], capture_output=True).returncode == 0


def file(name: str, node_name: str | None = None, **more: Any) -> NodeSpec:
    return NodeSpec("file", node_name, options={"filename": name}, **more)


def qcow2(name: str, node_name: str | None = None, **more: Any) -> NodeSpec:
    children = {"file": file(name)} | more.pop("children", {})
    return NodeSpec("qcow2", node_name, children=children, **more)


@pytest.fixture(autouse=True)
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def graph() -> Any:
    graph = Graph()
    yield graph
    run_steps(close_nodes(graph, graph.nodes))


def add(graph: Graph, spec: NodeSpec, **more: Any) -> Node:
    return run_steps(open_tree(graph, spec, monitor_owned=True, **more))


def refused(graph: Graph, spec: NodeSpec, **more: Any) -> str:
    """The error's text; nothing of the attempt is left, in the graph or in this process."""
    before, files = list(graph.table.items()), open_files()
    with pytest.raises(QmpdError) as caught:
        add(graph, spec, **more)
    assert list(graph.table.items()) == before
    assert open_files() == files
    return caught.value.desc


def open_files() -> set[str]:
    paths = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return {os.readlink(path) for path in paths if os.path.lexists(path)}


# -- trees -------------------------------------------------------------------------------------------------------------


def test_a_chain_is_opened_from_its_headers(graph: Graph) -> None:
    """Backing nodes are read-only, not owned, and newer than their overlay; file nodes are older than their format."""
    create("base.qcow2")
    overlay("mid.qcow2", "base.qcow2")
    overlay("top.qcow2", "mid.qcow2")
    top = add(graph, qcow2("top.qcow2", "top"))
    names = [node.filename for node in chain.walk(top)]
    assert names == ["top.qcow2", "mid.qcow2", "base.qcow2"]
    assert [(n.driver_name, n.filename) for n in graph.nodes] == [
        (driver, name) for name in names for driver in ("file", "qcow2")
    ]
    assert [node.read_only for node in graph.nodes] == [False, False, True, True, True, True]
    assert [node.monitor_owned for node in graph.nodes] == [False, True, False, False, False, False]
    assert not is_free("top.qcow2")
    assert not is_free("base.qcow2")
    run_steps(close_node(graph, top))
    assert graph.nodes == []
    assert is_free("top.qcow2")
    assert is_free("base.qcow2")


def test_header_paths_are_relative_to_their_image(graph: Graph) -> None:
    """Not to this process."""
    for name in ("d1", "d2"):
        Path(name).mkdir()
    create("d1/base.qcow2")
    overlay("d2/top.qcow2", "../d1/base.qcow2")
    top = add(graph, qcow2("d2/top.qcow2", "top"))
    assert chain.bottom(top).filename == "d2/../d1/base.qcow2"
    assert top.backing_from_header


def test_nodes_by_reference(graph: Graph) -> None:
    """A node of its own serves as file or backing and stays when its user goes."""
    create("base.qcow2")
    overlay("top.qcow2", "base.qcow2")
    base = add(graph, qcow2("base.qcow2", "base", read_only=True))
    inner = add(graph, file("top.qcow2", "inner"))
    top = add(graph, NodeSpec("qcow2", "top", children={"file": "inner", "backing": "base"}))
    assert top.backing is base
    assert not top.backing_from_header
    run_steps(close_node(graph, top))
    assert set(graph.nodes) >= {base, inner}
    assert "top" not in graph.table
    assert inner.parents == []
    assert is_free("top.qcow2")


@pytest.mark.parametrize("backing", [None, ""])
def test_backing_can_be_left_out(graph: Graph, backing: str | None) -> None:
    """The header is not even looked at."""
    overlay("top.qcow2", "json:{nonsense")
    top = add(graph, qcow2("top.qcow2", "top", children={"backing": backing}))
    assert top.backing is None


def test_an_inline_backing_node_overrides_the_header(graph: Graph) -> None:
    """Completely, so that a bare file can be described."""
    Path("raw.img").write_bytes(bytes(1 << 20))
    overlay("top.qcow2", "/nowhere")
    raw = NodeSpec("raw", children={"file": file("raw.img")})
    top = add(graph, qcow2("top.qcow2", "top", children={"backing": raw}))
    assert top.backing is not None
    assert top.backing.filename == "raw.img"
    assert top.backing.read_only


# -- options -----------------------------------------------------------------------------------------------------------


def test_inline_children_follow_their_parent(graph: Graph) -> None:
    """read-only, auto-read-only, cache and force-share; discard is unmap below whatever it is above."""
    create("a.qcow2")
    node = add(graph, qcow2("a.qcow2", "a", read_only=True, force_share=True, cache_no_flush=True, discard="ignore"))
    child = node.children["file"].node
    assert child.read_only
    assert child.force_share
    assert (child.spec.cache_no_flush, child.spec.cache_direct, child.spec.discard) == (True, False, "unmap")
    assert child.inherits_from is node
    assert child.explicit == frozenset()
    assert is_free("a.qcow2")  # force-share: nothing is unshared


def test_what_is_given_for_the_child_wins(graph: Graph) -> None:
    """And is remembered as such, for reopening."""
    create("a.qcow2")
    spec = NodeSpec("qcow2", "a", read_only=True, children={"file": file("a.qcow2", read_only=False)})
    child = add(graph, spec).children["file"].node
    assert not child.read_only
    assert child.explicit == {"read-only"}


def test_force_share_needs_read_only(graph: Graph) -> None:
    """Checked before the name is."""
    create("a.qcow2")
    text = refused(graph, qcow2("a.qcow2", "1a", force_share=True))
    assert text == "force-share=on can only be used with read-only images"


def test_detect_zeroes_unmap_needs_discard(graph: Graph) -> None:
    """As QEMU words it."""
    text = refused(graph, NodeSpec("null-co", "n", detect_zeroes="unmap"))
    assert text == "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"


# -- the order of errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (qcow2("nope", "1x"), "Could not open 'nope': No such file or directory"),
        (qcow2("a.qcow2", "1x"), "Invalid node-name: '1x'"),
        (qcow2("a.qcow2", "taken"), "Duplicate nodes with node-name='taken'"),
        (qcow2("a.qcow2", "x" * 32), "Node name too long"),
        (NodeSpec("qcow2", "x", children={"file": "y"}), "Cannot find device='y' nor node-name='y'"),
        (NodeSpec("raw", "x", children={"file": "x"}), "Cannot find device='x' nor node-name='x'"),
        (qcow2("a.qcow2", "x", children={"backing": "x"}), "Making 'x' a backing child of 'x' would create a cycle"),
        (
            qcow2("a.qcow2", "x", children={"backing": "y"}),
            "Could not open backing file: Cannot find device='y' nor node-name='y'",
        ),
        (
            qcow2("a.qcow2", "x", children={"backing": qcow2("nope")}),
            "Could not open backing file: Could not open 'nope': No such file or directory",
        ),
        (qcow2("a.raw", "x"), "Image is not in qcow2 format"),
        (NodeSpec("nonsense", "x"), "Unknown driver 'nonsense'"),
    ],
)
def test_refusals(graph: Graph, spec: NodeSpec, text: str) -> None:
    """Each leaves nothing behind."""
    create("a.qcow2")
    Path("a.raw").write_bytes(bytes(4096))
    add(graph, NodeSpec("null-co", "taken"))
    assert refused(graph, spec) == text
    assert is_free("a.qcow2")


def test_the_prefix_is_repeated_once_a_level(graph: Graph) -> None:
    """So one sees how deep it was."""
    overlay("mid.qcow2", "gone.qcow2")
    overlay("top.qcow2", "mid.qcow2")
    prefix = "Could not open backing file: " * 2
    assert refused(graph, qcow2("top.qcow2", "x")) == f"{prefix}Could not open 'gone.qcow2': No such file or directory"


def test_an_image_that_another_program_writes_to(graph: Graph) -> None:
    """Locks are taken before the header is read, and the error is the lock's."""
    create("a.qcow2")
    other = Graph()
    add(other, qcow2("a.qcow2", "a"))
    assert refused(graph, qcow2("a.qcow2", "a")) == 'Failed to get "write" lock'
    assert refused(graph, qcow2("a.qcow2", "a", read_only=True)) == 'Failed to get shared "write" lock'
    run_steps(close_nodes(other, other.nodes))


def test_a_conflict_inside_the_graph(graph: Graph) -> None:
    """Two formats over one file node; raw would do."""
    create("a.qcow2")
    add(graph, file("a.qcow2", "f"))
    add(graph, NodeSpec("qcow2", "x", children={"file": "f"}))
    text = refused(graph, NodeSpec("qcow2", "y", read_only=True, children={"file": "f"}))
    assert text.startswith("Permission conflict on node 'f': permissions 'write, resize' are both required by node 'x'")
    add(graph, NodeSpec("raw", "z", children={"file": "f"}))


# -- untrusted headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ['json:{"driver":"null-co"}', "nbd://localhost/x", "fat:/etc", "file:base.qcow2"])
def test_headers_cannot_name_more_than_a_path(graph: Graph, stored: str) -> None:
    """No connections, no trees, no directories served as disks."""
    create("base.qcow2")
    overlay("top.qcow2", stored)
    text = refused(graph, qcow2("top.qcow2", "x"))
    rule = "a name found in an image must be a plain path"
    assert text.startswith(f"Could not open backing file: top.qcow2 -> {stored}: {rule}; give 'backing' explicitly")


def test_formats_are_not_guessed(graph: Graph) -> None:
    """A guest writes what it likes into its raw disk."""
    create("base.qcow2")
    overlay("top.qcow2", "base.qcow2", None)
    assert "top.qcow2 -> base.qcow2: the image names no format for it" in refused(graph, qcow2("top.qcow2", "x"))


def test_only_regular_files(graph: Graph) -> None:
    """A device or a pipe named by a header would be opened on behalf of a guest."""
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/null", "."):
        overlay("top.qcow2", name, "raw")
        text = refused(graph, qcow2("top.qcow2", "x"))
        assert f"top.qcow2 -> {name}: a name found in an image must lead to a regular file; " in text


def test_directories_can_be_limited(graph: Graph, tmp_path: Path) -> None:
    """Symbolic links do not help."""
    (tmp_path / "in").mkdir()
    create("outside.qcow2")
    (tmp_path / "in" / "link").symlink_to("../outside.qcow2")
    graph.trust = Trust.make(["in"])
    for name in ("../outside.qcow2", "link", str(tmp_path / "outside.qcow2")):
        overlay("in/top.qcow2", name)
        assert "is outside the directories allowed (in)" in refused(graph, qcow2("in/top.qcow2", "x"))
    create("in/base.qcow2")
    overlay("in/top.qcow2", "base.qcow2")
    add(graph, qcow2("in/top.qcow2", "x"))
    assert "is outside" in refused(graph, qcow2("outside.qcow2", "y"))


def test_chains_that_bite_their_tail(graph: Graph) -> None:
    """By any name."""
    overlay("self.qcow2", "self.qcow2")
    assert refused(graph, qcow2("self.qcow2", "x")).endswith(
        "self.qcow2 -> self.qcow2: the file is in this backing chain already"
    )
    overlay("one.qcow2", "two.qcow2")
    overlay("two.qcow2", "./three.qcow2")
    Path("three.qcow2").hardlink_to("one.qcow2")
    text = refused(graph, qcow2("one.qcow2", "x", read_only=True))
    way = "one.qcow2 -> two.qcow2 -> ./three.qcow2"
    assert text == "Could not open backing file: " * 2 + way + ": the file is in this backing chain already"


def test_chains_that_are_absurdly_deep(graph: Graph) -> None:
    """64 levels are enough for everybody."""
    create("0.qcow2")
    data = Path(overlay("1.qcow2", "00.qcow2")).read_bytes()
    Path("0.qcow2").rename("00.qcow2")
    for number in range(1, 70):
        Path(f"{number:02}.qcow2").write_bytes(data.replace(b"00.qcow2", f"{number - 1:02}.qcow2".encode()))
    assert len(list(chain.walk(add(graph, qcow2("60.qcow2", "x", read_only=True))))) == 61
    assert refused(graph, qcow2("69.qcow2", "y", read_only=True)).endswith("More than 64 images on top of each other")


@pytest.mark.parametrize(
    ("stored", "fmt", "drivers"),
    [
        ("base.qcow2", None, ["qcow2", "file"]),
        ("file:base.qcow2", "raw", ["raw", "file"]),
        ('json:{"driver":"qcow2","file.driver":"file","file.filename":"base.qcow2"}', "qcow2", ["qcow2", "file"]),
        ('json:{"driver":"null-co","size":65536}', "null-co", ["null-co"]),
    ],
)
def test_names_can_be_trusted(graph: Graph, stored: str, fmt: str | None, drivers: list[str]) -> None:
    """Then they are what the peer takes them for, as far as the drivers exist."""
    create("base.qcow2")
    create("top.qcow2")
    store_backing("top.qcow2", stored, fmt)
    assert "Could not open backing file" in refused(graph, qcow2("top.qcow2", "x", read_only=True))
    graph.trust, graph.parse_description = Trust.make(image_names=True), parse_description
    backing = chain.next_image(add(graph, qcow2("top.qcow2", "x", read_only=True)))
    assert backing is not None
    assert [node.driver_name for node in backing.subtree()] == drivers


def test_trusted_names_still_end(graph: Graph) -> None:
    """A loop is a mistake whoever makes it, a json: name may hide it, and unknown protocols stay unknown."""
    graph.trust, graph.parse_description = Trust.make(image_names=True), parse_description
    create("top.qcow2")
    for stored, text in {
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}': "in this backing chain already",
        "json:{": "Could not parse the JSON options: ",
        "nbd:unix:/x": "top.qcow2 -> nbd:unix:/x: Unknown protocol 'nbd'",
        'json:{"driver":"file","filename":"top.qcow2"}': 'A block device must be specified for "file"',
    }.items():
        store_backing("top.qcow2", stored, "qcow2")
        assert text in refused(graph, qcow2("top.qcow2", "x", read_only=True))


def store_backing(name: str, stored: str, fmt: str | None) -> None:
    """Have the header of an image say just this."""
    file = FileStorage.open({}, {"filename": name}, read_only=False)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    image.change_backing_reference(BackingReference(stored, fmt))
    image.close()
    file.close()


# -- closing -----------------------------------------------------------------------------------------------------------


def test_closing_leaves_what_others_use(graph: Graph) -> None:
    """A base shared by two overlays goes with the second one."""
    create("base.qcow2")
    base = run_steps(open_tree(graph, qcow2("base.qcow2", read_only=True)))
    tops = []
    for name in ("a", "b"):
        create(f"{name}.qcow2")
        tops.append(add(graph, qcow2(f"{name}.qcow2", name, children={"backing": base.name})))
    run_steps(close_node(graph, tops[0]))
    assert base in graph.nodes
    run_steps(close_node(graph, tops[1]))
    assert graph.nodes == []
    assert is_free("base.qcow2")


def test_sweeping_up_after_an_edit(graph: Graph) -> None:
    """Nodes that lost their last parent, and all that only they were holding."""
    create("base.qcow2")
    overlay("mid.qcow2", "base.qcow2")
    overlay("top.qcow2", "mid.qcow2")
    top = add(graph, qcow2("top.qcow2", "top"))
    with graph.edit() as edit:
        edit.detach(top.children["backing"])
    run_steps(close_unreferenced(graph))
    assert graph.nodes == [top.children["file"].node, top]
    assert is_free("mid.qcow2")
