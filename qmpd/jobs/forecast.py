"""What a commit would copy, what that would do to base, and what would stop it. Nothing is changed.

Growth is found out by rehearsing the copy on an image whose writes go nowhere (:mod:`qmpd.block.rehearsal`), so it is
that of the real allocator. It holds as long as nobody writes to the chain meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from qmpd.block.api import BlockDevice, Driver
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.drivers.qcow2.rehearsal import Rehearsal
from qmpd.block.extents import ChainRuns, RunKind, chain_runs
from qmpd.block.rehearsal import CopyRehearsal
from qmpd.block.storage import posix
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.active import ActiveCommitJob
from qmpd.jobs.commit import CommitJob
from qmpd.jobs.pieces import Pieces
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.regions import Window
from qmpd.jobs.siblings import Sibling, SiblingPolicy, find_siblings, refusal
from qmpd.jobs.surgery import quietly
from qmpd.steps import Steps
from qmpd.units import MIB, SECTOR, align_up

#: Bytes read to see how fast reading is.
_SAMPLE: Final = 16 * MIB
_SAMPLE_STEP: Final = MIB


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


@dataclass(slots=True)
class Amount:
    """Bytes to copy, by kind. ``other`` can only be read through its driver."""

    data: int = 0
    zero: int = 0
    compressed: int = 0
    other: int = 0

    def add(self, runs: ChainRuns) -> None:
        for name, kind in _KINDS:
            setattr(self, name, getattr(self, name) + int(runs.length[runs.kind == kind].sum()))

    @property
    def bytes(self) -> int:
        """What takes space in base; zeros need none."""
        return self.data + self.compressed + self.other


_KINDS: Final = (
    ("data", RunKind.DATA),
    ("zero", RunKind.ZERO),
    ("compressed", RunKind.COMPRESSED),
    ("other", RunKind.OPAQUE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What base's file gains, bytes and clusters. A raw image has no clusters; ``data`` there is what fills holes."""

    file_size: int
    data: int
    cluster_size: int | None = None
    clusters: int = 0
    data_clusters: int = 0
    l1_clusters: int = 0
    l2_clusters: int = 0
    refcount_blocks: int = 0
    refcount_table_clusters: int = 0


@dataclass(slots=True, kw_only=True)
class Forecast:
    """All that is known before the first write. ``obstacles`` would stop the commit; empty if nothing would."""

    active: bool
    images: list[ImageFacts]
    copy: Amount = field(default_factory=Amount)
    reflink: bool = False
    growth: Growth | None = None
    #: Bytes that may still be written to base's file system; None where base is no file.
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
    work = _Work(plan, chain.layers(plan.top, plan.base), job.visible_end)
    drivers = [(node, _storage(node)) for node in images]
    yield partial(_look, found, work, drivers)
    return found


def _look(found: Forecast, work: _Work, images: Sequence[tuple[Node, FileStorage | None]]) -> None:
    """Worker thread."""
    found.images = [_facts(node, storage) for node, storage in images]
    base = _storage(chain.skip_filters(work.plan.base), data=True)
    try:
        found.copy = work.measure()
        found.growth = work.growth()
    except QmpdError as error:
        found.obstacles.append(error.desc)
    found.seconds = work.expected_seconds(found.copy)
    if base is None:
        return
    found.reflink = any(_shares_blocks(storage, base) for _, storage in images if storage not in (None, base))
    found.free = _free(base)
    if found.growth is not None and not found.reflink and found.growth.data > found.free:
        found.obstacles.append(_no_space(base.path, found.growth.data, found.free))


def _no_space(path: str, needed: int, free: int) -> str:
    return f"Not enough space for '{path}': the commit takes {needed} bytes there, {free} are free"


