"""The registry as the world sees it: query-qmp-schema's reply, and JSON Schema.

Both come from the models that validate, so they cannot say anything else. Source: spec/qmp-protocol.md section 11.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from qmpd.control.qapi import Alternate, Features, NullType, QapiModel, Scalar
from qmpd.control.registry import COMMANDS, EVENTS, Command, Event

Entry = TypeVar("Entry", Command, Event)

#: Introspection name -> JSON type of the built-in types.
BUILTINS: Final = {"str": "string", "int": "int", "number": "number", "bool": "boolean", "null": "null", "any": "value"}


@dataclass(frozen=True)
class Member:
    """One member of a struct. ``type`` is a type expression without optionality and markers."""

    name: str
    type: Any
    optional: bool
    features: tuple[str, ...] = ()


def members(model: type[QapiModel], *, beyond: type[QapiModel] | None = None) -> list[Member]:
    """Members in schema order; only those that ``beyond``, a base, does not have."""
    hints = get_type_hints(model, include_extras=True)
    return [
        _member(info.alias or name, hints[name], optional=not info.is_required())
        for name, info in model.model_fields.items()
        if beyond is None or name not in beyond.model_fields
    ]


def _member(name: str, hint: Any, *, optional: bool) -> Member:
    features: tuple[str, ...] = ()
    while True:
        marks = getattr(hint, "__metadata__", ())
        features += tuple(feature for mark in marks if isinstance(mark, Features) for feature in mark.names)
        if any(isinstance(mark, Scalar | Alternate) for mark in marks):
            return Member(name, hint, optional, features)
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif get_origin(hint) in (Union, UnionType):
            (hint,) = (member for member in get_args(hint) if member is not NoneType)
        else:
            return Member(name, hint, optional, features)


def _marker(hint: Any) -> Scalar | Alternate | None:
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Scalar | Alternate):
            return mark
    return None


# --- introspection ---------------------------------------------------------------------------------------------------


@dataclass
class _Introspection:
    """Numbers the types in order of first use and describes each once."""

    names: dict[Any, str] = field(default_factory=dict)
    pending: list[Any] = field(default_factory=list)
    arrays: int = 0

    def name_of(self, hint: Any) -> str:
        """The name to refer to a type by. A key is its class, its alternate's name, or a branch with its base."""
        mark = _marker(hint)
        if isinstance(mark, Scalar):
            return self._remember(mark.name, mark.name, mark.name)
        if hint is NullType:
            return self._remember("null", "null", "null")
        if get_origin(hint) is list:
            name = f"[{self.name_of(get_args(hint)[0])}]"
            return self._remember(name, hint, name)
        if isinstance(mark, Alternate):
            return self._number(mark.name, hint)
        if isinstance(hint, type) and issubclass(hint, QapiModel) and not hint.model_fields:
            hint = None
        return self._number(hint, hint)

    def branch(self, base: type[QapiModel], model: type[QapiModel]) -> str:
        """The name of what ``model`` adds to ``base``."""
        if not members(model, beyond=base):
            return self.name_of(None)
        return self._number((base, model), (base, model))

    def _number(self, key: Any, what: Any) -> str:
        return self._remember(key, what, str(len(self.names) - self.arrays))

    def _remember(self, key: Any, what: Any, name: str) -> str:
        if key not in self.names:
            self.arrays += not name.isdecimal()
            self.names[key] = name
            self.pending.append((name, what))
        return self.names[key]

    def describe(self, name: str, what: Any) -> dict[str, Any]:
        """The entry of one type."""
        mark = _marker(what)
        if name in BUILTINS:
            return {"name": name, "meta-type": "builtin", "json-type": BUILTINS[name]}
        if get_origin(what) is list:
            return {"name": name, "meta-type": "array", "element-type": name[1:-1]}
        if isinstance(mark, Alternate):
            options = [{"type": self.name_of(option)} for option in get_args(get_args(what)[0])]
            return {"name": name, "meta-type": "alternate", "members": options}
        if isinstance(what, type) and issubclass(what, Enum):
            values = [str(item.value) for item in what]
            return {
                "name": name,
                "meta-type": "enum",
                "members": [{"name": value} for value in values],
                "values": values,
            }
        return {"name": name, "meta-type": "object"} | self._object(what)

    def _object(self, what: Any) -> dict[str, Any]:
        if what is None:
            return {"members": []}
        base, model = what if isinstance(what, tuple) else (None, what)
        entry: dict[str, Any] = {"members": self._members(members(model, beyond=base))}
        # A branch inherits what its base declares, but only what it declares itself is about its own members.
        if features := model.__dict__.get("type_features"):
            entry["features"] = list(features)
        if model.is_union():
            entry["tag"] = model.tag_name()
            entry["variants"] = [
                {"case": tag, "type": self.branch(model, model.branches.get(tag, model))} for tag in _tags(model)
            ]
        return entry

    def _members(self, listed: Iterable[Member]) -> list[dict[str, Any]]:
        return [
            {"name": member.name, "type": self.name_of(member.type)}
            | ({"default": None} if member.optional else {})
            | ({"features": list(member.features)} if member.features else {})
            for member in listed
        ]


def _tags(union: type[QapiModel]) -> list[str]:
    """All values of a union's discriminator."""
    (hint,) = (member.type for member in members(union) if member.name == union.tag_name())
    return [str(item.value) for item in hint]


