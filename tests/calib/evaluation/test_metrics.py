"""Measures by hand arithmetic."""

import numpy as np
import pytest

from calib.evaluation.metrics import box_acc_v2, centre_correct, constant_boxes, corloc


def test_metrics_by_hand():
    assert corloc(np.array([0.5, 0.51, 0.9, 0.1])) == 0.5  # 0.5 itself does not count
    true = np.array([[0.0, 0.0, 10.0, 10.0]] * 3)
    found = np.array(
        [[4.0, 4, 6, 6], [0, 0, 4, 4], [8, 8, 16, 16]]
    )  # centres 5,5 and 2,2 and 12,12
    assert centre_correct(found, true, 0.0).tolist() == [True, True, False]
    assert centre_correct(found, true, 0.2).tolist() == [True, True, False]  # 2 .. 8
    assert centre_correct(found, true, 0.25).tolist() == [True, False, False]  # 2.5 .. 7.5
    assert centre_correct(found, true, 0.5).tolist() == [True, False, False]  # 5 alone


def test_a_margin_is_excluded_at_each_side():
    """Dwaraknath et al., section 5.2.2: "excluding 20% margins on all sides", pixel by pixel."""
    rng = np.random.default_rng(0)
    true = np.sort(rng.random((40, 2, 2)), axis=1).reshape(40, 4) * 100
    found = np.sort(rng.random((40, 2, 2)), axis=1).reshape(40, 4) * 100
    for margin in (0.0, 0.1, 0.2, 0.45):
        for (x0, y0, x1, y1), (a, b, c, d), is_right in zip(
            true, found, centre_correct(found, true, margin), strict=True
        ):
            left, right = x0 + margin * (x1 - x0), x1 - margin * (x1 - x0)
            top, bottom = y0 + margin * (y1 - y0), y1 - margin * (y1 - y0)
            assert is_right == (left <= (a + c) / 2 <= right and top <= (b + d) / 2 <= bottom)


def test_the_best_constant_box_beats_the_mean_where_boxes_have_two_kinds():
    boxes = np.array([[0.0, 0, 0.5, 0.5]] * 6 + [[0.5, 0.5, 1, 1]] * 4)
    constants = constant_boxes(boxes)
    assert constants.best_constant == (0.0, 0.0, 0.5, 0.5)
    assert constants.mean_box == pytest.approx((0.2, 0.2, 0.7, 0.7))
    assert constants.centre_box == pytest.approx((0.25, 0.25, 0.75, 0.75))


def test_box_accuracy_counts_an_iou_equal_to_the_threshold():
    found = box_acc_v2(np.array([0.29, 0.3, 0.5, 0.69, 0.7]))
    assert found == {"0.3": 0.8, "0.5": 0.6, "0.7": 0.2, "mean": pytest.approx(1.6 / 3)}
    assert box_acc_v2(np.array([])) == {"0.3": 0, "0.5": 0, "0.7": 0, "mean": 0}
