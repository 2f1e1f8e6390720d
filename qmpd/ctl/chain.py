"""The daemon's nodes as chains of images: bases at the bottom, overlays growing out of them.

A tree that starts at the base shows what a list from top to base hides: which other overlays depend on the same image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from qmpd.ctl import text
from qmpd.ctl.client import Client

#: Drivers that show the content of one child; that child is the next layer, unless it is the file itself.
_FILTERS: Final = frozenset(
    {"blkdebug", "commit_top", "compress", "copy-on-read", "mirror_top", "preallocate", "raw", "throttle"}
)
_FILTERED: Final = frozenset({"backing", "file", "image"})


@dataclass(slots=True)
class Layer:
    """One node of a chain. Sizes in bytes; ``on_disk`` is None where the daemon does not say."""

    node: str
    driver: str
    filename: str
    size: int
    on_disk: int | None
    read_only: bool
    jobs: list[str] = field(default_factory=list)
    overlays: list[Layer] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: names as in QMP."""
        return {
            "node-name": self.node,
            "drv": self.driver,
            "filename": self.filename,
            "virtual-size": self.size,
            "actual-size": self.on_disk,
            "ro": self.read_only,
            "jobs": self.jobs,
            "overlays": [layer.as_json() for layer in self.overlays],
        }


async def query(client: Client) -> list[Layer]:
    """All chains of the daemon, as their bases, oldest first. Raises CommandError."""
    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    graph = await client.execute("x-debug-query-block-graph")
    return build(nodes, graph)


def build(nodes: list[dict[str, Any]], graph: dict[str, Any]) -> list[Layer]:
    """The trees from the answers of query-named-block-nodes (flat) and x-debug-query-block-graph."""
    layers = {row["node-name"]: _layer(row) for row in reversed(nodes)}
    kinds = {vertex["id"]: (vertex["type"], vertex["name"]) for vertex in graph["nodes"]}
    hidden, stacked = set(), set()
    for edge in graph["edges"]:
        (kind, parent), (_, child) = kinds[edge["parent"]], kinds[edge["child"]]
        if child not in layers:
            continue
        if kind == "block-job":
            if parent not in layers[child].jobs:
                layers[child].jobs.append(parent)
        elif kind == "block-driver" and parent in layers:
            if _is_next_layer(layers[parent], edge["name"], layers[child]):
                layers[child].overlays.append(layers[parent])
                stacked.add(parent)
            else:
                hidden.add(child)
    return [layer for name, layer in layers.items() if name not in stacked and name not in hidden]


def _layer(row: dict[str, Any]) -> Layer:
    image = row["image"]
    return Layer(row["node-name"], row["drv"], row["file"], image["virtual-size"], image.get("actual-size"), row["ro"])


def _is_next_layer(parent: Layer, edge: str, child: Layer) -> bool:
    """Is the child a layer of the chain, rather than the storage of its parent?"""
    if edge == "backing":
        return True
    storage = child.driver in ("file", "host_device") or child.driver.startswith("null-")
    return parent.driver in _FILTERS and edge in _FILTERED and not storage


def render(chains: list[Layer]) -> list[str]:
    """Lines for people; one line says so if there is nothing."""
    if not chains:
        return ["no nodes"]
    rows = [["NODE", "DRIVER", "SIZE", "ON DISK", "MODE", "JOBS", "FILE"]]
    for base in chains:
        rows.extend(_rows(base, "", ""))
    return text.columns(rows)


def _rows(layer: Layer, first: str, rest: str) -> Iterator[list[str]]:
    """The rows of a layer and what grows out of it; ``first`` leads its own line, ``rest`` those below it."""
    yield [
        first + layer.node,
        layer.driver,
        text.size(layer.size),
        "-" if layer.on_disk is None else text.size(layer.on_disk),
        "ro" if layer.read_only else "rw",
        " ".join(layer.jobs) or "-",
        layer.filename,
    ]
    for index, overlay in enumerate(layer.overlays):
        last = index == len(layer.overlays) - 1
        yield from _rows(overlay, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