def introspect(
    commands: Iterable[Command] | None = None, events: Iterable[Event] | None = None
) -> list[dict[str, Any]]:
    """What query-qmp-schema returns: commands and events under their own names, then the types under numbers."""
    types = _Introspection()
    entries: list[dict[str, Any]] = []
    for command in COMMANDS.values() if commands is None else commands:
        entry = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.name_of(command.model),
            "ret-type": types.name_of(command.returns),
        }
        entries.append(entry | ({"features": list(command.features)} if command.features else {}))
    for event in EVENTS.values() if events is None else events:
        entry = {"name": event.name, "meta-type": "event", "arg-type": types.name_of(event.model)}
        entries.append(entry | ({"features": list(event.features)} if event.features else {}))
    for name, what in types.pending:  # grows while it is walked
        entries.append(types.describe(name, what))
    return entries


# --- JSON Schema -----------------------------------------------------------------------------------------------------


@dataclass
class _JsonSchema:
    """Collects definitions by type name."""

    definitions: dict[str, Any] = field(default_factory=dict)

    def of(self, hint: Any) -> dict[str, Any]:
        """The schema of a type; a reference where the type has a name."""
        mark = _marker(hint)
        if isinstance(mark, Scalar):
            return dict(mark.json)
        if hint is None:
            return {"type": "object", "additionalProperties": False}
        if hint is NullType:
            return {"type": "null"}
        if get_origin(hint) is list:
            return {"type": "array", "items": self.of(get_args(hint)[0])}
        name = mark.name if isinstance(mark, Alternate) else hint.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # stops the recursion
            self.definitions[name] = self._define(hint, mark)
        return {"$ref": f"#/$defs/{name}"}

    def _define(self, hint: Any, mark: Scalar | Alternate | None) -> dict[str, Any]:
        if isinstance(mark, Alternate):
            return {"anyOf": [self.of(option) for option in get_args(get_args(hint)[0])]}
        if issubclass(hint, Enum):
            return {"enum": [item.value for item in hint]}
        if hint.is_union():
            return {"oneOf": [self._branch(hint, tags, model) for model, tags in _by_branch(hint).items()]}
        return self._object(hint)

    def _branch(self, union: type[QapiModel], tags: list[str], model: type[QapiModel]) -> dict[str, Any]:
        schema = self._object(model)
        schema["properties"][union.tag_name()] = {"enum": tags}
        return schema

    def _object(self, model: type[QapiModel]) -> dict[str, Any]:
        listed = members(model)
        return {
            "type": "object",
            "properties": {member.name: self._property(member) for member in listed},
            "required": [member.name for member in listed if not member.optional],
            "additionalProperties": False,
        }

    def _property(self, member: Member) -> dict[str, Any]:
        schema = self.of(member.type)
        return schema | {"deprecated": True} if "deprecated" in member.features else schema


def _by_branch(union: type[QapiModel]) -> dict[type[QapiModel], list[str]]:
    grouped: dict[type[QapiModel], list[str]] = {}
    for tag in _tags(union):
        grouped.setdefault(union.branches.get(tag, union), []).append(tag)
    return grouped


def _document(title: str, describe: Any) -> dict[str, Any]:
    schema = _JsonSchema()
    body = describe(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **body,
        "$defs": dict(sorted(schema.definitions.items())),
    }


def _closed(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _request(schema: _JsonSchema, command: Command) -> dict[str, Any]:
    arguments = schema.of(command.model)
    needed = command.model is not None and any(not member.optional for member in members(command.model))
    properties = {"execute": {"const": command.name}, "arguments": arguments, "id": {}}
    return _closed(properties, ["execute", "arguments"] if needed else ["execute"])


def _notification(schema: _JsonSchema, event: Event) -> dict[str, Any]:
    stamp = _closed({"seconds": {"type": "integer"}, "microseconds": {"type": "integer"}}, ["seconds", "microseconds"])
    properties = {"event": {"const": event.name}, "data": schema.of(event.model), "timestamp": stamp}
    return _closed(properties, ["event", "data", "timestamp"])


def json_schemas() -> dict[str, dict[str, Any]]:
    """File name -> JSON Schema of every request, of every result by command, and of every event."""
    return {
        "requests.schema.json": _document(
            "A request to qmpd", lambda schema: {"oneOf": [_request(schema, command) for command in _sorted(COMMANDS)]}
        ),
        "results.schema.json": _document(
            "The results of qmpd's commands, each under the command's name",
            lambda schema: _closed({command.name: schema.of(command.returns) for command in _sorted(COMMANDS)}, []),
        ),
        "events.schema.json": _document(
            "An event from qmpd", lambda schema: {"oneOf": [_notification(schema, event) for event in _sorted(EVENTS)]}
        ),
    }


def _sorted(entries: Mapping[str, Entry]) -> list[Entry]:
    return [entries[name] for name in sorted(entries)]


# --- the published files ---------------------------------------------------------------------------------------------


def documents() -> dict[str, str]:
    """File name -> text of everything published under schema/."""
    parts: dict[str, Any] = {"introspection.json": introspect(_sorted(COMMANDS), _sorted(EVENTS))} | json_schemas()
    return {name: json.dumps(part, indent=1, ensure_ascii=False) + "\n" for name, part in parts.items()}


def write(folder: Path) -> None:
    """Write the published files anew."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents().items():
        (folder / name).write_text(text, encoding="utf-8")


def stale(folder: Path) -> list[str]:
    """Names of the published files that are not what :func:`write` would write."""
    return [
        name
        for name, text in documents().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
