"""When a measurement has settled."""

from itertools import chain, cycle, repeat

import numpy as np
import pytest

from calib.bench.compare import Rule, mean, notch, spread, until_settled, window_values

RULE = Rule(4, "rounds", 0.05)


def ticking(step_s=1.0):
    """A clock that moves on by one step whenever it is looked at."""
    times = iter(range(10**6))
    return lambda: next(times) * step_s


def test_windows_are_successive_and_whole():
    assert window_values([1, 3, 5, 7, 9, 11, 100], 2) == [2, 6, 10]
    assert window_values([1, 2, 9, 1, 2, 9], 2, mean) == [1.5, 5, 5.5]
    assert window_values([1, 2, 3, 4, 5, 6, 7], 5) == [1.5, 3.5, 5.5], (
        "too few samples make three shorter windows"
    )
    assert window_values([4, 6], 5) == [4, 6]
    assert window_values([], 5) == []


def test_three_windows_that_agree_settle_and_nothing_else_does():
    level, low, high = [10.0] * 4, [9.7] * 4, [10.2] * 4
    assert RULE.settled({"a": level + low + high}), "0.5 of 10 is 5 %"
    assert not RULE.settled({"a": level + low + [10.3] * 4})
    assert not RULE.settled({"a": level + low + high[:3]}), "the third window is not whole"
    assert RULE.settled({"a": [50.0] * 4 + level + low + high}), "only the last three count"
    assert not RULE.settled({"a": level * 3, "b": level * 2 + [20.0] * 4}), (
        "every series must have settled"
    )
    assert not RULE.settled({})


def test_one_slow_call_in_a_window_does_not_unsettle_a_median_but_does_a_mean():
    samples = [10.0, 10, 10, 500] + [10.0] * 8
    assert RULE.settled({"a": samples})
    assert not RULE.settled({"a": samples}, {"a": mean})


def test_measuring_stops_when_settled_and_keeps_every_sample():
    drift = chain([30.0, 25, 20, 15], repeat(10.0))
    series, stable = until_settled(lambda: {"a": next(drift)}, RULE, 1000, ticking())
    assert stable
    assert series["a"] == [30, 25, 20, 15] + [10] * 12


def test_measuring_stops_when_the_time_is_up_and_says_so():
    noise = cycle([10.0, 10, 10, 10, 20, 20, 20, 20])
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 30, ticking())
    assert not stable
    assert len(series["a"]) == 32, "the clock is looked at from the third round on"
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 0, ticking())
    assert (len(series["a"]), stable) == (3, False), "three samples at least, for a spread"


def test_spread_is_the_range_over_the_median():
    assert spread([9, 10, 12]) == pytest.approx(0.3)
    assert np.isnan(spread([3]))


def test_the_notch_of_a_box_plot_by_hand():
    """Quartiles of 8 9 10 11 12 13 14 15 16: 10 and 14, the median 12, root 9."""
    assert notch(range(8, 17)) == pytest.approx(1.57 * 4 / 3 / 12)
    assert notch([5, 5, 5]) == 0
    assert np.isnan(notch([3]))
