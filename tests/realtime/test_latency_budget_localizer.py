"""A run with a latency budget and real engines: the loop under a budget, while frames are said to be slow for a
while.
"""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from engines.choose import open_localizer
from engines.errors import InputError, ModelError
from engines.localizer import Localizer
from engines.options import EngineOptions
from engines.presets import presets
from realtime import latency_budget
from realtime.capture import every_frame
from realtime.latency_budget import BudgetLocalizer
from realtime.pipeline import run_frames
from realtime.sources.demo import Demo
from realtime.statistics import Run
from tests.engines.mock import MockEngine

TINY = EngineOptions("compact", "random", size_px=64, precision="fp32")
LADDER = presets(TINY)


class Kept:
    """A sink that keeps the pictures' corners: in one of them, where no box lies, is the heat map."""

    needs_picture = True

    def __init__(self):
        self.corners = []

    def write(self, record, picture):
        near, far = slice(10, 40), slice(-40, -10)
        places = ((far, far), (near, far), (far, near), (near, near))
        self.corners.append([picture[place].copy() for place in places])

    def is_fresh(self, i):
        """Whether the heat map is another one than in the frame before it."""
        return not any(
            np.array_equal(now, before) for now in self.corners[i] for before in self.corners[i - 1]
        )


@pytest.fixture
def load(monkeypatch):
    """The times that the latency budget is given for each frame, in milliseconds, whatever they are
    on this machine.
    """
    given_ms = {"frame": 10.0, "engine": 5.0}
    observe = latency_budget.BudgetController.observe

    def observed(self, now_s, frame_ms, engine_ms):
        return observe(self, now_s, given_ms["frame"], given_ms["engine"])

    monkeypatch.setattr(latency_budget.BudgetController, "observe", observed)
    return given_ms


@pytest.fixture
def impatient(monkeypatch):
    """Steps up are tried after a tenth of a second."""
    monkeypatch.setattr(latency_budget, "HOLD_S", 0.1)


def play(budgeted, sink, until, frames=4000):
    """Records of a run that ends when ``until`` says so."""
    records = []
    with closing(run_frames(every_frame(Demo(frames)), budgeted, [sink], Run())) as loop:
        for record in loop:
            records.append(record)
            if until(records):
                return records
    raise AssertionError(f"never: {budgeted.summary()}")


@pytest.mark.usefixtures("impatient")
def test_under_load_it_steps_down_says_so_and_comes_back(load):
    notify, sink, load["frame"] = [], Kept(), 100.0
    budgeted = BudgetLocalizer(TINY, 80.0, notify.append)
    records = play(budgeted, sink, lambda _: budgeted.summary()["over_budget"])
    assert budgeted.preset == LADDER[-1], "what is not the engine takes longer than the budget"
    names = [preset.name for preset in LADDER]
    way_down = [(names.index(step["from"]), names.index(step["to"])) for step in budgeted.steps]
    assert all(source < target for source, target in way_down)
    load["frame"] = 10.0
    records += play(budgeted, sink, lambda _: budgeted.preset == LADDER[0])

    for record in records:
        preset = LADDER[names.index(record.preset)]
        side = preset.choice.size_px // (8 if preset.choice.layer else 1)
        assert record.found.map_hw.shape == (side, side), (
            "each frame is of the rung that its record names"
        )
    assert [step["from"] for step in budgeted.steps] == [
        names[0],
        *(step["to"] for step in budgeted.steps[:-1]),
    ]
    assert budgeted.steps[-1]["to"] == names[0]
    assert {record.preset for record in records} <= set(names)
    assert len({record.preset for record in records}) > 1
    assert "over the budget of 80 ms" in budgeted.steps[0]["why"]
    assert sum("even the cheapest setting" in line for line in notify) == 1
    assert len(notify) == len(budgeted.steps) + 1
    budgeted.close()


def test_within_budget_it_is_the_plain_loop():
    budgeted = BudgetLocalizer(TINY, 10_000.0, pytest.fail)
    records = play(budgeted, Kept(), lambda records: len(records) == 60)
    assert [record.frame.index for record in records] == list(range(60))
    assert isinstance(budgeted, Localizer)
    expected = budgeted.localize([next(iter(Demo(4000))).image_bgr])[0]
    np.testing.assert_array_equal(records[0].found.map_hw, expected.map_hw)
    assert budgeted.summary() == {
        "budget_ms": 10_000.0,
        "rung": records[0].preset,
        "steps": [],
        "over_budget": None,
    }
    budgeted.close()


