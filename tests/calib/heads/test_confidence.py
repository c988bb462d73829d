"""The confidence model of a head's boxes, fitted on cues and boxes that are made up."""

import numpy as np
import pytest

from calib.heads.confidence import head_confidence_model, logistic, smoothed
from calib.heads.linear import Answers, FeatureTable
from engines.confidence import SIDE, cues_of

RNG = np.random.default_rng(0)


def table_of(count, right, logits):
    """Images whose true box is the left half, and a box in each, right or not."""
    true = np.tile([0.0, 0.0, 0.5, 1.0], (count, 1))
    found = np.where(right[:, None], true, [0.5, 0.0, 1.0, 1.0])
    maps = RNG.random((count, SIDE, SIDE)).astype(np.float32)
    answers = Answers(maps, np.full(count, 0.5, np.float32), logits.astype(np.float32))
    nothing, names = np.zeros((count, 1), np.float32), tuple(map(str, range(count)))
    return FeatureTable(
        nothing, nothing, true, names, np.zeros(count, np.int64), names, answers
    ), found


def test_what_is_said_is_true_of_the_boxes():
    logits = RNG.normal(size=4000)
    true = 1 / (1 + np.exp(-1.5 * logits - 0.5))
    table, found = table_of(4000, RNG.random(4000) < true, logits)
    confidence_model = head_confidence_model(table, np.roll(found, 0, axis=0))
    box, map_hw = (0.3, 0.3, 0.6, 0.6), np.ones((SIDE, SIDE), np.float32)
    said = [confidence_model(cues_of(box, map_hw, 0.5, logit)) for logit in (-2.0, 0.0, 2.0)]
    assert said[0] < said[1] < said[2]
    each = np.array(
        [confidence_model(cues) for cues in table.answers.cues(np.tile(box, (4000, 1)))]
    )
    assert np.corrcoef(each, true)[0, 1] > 0.99


def test_few_boxes_say_little_and_never_all():
    right = np.ones(12, np.bool_)
    table, found = table_of(12, right, RNG.normal(size=12))
    said = [head_confidence_model(table, found)(cues) for cues in table.answers.cues(found)]
    assert said == pytest.approx([13 / 14] * 12, abs=0.02)
    assert smoothed(np.array([1.0, 1.0, 0.0])).tolist() == [3 / 4, 3 / 4, 1 / 3]


def test_a_table_without_answers_gives_no_model():
    table, found = table_of(4, np.ones(4, np.bool_), np.zeros(4))
    assert (
        head_confidence_model(
            FeatureTable(
                table.values,
                table.mirrored,
                table.boxes_xyxy,
                table.class_names,
                table.class_indices,
                table.groups,
            ),
            found,
        )
        is None
    )


def test_the_regression_finds_the_weights_and_counts_its_rows():
    x = RNG.normal(size=(3000, 2))
    right = (RNG.random(3000) < 1 / (1 + np.exp(-(x @ [1.0, -2.0] + 0.5)))).astype(float)
    weight, bias = logistic(x, right, np.ones(3000), 0.1)
    assert [*weight, bias] == pytest.approx([1.0, -2.0, 0.5], abs=0.25)
    twice = logistic(
        np.concatenate([x, x]), np.concatenate([right, right]), np.full(6000, 0.5), 0.1
    )
    assert [*twice[0], twice[1]] == pytest.approx([*weight, bias], abs=1e-9)
    assert abs(logistic(x, right, np.ones(3000), 1e6)[0]).max() < 0.01
