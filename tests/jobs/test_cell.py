"""What the two planes see of each other through the cell."""

import threading

import pytest

from qmpd.errors import Kind, QmpdError
from qmpd.jobs.cell import Cell, Progress, Rest


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_checkpoint_costs_nothing_when_nobody_asked() -> None:
    """No yield, so no thread hop."""
    assert list(Cell(Clock()).checkpoint()) == []
    assert list(Cell(Clock()).pace()) == []


def test_a_paused_body_rests_until_resumed() -> None:
    """It asks again each time it is woken, and goes on when the pause is over."""
    cell = Cell(Clock())
    cell.pause()
    body = cell.checkpoint()

    assert next(body) == Rest()
    assert next(body) == Rest()

    cell.resume()

    assert next(body, "over") == "over"


@pytest.mark.parametrize("paused", [False, True])
def test_cancel_ends_a_body_paused_or_not(paused: bool) -> None:
    """The checkpoint raises ECANCELED with the text of a concluded job."""
    cell = Cell(Clock())
    if paused:
        cell.pause()
    cell.cancel()

    with pytest.raises(QmpdError, match="Operation canceled") as ending:
        list(cell.checkpoint())

    assert ending.value.kind is Kind.CANCELLED
    assert ending.value.strerror == "Operation canceled"


def test_pace_sleeps_for_the_debt_and_asks_again() -> None:
    """A woken sleeper computes its delay anew, from the speed of now."""
    clock = Clock()
    cell = Cell(clock)
    cell.set_speed(1000)
    cell.advance(500, charged=500)
    body = cell.pace()

    assert next(body) == Rest(pytest.approx(0.5))

    clock.now = 0.2

    assert next(body) == Rest(pytest.approx(0.3))

    cell.set_speed(0)

    assert next(body, "over") == "over"


def test_only_charged_bytes_count_against_the_speed() -> None:
    """Skipped ranges move the progress and cost nothing."""
    cell = Cell(Clock())
    cell.set_speed(1)
    cell.set_total(100)
    cell.advance(90)

    assert list(cell.pace()) == []
    assert cell.progress == Progress(90, 100)


@pytest.mark.parametrize(("old", "new", "wakes"), [(10, 20, 1), (10, 0, 1), (10, 5, 0), (10, 10, 0), (0, 10, 1)])
def test_set_speed_wakes_only_for_more(old: int, new: int, wakes: int) -> None:
    """A lowered speed takes effect when the current sleep ends."""
    pokes: list[None] = []
    cell = Cell(Clock(), lambda: pokes.append(None))
    cell.set_speed(old)
    pokes.clear()

    cell.set_speed(new)

    assert len(pokes) == wakes


def test_progress_from_many_threads_adds_up() -> None:
    """advance is atomic."""
    cell = Cell(Clock())

    def work() -> None:
        for _ in range(1000):
            cell.advance(1, charged=1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert cell.progress.current == 4000


def test_work_is_what_is_charged_once_it_is_known() -> None:
    """Until then nothing is claimed; at the end all of it is done, whatever was charged."""
    cell = Cell(lambda: 0.0)
    cell.expect_survey()
    cell.set_total(100)
    assert cell.work is None
    cell.set_work(10)
    cell.advance(60, charged=4)
    assert cell.work == Progress(4, 10)
    cell.advance(40, charged=2)
    assert cell.work == Progress(10, 10)


def test_work_that_nobody_can_tell_is_progress() -> None:
    """A survey that failed, and a job that makes none."""
    cell = Cell(lambda: 0.0)
    cell.set_total(100)
    cell.advance(60, charged=4)
    assert cell.work == Progress(60, 100)
    cell.expect_survey()
    cell.set_work(None)
    assert cell.work == Progress(60, 100)
