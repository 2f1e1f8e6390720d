"""The base class of jobs: identity, state that queries show, and the phases.

The manager (``control.manager``) calls the phases in this order and nothing else ever calls them:

``start``
    Control thread, graph lock held, after the event ``created``. A failure ends the job without trace: the command that
    made it gets the error, and no other phase follows. So ``start`` undoes itself (``graph.edit`` does).
``run``
    A generator on a worker thread, without the graph lock. Up to its first yield it runs before the command is answered
    (the *opening stretch*: keep it short); a body that ends there has all its events in front of the reply.
    It yields :class:`~qmpd.jobs.cell.Rest` to give up the thread, :class:`Failure` to have an I/O error published and
    the policy's action carried out, and :class:`Ready` when only ``complete`` is missing. It ends by returning, or by
    raising QmpdError.
``prepare``
    Control thread with graph lock, the last step that may fail. Skipped when the body failed or the job was cancelled.
``commit`` or ``abort``
    Control thread with graph lock; exactly one of them.
``clean``
    Control thread with graph lock, always. Nodes that nobody holds afterwards are closed by the manager.

``start``, ``prepare``, ``commit``, ``abort`` and ``clean`` are ``Steps`` (see :mod:`qmpd.steps`): between the yields
they run on the control thread, what they yield runs on a worker. ``commit``, ``abort`` and ``clean`` should not raise;
if they do, it is logged and the remaining phases still run.
"""

from __future__ import annotations

import errno
import string
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Final, Literal

from qmpd.errors import QmpdError
from qmpd.graph.node import Node
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.table import Status
from qmpd.steps import Steps


class OnError(Enum):
    """QMP's BlockdevOnError: what a job does about a failed request."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class Action(Enum):
    """QMP's BlockErrorAction."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


#: Policy -> (action when space ran out, action otherwise); section 5.1.
ACTIONS: Final = {
    OnError.REPORT: (Action.REPORT, Action.REPORT),
    OnError.IGNORE: (Action.IGNORE, Action.IGNORE),
    OnError.ENOSPC: (Action.STOP, Action.REPORT),
    OnError.AUTO: (Action.STOP, Action.REPORT),
    OnError.STOP: (Action.STOP, Action.STOP),
}


def error_action(policy: OnError, number: int) -> Action:
    """What ``policy`` does about errno ``number``."""
    no_space, other = ACTIONS[policy]
    return no_space if number == errno.ENOSPC else other


class IoStatus(Enum):
    """QMP's BlockDeviceIoStatus."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


@dataclass(frozen=True, slots=True)
class Failure:
    """A request failed. Yielded by a body; when the yield returns, the action has been carried out.

    For STOP that is: the job was paused and a client resumed it. For IGNORE: a short delay has passed. For REPORT
    nothing is left to do but to raise ``error``. A body whose retry succeeds yields a Rest: the client that resumed it
    waits for the outcome.
    """

    operation: Literal["read", "write"]
    action: Action
    error: QmpdError


@dataclass(frozen=True, slots=True)
class Ready:
    """Source and target agree: the job becomes ready, once, and can be completed from now on."""


Body = Generator[Rest | Failure | Ready, None, None]


def nothing() -> Steps[None]:
    """A phase with nothing to do."""
    yield from ()


_ID_FIRST: Final = frozenset(string.ascii_letters)
_ID_REST: Final = _ID_FIRST | frozenset(string.digits) | frozenset("-._")


def well_formed_id(name: str) -> bool:
    """QEMU's rule for ids that a client chooses (section 1.4)."""
    return bool(name) and name[0] in _ID_FIRST and set(name) <= _ID_REST


def check_speed(speed: int) -> None:
    """Raise for a speed below 0 (bytes per second)."""
    if speed < 0:
        raise QmpdError("Parameter 'speed' expects a non-negative value")


@dataclass(frozen=True, slots=True)
class Merge:
    """The content of the files ``images`` goes into the file ``base``."""

    base: str
    images: tuple[str, ...]


@dataclass(slots=True)
class Keeper:
    """Where checkpoints go, and how often: the worker thread that runs the body calls all of this.

    ``write`` makes a checkpoint durable; it does not raise. What a checkpoint vouches for is durable already.
    ``interval`` is the least time between two, in seconds; where they are slow it is more, so that they cost little.
    """

    write: Callable[[dict[str, Any]], None]
    interval: float
    _due: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The first one is due after an interval."""
        self._due = time.monotonic() + self.interval

    @property
    def is_due(self) -> bool:
        """Is it time for a checkpoint?"""
        return time.monotonic() >= self._due

    def keep(self, make_durable: Callable[[], None], checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint. Raises what ``make_durable`` raises."""
        began = time.monotonic()
        make_durable()
        self.write(checkpoint)
        now = time.monotonic()
        self._due = now + max(self.interval, CHECKPOINT_SHARE * (now - began))


CHECKPOINT_SHARE: Final = 20
"""Between two checkpoints passes so many times what one takes."""


class Job(ABC):
    """One job. Subclasses say what it does; the manager says when. Control thread, but for :meth:`run`."""

    #: QMP's JobType, e.g. ``commit``.
    job_type: ClassVar[str]
    #: Block jobs answer to block-job-* commands, appear in query-block-jobs and emit BLOCK_JOB_* events.
    is_block_job: ClassVar[bool] = True

    def __init__(self, job_id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.id = job_id
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = Status.UNDEFINED
        self.error: QmpdError | None = None
        self.user_paused = False
        self.io_status = IoStatus.OK
        #: Takes checkpoints; None: nobody keeps any.
        self.keeper: Keeper | None = None
        #: What the keeper of an earlier incarnation of the daemon got last, if this job goes on from there.
        self.checkpoint: dict[str, Any] | None = None
        #: The command that asked for it, and its arguments; equal ones may be the same one sent twice.
        self.asked: dict[str, Any] | None = None
        #: All that the job was to do is done; only telling is left.
        self.passed = False

    # -- what outlives the daemon --------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any] | None:
        """What :func:`qmpd.jobs.remake.remake` makes this job of again, as JSON; None: it cannot be done again."""
        return None

    @property
    def lent(self) -> list[Node]:
        """Nodes that are writable for this job alone."""
        return []

    @property
    def nodes(self) -> list[Node]:
        """Those that the job keeps other jobs off."""
        return []

    @property
    def merge(self) -> Merge | None:
        """What this job copies into what, so that the target is a mixture until it is done."""
        return None

    # -- phases ------------------------------------------------------------------------------------------------------

    def start(self, cell: Cell) -> Steps[None]:
        """Change the graph so that the body can run. ``cell`` is the one :meth:`run` gets: set speed and total here."""
        return nothing()

    @abstractmethod
    def run(self, cell: Cell) -> Body:
        """Do the work. Worker thread."""

    def prepare(self) -> Steps[None]:
        """What may still fail on the way to success."""
        return nothing()

    def commit(self) -> Steps[None]:
        """The job succeeded."""
        return nothing()

    def abort(self) -> Steps[None]:
        """The job failed or was cancelled; ``self.error`` says why."""
        return nothing()

    def clean(self) -> Steps[None]:
        """Give back what :meth:`start` took."""
        return nothing()

    # -- verbs that only some jobs know ------------------------------------------------------------------------------

    def complete(self) -> None:
        """A client wants a ready job to end. The manager wakes the body afterwards."""
        raise QmpdError(f"The active block job '{self.id}' cannot be completed")

    def soft_cancel(self) -> bool:
        """May a ready job end as a success without its last step? False makes every cancel a forced one."""
        return False
