"""Changing options of an image in place: the background job of x-blockdev-amend.

Of qcow2 only the key slots of encrypted images can be changed, and those are not supported; so the job has nothing to
do, or fails. Not a block job, and never dismissed by itself. Source: spec/toolbox.md section 10.
"""

from __future__ import annotations

from typing import ClassVar

from qmpd.errors import Kind, QmpdError
from qmpd.jobs.cell import Cell
from qmpd.jobs.job import Body, Job, nothing
from qmpd.steps import Steps


class AmendJob(Job):
    """``encryption``: was a change of the encryption asked for?"""

    job_type: ClassVar[str] = "amend"
    is_block_job: ClassVar[bool] = False

    def __init__(self, job_id: str, *, encryption: bool) -> None:
        super().__init__(job_id, auto_dismiss=False)
        self._encryption = encryption

    def start(self, cell: Cell) -> Steps[None]:
        cell.set_total(1)
        return nothing()

    def run(self, cell: Cell) -> Body:
        """Over in the opening stretch: the command is answered when the job is concluded."""
        cell.advance(1)
        if self._encryption:
            raise QmpdError("image is not encrypted, can't amend", Kind.UNSUPPORTED)
        yield from ()
