"""What is said against what is right, by hand arithmetic."""

import numpy as np
import pytest

from calib.evaluation.metrics import calibration_error, confidence_report, coverage, reliability

SURE, RIGHT = np.array([0.1, 0.15, 0.85, 0.95, 1.0]), np.array([False, True, True, True, True])


def test_boxes_are_counted_by_what_was_said():
    rows = reliability(SURE, RIGHT)
    assert rows == [
        {"boxes": 2.0, "said": pytest.approx(0.125), "right": 0.5},
        {"boxes": 1.0, "said": pytest.approx(0.85), "right": 1.0},
        {"boxes": 2.0, "said": pytest.approx(0.975), "right": 1.0},
    ]
    assert calibration_error(rows) == pytest.approx((2 * 0.375 + 0.15 + 2 * 0.025) / 5)


def test_coverage_is_what_is_kept_and_how_much_of_that_is_right():
    found = coverage(SURE, RIGHT)
    assert found["0.0"] == {"kept": 1.0, "corloc": 0.8}
    assert found["0.9"] == {"kept": 0.4, "corloc": 1.0}
    assert coverage(np.array([0.2]), np.array([True]))["0.5"] == {"kept": 0.0, "corloc": 0.0}


def test_what_min_score_leaves_is_said_where_it_is_asked():
    assert confidence_report(SURE, RIGHT, 0.12)["at_min_score"] == {
        "min_score": 0.12,
        "kept": 0.8,
        "corloc": 1.0,
    }
    assert "at_min_score" not in confidence_report(SURE, RIGHT, 0.0)
