"""Boxes by hand."""

import numpy as np

from engines.boxes import shared, shifted, voted, with_margin


def test_the_share_of_the_smaller_box():
    """100 of the smaller one's 200 pixels; all of it; none; a box without area."""
    large = [0, 0, 100, 100]
    others = np.array([[90, 0, 110, 10], [10, 10, 20, 20], [100, 0, 120, 100], [50, 50, 50, 60]])
    np.testing.assert_allclose(shared(large, others), [0.5, 1, 0, 0])
    np.testing.assert_allclose(shared(others, large), [0.5, 1, 0, 0])


def test_a_box_moves_with_all_its_edges():
    assert shifted((1, 2, 30, 40), 50, 20) == (51, 22, 80, 60)


def test_a_margin_is_a_share_of_each_side():
    assert with_margin((10, 20, 50, 100), 0.25) == (0, 0, 60, 120)


def test_boxes_vote_with_score_and_overlap():
    """The second overlaps the first by 90 of 110; the third by a third, which is too little."""
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [5, 0, 15, 10]], np.float64)
    scores = np.array([0.8, 0.4, 0.9])
    one, other = 0.8, 0.4 * 90 / 110
    expected = (one * boxes[0] + other * boxes[1]) / (one + other)
    np.testing.assert_allclose(voted(boxes, scores, np.array([2, 0])), [boxes[2], expected])
    np.testing.assert_allclose(voted(boxes, np.zeros(3), np.array([2])), boxes[2:])
