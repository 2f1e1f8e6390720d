"""Data files: opened from headers as far as these are trusted, held with the right permissions, kept by reopening."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpd.block.api import Perm, Role
from qmpd.block.drivers.qcow2 import CreateOptions
from qmpd.block.drivers.qcow2 import create as build
from qmpd.block.storage.file import FileStorage
from qmpd.block.trust import Trust
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.open import close_node, close_nodes
from qmpd.graph.remember import describe, restore
from qmpd.graph.spec import NodeSpec
from qmpd.steps import run_steps
from tests.block.qcow2.support import MemoryFile
from tests.graph.test_open import _images, add, create, file, graph, qcow2, refused, run

__all__ = ["_images", "graph"]

WRITER = Perm.CONSISTENT_READ | Perm.WRITE


def with_data_file(name: str, data: str, **options: str) -> str:
    """An image that names ``data`` as its data file."""
    more = "".join(f",{key}={value}" for key, value in options.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}{more}", name, "1M")
    return name


def naming(name: str, stored: str) -> str:
    """An image whose header says so, whatever is there."""
    Path(name).touch()
    opened = FileStorage.open({}, {"filename": name}, read_only=False)
    build(opened, CreateOptions(1 << 20, data_file=stored), MemoryFile())
    opened.close()
    return name


def write(graph: Graph, node: Node) -> None:
    """Through a user who may."""
    with graph.edit() as edit:
        edge = edit.attach(Backend(), "root", node, Role.NONE, perm=WRITER)
    edge.device.write(0, b"guest")
    edge.device.flush()
    with graph.edit() as edit:
        edit.detach(edge)


def test_the_header_names_the_data_file(graph: Graph) -> None:
    """It follows the image's read-only flag and goes with it; the image file keeps metadata alone."""
    with_data_file("image.qcow2", "data.raw")
    node = add(graph, qcow2("image.qcow2", "image"))
    edge = node.children["data-file"]
    assert (edge.node.driver_name, edge.node.filename, edge.role) == ("file", "data.raw", Role.DATA)
    assert node.children["file"].role == Role.METADATA | Role.PRIMARY
    assert (edge.perm, edge.shared) == (Perm.NONE, Perm.ALL & ~Perm.RESIZE)
    write(graph, node)
    assert Path("data.raw").read_bytes()[:5] == b"guest"
    assert node.filename == "image.qcow2"
    run_steps(close_node(graph, node))
    assert graph.nodes == []


def test_the_name_is_relative_to_the_image(graph: Graph) -> None:
    """Whatever directory the daemon runs in."""
    Path("d").mkdir()
    with_data_file("d/image.qcow2", "data.raw")
    os.rename("data.raw", "d/data.raw")
    node = add(graph, qcow2("d/image.qcow2", "image"))
    assert node.children["data-file"].node.filename == "d/data.raw"


def test_a_writer_has_the_data_file_like_any_other(graph: Graph) -> None:
    """Others may write there too, but not change its length."""
    with_data_file("image.qcow2", "data.raw")
    node = add(graph, qcow2("image.qcow2", "image"))
    with graph.edit() as edit:
        user = edit.attach(Backend(), "root", node, Role.NONE, perm=WRITER)
    edge = node.children["data-file"]
    assert (edge.perm, edge.shared) == (WRITER | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)
    with graph.edit() as edit:
        edit.detach(user)


def test_the_description_goes_first(graph: Graph) -> None:
    """Then nobody looks for what the header says."""
    with_data_file("image.qcow2", "data.raw")
    os.rename("data.raw", "moved.raw")
    assert "'data.raw': No such file" in refused(graph, qcow2("image.qcow2", "image"))
    node = add(graph, qcow2("image.qcow2", "image", children={"data-file": file("moved.raw")}))
    assert node.children["data-file"].node.filename == "moved.raw"
    write(graph, node)
    assert node.filename == "image.qcow2"


def test_images_without_a_data_file_take_none(graph: Graph) -> None:
    """In QEMU's words."""
    Path("data.raw").write_bytes(bytes(512))
    create("image.qcow2")
    text = refused(graph, qcow2("image.qcow2", "image", children={"data-file": file("data.raw")}))
    assert text == "'data-file' can only be set for images with an external data file"


