"""``qmpctl plan DEVICE``: what would a commit do, and what would stop it?"""

from __future__ import annotations

from typing import Any, Final

from qmpd.ctl import text
from qmpd.ctl.session import Exit, Session

#: Options that go to x-qmpd-plan-commit as they are.
_MEMBERS: Final = {"device": "device", "top": "top-node", "base": "base-node", "speed": "speed"}

#: Member of the growth, what its clusters are for.
_CLUSTERS: Final = (
    ("data-clusters", "data"),
    ("l1-clusters", "L1 table"),
    ("l2-clusters", "L2 tables"),
    ("refcount-blocks", "refcount blocks"),
    ("refcount-table-clusters", "refcount table"),
)


async def run_plan(session: Session) -> Exit:
    """Ask for the plan and show it; an error exit if something would stop the commit."""
    args = session.args
    given = {member: getattr(args, name) for name, member in _MEMBERS.items() if getattr(args, name) is not None}
    plan = await session.client.execute("x-qmpd-plan-commit", given)
    if args.json:
        session.print_json(plan)
    else:
        session.say(*lines(plan))
    return Exit.FAILED if plan["obstacles"] else Exit.OK


def lines(plan: dict[str, Any]) -> list[str]:
    """A plan for people."""
    rows = [
        [image["node-name"], image["format"], text.size(image["virtual-size"]), image.get("filename", "-")]
        for image in plan["images"]
    ]
    said = text.columns([["NODE", "FORMAT", "SIZE", "FILE"], *rows])
    amounts = [f"{text.size(count)} {kind}" for kind, count in plan["copy"].items() if count]
    kind = "active commit" if plan["active"] else "commit"
    said.append(f"{kind}, copies: {', '.join(amounts) or 'nothing'}{' (by reflink)' if plan['reflink'] else ''}")
    if "growth" in plan:
        said.append(_growth(plan["growth"]))
    if "free" in plan:
        said.append(f"free on base's file system: {text.size(plan['free'])}")
    if "expected-seconds" in plan:
        said.append(f"takes about {plan['expected-seconds']:.1f} s, by a short measurement")
    said += [f"would change {one['image']}, which is backed by {one['backing']}" for one in plan.get("siblings", ())]
    return [*said, *(f"would be stopped: {obstacle}" for obstacle in plan["obstacles"])]


def _growth(growth: dict[str, Any]) -> str:
    line = f"base's file grows by {text.size(growth['file-size'])}"
    if "cluster-size" not in growth:
        return f"{line}; {text.size(growth['data'])} of holes are filled"
    uses = [f"{growth[member]} {use}" for member, use in _CLUSTERS if growth[member]]
    return f"{line}; clusters of {text.size(growth['cluster-size'])}: {', '.join(uses) or 'none new'}"
