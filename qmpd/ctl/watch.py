"""Watching a job with a person at the keyboard: progress until it ends, and what Ctrl-C means meanwhile."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field

import trio

from qmpd.ctl.client import Client, CommandError, Events
from qmpd.ctl.display import Display, display
from qmpd.ctl.follow import JOB_EVENTS, Ending, follow
from qmpd.ctl.session import Exit, Session

_QUESTION = "Leave {job} running (Enter), cancel it (c), or go on watching (w)? "


async def run_watch(session: Session) -> Exit:
    """``qmpctl watch [JOB]``: without a name, the only job there is."""
    with session.client.events(*JOB_EVENTS) as events:
        job = session.args.job or await _only_job(session.client)
        return await watch(session, events, job)


async def _only_job(client: Client) -> str:
    jobs = [row["id"] for row in await client.execute("query-jobs")]
    if len(jobs) != 1:
        raise CommandError("GenericError", f"name the job to watch: {', '.join(jobs)}" if jobs else "no jobs")
    return str(jobs[0])


async def watch(
    session: Session, events: Events, job: str, *, complete: bool = False, until_ready: bool = False
) -> Exit:
    """Follow a job, report its end, and return the exit status. Ctrl-C asks what to do where somebody can answer."""
    quiet = session.args.json or session.args.quiet
    with display(job, session.out, silent=quiet) as shown:
        interrupt = _Interrupt(session.client, job, shown)
        ending: Ending | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(interrupt.serve, nursery.cancel_scope)
            ending = await follow(session.client, events, job, shown, complete=complete, until_ready=until_ready)
            nursery.cancel_scope.cancel()
    if ending is None:
        print(f"qmpctl: {job} goes on; 'qmpctl watch {job}' looks at it again", file=session.err)
        return Exit.INTERRUPTED
    return session.finish(ending)


@dataclass(slots=True)
class _Interrupt:
    """Ctrl-C once asks (or leaves, if nobody can answer), twice leaves."""

    client: Client
    job: str
    display: Display
    asking: bool = field(default=False)

    async def serve(
        self, leave: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Background task; cancelling ``leave`` ends the watching."""
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for _ in signals:
                    if self.asking or not sys.stdin.isatty():
                        leave.cancel()
                    else:
                        self.asking = True
                        nursery.start_soon(self._ask, leave)

    async def _ask(self, leave: trio.CancelScope) -> None:
        with self.display.suspended():
            # The thread may be left behind at its read: the process ends soon, and the answer has no meaning then.
            answer = await trio.to_thread.run_sync(self._read_answer, abandon_on_cancel=True)
        self.asking = False
        if answer == "c":
            await self._cancel()
        elif answer != "w":
            leave.cancel()

    def _read_answer(self) -> str:
        print(_QUESTION.format(job=self.job), end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower()

    async def _cancel(self) -> None:
        try:
            await self.client.execute("job-cancel", {"id": self.job})
        except CommandError as error:
            self.display.note(f"cannot cancel: {error}")