@pytest.mark.parametrize("name", ['json:{"driver":"null-co"}', "nbd:127.0.0.1:9", "file:x"])
def test_a_name_is_a_path_whatever_it_looks_like(graph: Graph, name: str) -> None:
    """No driver, no protocol."""
    naming("image.qcow2", name)
    assert refused(graph, qcow2("image.qcow2", "image")) == f"Could not open '{name}': No such file or directory"
    Path(name).write_bytes(bytes(512))
    graph.trust = Trust(image_names=True)
    assert add(graph, qcow2("image.qcow2", "image")).children["data-file"].node.filename == name


def test_a_guest_does_not_write_to_any_file_of_the_host(graph: Graph, tmp_path: Path) -> None:
    """What lies outside of the image's directory can be read from a header, but not written, now or later."""
    Path("d").mkdir()
    secret = tmp_path / "host.conf"
    secret.write_bytes(bytes(512))
    naming("d/image.qcow2", "../host.conf")
    rule = "must not lead out of the image's directory to be written"
    text = refused(graph, qcow2("d/image.qcow2", "image"))
    assert text.startswith(
        f"d/image.qcow2 -> ../host.conf: a name found in an image {rule}; give 'data-file' explicitly"
    )

    node = add(graph, qcow2("d/image.qcow2", "image", read_only=True))
    with pytest.raises(Exception, match=rule), graph.edit() as edit:
        edit.set_read_only(node, False)
    assert node.read_only
    run_steps(close_node(graph, node))

    for trusted in (Trust.make([str(tmp_path)]), Trust(image_names=True)):
        graph.trust = trusted
        run_steps(close_node(graph, add(graph, qcow2("d/image.qcow2", "image"))))
    graph.trust = Trust.make(["d"])
    assert "is outside the directories allowed (d)" in refused(graph, qcow2("d/image.qcow2", "image", read_only=True))


def test_what_a_header_may_not_name(graph: Graph) -> None:
    """The image itself, and what is no file."""
    itself, pipe = naming("itself.qcow2", "./itself.qcow2"), naming("image.qcow2", "pipe")
    assert "the file is in this backing chain already" in refused(graph, qcow2(itself, "image"))
    os.mkfifo("pipe")
    assert "must lead to a regular file; give 'data-file'" in refused(graph, qcow2(pipe, "image"))


def test_the_data_file_of_a_backing_image(graph: Graph) -> None:
    """Found through two headers, and read-only as its image is."""
    with_data_file("base.qcow2", "data.raw")
    run("qemu-io", "-c", "write -P 7 0 1M", "base.qcow2")
    create("top.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    top = add(graph, qcow2("top.qcow2", "top"))
    base = top.backing
    assert base is not None
    assert base.children["data-file"].node.read_only
    buffer = bytearray(10)
    top.opened.readinto(4096, memoryview(buffer))
    assert buffer == b"\7" * 10


def test_a_node_by_reference(graph: Graph) -> None:
    """It stays when the image goes."""
    with_data_file("image.qcow2", "data.raw")
    data = add(graph, file("data.raw", "data"))
    node = add(graph, NodeSpec("qcow2", "image", children={"file": file("image.qcow2"), "data-file": "data"}))
    assert node.children["data-file"].node is data
    run_steps(close_node(graph, node))
    assert graph.nodes == [data]


def test_a_restart_brings_both_files_back(graph: Graph) -> None:
    """The nodes are described with their children; the header is not asked again."""
    with_data_file("image.qcow2", "data.raw")
    node = add(graph, qcow2("image.qcow2", "image"))
    write(graph, node)
    rows = describe(graph)
    run_steps(close_node(graph, node))

    after = Graph()
    assert run_steps(restore(after, rows)) == {}

    again = after.get("image")
    assert again.children["data-file"].node.filename == "data.raw"
    assert again.children["file"].role == Role.METADATA | Role.PRIMARY
    buffer = bytearray(5)
    again.opened.readinto(0, memoryview(buffer))
    assert buffer == b"guest"
    run_steps(close_nodes(after, after.nodes))
