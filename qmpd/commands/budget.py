"""The budget that all jobs share. Source: docs/budget.md."""

from typing import Any

from qmpd.control.qapi import Int, QapiModel
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from qmpd.jobs.budget import Limits


class SetBudget(QapiModel):
    """Arguments of x-qmpd-set-budget: 0 for no limit; what is not given stays as it is."""

    bytes_per_second: Int | None = None
    iops: Int | None = None


class BudgetInfo(QapiModel):
    """The limits (0 for none), and the ``bytes`` and ``operations`` of all jobs since the daemon began."""

    bytes_per_second: Int
    iops: Int
    bytes: Int
    operations: Int


@command("x-qmpd-set-budget", features=("unstable",))
def set_budget(ctx: Context, args: SetBudget) -> None:
    """Limit what all jobs that copy do together, beside the limit that each may have. Counts at once."""
    for name, value in args.to_wire().items():
        if value < 0:
            raise QmpdError(f"Parameter '{name}' expects a non-negative value")
    limits = ctx.jobs.budget.limits
    ctx.jobs.set_budget(
        Limits(
            limits.bytes_per_second if args.bytes_per_second is None else args.bytes_per_second,
            limits.iops if args.iops is None else args.iops,
        )
    )


@command("x-qmpd-query-budget", returns=BudgetInfo, features=("unstable",))
def query_budget(ctx: Context) -> dict[str, Any]:
    """The limits, and how much was done."""
    limits, (count, operations) = ctx.jobs.budget.limits, ctx.jobs.budget.used
    return {
        "bytes-per-second": limits.bytes_per_second,
        "iops": limits.iops,
        "bytes": count,
        "operations": operations,
    }
