"""Objects that clients create by id, and the tree in which they are found.

The tree is QEMU's object model as far as clients look at it: containers ``/objects``, ``/chardevs`` and ``/backend``,
and in them objects with named properties. Control thread. Source: spec/toolbox.md section 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.errors import Kind, QmpdError


@dataclass(frozen=True)
class Property:
    """A property that clients see. ``get`` takes the object, ``set`` the object and a JSON value; None forbids it."""

    name: str
    type: str
    get: Callable[[Any], Any] | None
    set: Callable[[Any, Any], None] | None = None


class Thing:
    """A node of the tree. Subclasses name their type and list their properties."""

    type_name: ClassVar[str] = "object"
    properties: ClassVar[tuple[Property, ...]] = ()

    def children(self) -> dict[str, Thing]:
        """Things below this one, by name."""
        return {}

    def listing(self) -> list[dict[str, str]]:
        """What qom-list says about it."""
        return describe(type(self)) + [
            {"name": name, "type": f"child<{child.type_name}>"} for name, child in self.children().items()
        ]

    def get(self, name: str, path: str) -> Any:
        """The value of a property. ``path`` is the object's own. Raises QmpdError."""
        if name == "type":
            return self.type_name
        if name in self.children():
            return f"{path.rstrip('/')}/{name}"
        getter = self._property(name).get
        if getter is None:
            raise QmpdError(f"Property '{self.type_name}.{name}' is not readable")
        return getter(self)

    def set(self, name: str, value: Any) -> None:
        """Change a property. Raises QmpdError."""
        setter = None if name == "type" or name in self.children() else self._property(name).set
        if setter is None:
            raise QmpdError(f"Property '{self.type_name}.{name}' is not writable")
        setter(self, value)

    def _property(self, name: str) -> Property:
        for found in self.properties:
            if found.name == name:
                return found
        raise QmpdError(f"Property '{self.type_name}.{name}' not found")


def describe(thing: type[Thing]) -> list[dict[str, str]]:
    """The properties of a type, as qom-list-properties returns them."""
    return [
        {"name": "type", "type": "string"},
        *({"name": found.name, "type": found.type} for found in thing.properties),
    ]


class Container(Thing):
    """A folder."""

    type_name = "container"

    def __init__(self, content: dict[str, Thing] | None = None) -> None:
        self.content: dict[str, Thing] = {} if content is None else content

    def children(self) -> dict[str, Thing]:
        """Its content, oldest first."""
        return self.content


class UserObject(Thing):
    """An object made by object-add. Whoever depends on it counts itself in :attr:`users`."""

    def __init__(self, object_id: str) -> None:
        self.id = object_id
        self.users = 0

    def retire(self) -> bool:
        """Delete it: nobody can begin to use it any more. False, and nothing is changed, if it is in use."""
        return not self.users

    def close(self) -> None:
        """Called when it is deleted."""


class ObjectStore:
    """The tree's root and the objects in it."""

    def __init__(self) -> None:
        self.objects: dict[str, UserObject] = {}
        self.chardevs = Container()
        objects = Container(self.objects)  # type: ignore[arg-type]  # the dict is filled here only
        self.root = Container({"backend": Container(), "objects": objects, "chardevs": self.chardevs})

    def find(self, object_id: str) -> UserObject | None:
        """The object called so."""
        return self.objects.get(object_id)

    def check_id(self, object_id: str) -> None:
        """Raise QmpdError unless a new object may be called so."""
        if object_id in self.objects:
            raise QmpdError(f"attempt to add duplicate property '{object_id}' to object (type 'container')")

    def add(self, item: UserObject) -> None:
        """Raises QmpdError if the id is taken."""
        self.check_id(item.id)
        self.objects[item.id] = item

    def remove(self, object_id: str) -> None:
        """Raises QmpdError if there is none, or if it is in use."""
        item = self.objects.get(object_id)
        if item is None:
            raise QmpdError(f"object '{object_id}' not found")
        if not item.retire():
            raise QmpdError(f"object '{object_id}' is in use, can not be deleted")
        del self.objects[object_id]
        item.close()

    def resolve(self, path: str) -> tuple[Thing, str]:
        """The thing at ``path`` and its full path; a path not from the root may begin anywhere it is unambiguous.

        Raises QmpdError of class DeviceNotFound if there is none.
        """
        parts = [part for part in path.split("/") if part]
        starts = [(self.root, "/")] if path.startswith("/") else _everything(self.root, "/")
        found = [hit for start in starts if (hit := _descend(*start, parts)) is not None]
        if len(found) > 1:
            raise QmpdError(f"Path '{path}' is ambiguous")
        if not found:
            raise QmpdError(f"Device '{path}' not found", Kind.DEVICE_NOT_FOUND)
        return found[0]


def _descend(thing: Thing, path: str, parts: list[str]) -> tuple[Thing, str] | None:
    for part in parts:
        child = thing.children().get(part)
        if child is None:
            return None
        thing, path = child, f"{path.rstrip('/')}/{part}"
    return thing, path


def _everything(thing: Thing, path: str) -> Iterator[tuple[Thing, str]]:
    yield thing, path
    for name, child in thing.children().items():
        yield from _everything(child, f"{path.rstrip('/')}/{name}")
