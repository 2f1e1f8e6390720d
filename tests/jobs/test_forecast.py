"""What a plan says before the first write is what the commit then does."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chains.images import Chain, chains, data_file, make
from tests.chains.test_random_chains import ALWAYS, add_nodes
from tests.daemons import Client
from tests.replay import hosts
from tests.tools import need

FEW = settings(ALWAYS, max_examples=12, derandomize=True)
MANY = settings(ALWAYS, max_examples=int(os.environ.get("QMPD_CHAINS", "200")), print_blob=True)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    need("qemu-img", "qemu-io")
    with (
        hosts.start(tmp_path_factory.mktemp("daemon")) as host,
        contextlib.closing(Client(host.dial())) as client,
    ):
        yield client


@FEW
@given(chain=chains())
def test_the_predicted_growth_is_the_measured_growth(client: Client, chain: Chain) -> None:
    """To the byte of base's file, and so to the cluster; and planning changes no byte of any image."""
    plan_and_measure(client, chain)


@pytest.mark.long
@MANY
@given(chain=chains())
def test_the_predicted_growth_is_the_measured_growth_of_many_chains(client: Client, chain: Chain) -> None:
    """The same, 200 times."""
    plan_and_measure(client, chain)


@pytest.mark.long
@MANY
@given(chain=chains(), bits=st.sampled_from([16, 64]), data=st.data())
def test_refcount_blocks_and_tables_are_foreseen(client: Client, chain: Chain, bits: int, data: st.DataObject) -> None:
    """Bases of the smallest clusters need new refcount blocks, and now and then a larger table."""
    base = replace(
        chain.layers[chain.base],
        format="qcow2",
        cluster_size=512,
        version="1.1",
        refcount_bits=bits,
        extended_l2=False,
        changes=(),
    )
    plan_and_measure(
        client, replace(chain, layers=(*chain.layers[: chain.base], base, *chain.layers[chain.base + 1 :]))
    )


def plan_and_measure(client: Client, chain: Chain) -> None:
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        images = make(chain, Path(name))
        before = [image.read_bytes() for image in images]
        beside = _size(data_file(images[chain.base]))
        nodes = add_nodes(client, chain, images)
        if chain.named_nodes:
            where = {"top-node": f"n{chain.top}", "base-node": f"n{chain.base}"}
        else:
            where = {"top": str(images[chain.top]), "base": str(images[chain.base])}
        arguments = {"job-id": "j", "device": nodes[-1], **where}

        plan = client.execute_with("x-qmpd-plan-commit", arguments)

        assert [image.read_bytes() for image in images] == before
        client.execute_with("block-commit", arguments)
        ended = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
        client.wait_status("j", "null")
        for node in reversed(nodes):
            client.execute("blockdev-del", node_name=node)
        assert "error" not in ended["data"], ended
        assert plan["obstacles"] == []
        grown = images[chain.base].stat().st_size - len(before[chain.base])
        assert plan["growth"]["file-size"] == grown + _size(data_file(images[chain.base])) - beside
        size = plan["growth"].get("cluster-size")
        if size:
            clusters = -(-images[chain.base].stat().st_size // size) - -(-len(before[chain.base]) // size)
            assert plan["growth"]["clusters"] == clusters


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
