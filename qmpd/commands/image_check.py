"""x-qmpd-check: what ``qemu-img check`` does, in the daemon. Source: spec/qcow2.md section 11.

The answer comes when the check is over, which may take a while for large images: other clients are served meanwhile,
and the graph may change around the node. A client that hangs up ends its check.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Self

import trio

from qmpd.block.api import Perm, Role
from qmpd.block.findings import CheckResult, Finding, Severity
from qmpd.control.bridge import JOBS
from qmpd.control.qapi import QapiModel, Str, Uint64
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from qmpd.graph.node import Backend, Edge, Node


class CheckFix(StrEnum):
    NONE = "none"
    LEAKS = "leaks"


class Check(QapiModel):
    """Arguments of x-qmpd-check."""

    node_name: Str
    fix: CheckFix | None = None


class CheckFinding(QapiModel):
    """One fault: the ``field`` at byte ``offset`` of the image file holds ``value``; ``text`` says what is wrong."""

    severity: Severity
    offset: Uint64
    field: Str
    value: Uint64
    text: Str

    @classmethod
    def of(cls, finding: Finding) -> Self:
        return cls(
            severity=finding.severity,
            offset=finding.offset,
            field=finding.field,
            value=finding.value,
            text=finding.text,
        )


class ImageCheck(QapiModel):
    """QEMU's type of that name with every count there, also when it is 0, and the first of the ``findings``."""

    filename: Str
    format: Str
    check_errors: Uint64
    image_end_offset: Uint64
    corruptions: Uint64
    leaks: Uint64
    corruptions_fixed: Uint64
    leaks_fixed: Uint64
    total_clusters: Uint64
    allocated_clusters: Uint64
    fragmented_clusters: Uint64
    compressed_clusters: Uint64
    findings: list[CheckFinding]

    @classmethod
    def of(cls, node: Node, result: CheckResult) -> Self:
        return cls(
            filename=node.filename,
            format=node.driver_name,
            check_errors=result.check_errors,
            image_end_offset=result.image_end_offset,
            corruptions=result.corruptions,
            leaks=result.leaks,
            corruptions_fixed=result.corruptions_fixed,
            leaks_fixed=result.leaks_fixed,
            total_clusters=result.total_clusters,
            allocated_clusters=result.allocated_clusters,
            fragmented_clusters=result.fragmented_clusters,
            compressed_clusters=result.compressed_clusters,
            findings=[CheckFinding.of(finding) for finding in result.report.findings],
        )


@command("x-qmpd-check", returns=ImageCheck, features=("unstable",))
async def image_check(ctx: Context, args: Check) -> ImageCheck:
    """Check an image that nobody writes to, and keep writers away meanwhile."""
    fix_leaks = args.fix is CheckFix.LEAKS
    async with ctx.graph_lock:
        node = ctx.graph.get(args.node_name)
        checker = Checker()
        perm = Perm.CONSISTENT_READ | (Perm.WRITE_UNCHANGED if fix_leaks else Perm.NONE)
        with ctx.graph.edit() as edit:
            edge = edit.attach(checker, "root", node, Role.NONE, perm=perm, shared=Perm.CONSISTENT_READ)
    try:
        result = await JOBS.to_worker(checker.run, node, fix_leaks)
        return ImageCheck.of(node, result)
    finally:
        with trio.CancelScope(shield=True):
            async with ctx.graph_lock:
                with ctx.graph.edit() as edit:
                    edit.detach(edge)


class Checker(Backend):
    """The check's hold on its node. It rests while the graph below changes, and gives up if the node is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._held = 0
        self._working = False
        self._replaced = False

    def run(self, node: Node, fix_leaks: bool) -> CheckResult:
        """The check itself. Worker thread."""
        with self._work():
            return node.opened.check(fix_leaks=fix_leaks, pulse=self._pulse)

    @contextmanager
    def _work(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._rest()

    def _begin(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            self._working = True

    def _rest(self) -> None:
        with self._changed:
            self._working = False
            self._changed.notify_all()

    def _pulse(self) -> None:
        trio.from_thread.check_cancelled()
        if self._held:
            self._rest()
            self._begin()
        if self._replaced:
            raise QmpdError("The node was replaced during the check")

    def quiesce(self) -> None:
        with self._changed:
            self._held += 1
            self._changed.wait_for(lambda: not self._working)

    def resume(self) -> None:
        with self._changed:
            self._held -= 1
            self._changed.notify_all()

    def retargeted(self, edge: Edge) -> None:
        self._replaced = True
