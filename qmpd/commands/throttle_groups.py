"""Throttle groups as objects: their limits as QAPI types, and as properties. Source: spec/toolbox.md section 11."""

from collections.abc import Mapping
from typing import Annotated, Any

from qmpd.block.limits import MEMBERS, Limits
from qmpd.block.throttling import ThrottleGroup
from qmpd.control.objects import ObjectStore, Property, UserObject
from qmpd.control.qapi import Features, Int, QapiModel
from qmpd.errors import QmpdError

Unstable = Annotated[Int, Features(("unstable",))]


class ThrottleLimits(QapiModel):
    """Rates in bytes or operations a second, burst lengths in seconds, ``iops-size`` in bytes."""

    iops_total: Int | None = None
    iops_total_max: Int | None = None
    iops_total_max_length: Int | None = None
    iops_read: Int | None = None
    iops_read_max: Int | None = None
    iops_read_max_length: Int | None = None
    iops_write: Int | None = None
    iops_write_max: Int | None = None
    iops_write_max_length: Int | None = None
    bps_total: Int | None = None
    bps_total_max: Int | None = None
    bps_total_max_length: Int | None = None
    bps_read: Int | None = None
    bps_read_max: Int | None = None
    bps_read_max_length: Int | None = None
    bps_write: Int | None = None
    bps_write_max: Int | None = None
    bps_write_max_length: Int | None = None
    iops_size: Int | None = None


class ThrottleLimitsArgument(QapiModel):
    """What qom-set is given, under the name that errors call it by."""

    limits: ThrottleLimits


class ThrottleGroupObject(UserObject):
    """A throttle group that clients can see. Nodes in it count themselves in the group."""

    type_name = "throttle-group"

    def __init__(self, object_id: str, group: ThrottleGroup) -> None:
        super().__init__(object_id)
        self.group = group

    def retire(self) -> bool:
        return self.group.retire()


def make(object_id: str, single: Mapping[str, Any], limits: Mapping[str, int]) -> ThrottleGroupObject:
    """A group with ``limits``, and with those named one by one (``x-iops-total``) that are not among them.

    Raises QmpdError.
    """
    for name, value in single.items():
        if value < 0:
            raise QmpdError("Property values cannot be negative")
        if name.endswith("-length") and value >= 1 << 32:
            raise QmpdError(f"{name} value must be in therange [0, {(1 << 32) - 1}]")
    values = {name.removeprefix("x-"): value for name, value in single.items()} | dict(limits)
    return ThrottleGroupObject(object_id, ThrottleGroup(object_id, Limits().merged(values)))


def find(store: ObjectStore, name: str) -> ThrottleGroup | None:
    """The group of that id. Any thread."""
    found = store.find(name)
    return found.group if isinstance(found, ThrottleGroupObject) else None


def _set_limits(thing: ThrottleGroupObject, value: Any) -> None:
    thing.group.change(ThrottleLimitsArgument.parse({"limits": value}).limits.to_wire())


def _refuse(_thing: ThrottleGroupObject, _value: Any) -> None:
    raise QmpdError("Property cannot be set after initialization")


def _single(member: str) -> Property:
    return Property("x-" + member, "int", lambda thing: thing.group.limits.to_wire()[member], _refuse)


ThrottleGroupObject.properties = (
    Property("limits", "ThrottleLimits", lambda thing: thing.group.limits.to_wire(), _set_limits),
    *map(_single, MEMBERS),
)
