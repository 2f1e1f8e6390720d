"""Compares two replies to query-qmp-schema by structure, since the names of types are masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]


class Schema:
    """One reply, by name."""

    def __init__(self, entries: list[Entry]) -> None:
        self.by_name = {entry["name"]: entry for entry in entries}

    def names(self, meta_type: str) -> set[str]:
        """Commands or events."""
        return {name for name, entry in self.by_name.items() if entry["meta-type"] == meta_type}


class Comparison:
    """What ``ours`` has otherwise than ``theirs``, as lines ``path: what``."""

    def __init__(self, ours: Schema, theirs: Schema) -> None:
        self._ours = ours
        self._theirs = theirs
        self._seen: set[tuple[str, str]] = set()

    def differences(self) -> Iterator[str]:
        """Of all commands and events that both have."""
        for meta_type, roots in (("command", ("arg-type", "ret-type")), ("event", ("arg-type",))):
            for name in sorted(self._ours.names(meta_type) & self._theirs.names(meta_type)):
                ours, theirs = self._ours.by_name[name], self._theirs.by_name[name]
                yield from self._features(name, ours, theirs)
                for root in roots:
                    yield from self._types(f"{name} {root.removesuffix('-type')}", ours[root], theirs[root])

    def _types(self, path: str, ours: str, theirs: str) -> Iterator[str]:
        if (ours, theirs) in self._seen:
            return
        self._seen.add((ours, theirs))
        mine, yours = self._ours.by_name[ours], self._theirs.by_name[theirs]
        if mine["meta-type"] != yours["meta-type"]:
            yield f"{path}: is {mine['meta-type']}, not {yours['meta-type']}"
            return
        yield from getattr(self, "_" + mine["meta-type"])(path, mine, yours)

    def _builtin(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        if ours["json-type"] != theirs["json-type"]:
            yield f"{path}: is {ours['json-type']}, not {theirs['json-type']}"

    def _array(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        yield from self._types(path + "[]", ours["element-type"], theirs["element-type"])

    def _enum(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        yield from _sets(path, "value", set(ours["values"]), set(theirs["values"]))

    def _alternate(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        mine = {self._ours.by_name[member["type"]]["meta-type"]: member["type"] for member in ours["members"]}
        yours = {self._theirs.by_name[member["type"]]["meta-type"]: member["type"] for member in theirs["members"]}
        yield from _sets(path, "type", set(mine), set(yours))
        for kind in mine.keys() & yours.keys():
            yield from self._types(path, mine[kind], yours[kind])

    def _object(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        yield from self._features(path, ours, theirs)
        if ours.get("tag") != theirs.get("tag"):
            yield f"{path}: the tag is {ours.get('tag')}, not {theirs.get('tag')}"
        yield from self._members(path, ours["members"], theirs["members"])
        mine = {variant["case"]: variant["type"] for variant in ours.get("variants", ())}
        yours = {variant["case"]: variant["type"] for variant in theirs.get("variants", ())}
        yield from _sets(path, "case", set(mine), set(yours))
        for case in sorted(mine.keys() & yours.keys()):
            yield from self._types(f"{path}<{case}>", mine[case], yours[case])

    def _members(self, path: str, ours: list[Entry], theirs: list[Entry]) -> Iterator[str]:
        mine = {member["name"]: member for member in ours}
        yours = {member["name"]: member for member in theirs}
        yield from _sets(path, "member", set(mine), set(yours))
        for name in (member["name"] for member in ours if member["name"] in yours):
            inner = f"{path}.{name}"
            if ("default" in mine[name]) != ("default" in yours[name]):
                yield f"{inner}: is {'optional' if 'default' in mine[name] else 'mandatory'}, unlike the peer's"
            yield from self._features(inner, mine[name], yours[name])
            yield from self._types(inner, mine[name]["type"], yours[name]["type"])
        common = [
            [entry["name"] for entry in side if entry["name"] in mine.keys() & yours.keys()] for side in (ours, theirs)
        ]
        if common[0] != common[1]:
            yield f"{path}: the order is {common[0]}, not {common[1]}"

    def _features(self, path: str, ours: Entry, theirs: Entry) -> Iterator[str]:
        yield from _sets(path, "feature", set(ours.get("features", ())), set(theirs.get("features", ())))


def _sets(path: str, what: str, ours: set[str], theirs: set[str]) -> Iterator[str]:
    for name in sorted(ours - theirs):
        yield f"{path}: additional {what} {name}"
    for name in sorted(theirs - ours):
        yield f"{path}: no {what} {name}"
