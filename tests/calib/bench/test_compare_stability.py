"""When a measurement has settled."""

from itertools import chain, cycle, repeat

import numpy as np
import pytest

from calib.bench.compare import Rule, interval, mean, notch, until_settled, window_values

RULE = Rule(2, "frames", 0.05)
TURNS = Rule(1, "rounds", 0.05, paired=True)


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


def test_an_interval_holds_the_true_median_nineteen_times_in_twenty():
    """Of 400 samples of 25 exponential times, whose median is ln 2."""
    rng = np.random.default_rng(5)
    ends = np.array([interval(rng.exponential(size=25).tolist()) for _ in range(400)])
    held = np.mean((ends[:, 0] <= np.log(2)) & (np.log(2) <= ends[:, 1]))
    assert 0.91 < held < 0.99


def test_a_figure_settles_when_chance_no_longer_moves_it():
    level = [9.8, 10.2] * 8
    assert RULE.settled({"a": level}), "eight blocks of 10"
    assert not RULE.settled({"a": level[:14]}), "seven blocks"
    assert not RULE.settled({"a": level[:15]}), "the eighth is not whole"
    assert not RULE.settled({"a": [8.0, 8, 12, 12] * 4}), "blocks of 8 and 12"
    assert RULE.settled({"a": [*level, 500.0, 500.0]}), "one slow block moves no median"
    assert not RULE.settled({"a": level, "b": [8.0, 8, 12, 12] * 4})
    assert not RULE.settled({})


def test_what_slows_all_calls_of_a_round_moves_no_paired_figure():
    pace = np.random.default_rng(0).uniform(1, 4, 12)
    series = {"Sightline": 5 * pace, "Sightline, other": 7 * pace}
    assert TURNS.settled(series)
    assert not Rule(1, "rounds", 0.05).settled(series)


def test_peers_need_be_known_less_well():
    ours, noise = np.full(10, 4.0), np.array([1, 1.16] * 5)
    assert TURNS.settled({"Sightline": ours, "torch": ours * noise})
    assert not TURNS.settled({"Sightline": ours, "Sightline, other": ours * noise})


def test_measuring_stops_when_settled_and_keeps_every_sample():
    drift = chain([30.0, 30, 20, 20], repeat(10.0))
    series, stable = until_settled(lambda: {"a": next(drift)}, RULE, 1000, ticking())
    assert stable
    assert series["a"][:5] == [30, 30, 20, 20, 10]
    assert len(series["a"]) % 2 == 0


def test_measuring_stops_when_the_time_is_up_and_says_so():
    noise = cycle([10.0, 10, 20, 20])
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 30, ticking())
    assert not stable
    assert len(series["a"]) == 32, "the clock is looked at from the third sample on"
    report = RULE.report(series, stable, 30)
    assert (report["widest"], report["stable"], report["time_limit_s"]) == ("a", False, 30)
    assert report["margin"] > 0.05
    series, stable = until_settled(lambda: {"a": next(noise)}, RULE, 0, ticking())
    assert (len(series["a"]), stable) == (3, False), "three samples at least, for a spread"
    assert RULE.report(series, stable, 0)["margin"] is None


def test_the_notch_of_a_box_plot_by_hand():
    """Quartiles of 8 9 10 11 12 13 14 15 16: 10 and 14, the median 12, root 9."""
    assert notch(range(8, 17)) == pytest.approx(1.57 * 4 / 3 / 12)
    assert notch([5, 5, 5]) == 0
    assert np.isnan(notch([3]))
