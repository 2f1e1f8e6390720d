"""What a commit would copy, what that would do to base, and what would stop it. Nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.active import ActiveCommitJob
from qmpd.jobs.commit import CommitJob
from qmpd.jobs.files import free_space, shares_blocks, storage_of
from qmpd.jobs.growth import Amount, Growth, Work, no_space
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.siblings import Sibling, SiblingPolicy, find_siblings, refusal
from qmpd.jobs.surgery import quietly
from qmpd.steps import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """One image of the chain as found: sizes in bytes; the file's facts are None where there is no file."""

    node: str
    format: str
    length: int
    path: str | None = None
    device: int | None = None
    inode: int | None = None
    file_size: int | None = None
    allocated: int | None = None


@dataclass(slots=True, kw_only=True)
class Forecast:
    """All that is known before the first write. ``obstacles`` would stop the commit; empty if nothing would."""

    active: bool
    images: list[ImageFacts]
    copy: Amount = field(default_factory=Amount)
    reflink: bool = False
    growth: Growth | None = None
    #: Bytes that may still be written to base's file system; None where base is no file that grows.
    free: int | None = None
    #: Seconds, from how fast the first data could be read; None if there is nothing to measure by.
    seconds: float | None = None
    #: Other images that the commit would change.
    siblings: list[Sibling] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)


def forecast(graph: Graph, plan: CommitPlan, policy: SiblingPolicy = SiblingPolicy.REFUSE) -> Steps[Forecast]:
    """Find it all out. Raises nothing for what the forecast can tell: that becomes an obstacle.

    ``policy`` says whether siblings are one.
    """
    images = list(dict.fromkeys(chain.skip_filters(node) for node in chain.walk(plan.device)))
    found = Forecast(active=plan.active, images=[])
    job = (ActiveCommitJob if plan.active else CommitJob)(graph, plan)
    try:
        yield from quietly(graph, [plan.top], partial(graph.rehearse, job.enter_graph))
    except QmpdError as error:
        found.obstacles.append(error.desc)
    found.siblings = yield from find_siblings(graph, plan)
    if found.siblings and policy is SiblingPolicy.REFUSE:
        found.obstacles.append(refusal(found.siblings).desc)
    work = Work(plan, chain.layers(plan.top, plan.base), job.visible_end)
    drivers = [(node, storage_of(node)) for node in images]
    yield partial(_look, found, work, drivers)
    return found


def _look(found: Forecast, work: Work, images: Sequence[tuple[Node, FileStorage | None]]) -> None:
    """Worker thread."""
    found.images = [_facts(node, storage) for node, storage in images]
    base = storage_of(chain.skip_filters(work.plan.base), data=True)
    try:
        found.copy = work.measure()
        found.growth = work.growth()
    except QmpdError as error:
        found.obstacles.append(error.desc)
    found.seconds = work.expected_seconds(found.copy)
    if base is None:
        return
    found.reflink = any(shares_blocks(storage, base) for _, storage in images if storage not in (None, base))
    found.free = free_space(base)
    if found.free is not None and found.growth is not None and not found.reflink and found.growth.data > found.free:
        found.obstacles.append(no_space(base.path, found.growth.data, found.free))


def _facts(node: Node, storage: FileStorage | None) -> ImageFacts:
    """Worker thread."""
    facts = partial(ImageFacts, node=node.name, format=node.driver_name, length=node.length)
    if storage is None:
        return facts()
    status = os.fstat(storage.fd)
    return facts(
        path=storage.location,
        device=status.st_dev,
        inode=status.st_ino,
        file_size=status.st_size,
        allocated=status.st_blocks * 512,
    )
