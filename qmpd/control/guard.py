"""The daemon's policy about images that a commit would change beside its own, and how it is told. Control thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from qmpd.control.bridge import to_worker
from qmpd.control.registry import Context
from qmpd.graph.edit import Graph
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.preflight import Preflight
from qmpd.jobs.siblings import Sibling, SiblingPolicy

_log = logging.getLogger(__name__)

ROOM: Final = "guard"

TOLD: Final = "X_QMPD_SIBLINGS"


@dataclass(slots=True)
class Guard:
    """``policy`` is that of commands that say nothing about it."""

    policy: SiblingPolicy = SiblingPolicy.REFUSE

    async def warm(self, graph: Graph) -> None:
        """Read what is in the image directories, so that no commit has to wait for it."""
        if graph.overlays.directories:
            await to_worker(graph.overlays.look)


def effective(ctx: Context, said: SiblingPolicy | None) -> SiblingPolicy:
    """What holds for a command that ``said`` this, or nothing."""
    guard: Guard = ctx.rooms.get(ROOM) or Guard()
    return guard.policy if said is None else said


def preflight(ctx: Context, said: SiblingPolicy | None, *, force: bool = False) -> Preflight:
    """The checks before a commit whose command ``said`` this about siblings, or nothing.

    With ``force`` nothing else is checked.
    """
    policy = effective(ctx, said)
    overridden = policy is not effective(ctx, None)
    return Preflight(policy, overridden, partial(_warn, ctx, policy), force)


def _warn(ctx: Context, policy: SiblingPolicy, plan: CommitPlan, siblings: list[Sibling]) -> None:
    """It may, but not silently."""
    job = plan.request.job_id
    for one in siblings:
        text = "job %s (started by %s, siblings: %s) will change what '%s' shows, which is backed by '%s'"
        _log.warning(text, job, ctx.client.label, policy.value, one.image, one.backing)
    ctx.bus.publish(TOLD, {"id": job, "policy": policy.value, "siblings": as_rows(siblings)})


def as_rows(siblings: list[Sibling]) -> list[dict[str, Any]]:
    """As clients are told."""
    return [{"image": one.image, "backing": one.backing} for one in siblings]
