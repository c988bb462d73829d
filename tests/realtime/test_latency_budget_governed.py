"""A governed run with real engines: the loop under a budget, while frames are said to be slow for a while."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from engines.choose import Choice
from engines.errors import ModelError
from realtime import latency_budget as governor
from realtime import latency_budget as module
from realtime.capture import every_frame
from realtime.latency_budget import Governed
from realtime.pipeline import run_frames
from realtime.sources.images import Demo
from realtime.statistics import Run

TINY = Choice("compact", "random", size_px=64, precision="fp32")


class Kept:
    """A sink that keeps the pictures' lower right corners, where the heat map is."""

    needs_picture = True

    def __init__(self):
        self.corners = []

    def write(self, record, picture):
        self.corners.append(picture[-40:-10, -40:-10].copy())


@pytest.fixture
def load(monkeypatch):
    """What the governor is told that a frame takes, in milliseconds: however long it takes on this machine."""
    told_ms, observe = {"frame": 10.0, "engine": 5.0}, governor.Governor.observe

    def observed(self, now_s, frame_ms, engine_ms):
        return observe(self, now_s, told_ms["frame"], told_ms["engine"])

    monkeypatch.setattr(governor.Governor, "observe", observed)
    return told_ms


@pytest.fixture
def impatient(monkeypatch):
    """Steps up are tried after a tenth of a second."""
    monkeypatch.setattr(governor, "HOLD_S", 0.1)


def play(governed, sink, until, frames=4000):
    """Records of a run that ends when ``until`` says so."""
    records = []
    with closing(run_frames(every_frame(Demo(frames)), governed, [sink], Run())) as loop:
        for record in loop:
            records.append(record)
            if until(records):
                return records
    raise AssertionError(f"never: {governed.summary()}")


def test_under_load_it_steps_down_says_so_and_comes_back(impatient, load):
    told, sink, load["frame"] = [], Kept(), 100.0
    governed = Governed(TINY, 80.0, told.append)
    ladder = governed._ladder
    records = play(governed, sink, lambda _: governed.summary()["over_budget"])
    assert governed.rung == ladder[-1], "what is not the engine takes longer than the budget"
    names = [rung.name for rung in ladder]
    way_down = [(names.index(step["from"]), names.index(step["to"])) for step in governed.steps]
    assert all(source < target for source, target in way_down)
    load["frame"] = 10.0
    records += play(governed, sink, lambda _: governed.rung == ladder[0])

    for record in records:
        rung = ladder[names.index(record.rung)]
        side = rung.choice.size_px // (8 if rung.choice.layer else 1)
        assert record.found.map_hw.shape == (side, side), "each frame is of the rung that its record names"
    assert [step["from"] for step in governed.steps] == [names[0], *(step["to"] for step in governed.steps[:-1])]
    assert governed.steps[-1]["to"] == names[0]
    assert {record.rung for record in records} <= set(names)
    assert len({record.rung for record in records}) > 1
    assert "over the budget of 80 ms" in governed.steps[0]["why"]
    assert sum("even the cheapest setting" in line for line in told) == 1
    assert len(told) == len(governed.steps) + 1
    governed.close()


def test_within_budget_it_is_the_plain_loop():
    governed = Governed(TINY, 10_000.0, pytest.fail)
    records = play(governed, Kept(), lambda records: len(records) == 60)
    assert [record.frame.index for record in records] == list(range(60))
    expected = governed.localizer.localize([next(iter(Demo(4000))).image_bgr])[0]
    np.testing.assert_array_equal(records[0].found.map_hw, expected.map_hw)
    assert governed.summary() == {"budget_ms": 10_000.0, "rung": records[0].rung, "steps": [], "over_budget": None}
    governed.close()


@pytest.fixture(scope="module")
def descended():
    """A run with a budget that nothing keeps to, and a rung that cannot be built: (governed, what was told, sink, records)."""
    real = module.rungs

    def with_a_bad_one(choice):
        first, *rest = real(choice)
        bad = replace(first, name="of 50 px", choice=replace(first.choice, size_px=50), cost=0.9 * first.cost)
        return [first, bad, *rest]

    told, sink = [], Kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rungs", with_a_bad_one)
        governed = Governed(TINY, 0.01, told.append)
    cheapest = governed._ladder[-1].name

    def at_the_end(records):
        return governed.summary()["over_budget"] and sum(record.rung == cheapest for record in records) >= 25

    yield governed, told, sink, play(governed, sink, at_the_end)
    governed.close()


def test_a_rung_that_cannot_be_built_is_left_out_and_named(descended):
    governed, told, _, _ = descended
    assert any("left out: of 50 px" in line and "not a multiple of 32" in line for line in told)
    assert "of 50 px" not in {step["to"] for step in governed.steps}


def test_a_first_rung_that_cannot_be_built_is_the_users_mistake():
    with pytest.raises(ModelError, match="not a multiple of 32"):
        Governed(replace(TINY, size_px=50), 10.0, pytest.fail)


def test_few_engines_are_open_at_once(descended):
    governed = descended[0]
    choices = {rung.choice for rung in governed._ladder}
    assert len(governed._open) <= 2 < len(choices)


def test_the_cheapest_rung_keeps_a_heat_map_for_several_frames(descended):
    governed, _, sink, records = descended
    last = [i for i, record in enumerate(records) if record.rung == governed._ladder[-1].name]
    fresh = [i for i in last[1:] if not np.array_equal(sink.corners[i], sink.corners[i - 1])]
    assert 0 < len(fresh) <= 1 + len(last) // governed._ladder[-1].heat_map_every
