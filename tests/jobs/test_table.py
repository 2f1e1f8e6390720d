"""Both tables, cell by cell, against copies typed from the published rules."""

import pytest

from qmpd.errors import QmpdError
from qmpd.jobs.job import Action, OnError, error_action, well_formed_id
from qmpd.jobs.table import ACCEPTED, NEXT, IllegalTransition, Status, Verb, check_verb, transition

STATUSES = [
    *("undefined", "created", "running", "paused", "ready", "standby"),
    *("waiting", "pending", "aborting", "concluded", "null"),
]
PUBLISHED_NEXT = {
    # from        U C R P Y S W D X E N   (to, in the order of STATUSES)
    "undefined": "0 1 0 0 0 0 0 0 0 0 0",
    "created":   "0 0 1 0 0 0 0 0 1 0 1",
    "running":   "0 0 0 1 1 0 1 0 1 0 0",
    "paused":    "0 0 1 0 0 0 0 0 0 0 0",
    "ready":     "0 0 0 0 0 1 1 0 1 0 0",
    "standby":   "0 0 0 0 1 0 0 0 0 0 0",
    "waiting":   "0 0 0 0 0 0 0 1 1 0 0",
    "pending":   "0 0 0 0 0 0 0 0 1 1 0",
    "aborting":  "0 0 0 0 0 0 0 0 1 1 0",
    "concluded": "0 0 0 0 0 0 0 0 0 0 1",
    "null":      "0 0 0 0 0 0 0 0 0 0 0",
}  # fmt: skip
PUBLISHED_VERBS = {
    # verb        U C R P Y S W D X E N
    "cancel":    "0 1 1 1 1 1 1 1 0 0 0",
    "pause":     "0 1 1 1 1 1 0 0 0 0 0",
    "resume":    "0 1 1 1 1 1 0 0 0 0 0",
    "set-speed": "0 1 1 1 1 1 0 0 0 0 0",
    "complete":  "0 0 0 0 1 1 0 0 0 0 0",
    "finalize":  "0 0 0 0 0 0 0 1 0 0 0",
    "dismiss":   "0 0 0 0 0 0 0 0 0 1 0",
    "change":    "0 1 1 1 1 1 0 0 0 0 0",
}  # fmt: skip


class Thing:
    """Anything with an id and a status."""

    id = "j0"

    def __init__(self, status: Status) -> None:
        self.status = status


def test_tables_are_complete() -> None:
    """Every state and every verb has its row, spelled as QMP spells it."""
    assert [status.value for status in Status] == STATUSES
    assert set(NEXT) == set(Status)
    assert {verb.value for verb in ACCEPTED} == set(PUBLISHED_VERBS)
    assert set(ACCEPTED) == set(Verb)


@pytest.mark.parametrize("old", Status)
@pytest.mark.parametrize("new", Status)
def test_transitions(old: Status, new: Status) -> None:
    """A published step happens and is published, any other raises and changes nothing."""
    allowed = PUBLISHED_NEXT[old.value].split()[STATUSES.index(new.value)] == "1"
    events: list[tuple[str, dict[str, object]]] = []
    thing = Thing(old)

    if allowed:
        transition(thing, new, lambda name, data: events.append((name, data)))
    else:
        with pytest.raises(IllegalTransition):
            transition(thing, new, lambda name, data: events.append((name, data)))

    assert thing.status is (new if allowed else old)
    told = [("JOB_STATUS_CHANGE", {"id": "j0", "status": new.value})] if allowed and new is not old else []
    assert events == told


@pytest.mark.parametrize("verb", Verb)
@pytest.mark.parametrize("status", Status)
def test_verbs(verb: Verb, status: Status) -> None:
    """A verb outside its states is refused with the text clients match on."""
    if PUBLISHED_VERBS[verb.value].split()[STATUSES.index(status.value)] == "1":
        check_verb(Thing(status), verb)
        return

    with pytest.raises(QmpdError) as refusal:
        check_verb(Thing(status), verb)

    assert str(refusal.value) == f"Job 'j0' in state '{status.value}' cannot accept command verb '{verb.value}'"
    assert refusal.value.qmp_class == "GenericError"


@pytest.mark.parametrize(
    ("policy", "no_space", "other"),
    [
        ("report", "report", "report"),
        ("ignore", "ignore", "ignore"),
        ("enospc", "stop", "report"),
        ("auto", "stop", "report"),
        ("stop", "stop", "stop"),
    ],
)
def test_error_policy(policy: str, no_space: str, other: str) -> None:
    """What each policy does about ENOSPC (28) and about EIO (5)."""
    assert error_action(OnError(policy), 28) is Action(no_space)
    assert error_action(OnError(policy), 5) is Action(other)


@pytest.mark.parametrize(
    ("name", "fine"),
    [("j0", True), ("a.B-c_9", True), ("x" * 400, True)]
    + [(bad, False) for bad in ("", "1a", "a b", "#x", "ä", "j0/x", "-a", "_a", "aä", "a\n")],
)
def test_job_ids(name: str, fine: bool) -> None:
    """A letter first, then letters, digits, '-', '.', '_'; of any length."""
    assert well_formed_id(name) is fine
