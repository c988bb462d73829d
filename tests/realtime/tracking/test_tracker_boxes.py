"""Boxes in windows, and smoothed boxes, by hand."""

import pytest

from realtime.tracking.tracker import SMOOTH_SHARE, SMOOTH_SHARE_LATER, smoothed, touches

FRAME = (200, 100)
WINDOW = (50.0, 0.0, 150.0, 80.0)


@pytest.mark.parametrize(
    ("box", "cut_off"),
    [
        ((60, 10, 140, 70), False),
        ((51, 10, 140, 70), True),
        ((60, 10, 149, 70), True),
        ((60, 10, 140, 79), True),
        ((60, 0, 140, 70), False),
    ],
)
def test_a_box_is_cut_off_where_it_reaches_an_edge_that_is_not_the_frames(box, cut_off):
    assert touches(box, WINDOW, FRAME) is cut_off


def test_a_box_goes_a_part_of_the_way_to_one_that_is_alike_and_all_of_it_to_another():
    assert smoothed((10, 0, 110, 50), None, 1) == (10, 0, 110, 50)
    assert smoothed((1, 0, 101, 50), (0, 0, 100, 50), 1) == pytest.approx(
        (SMOOTH_SHARE, 0, 100 + SMOOTH_SHARE, 50)
    )
    assert smoothed((1, 0, 101, 50), (0, 0, 100, 50), 20) == pytest.approx((0.2, 0, 100.2, 50))
    assert smoothed((1, 0, 101, 50), (0, 0, 100, 50), 999) == pytest.approx(
        (SMOOTH_SHARE_LATER, 0, 100 + SMOOTH_SHARE_LATER, 50)
    )
    assert smoothed((80, 0, 180, 50), (0, 0, 100, 50), 1) == (80, 0, 180, 50)
    between = smoothed((20, 0, 120, 50), (0, 0, 100, 50), 1)[0]
    assert 20 * SMOOTH_SHARE < between < 20
