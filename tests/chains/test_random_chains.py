"""Whatever the images are like, a commit keeps the guest's view and leaves clean images behind."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.chains.images import Chain, chains, flatten, make, run
from tests.daemons import PEER, Client, under_test
from tests.replay import hosts
from tests.tools import need

ALWAYS = settings(
    deadline=None,  # qemu-img takes its time
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
FEW = settings(ALWAYS, max_examples=10, derandomize=True)
MANY = settings(ALWAYS, max_examples=int(os.environ.get("QMPD_CHAINS", "200")), print_blob=True)

#: The peer lets old data of base appear where an image in the middle is shorter, and writes a header that it cannot
#: read when the name in a header and a node's differ. To check the harness with it, it gets neither.
CHAINS = chains(one_size=True, full_names=True) if under_test() == PEER else chains()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One daemon for all chains; each example leaves it without nodes."""
    need("qemu-img", "qemu-io")
    with (
        hosts.start(tmp_path_factory.mktemp("daemon")) as host,
        contextlib.closing(Client(host.dial())) as client,
    ):
        yield client


@FEW
@given(chain=CHAINS)
def test_commit_keeps_the_guests_view(client: Client, chain: Chain) -> None:
    """After a commit the uppermost image reads as before, base as the topmost committed one did, and all are clean."""
    commit_and_compare(client, chain)


@pytest.mark.long
@MANY
@given(chain=CHAINS)
def test_commit_keeps_the_guests_view_of_many_chains(client: Client, chain: Chain) -> None:
    """The same, 200 times."""
    commit_and_compare(client, chain)


def commit_and_compare(client: Client, chain: Chain) -> None:
    with tempfile.TemporaryDirectory(prefix="chain-") as name:
        directory = Path(name)
        images = make(chain, directory)
        flatten(images[-1], directory / "before")
        flatten(images[chain.top], directory / "committed")
        commit(client, chain, images)
        assert run("qemu-img", "compare", "-F", "raw", str(images[-1]), str(directory / "before"))
        if chain.layers[chain.base].size <= chain.layers[chain.top].size:
            assert run("qemu-img", "compare", "-F", "raw", str(images[chain.base]), str(directory / "committed"))
        for layer, image in zip(chain.layers, images, strict=True):
            if layer.format == "qcow2":
                run("qemu-img", "check", "-q", str(image))
        assert len(chain_of(images[-1])) == len(images) - (chain.top - chain.base)


def commit(client: Client, chain: Chain, images: list[Path]) -> None:
    """Open the chain, commit the stretch, close the chain."""
    nodes = add_nodes(client, chain, images)
    if chain.named_nodes:
        where = {"top-node": f"n{chain.top}", "base-node": f"n{chain.base}"}
    else:
        where = {"top": str(images[chain.top]), "base": str(images[chain.base])}
    client.execute_with("block-commit", {"job-id": "j", "device": nodes[-1], **where})
    ended = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
    client.wait_status("j", "null")
    for node in reversed(nodes):
        client.execute("blockdev-del", node_name=node)
    assert "error" not in ended["data"], ended
    assert client.execute("query-named-block-nodes") == []


def add_nodes(client: Client, chain: Chain, images: list[Path]) -> list[str]:
    """blockdev-add of each image with its backing node named, or of the uppermost alone."""
    if not chain.named_nodes:
        client.execute_with("blockdev-add", blockdev("n", images[-1], "qcow2"))
        return ["n"]
    nodes: list[str] = []
    for number, (layer, image) in enumerate(zip(chain.layers, images, strict=True)):
        options = blockdev(f"n{number}", image, layer.format)
        options["read-only"] = number < len(images) - 1
        if layer.format == "qcow2":
            options["backing"] = nodes[-1] if nodes else None
        client.execute_with("blockdev-add", options)
        nodes.append(f"n{number}")
    return nodes


def blockdev(node: str, image: Path, image_format: str) -> dict[str, Any]:
    return {"driver": image_format, "node-name": node, "file": {"driver": "file", "filename": str(image)}}


def chain_of(image: Path) -> list[dict[str, Any]]:
    """What qemu-img finds from an image down, following the headers."""
    found = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", str(image)))
    assert isinstance(found, list)
    return found
