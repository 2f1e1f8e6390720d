"""The QMP surface, a module a family: models and thin handlers side by side.

Importing this package registers everything in :mod:`qmpd.control.registry`.
"""

from __future__ import annotations

from qmpd.commands import (
    block_commit,
    block_exports,
    block_queries,
    block_stats,
    block_stream,
    blockdev,
    blockdev_active,
    blockdev_amend,
    blockdev_change,
    blockdev_create,
    blockdev_snapshot,
    blockdev_unstable,
    budget,
    commit_offline,
    core,
    events,
    image_check,
    jobs,
    objects,
    plan_commit,
    queue,
    siblings,
    state,
    tls_objects,
    transaction,
)

__all__ = [
    "block_commit",
    "block_exports",
    "block_queries",
    "block_stats",
    "block_stream",
    "blockdev",
    "blockdev_active",
    "blockdev_amend",
    "blockdev_change",
    "blockdev_create",
    "blockdev_snapshot",
    "blockdev_unstable",
    "budget",
    "commit_offline",
    "core",
    "events",
    "image_check",
    "jobs",
    "objects",
    "plan_commit",
    "queue",
    "siblings",
    "state",
    "tls_objects",
    "transaction",
]