class _Work:
    """The copying of one commit. Worker thread."""

    def __init__(self, plan: CommitPlan, layers: Sequence[BlockDevice], visible_end: int) -> None:
        self.plan = plan
        self._layers = layers
        self._length = plan.top.length
        self._visible_end = visible_end
        self._stepwise = bool(plan.request.speed) or any(node.is_filter for node in plan.top.subtree())

    def windows(self) -> Iterator[ChainRuns]:
        """All that lies above base, as the job maps it."""
        offset, window = 0, Window()
        while offset < self._length:
            runs = chain_runs(self._layers, offset, min(window.length, self._length - offset))
            window.learn(len(runs))
            offset = runs.end
            yield runs

    def measure(self) -> Amount:
        amount = Amount()
        for runs in self.windows():
            amount.add(runs)
        return amount

    def growth(self) -> Growth:
        """What the commit adds to base. Raises QmpdError where base cannot be written."""
        base = chain.skip_filters(self.plan.base).opened
        if isinstance(base, Qcow2):
            return self._qcow2_growth(base)
        return self._raw_growth(base)

    def _qcow2_growth(self, base: Qcow2) -> Growth:
        rehearsal = Rehearsal(base, self._file_end())
        before = rehearsal.inventory()
        self._rehearse(rehearsal.driver)
        added = rehearsal.inventory().since(before)
        size = base.placement_unit or base.info().cluster_size or 0
        data, grown = added.data_clusters * size, added.length
        if rehearsal.data is not None:  # as far as it has no data there yet
            data, grown = sum(_filling(base, runs) for runs in self.windows()), grown + rehearsal.data_growth
        return Growth(
            file_size=grown,
            data=data,
            cluster_size=size,
            clusters=added.file_clusters,
            data_clusters=added.data_clusters,
            l1_clusters=added.l1_clusters,
            l2_clusters=added.l2_tables,
            refcount_blocks=added.refcount_blocks,
            refcount_table_clusters=added.refcount_table_clusters,
        )

    def _file_end(self) -> int | None:
        """The exact length of base's file, if base is all there is in it."""
        storage = _storage(self.plan.base)
        return os.fstat(storage.fd).st_size if storage is not None else None

    def _rehearse(self, target: Driver) -> None:
        """The steps of the job's body."""
        if target.length < self._length:
            target.truncate(self._length)
        with CopyRehearsal(self._layers, target) as engine:
            for runs in self.windows():
                pieces, offset = Pieces(runs), runs.start
                while offset < pieces.end:
                    piece = pieces.step(offset) if self._stepwise else pieces.stretch(offset)
                    if piece.allocated:
                        engine.copy(runs, offset, piece.length)
                    offset += piece.length
        if self._visible_end > self._length:
            target.write_zeroes(self._length, self._visible_end - self._length)
        target.flush()

    def _raw_growth(self, base: Driver) -> Growth:
        """Holes of base that data will fill; its length where top is longer."""
        data = 0
        for runs in self.windows():
            data += _filling(base, runs)
        begin, end = base.length, max(base.length, self._length)
        exact = self._file_end()
        if exact is not None and end > begin == align_up(exact, SECTOR):
            begin = exact
        return Growth(file_size=end - begin, data=data)

    def expected_seconds(self, amount: Amount) -> float | None:
        """From the time that reading the first data takes. Writing is taken to be as fast: an estimate."""
        speed = self.plan.request.speed
        with contextlib.suppress(QmpdError):
            rate = self._reading_rate()
            if rate is not None:
                return amount.bytes / (min(rate, speed) if speed else rate)
        return amount.bytes / speed if speed else None

    def _reading_rate(self) -> float | None:
        """Bytes a second."""
        buffer, done, begin = memoryview(bytearray(_SAMPLE_STEP)), 0, time.monotonic()
        for runs in self.windows():
            for run in runs.allocated():
                if run.kind == RunKind.ZERO:
                    continue
                for at in range(run.offset, run.offset + run.length, _SAMPLE_STEP):
                    size = min(_SAMPLE_STEP, run.offset + run.length - at)
                    self._layers[run.layer].readinto(at, buffer[:size])
                    done += size
                    if done >= _SAMPLE:
                        return done / max(time.monotonic() - begin, 1e-9)
        return done / max(time.monotonic() - begin, 1e-9) if done else None


def _filling(base: Driver, runs: ChainRuns) -> int:
    """Bytes of ``runs`` that hold data where base has none."""
    filled = 0
    for run in runs.allocated():
        if run.kind == RunKind.ZERO:
            continue
        position, end = run.offset, run.offset + run.length
        while position < min(end, base.length):
            known = base.map(position, min(end, base.length) - position)
            filled += int(known.length[known.kind != RunKind.DATA].sum())
            position = known.end
        filled += end - position
    return filled


# -- files: worker thread ----------------------------------------------------------------------------------------------


def _storage(node: Node, *, data: bool = False) -> FileStorage | None:
    """The file that holds the node's image, if there is one; with ``data``, that of the guest's data."""
    if data and "data-file" in node.children:
        return _storage(node.children["data-file"].node)
    current: Node | None = node
    while current is not None:
        if isinstance(current.driver, FileStorage):
            return current.driver
        edge = current.primary_edge
        current = edge.node if edge else None
    return None


def _facts(node: Node, storage: FileStorage | None) -> ImageFacts:
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


def _free(storage: FileStorage) -> int:
    """Bytes that this process may still write."""
    answer = os.fstatvfs(storage.fd)
    return answer.f_frsize * (answer.f_bfree if os.geteuid() == 0 else answer.f_bavail)


def _shares_blocks(source: FileStorage | None, base: FileStorage) -> bool:
    """Does the file system let the two share blocks? Tried on a file without a name, which is gone at once."""
    if source is None or os.fstat(source.fd).st_dev != os.fstat(base.fd).st_dev:
        return False
    try:
        fd = os.open(os.path.dirname(base.location) or ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        posix.clone_range(source.fd, 0, 4096, fd, 0)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
