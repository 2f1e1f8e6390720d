"""The chain that the tests with real programs work on: base <- mid <- top, with known bytes in known places."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemons import Client

SIZE = 4 << 20  # bytes of each image

#: What a guest reads through top: pattern, offset, length. As long as this holds, no byte is lost.
VIEW = ((0x33, "0", "64k"), (0x22, "64k", "1984k"), (0x11, "2M", "2M"))


@dataclass(frozen=True)
class Chain:
    """Three qcow2 images in a directory."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> Chain:
        chain = cls(directory)
        chain.run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", str(SIZE))
        for overlay, below in (("mid", "base"), ("top", "mid")):
            backing = ["-b", f"{below}.qcow2", "-F", "qcow2"]
            chain.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{overlay}.qcow2")
        for image, change in (("base", "0x11 2M 2M"), ("mid", "0x22 0 2M"), ("top", "0x33 0 64k")):
            chain.run("qemu-io", "-f", "qcow2", "-c", f"write -P {change}", f"{image}.qcow2")
        return chain

    def run(self, *argv: str) -> str:
        """Output of a program that must succeed, run in the chain's directory."""
        done = subprocess.run(argv, cwd=self.directory, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def open(self, client: Client) -> None:
        """Add the nodes base, mid (both read-only) and top, each with its protocol node."""
        for name, below in (("base", None), ("mid", "base"), ("top", "mid")):
            client.execute_with("blockdev-add", self.blockdev(name, below, read_only=name != "top"))

    @staticmethod
    def blockdev(name: str, backing: str | None = None, *, read_only: bool = False) -> dict[str, Any]:
        file = {"driver": "file", "node-name": f"{name}-file", "filename": f"{name}.qcow2"}
        return {"driver": "qcow2", "node-name": name, "file": file, "backing": backing, "read-only": read_only}

    def verify(self) -> None:
        """The guest's view is as made, and every image is clean."""
        commands = [argument for part in VIEW for argument in ("-c", "read -P {} {} {}".format(*part))]
        self.run("qemu-io", "-r", "-f", "qcow2", *commands, "top.qcow2")
        for image in ("base", "mid", "top"):
            self.run("qemu-img", "check", "-q", f"{image}.qcow2")

    def backing_of(self, image: str) -> str | None:
        """The backing file name in an image's header."""
        info = json.loads(self.run("qemu-img", "info", "--output=json", f"{image}.qcow2"))
        name: str | None = info.get("backing-filename")
        return name


COMMIT = {"job-id": "j0", "device": "top", "top-node": "mid", "base-node": "base"}


def graph(client: Client) -> dict[str, Any]:
    """The whole block graph with what identifies nodes and edges, in no order."""
    answer = client.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] or node["type"] for node in answer["nodes"]}
    edges = [{**edge, "parent": names[edge["parent"]], "child": names[edge["child"]]} for edge in answer["edges"]]
    for edge in edges:
        edge["perm"].sort()
        edge["shared-perm"].sort()
    flags = [[node["node-name"], node["ro"]] for node in client.execute("query-named-block-nodes", flat=True)]
    return {"edges": sorted(edges, key=json.dumps), "nodes": sorted(flags)}
