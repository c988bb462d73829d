"""The cues of an answer by hand arithmetic, what a model says of them, and models that cannot be
used.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from engines.confidence import (
    CUES,
    SIDE,
    ConfidenceModel,
    averaged,
    confidence_model_of,
    cues_of,
    terms,
)
from engines.dense import DenseHead
from engines.engine import TensorSpec
from engines.errors import ModelError
from engines.head import load_head, shipped_head_names, shipped_head_path
from engines.localizer import Localizer
from tests.engines.mock import MockEngine

CERTAIN = ConfidenceModel(
    CUES, (0.0,) * len(CUES), (1.0,) * len(CUES), (1.0, *(0.0,) * (len(CUES) - 1)), 0.0
)
"""It looks at the logit alone."""


def named(box, map_hw, probability=0.25, logit=3.0):
    return dict(zip(CUES, cues_of(box, map_hw, probability, logit), strict=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_shares_of_cues_add_up_to_the_logit_and_are_nothing_for_a_usual_box(pairs):
    rng = np.random.default_rng(0)
    count = len(CUES)
    weight = rng.normal(size=count + (count * (count + 1) // 2 if pairs else 0))
    mean, scale = rng.normal(size=count), rng.uniform(0.5, 2, count)
    model = ConfidenceModel(CUES, tuple(mean), tuple(scale), tuple(weight), 0.3)
    cues = rng.normal(size=count)
    logit = math.log(model(cues) / (1 - model(cues)))
    assert sum(model.shares(cues)) + 0.3 == pytest.approx(logit)
    assert model.shares(mean) == pytest.approx([0.0] * count)
    one = mean.copy()
    one[3] += scale[3]  # a standard deviation more than usual, and all else as usual
    place = count + sum(count - each for each in range(3))
    alone = weight[3] + (weight[place] if pairs else 0)
    assert model.shares(one) == pytest.approx([0, 0, 0, alone, *[0] * (count - 4)])


def test_cues_of_a_flat_map_are_those_of_its_box():
    flat = np.full((SIDE, SIDE), 2.0, np.float32)
    found = named((0.25, 0.5, 0.75, 0.75), flat)
    spread = 2 * math.log(math.sqrt((1 - 1 / SIDE**2) / 12))  # of SIDE equal cells, along both axes
    assert found == pytest.approx(
        {
            "logit": 3.0,
            "probability": 0.5,
            "strength": math.log(2),
            "inside": 0.125,
            "spread": spread,
            "off_centre": 0.0,
            "size": math.log(0.125),
            "aspect": math.log(2),
        },
        abs=1e-6,
    )
    assert named((0.03, 0.5, 0.5, 0.6), flat)["inside"] == pytest.approx(
        0.47 * 0.1, abs=1e-6
    )  # parts of cells count in part


def test_what_lies_inside_and_how_far_it_spreads():
    map_hw = np.zeros((SIDE, SIDE), np.float32)
    map_hw[4, 4], map_hw[12, 12] = 3, 1
    found = named((0.0, 0.0, 0.5, 0.5), map_hw)
    assert found["inside"] == pytest.approx(0.75)
    assert found["spread"] == pytest.approx(2 * math.log(0.5 * math.sqrt(0.75 * 0.25)))
    assert (
        named((0, 0, 0.5, 0.5), np.full((SIDE, SIDE), 0.1, np.float32))["spread"] > found["spread"]
    )


@pytest.mark.parametrize("side", [8, 16, 128, 227])
def test_maps_of_any_size_have_the_same_cues(side):
    ramp = np.outer(np.linspace(1, 2, side), np.linspace(1, 3, side)).astype(np.float32)
    assert averaged(ramp).shape == (SIDE, SIDE)
    one, other = named((0.1, 0.2, 0.8, 0.9), ramp), named((0.1, 0.2, 0.8, 0.9), averaged(ramp))
    assert one == pytest.approx(other)
    assert one["inside"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "map_hw", [np.zeros((SIDE, SIDE), np.float32), np.eye(SIDE, dtype=np.float32) * 1e-30]
)
@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 0, 1, 1), (0.3, 0.3, 0.3, 0.9)])
def test_empty_maps_and_boxes_have_cues_too(box, map_hw):
    assert np.isfinite(cues_of(box, map_hw, 0.0, -5.0)).all()


def test_the_model_is_logistic_and_holds_what_it_never_saw():
    cues = [2.0, *(0.0,) * (len(CUES) - 1)]
    assert CERTAIN(cues) == pytest.approx(1 / (1 + math.exp(-2)))
    assert CERTAIN([1e9, *cues[1:]]) == CERTAIN([3.0, *cues[1:]])
    shifted = replace(
        CERTAIN, mean=(1.0, *CERTAIN.mean[1:]), scale=(0.5, *CERTAIN.scale[1:]), bias=-1.0
    )
    assert shifted(cues) == pytest.approx(1 / (1 + math.exp(-(2 - 1))))


def test_a_model_may_weigh_the_products_of_its_cues():
    names = ("a", "b", "c")
    count = len(names)
    cues = [-1.0, 0.5, 2.0]
    weight = tuple(np.random.default_rng(0).normal(size=count + count * (count + 1) // 2).tolist())
    total = 0.3 + sum(w * cue for w, cue in zip(weight, cues, strict=False))
    place = count
    for i in range(count):
        for j in range(i, count):
            total += weight[place] * cues[i] * cues[j]
            place += 1
    model = ConfidenceModel(names, (0.0,) * count, (1.0,) * count, weight, 0.3)
    assert model(cues) == pytest.approx(1 / (1 + math.exp(-total)))
    assert confidence_model_of(json.loads(json.dumps(model.stored())), names) == model
    held = terms([9.0] * count, model.mean, model.scale, pairs=True)
    assert held == [3.0] * count + [9.0] * 6  # held at 3, then multiplied


def test_a_stored_model_comes_back_and_one_of_other_cues_is_none():
    stored = json.loads(json.dumps(CERTAIN.stored()))
    assert confidence_model_of(stored) == CERTAIN
    assert confidence_model_of(None) is None
    assert confidence_model_of({**stored, "signs": ["logit"]}) is None
    with pytest.raises(ValueError, match="weights"):
        confidence_model_of({**stored, "weight": [1.0]})


class Sure(MockEngine):
    """The mock, whose first image has a logit of 2 and whose others have one of -2."""

    def __init__(self, confidence_model=CERTAIN):
        super().__init__(96)
        self.outputs = (*self.outputs, TensorSpec("logit", np.dtype(np.float32), (1,)))
        self.metadata = {
            **self.metadata,
            "sightline": json.dumps(
                {"trust": confidence_model.stored() if confidence_model else None, "head": "0" * 64}
            ),
        }

    def run(self, feeds):
        return {
            **super().run(feeds),
            "logit": np.array([2.0 if self.calls == 1 else -2.0], np.float32),
        }


PHOTOS = [np.full((96, 128, 3), 90, np.uint8)] * 2


def test_every_answer_says_how_sure_it_is():
    found = Localizer(Sure()).localize(PHOTOS)
    assert [each.confidence for each in found] == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
    )
    assert all(each.box_xyxy_px is not None for each in found)
    assert [each.confidence for each in Localizer(MockEngine(96)).localize(PHOTOS)] == [None, None]


def test_a_localizer_abstains_where_it_is_told_to():
    localizer = Localizer(Sure())
    localizer.abstain_below(0.5)
    sure, unsure = localizer.localize(PHOTOS)
    assert sure.box_xyxy_px is not None
    assert unsure.box_xyxy_px is None
    assert unsure.confidence < 0.5
    localizer.abstain_below(0.0)
    assert localizer.localize(PHOTOS)[1].box_xyxy_px is not None


def test_a_head_that_does_not_say_cannot_be_asked():
    localizer = Localizer(Sure(confidence_model=None))
    localizer.abstain_below(0.0)
    with pytest.raises(ModelError, match=r"nothing tells .*\(fitted head\).*fit it again"):
        localizer.abstain_below(0.5)


@pytest.mark.parametrize("name", shipped_head_names())
def test_every_shipped_head_says_how_sure_it_is(name):
    head = load_head(shipped_head_path(name))
    assert isinstance(head, DenseHead) or head.confidence_model is not None