class OpenEngines:
    """Opens localizers as a latency budget does, and counts the engines that are open."""

    def __init__(self):
        self.count = 0

    def open(self, choice, *given, **options):
        localizer = open_localizer(choice, *given, **options)
        close = localizer.engine.close

        def counted_close():
            self.count -= 1
            close()

        localizer.engine.close = counted_close
        self.count += 1
        return localizer


@pytest.fixture(scope="module")
def descended():
    """A run with a budget that nothing keeps to, and a preset that cannot be built: (localizer,
    notes, sink, records, open engines at the end).
    """

    def with_a_bad_one(choice):
        first, *rest = presets(choice)
        bad = replace(
            first, name="of 50 px", choice=replace(first.choice, size_px=50), cost=0.9 * first.cost
        )
        return [first, bad, *rest]

    notes, sink, engines = [], Kept(), OpenEngines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_budget, "presets", with_a_bad_one)
        patch.setattr(latency_budget, "open_localizer", engines.open)
        budgeted = BudgetLocalizer(TINY, 0.01, notes.append)

        def at_the_end(records):
            cheapest = sum(record.preset == LADDER[-1].name for record in records)
            return budgeted.summary()["over_budget"] and cheapest >= 25

        records = play(budgeted, sink, at_the_end)
        yield budgeted, notes, sink, records, engines.count
        budgeted.close()
    assert engines.count == 0


def test_a_rung_that_cannot_be_built_is_left_out_and_named(descended):
    budgeted, notes, *_ = descended
    assert any("left out: of 50 px" in line and "not a multiple of 32" in line for line in notes)
    assert "of 50 px" not in {step["to"] for step in budgeted.steps}


def test_a_first_rung_that_cannot_be_built_is_the_users_mistake():
    with pytest.raises(ModelError, match="not a multiple of 32"):
        BudgetLocalizer(replace(TINY, size_px=50), 10.0, pytest.fail)


def test_few_engines_are_open_at_once(descended):
    assert descended[-1] <= 2 < len({preset.choice for preset in LADDER})


def test_the_cheapest_rung_keeps_a_heat_map_for_several_frames(descended):
    _, _, sink, records, _ = descended
    last = [i for i, record in enumerate(records) if record.preset == LADDER[-1].name]
    fresh = [i for i in last[1:] if sink.is_fresh(i)]
    assert 0 < len(fresh) <= 1 + len(last) // LADDER[-1].heat_map_every


@pytest.fixture
def named_at_best(monkeypatch):
    """Only the best preset names boxes."""

    def opened(choice, *_):
        engine = MockEngine(64)
        if choice == LADDER[0].choice:
            naming = {"names": ["dog"], "shown_from": 0.5, "finer_from": 0.5, "finer": []}
            engine.metadata = {**engine.metadata, "sightline": json.dumps({"naming": naming})}
        return Localizer(engine)

    monkeypatch.setattr(latency_budget, "open_localizer", opened)


@pytest.mark.usefixtures("named_at_best")
def test_a_preset_that_lacks_the_name_that_is_looked_for_is_left_out(load):
    notify, load["frame"] = [], 100.0
    with closing(BudgetLocalizer(TINY, 80.0, notify.append)) as budgeted:
        budgeted.look_for(2)
        play(budgeted, Kept(), lambda _: notify)
        assert "left out" in notify[0]
        assert "does not name boxes" in notify[0]
        assert (budgeted.names, budgeted.wanted_class) == (("dog",), 2)


@pytest.mark.usefixtures("named_at_best")
def test_a_name_that_a_preset_lacks_is_said_once(load):
    notify, load["frame"] = [], 100.0
    with closing(BudgetLocalizer(TINY, 80.0, notify.append)) as budgeted:
        play(budgeted, Kept(), lambda _: budgeted.preset != LADDER[0])
        for _ in range(3):
            budgeted.look_for(2)
        assert sum("does not name boxes: any object is shown" in line for line in notify) == 1
        assert budgeted.wanted_class == 2
        with pytest.raises(InputError, match="outside"):
            budgeted.look_for(3)
