"""Random commands that change the graph: what a client might send, sensible or not.

Everything is drawn from a small world, so that names meet: ten images, a dozen node names, two throttle groups, two
jobs, two exports, two internal snapshots. Nothing here knows whether a command will be accepted.

What ends qemu-storage-daemon, or what the two do differently from then on, is left out; each time the reason stands
there.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = dict[str, Any]

MIB = 1 << 20

#: Image -> the image it names as its backing file, and a piece of its own: offset and length in KiB, pattern. All
#: are of one size: what the two do about sizes that differ is a difference by itself, listed and tested elsewhere.
QCOW2 = {
    "base.qcow2": (None, (0, 640, 1)),
    "mid.qcow2": ("base.qcow2", (256, 512, 2)),
    "top.qcow2": ("mid.qcow2", (512, 512, 3)),
    "other.qcow2": (None, (64, 64, 4)),
    "over.qcow2": (None, (128, 64, 5)),
    "leaf.qcow2": ("other.qcow2", (960, 64, 6)),
    "outside.qcow2": (None, (32, 64, 9)),
}
#: Image -> its data file, which it names.
DATA_FILES = {"outside.qcow2": "data.img"}
RAW = {"plain.img": 7, "disk.img": 8}

NODES = ("base", "mid", "top", "a", "b", "c", "d", "f0", "f1")
GROUPS = ("g0", "g1")
JOBS = ("j0", "j1")
EXPORTS = ("e0", "e1")
SNAPSHOTS = ("s0", "s1")


def make_images(directory: Path) -> None:
    """The world's images, in ``directory``."""
    for name, (backing, (offset, length, pattern)) in QCOW2.items():
        below = ["-b", backing, "-F", "qcow2"] if backing else []
        data = ["-o", f"data_file={DATA_FILES[name]}"] if name in DATA_FILES else []
        _run(directory, "qemu-img", "create", "-q", "-f", "qcow2", *below, *data, name, "1M")
        _run(directory, "qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {offset}k {length}k", name)
    for name, pattern in RAW.items():
        _run(directory, "qemu-img", "create", "-q", "-f", "raw", name, "1M")
        _run(directory, "qemu-io", "-f", "raw", "-c", f"write -q -P {pattern} 0 256k", name)


def _run(directory: Path, *argv: str) -> None:
    subprocess.run(argv, cwd=directory, check=True, capture_output=True)


