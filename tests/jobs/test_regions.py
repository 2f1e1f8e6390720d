"""How much of a device is mapped at once."""

from __future__ import annotations

from qmpd.jobs.pieces import WINDOW, Window
from qmpd.units import TIB


def _steps(size: int, runs_in_window: int) -> list[int]:
    """The windows that a device of ``size`` bytes is mapped in, if each answer has so many runs."""
    window, lengths, left = Window(), [], size
    while left > 0:
        lengths.append(window.length)
        left -= window.length
        window.learn(runs_in_window)
    return lengths


def test_windows_widen_over_a_device_that_holds_little() -> None:
    """The work follows what is there: an almost empty device of 4 TiB takes a few dozen answers."""
    lengths = _steps(4 * TIB, 10)

    assert lengths[0] == WINDOW
    assert lengths == sorted(lengths)
    assert len(lengths) < 32


def test_windows_stay_small_over_a_device_that_is_in_pieces() -> None:
    """An answer has bounded memory: what has many runs is asked for in the least window."""
    assert set(_steps(TIB, 1 << 18)) == {WINDOW}


def test_a_wide_window_is_given_up_where_much_is_found() -> None:
    """One answer that is long is enough."""
    window = Window()
    for _ in range(8):
        window.learn(0)
    window.learn(1 << 18)

    assert window.length == WINDOW
