"""A live block commit from beginning to end: `make demo`.

Builds a chain of three qcow2 images, starts the daemon on a private socket, connects two clients, lets one of them
commit the middle image into the base at a speed that can be watched, and then checks every byte of the result. The exit
status is 0 only if everything is as it must be.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import images
import trio

from qmpd.ctl import chain, text
from qmpd.ctl.client import Client, ClientError, ConnectError, Events, connect
from qmpd.ctl.display import display
from qmpd.ctl.follow import JOB_EVENTS, Ending, Outcome, follow

#: Bytes a second: some ten seconds for the data of the middle image.
SPEED = 8 << 20
#: Seconds that the daemon gets to open its socket, and to end.
PATIENCE = 20.0

say = functools.partial(print, flush=True)


def main() -> int:
    """Run the demo. Returns the exit status."""
    try:
        with tempfile.TemporaryDirectory(prefix="qmpd-demo-") as folder:
            return trio.run(demo, Path(folder))
    except KeyboardInterrupt:
        return 130


async def demo(folder: Path) -> int:
    """The whole story."""
    say(f"Making base <- mid <- top, disks of {text.size(images.SIZE)} each, in {folder}")
    images.build(folder)
    good = report("the disk seen through top is as it was written", images.differing(folder, "top", VIEW))
    try:
        async with daemon(folder) as socket, connect(socket) as client, connect(socket) as onlooker:
            say("\nThe chain before:")
            await show_chain(client)
            say(f"\nCommitting mid into base at {text.rate(SPEED)}, with top open above them:")
            with onlooker.events("JOB_STATUS_CHANGE") as seen:
                ending = await commit(client)
                await tell(seen)
            say("\nThe chain after:")
            await show_chain(client)
            await client.execute("quit")
    except (ClientError, subprocess.CalledProcessError) as error:
        say(f"\nfailed: {error}")
        return 1
    if ending.outcome is not Outcome.COMPLETED:
        say(f"\nfailed: the job was {ending.outcome.value}: {ending.error}")
        return 1
    say()
    good &= verify(folder)
    say("\nAll is well." if good else "\nSomething is wrong.")
    return 0 if good else 1


#: What must be read through top, before and after, and in base afterwards.
VIEW = images.owners("base", "mid", "top")
MERGED = images.owners("base", "mid")


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[str]:
    """Run qmpd over the three images; yields the path of its socket. Ends the daemon on the way out."""
    socket = str(folder / "qmp.sock")
    arguments = ["--chardev", f"socket,id=monitor,path={socket},server=on,wait=off", "--monitor", "monitor"]
    for layer, below in zip(images.CHAIN, (None, *images.CHAIN), strict=False):
        arguments += ["--blockdev", json.dumps(node(layer, below))]
    command = [sys.executable, "-m", "qmpd", *arguments]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, cwd=folder)
    try:
        await listening(socket, process)
        yield socket
        with trio.move_on_after(PATIENCE):
            await process.wait()
    finally:
        process.kill()  # does nothing to a process that has ended
        with trio.CancelScope(shield=True):
            status = await process.wait()
    if status != 0:
        raise subprocess.CalledProcessError(status, "qmpd")


def node(layer: str, below: str | None) -> dict[str, object]:
    """The arguments of blockdev-add for one image; only the uppermost is written to."""
    return {
        "driver": "qcow2",
        "node-name": layer,
        "read-only": layer != images.CHAIN[-1],
        "file": {"driver": "file", "filename": f"{layer}.qcow2"},
        "backing": below,
    }


async def listening(socket: str, process: trio.Process) -> None:
    """Wait until somebody answers. Raises ConnectError if nobody does."""
    with trio.move_on_after(PATIENCE):
        while process.poll() is None:
            try:
                async with connect(socket):
                    return
            except ConnectError:
                await trio.sleep(0.05)
    raise ConnectError("the daemon did not start")


async def show_chain(client: Client) -> None:
    """As `qmpctl chain` shows it."""
    for line in chain.render(await chain.query(client)):
        say(f"  {line}")


async def commit(client: Client) -> Ending:
    """Start the job and follow it to its end, with a bar on a terminal and lines elsewhere."""
    with client.events(*JOB_EVENTS) as events, display("commit", sys.stdout) as bar:
        arguments = {"job-id": "commit", "device": "top", "top-node": "mid", "base-node": "base", "speed": SPEED}
        await client.execute("block-commit", arguments)
        return await follow(client, events, "commit", bar)


async def tell(seen: Events) -> None:
    """What the second client was told meanwhile."""
    statuses: list[str] = []
    while "null" not in statuses:
        statuses.append((await seen.next()).data["status"])
    say(f"A second client on the same socket saw: {', '.join(statuses)}")


def verify(folder: Path) -> bool:
    """Is every byte where it must be? The daemon has ended, so the images are opened here."""
    good = report("base holds what was in base and mid", images.differing(folder, "base", MERGED))
    good &= report("the disk seen through top has not changed", images.differing(folder, "top", VIEW))
    names = images.backing_names(folder, "top")
    linked = names == ["top", "base"]
    say(f"{mark(linked)} the header of top points to {' <- '.join(names[1:]) or 'nothing'}")
    return good and linked


def report(claim: str, wrong: list[int]) -> bool:
    """One line for one check of the whole disk."""
    say(f"{mark(not wrong)} {claim}: {images.BLOCKS - len(wrong)} of {images.BLOCKS} blocks are right")
    return not wrong


def mark(good: bool) -> str:
    """For the eye."""
    return "ok    " if good else "WRONG "


if __name__ == "__main__":
    sys.exit(main())
