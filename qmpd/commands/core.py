"""The daemon about itself: version, commands, schema, the end. Source: spec/qmp-protocol.md sections 8, 11 and 12."""

from enum import StrEnum
from functools import cache
from typing import Annotated, Any

from qmpd.control.qapi import AnyValue, Bool, Features, Int, QapiModel, Str
from qmpd.control.registry import COMMANDS, Context, command
from qmpd.control.schema import introspect
from qmpd.errors import Kind, QmpdError
from qmpd.wire.messages import VERSION


class QMPCapability(StrEnum):
    """What a client can enable."""

    OOB = "oob"


class QmpCapabilities(QapiModel):
    """Arguments of qmp_capabilities."""

    enable: list[QMPCapability] | None = None


class VersionTriple(QapiModel):
    """The QMP level spoken."""

    major: Int
    minor: Int
    micro: Int


class VersionInfo(QapiModel):
    """Result of query-version; ``package`` names qmpd's own version."""

    qemu: VersionTriple
    package: Str


class CommandInfo(QapiModel):
    """One entry of query-commands."""

    name: Str


class SchemaMetaType(StrEnum):
    """What an entry of the schema describes."""

    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class JSONType(StrEnum):
    """How a built-in type looks in JSON; ``value`` is any of them."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class SchemaInfo(QapiModel, discriminator="meta_type"):
    """One entry of query-qmp-schema."""

    name: Str
    meta_type: SchemaMetaType
    features: list[Str] | None = None


class SchemaInfoBuiltin(SchemaInfo, branch=SchemaMetaType.BUILTIN):
    """A built-in type."""

    json_type: JSONType


class SchemaInfoEnumMember(QapiModel):
    """One value of an enum."""

    name: Str
    features: list[Str] | None = None


class SchemaInfoEnum(SchemaInfo, branch=SchemaMetaType.ENUM):
    """An enum; ``values`` is the older form of ``members``."""

    members: list[SchemaInfoEnumMember]
    values: Annotated[list[Str], Features(("deprecated",))]


class SchemaInfoArray(SchemaInfo, branch=SchemaMetaType.ARRAY):
    """A list type."""

    element_type: Str


class SchemaInfoObjectMember(QapiModel):
    """One member of a struct; ``default``, always null, marks an optional one."""

    name: Str
    type: Str
    default: AnyValue = None
    features: list[Str] | None = None


class SchemaInfoObjectVariant(QapiModel):
    """What a union's tag value adds."""

    case: Str
    type: Str


class SchemaInfoObject(SchemaInfo, branch=SchemaMetaType.OBJECT):
    """A struct or a flat union."""

    members: list[SchemaInfoObjectMember]
    tag: Str | None = None
    variants: list[SchemaInfoObjectVariant] | None = None


class SchemaInfoAlternateMember(QapiModel):
    """One type that an alternate takes."""

    type: Str


class SchemaInfoAlternate(SchemaInfo, branch=SchemaMetaType.ALTERNATE):
    """A union told apart by JSON type."""

    members: list[SchemaInfoAlternateMember]


class SchemaInfoCommand(SchemaInfo, branch=SchemaMetaType.COMMAND):
    """A command."""

    arg_type: Str
    ret_type: Str
    allow_oob: Bool = False


class SchemaInfoEvent(SchemaInfo, branch=SchemaMetaType.EVENT):
    """An event."""

    arg_type: Str


@cache
def _schema() -> list[dict[str, Any]]:
    return introspect()


@command("qmp_capabilities")
def qmp_capabilities(_ctx: Context, _args: QmpCapabilities) -> None:
    """Negotiation is the session's business (qmpd.wire.session); who gets here is through with it."""
    raise QmpdError("Capabilities negotiation is already complete, command ignored", Kind.COMMAND_NOT_FOUND)


@command("query-version", returns=VersionInfo)
def query_version(_ctx: Context) -> dict[str, Any]:
    """The object that the greeting holds, too."""
    return dict(VERSION)


@command("query-commands", returns=list[CommandInfo])
def query_commands(_ctx: Context) -> list[dict[str, Any]]:
    """All commands, the last registered first."""
    return [{"name": name} for name in reversed(COMMANDS)]


@command("query-qmp-schema", returns=list[SchemaInfo])
def query_qmp_schema(_ctx: Context) -> list[dict[str, Any]]:
    """The registry; nothing is registered after start-up."""
    return _schema()


@command("quit")
async def quit_(ctx: Context) -> None:
    """End the daemon. The events of the jobs this cancels come before the reply."""
    await ctx.shutdown()
