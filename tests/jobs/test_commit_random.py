"""Any chain of images, merged anywhere: the guest's bytes are the same before and after."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.jobs.rig import backing, check, image, output, running, shell
from tests.tools import need

KIB = 1024
#: Writes as qemu-io spells them, on ranges that ignore clusters.
WRITE = st.tuples(
    st.sampled_from(["write -P 0x5a", "write -P 0xa5", "write -z", "write -z -u", "write -c -P 0x3c", "discard"]),
    st.integers(0, 1000),
    st.integers(1, 300),
)
CHAINS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(300, 1100), min_size=3, max_size=5),  # units of 512 bytes
        "clusters": st.lists(st.sampled_from([512, 4096, 65536]), min_size=5, max_size=5),
        "writes": st.lists(st.lists(WRITE, max_size=4), min_size=5, max_size=5),
        "raw_base": st.booleans(),
        "speed": st.sampled_from([0, 1 << 40]),
    }
)


def clipped(write: tuple[str, int, int], size: int, cluster: int) -> str | None:
    """The qemu-io command, within the image; a compressed write takes whole clusters."""
    verb, start, count = write
    if "-c" in verb:
        start, count = start * 512 // cluster * cluster, cluster
    else:
        start, count = start * 512, count * 512
    count = min(count, size * 512 - start)
    if count <= 0 or ("-c" in verb and count < cluster):
        return None
    return f"{verb} {start} {count}"


def build(chain: dict[str, Any]) -> list[str]:
    """Make the images i0 <- i1 <- ... in the current directory; their names."""
    names: list[str] = []
    for i, size in enumerate(chain["sizes"]):
        raw = i == 0 and chain["raw_base"]
        kind, cluster = ("raw" if raw else "qcow2"), chain["clusters"][i]
        options = "" if raw else f"-o cluster_size={cluster}"
        below = f"-b {names[-1]}.qcow2 -F {'raw' if i == 1 and chain['raw_base'] else 'qcow2'}" if names else ""
        shell(f"qemu-img create -q -f {kind} {options} {below} i{i}.qcow2 {size * 512}")
        commands = [clipped(write, size, cluster) for write in chain["writes"][i] if not (raw and "-c" in write[0])]
        for command in commands:
            if command is not None:
                with suppress(subprocess.CalledProcessError):  # no compressed write over an allocated cluster
                    shell(f"qemu-io -f {kind} -c '{command}' i{i}.qcow2")
        names.append(f"i{i}")
    return names


def content(name: str) -> bytes:
    """What a guest reads from an image."""
    output(f"qemu-img convert -U -f qcow2 -O raw {name}.qcow2 content.raw")
    return Path("content.raw").read_bytes()


async def merge(directory: Path, chain: dict[str, Any], top: int, base: int) -> None:
    async with running(directory) as rig:
        names = build(chain)
        before = content(names[-1])
        first = image(names[0], read_only=True)
        if chain["raw_base"]:
            first = {"driver": "raw", "node-name": "i0", "file": first["file"], "read-only": True}
        await rig.add(first)
        for lower, upper in pairwise(names):
            await rig.add(image(upper, lower, read_only=upper != names[-1]))
        await rig.commit(names[-1], names[top], names[base], speed=chain["speed"])
        await rig.gone()

        assert "error" not in rig.told()
        await rig.close()
        assert content(names[-1]) == before
        assert backing(f"{names[top + 1]}.qcow2")[0] == f"{names[base]}.qcow2"
        check(*(f"{name}.qcow2" for name in names[chain["raw_base"] :]))


# An example takes a third of a second, so there is no time for shrinking.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(chain=CHAINS, data=st.data())
def test_the_guest_sees_no_difference(chain: dict[str, Any], data: st.DataObject) -> None:
    """Sizes, cluster sizes, zeros, discards and compressed clusters in any mixture; qemu-img finds no fault."""
    need("qemu-img", "qemu-io")
    last = len(chain["sizes"]) - 1
    top = data.draw(st.integers(1, last - 1), label="top")
    base = data.draw(st.integers(0, top - 1), label="base")

    with tempfile.TemporaryDirectory() as directory:
        trio.run(merge, Path(directory), chain, top, base, clock=trio.testing.MockClock(rate=1.0))
