"""What an option stands for. Source: spec/qmp-protocol.md sections 14 and 15."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, get_args

from qmpd.commands.objects import ObjectOptions
from qmpd.control.qapi import Bool, QapiModel, Scalar, Source, Str
from qmpd.control.schema import members
from qmpd.errors import QmpdError
from qmpd.options.argv import Option
from qmpd.options.chardev import Chardev, ChardevHelp, parse_chardev
from qmpd.options.keyval import parse_keyval
from qmpd.wire.dialect import DialectError
from qmpd.wire.stream import parse_only

#: Options that are a QAPI struct -> the key that the first item may leave out.
IMPLIED_KEYS: Final[Mapping[str, str | None]] = {
    "blockdev": "driver",
    "export": "type",
    "monitor": "chardev",
    "nbd-server": None,
    "object": "qom-type",
}


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of the command that an option is short for, not yet checked against its schema."""

    tree: dict[str, Any]
    source: Source


@dataclass(frozen=True, slots=True)
class Show:
    """Help: to be printed on standard output, and then the program ends with ``status``."""

    text: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Trace events to switch on. There are none, so the daemon can only say so (a pattern with a * may match none)."""

    pattern: str

    @property
    def names_one(self) -> bool:
        """Whether a particular event is meant, which does not exist."""
        return bool(self.pattern) and "*" not in self.pattern


class MonitorMode(StrEnum):
    """What is spoken on a monitor; only ``control``, which is QMP, is available."""

    READLINE = "readline"
    CONTROL = "control"


class MonitorOptions(QapiModel):
    """The schema of --monitor."""

    id: Str | None = None
    mode: MonitorMode | None = None
    pretty: Bool | None = None
    chardev: Str | None = None


@dataclass(frozen=True, slots=True)
class Monitor:
    """A monitor on the character device ``chardev``, which must exist, be free, and only then be in the right mode."""

    chardev: str
    pretty: bool = False
    mode: MonitorMode = MonitorMode.CONTROL
    id: str | None = None


def interpret(option: Option, warn: Callable[[str], None]) -> Arguments | Chardev | Monitor | Show | Trace:
    """The meaning of one option of :attr:`CommandLine.options`. ``warn`` takes texts for standard error.

    Raises QmpdError.
    """
    match option.name:
        case "":
            raise QmpdError("Unexpected argument")
        case "chardev":
            chardev = parse_chardev(option.value, warn)
            # The peer, too, takes a question about the parameters for a failure.
            return Show(str(chardev), int(chardev.parameters)) if isinstance(chardev, ChardevHelp) else chardev
        case "trace":
            return _trace(option.value)
        case "monitor":
            return _monitor(_arguments(option))
        case "object":
            return _object(option)
        case _:
            return _arguments(option)


def _arguments(option: Option) -> Arguments:
    tree, wants_help = _tree(option)
    if wants_help:
        raise QmpdError("Help is not available for this option")
    return tree


def _tree(option: Option) -> tuple[Arguments, bool]:
    """JSON if it begins like an object, else key=value; and whether it asks for help."""
    if option.value.startswith("{"):
        try:
            return Arguments(parse_only(option.value.encode("utf-8", "surrogateescape")), Source.WIRE), False
        except DialectError as error:
            raise QmpdError(error.desc) from None
    tree, wants_help = parse_keyval(option.value, IMPLIED_KEYS[option.name])
    return Arguments(tree, Source.KEYVAL), wants_help


def _monitor(arguments: Arguments) -> Monitor:
    given = MonitorOptions.parse(arguments.tree, arguments.source)
    if given.chardev is None:
        raise QmpdError("Parameter 'chardev' is missing")
    return Monitor(given.chardev, bool(given.pretty), given.mode or MonitorMode.CONTROL, given.id)


def _object(option: Option) -> Arguments | Show:
    arguments, wants_help = _tree(option)
    return Show(object_help(arguments.tree.get("qom-type"))) if wants_help else arguments


def object_help(qom_type: str | None) -> str:
    """The properties of a type, or the types if it is none."""
    model = ObjectOptions.branches.get(qom_type or "")
    if model is None:
        return "\n".join(
            ["List of user creatable objects:", *(f"  {name}" for name in sorted(ObjectOptions.branches)), ""]
        )
    lines = [f"  {member.name}=<{_type_name(member.type)}>" for member in members(model, beyond=ObjectOptions)]
    return "\n".join([f"{qom_type} options:", *sorted(lines), ""])


def _type_name(hint: Any) -> str:
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Scalar):
            return {"str": "string"}.get(mark.name, mark.name)
    return hint.__name__ if isinstance(hint, type) else str(get_args(hint)[0].__name__)


def _trace(text: str) -> Trace:
    """Only the pattern matters: without events there is nothing to read from ``events`` or to write to ``file``."""
    pattern = ""
    for index, item in enumerate(text.split(",")):
        name, equals, value = item.partition("=")
        if not equals and index == 0:
            pattern = name
        elif name == "enable":
            pattern = value
        elif name not in ("events", "file"):
            raise QmpdError(f"Invalid parameter '{name}'")
    return Trace(pattern)
