"""Rewriting what overlays' headers say about their backing file.

Source: spec/jobs-and-commit.md section 4.3.

Deviation: without a name from the client the string leads from the overlay's own directory to the new backing file. The
peer writes the name as the daemon's working directory sees it, which an overlay in another directory cannot resolve.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from qmpd.block.api import BackingReference
from qmpd.errors import QmpdError
from qmpd.graph import filename
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.surgery import back_to_read_only
from qmpd.steps import Steps

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewBacking:
    """Which backing file overlays are to name: ``base``, or verbatim ``given`` ('' for none at all)."""

    base: Node
    given: str | None = None
    mask_protocol: bool = False

    def reference(self, overlay: Node) -> BackingReference | None:
        """What the header of ``overlay`` will say. Looks at directories (realpath), not at images."""
        name = self.given if self.given is not None else backing_name(overlay, self.base)
        return BackingReference(name, self._format) if name else None

    @property
    def _format(self) -> str:
        if self.mask_protocol and self.base.opened.is_protocol:
            return "raw"
        return self.base.driver_name

    def check(self, overlays: Iterable[Node]) -> None:
        """Raise EINVAL if the string does not fit into the header of one of ``overlays``."""
        for overlay in overlays:
            overlay.opened.check_backing_reference(self.reference(overlay))


def backing_name(overlay: Node, base: Node) -> str:
    """A name that leads from the header of ``overlay`` to ``base``: base's own if that works, else made relative."""
    name = base.filename
    if name != filename.image_path(base):
        return name  # not the name of a plain file
    return name_seen_from(filename.image_location(overlay), name, filename.image_location(base))


def name_seen_from(image: str | None, name: str, location: str | None = None) -> str:
    """The file name ``name``, which counts from the working directory, as the header of the file ``image`` needs it.

    With ``location`` the name is that of a plain file, which is there; it may look like ``protocol:something``.
    """
    if name.startswith("/") or (location is None and filename.has_protocol(name)):
        return name
    target = os.path.realpath(location or name)
    if image is None:
        return target
    relative = os.path.relpath(target, os.path.realpath(os.path.dirname(image)))
    for candidate in (_no_protocol(name), _no_protocol(relative)):
        if os.path.realpath(filename.combine(image, candidate)) == target:
            return candidate
    return target


def _no_protocol(path: str) -> str:
    return f"./{path}" if filename.has_protocol(path) else path


#: Nodes whose headers were rewritten, and what they said before.
Rewritten = list[tuple[Node, BackingReference | None]]


def rewrite(graph: Graph, overlays: Iterable[Node], new: NewBacking) -> Steps[Rewritten]:
    """Rewrite all headers durably, or none: those done before a failure are put back.

    Returns what :func:`restore` needs. Raises QmpdError.
    """
    done: Rewritten = []
    try:
        for overlay in overlays:
            old = overlay.opened.backing_reference
            yield from _write(graph, overlay, new.reference(overlay))
            done.append((overlay, old))
    except Exception:
        yield from restore(graph, done)
        raise
    return done


def restore(graph: Graph, done: Rewritten) -> Steps[None]:
    """Take a rewrite back, as far as possible: both versions of a header lead to the same content."""
    for overlay, old in reversed(done):
        try:
            yield from _write(graph, overlay, old)
        except QmpdError as error:
            _log.error("node %s: while restoring the backing file name: %s", overlay.name, error)


def _write(graph: Graph, overlay: Node, reference: BackingReference | None) -> Steps[None]:
    """Change one header; a read-only overlay is writable for that long."""
    change = partial(overlay.opened.change_backing_reference, reference)
    if not overlay.read_only:
        yield change
        return
    with graph.edit() as edit:
        edit.set_read_only(overlay, False)
    try:
        yield change
    finally:
        yield from back_to_read_only(graph, overlay)
