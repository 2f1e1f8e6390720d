"""What can be said to the daemon: commands and events by name, and the call of one command.

A family module registers its handlers at import::

    @command("block-job-set-speed")
    async def block_job_set_speed(ctx: Context, args: BlockJobSetSpeed) -> None: ...

The arguments' model is the annotation of the handler's second parameter; a handler without one takes no arguments.
Handlers are plain or async functions on the control thread. They return a model, a list of models, plain JSON values
(no models inside) or ``None`` for an empty result, and raise :class:`qmpd.errors.QmpdError`; nobody but the server
turns that into a reply.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from qmpd.control.qapi import WIRE, QapiModel, Source, wire_value
from qmpd.errors import Kind, QmpdError

if TYPE_CHECKING:
    from qmpd.control.bus import Bus, Subscriber
    from qmpd.control.manager import JobManager
    from qmpd.control.objects import ObjectStore
    from qmpd.graph.edit import Graph

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Client:
    """Who sent a command. ``label`` is for logs; uid, gid and pid are the connecting process's, where known."""

    label: str = "internal"
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None


@dataclass(slots=True)
class Context:
    """What a handler may touch; control thread only.

    ``graph_lock`` is held by everything that changes the graph across awaits. ``shutdown`` ends the daemon: it returns
    when all jobs are gone, so that their events precede the reply. ``client`` and ``outbox``, where its events go
    (None: nowhere), differ from connection to connection, all else is shared. ``rooms`` holds services by name that
    only some families know (exports, character devices, ...).
    """

    graph: Graph
    jobs: JobManager
    bus: Bus
    objects: ObjectStore
    shutdown: Callable[[], Awaitable[None]]
    graph_lock: trio.Lock = field(default_factory=trio.Lock)
    rooms: dict[str, Any] = field(default_factory=dict)
    client: Client = field(default_factory=Client)
    outbox: Subscriber | None = None
    #: Called before a command is answered, with its name and arguments if it succeeded.
    before_reply: Callable[[str | None, Mapping[str, Any]], Awaitable[None]] | None = None

    def for_client(self, client: Client, outbox: Subscriber | None = None) -> Context:
        """The same daemon as seen by ``client``."""
        return replace(self, client=client, outbox=outbox)


@dataclass(frozen=True, slots=True)
class Command:
    """A registered command. ``model`` is None for a command without arguments, ``returns`` for one without a result."""

    name: str
    handler: Callable[..., Any]
    model: type[QapiModel] | None
    returns: Any
    features: tuple[str, ...]
    is_async: bool

    def start(self, ctx: Context, arguments: Mapping[str, Any] | None, source: Source = WIRE) -> Any:
        """Check the arguments and call the handler; for an async one the result is a coroutine to be awaited.

        Raises QmpdError. All checks are finished before any side effect.
        """
        if self.model is not None:
            return self.handler(ctx, self.model.parse(arguments or {}, source))
        if arguments:
            *_, last = arguments
            raise QmpdError(f"Parameter '{last}' is unexpected")
        return self.handler(ctx)

    def finish(self, result: Any) -> Any:
        """A handler's return value as the reply's ``return``. Plain values are not searched for models."""
        if result is None:
            return {}
        if isinstance(result, list):
            return [item.to_wire() if isinstance(item, QapiModel) else item for item in result]
        return wire_value(result) if isinstance(result, QapiModel | Enum) else result

    async def call(self, ctx: Context, arguments: Mapping[str, Any] | None = None, source: Source = WIRE) -> Any:
        """Run the command to its end and return its result as JSON values; ``{}`` for none. Raises QmpdError."""
        result = self.start(ctx, arguments, source)
        return self.finish(await result if self.is_async else result)


@dataclass(frozen=True, slots=True)
class Event:
    """A registered event; every event of this daemon has data."""

    name: str
    model: type[QapiModel]
    features: tuple[str, ...]


COMMANDS: dict[str, Command] = {}
"""Name -> command, in order of registration."""

EVENTS: dict[str, Event] = {}
"""Name -> event, in order of registration."""


def command(name: str, *, returns: Any = None, features: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Register the decorated handler; ``returns`` is the result's type, for introspection."""

    def register(handler: F) -> F:
        assert name not in COMMANDS, f"{name} is registered twice"
        COMMANDS[name] = Command(
            name, handler, _argument_model(handler), returns, features, inspect.iscoroutinefunction(handler)
        )
        return handler

    return register


def event(name: str, model: type[QapiModel], *, features: tuple[str, ...] = ()) -> type[QapiModel]:
    """Register an event with the model of its data; returns the model."""
    assert name not in EVENTS, f"{name} is registered twice"
    EVENTS[name] = Event(name, model, features)
    return model


def lookup(name: str) -> Command:
    """The command called ``name``. Raises QmpdError of class CommandNotFound."""
    try:
        return COMMANDS[name]
    except KeyError:
        raise QmpdError(f"The command {name} has not been found", Kind.COMMAND_NOT_FOUND) from None


def _argument_model(handler: Callable[..., Any]) -> type[QapiModel] | None:
    parameters = list(inspect.signature(handler).parameters)
    if len(parameters) < 2:
        return None
    model: type[QapiModel] = inspect.get_annotations(handler, eval_str=True)[parameters[1]]
    assert issubclass(model, QapiModel), f"{handler.__name__} wants a QapiModel"
    return model