class Client:
    """Draws commands. ``may_have_jobs`` follows from what was drawn, not from what became of it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.may_have_jobs = False

    def chain(self) -> list[Command]:
        """How most sequences begin: a chain of three, so that jobs have something to do."""
        pick = self._random
        if pick.random() < 0.15:
            return []
        commands: list[Command] = []
        below = None
        for name in ("base", "mid", "top"):
            options = {
                "driver": "qcow2",
                "node-name": name,
                "file": self._file(f"{name}.qcow2"),
                "read-only": name != "top" or pick.random() < 0.1,
                "backing": below,
            }
            commands.append(_command("blockdev-add", **options))
            below = name
        return commands

    def command(self) -> Command:
        """One more."""
        kinds, weights = zip(*self._KINDS, strict=True)
        made = self._random.choices(kinds, weights)[0](self)
        self.may_have_jobs |= made["execute"] in ("block-commit", "block-stream")
        return made

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _add(self) -> Command:
        make = self._random.choice(self._DRIVERS)
        options = make(self)
        options["node-name"] = self._random.choice(NODES)
        self._sometimes(options, 0.3, "read-only", [True, True, False])
        self._sometimes(options, 0.1, "auto-read-only", [True, False])
        self._sometimes(options, 0.1, "discard", ["unmap", "ignore"])
        return _command("blockdev-add", **options)

    def _qcow2(self) -> Command:
        name = self._random.choice([*QCOW2, *QCOW2, "plain.img"])
        options: Command = {"driver": "qcow2", "file": self._child(name)}
        self._sometimes(options, 0.6, "backing", [None, *NODES])
        if name in DATA_FILES or self._random.random() < 0.05:
            # No node of another image: what cannot be resized is found out at different moments.
            self._sometimes(options, 0.5, "data-file", [self._file(image) for image in ("data.img", *RAW)])
        return options

    def _raw(self) -> Command:
        options: Command = {"driver": "raw", "file": self._child(self._random.choice([*RAW, "base.qcow2"]))}
        self._sometimes(options, 0.2, "size", [512 * 1024, MIB])
        return options

    def _plain_file(self) -> Command:
        return self._file(self._random.choice([*QCOW2, *RAW, "missing.img"]))

    def _null(self) -> Command:
        return {"driver": "null-co", "size": MIB, "read-zeroes": True}

    def _throttle(self) -> Command:
        return {"driver": "throttle", "throttle-group": self._random.choice(GROUPS), "file": self._node()}

    def _copy_on_read(self) -> Command:
        # No 'bottom': one that is not in the chain sends the peer into an endless loop.
        return {"driver": "copy-on-read", "file": self._node()}

    def _blkdebug(self) -> Command:
        return {"driver": "blkdebug", "image": self._node()}

    _DRIVERS: tuple[Callable[[Client], Command], ...] = (
        _qcow2, _qcow2, _qcow2, _raw, _plain_file, _null, _throttle, _copy_on_read, _blkdebug,
    )  # fmt: skip

    def _del(self) -> Command:
        return _command("blockdev-del", **{"node-name": self._node()})

    def _reopen(self) -> Command:
        # With a job there, giving its overlay another backing node aborts the peer.
        if self.may_have_jobs:
            return self._del()
        pick = self._random
        options: Command = {"node-name": self._node()}
        if pick.random() < 0.7:
            options |= {"driver": "qcow2", "file": self._node(), "backing": pick.choice([None, *NODES])}
        else:
            driver = pick.choice(["raw", "throttle", "copy-on-read"])
            options |= {"driver": driver, "file": self._node()}
            if driver == "throttle":
                options["throttle-group"] = pick.choice(GROUPS)
        self._sometimes(options, 0.5, "read-only", [True, False])
        return _command("blockdev-reopen", options=[options])

    def _snapshot(self) -> Command:
        return _command("blockdev-snapshot", node=self._node(), overlay=self._node())

    def _backing_string(self) -> Command:
        arguments = {"device": self._node(), "image-node-name": self._node(), "backing-file": "base.qcow2"}
        return _command("change-backing-file", **arguments)

    def _resize(self) -> Command:
        # To what it is: a size of its own would make the rest of the sequence one about sizes.
        return _command("block_resize", **{"node-name": self._node(), "size": MIB})

    def _internal(self) -> Command:
        device, name = self._node(), self._random.choice(SNAPSHOTS)
        if self._random.random() < 0.6:
            return _command("blockdev-snapshot-internal-sync", device=device, name=name)
        return _command("blockdev-snapshot-delete-internal-sync", device=device, name=name)

    def _activity(self) -> Command:
        arguments: Command = {"active": self._random.random() < 0.6}
        self._sometimes(arguments, 0.8, "node-name", [*NODES])
        return _command("blockdev-set-active", **arguments)

    def _transaction(self) -> Command:
        makes = (self._snapshot, self._snapshot, self._internal_take)
        drawn = [self._random.choice(makes)() for _ in range(self._random.randint(1, 3))]
        actions = [{"type": command["execute"], "data": command["arguments"]} for command in drawn]
        if self._random.random() < 0.2:
            actions.append({"type": "abort", "data": {}})
        return _command("transaction", actions=actions)

    def _internal_take(self) -> Command:
        device, name = self._node(), self._random.choice(SNAPSHOTS)
        return _command("blockdev-snapshot-internal-sync", device=device, name=name)

    def _group(self) -> Command:
        name = self._random.choice(GROUPS)
        if self._random.random() < 0.6:
            return _command("object-add", **{"qom-type": "throttle-group", "id": name})
        return _command("object-del", id=name)

    # -- exports ---------------------------------------------------------------------------------------------------

    def _export(self) -> Command:
        key = self._random.choice(EXPORTS)
        arguments: Command = {"id": key, "type": "nbd", "node-name": self._node()}
        self._sometimes(arguments, 0.5, "writable", [True, False])
        self._sometimes(arguments, 0.1, "name", list(EXPORTS))
        self._sometimes(arguments, 0.2, "allow-inactive", [True, False])
        return _command("block-export-add", **arguments)

    def _unexport(self) -> Command:
        arguments: Command = {"id": self._random.choice(EXPORTS)}
        self._sometimes(arguments, 0.3, "mode", ["safe", "hard"])
        return _command("block-export-del", **arguments)

    # -- jobs ------------------------------------------------------------------------------------------------------

    def _commit(self) -> Command:
        arguments: Command = {"job-id": self._random.choice(JOBS), "device": self._top()}
        self._sometimes(arguments, 0.7, "top-node", ["mid", *NODES])
        self._sometimes(arguments, 0.7, "base-node", ["base", *NODES])
        return self._job("block-commit", arguments)

    def _stream(self) -> Command:
        arguments: Command = {"job-id": self._random.choice(JOBS), "device": self._top()}
        self._sometimes(arguments, 0.5, self._random.choice(["base-node", "bottom"]), ["base", "mid", *NODES])
        return self._job("block-stream", arguments)

    def _job(self, name: str, arguments: Command) -> Command:
        # Always with auto-dismiss: what a concluded job still holds is a difference by itself.
        self._sometimes(arguments, 0.6, "speed", [1])
        self._sometimes(arguments, 0.4, "auto-finalize", [False])
        self._sometimes(arguments, 0.3, "filter-node-name", ["filter", *NODES])
        return _command(name, **arguments)

    def _verb(self) -> Command:
        verb = self._random.choice(["cancel", "finalize", "dismiss", "pause", "resume", "complete", "cancel"])
        job = self._random.choice(JOBS)
        if self._random.random() < 0.5:
            return _command(f"job-{verb}", id=job)
        key = "id" if verb in ("finalize", "dismiss") else "device"
        arguments: Command = {key: job}
        if verb == "cancel":
            self._sometimes(arguments, 0.5, "force", [True, False])
        return _command(f"block-job-{verb}", **arguments)

    def _speed(self) -> Command:
        return _command("block-job-set-speed", device=self._random.choice(JOBS), speed=self._random.choice([0, 1]))

    _KINDS: tuple[tuple[Callable[[Client], Command], int], ...] = (
        (_add, 8), (_del, 4), (_reopen, 4), (_snapshot, 3), (_backing_string, 1), (_resize, 1), (_group, 2),
        (_commit, 3), (_stream, 2), (_verb, 4), (_speed, 1), (_internal, 2), (_activity, 2), (_transaction, 2),
        (_export, 3), (_unexport, 2),
    )  # fmt: skip

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _node(self) -> str:
        return self._random.choice(NODES)

    def _top(self) -> str:
        return self._random.choice(["top", "top", *NODES])

    def _file(self, name: str) -> Command:
        return {"driver": "file", "filename": name}

    def _child(self, image: str) -> Any:
        return self._node() if self._random.random() < 0.35 else self._file(image)

    def _sometimes(self, options: Command, chance: float, key: str, values: list[Any]) -> None:
        if self._random.random() < chance:
            options[key] = self._random.choice(values)


def _command(name: str, /, **arguments: Any) -> Command:
    return {"execute": name, "arguments": arguments}
