"""The refinement: its gradient against finite differences, and what it buys where squared error
misleads.
"""

import numpy as np

from calib.heads.linear import Refinement, Ridge, iou_and_gradient, predict, refined
from engines.boxes import iou


def made_boxes(count, seed):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)) * np.array([1, 1]), axis=1)
    corners[:, 1] += 0.05
    return corners.reshape(count, 4)


def test_the_gradient_of_the_iou_is_the_slope_of_the_iou():
    found, true = made_boxes(200, 0), made_boxes(200, 1)
    overlap, slope = iou_and_gradient(found, true)
    np.testing.assert_allclose(overlap, iou(found, true), atol=1e-12)
    assert (overlap > 0).sum() > 50
    step = 1e-7
    for edge in range(4):
        moved = step * np.eye(4)[edge]
        numeric = (iou(found + moved, true) - iou(found - moved, true)) / (2 * step)
        np.testing.assert_allclose(slope[:, edge], numeric, atol=1e-6)


def test_boxes_inside_out_or_apart_have_no_gradient():
    found = np.array([[0.6, 0.6, 0.4, 0.4], [0.0, 0.0, 0.1, 0.1]])
    overlap, slope = iou_and_gradient(found, np.array([[0.2, 0.2, 0.8, 0.8]] * 2))
    assert overlap.tolist() == [0, 0]
    assert not slope.any()


def test_the_refinement_fits_better_where_a_few_wild_ones_mislead_squared_error():
    """Nine in ten objects are small and follow the feature; one in ten fills the image and pulls
    every edge outwards.
    """
    rng = np.random.default_rng(2)

    def drawn(count):
        x = rng.random((count, 1))
        small = np.concatenate(
            [0.7 * x, np.full((count, 1), 0.4), 0.7 * x + 0.3, np.full((count, 1), 0.6)], axis=1
        )
        return x, np.where(rng.random((count, 1)) < 0.1, np.array([0.0, 0, 1, 1]), small)

    (x, boxes), (x_new, boxes_new) = drawn(400), drawn(400)
    ridge = Ridge(x, boxes).solve(1e-3)
    better = refined(x, boxes, *ridge, Refinement(hold=0.0, steps=300, rate=3e-3))
    overlap = [iou(predict(x_new, *head), boxes_new).mean() for head in (ridge, better)]
    assert overlap[1] > overlap[0] + 0.25, overlap


def test_it_stays_where_it_is_held():
    x, boxes = np.random.default_rng(3).random((50, 6)), made_boxes(50, 4)
    weight, bias = Ridge(x, boxes).solve(1.0)
    held, _ = refined(x, boxes, weight, bias, Refinement(hold=1e6))
    free, _ = refined(x, boxes, weight, bias, Refinement(hold=0.0))
    assert np.abs(held - weight).max() < np.abs(free - weight).max() / 10


def test_few_boxes_are_held_back_more_than_many():
    """The same 40 pairs, and the same 40 fifty times over: only their number differs."""
    x, boxes = np.random.default_rng(5).random((40, 8)), made_boxes(40, 6)
    weight, bias = Ridge(x, boxes).solve(1.0)
    few, _ = refined(x, boxes, weight, bias)
    many, _ = refined(np.tile(x, (50, 1)), np.tile(boxes, (50, 1)), weight, bias)
    assert np.abs(few - weight).sum() < 0.7 * np.abs(many - weight).sum()
