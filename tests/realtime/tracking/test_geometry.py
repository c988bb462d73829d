"""Boxes in windows, by hand."""

import pytest

from realtime.tracking.geometry import CALM, CALM_LATER, calmed, moved, touches, widened

FRAME = (200, 100)
WINDOW = (50.0, 0.0, 150.0, 80.0)


def test_a_windows_pixels_are_the_frames_but_for_its_corner():
    assert moved((1, 2, 30, 40), (50, 20, 90, 80)) == (51, 22, 80, 60)


def test_a_margin_is_a_share_of_each_side():
    assert widened((10, 20, 50, 100), 0.25) == (0, 0, 60, 120)


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
    assert calmed((10, 0, 110, 50), None, 1) == (10, 0, 110, 50)
    assert calmed((1, 0, 101, 50), (0, 0, 100, 50), 1) == pytest.approx((CALM, 0, 100 + CALM, 50))
    assert calmed((1, 0, 101, 50), (0, 0, 100, 50), 20) == pytest.approx((0.2, 0, 100.2, 50))
    assert calmed((1, 0, 101, 50), (0, 0, 100, 50), 999) == pytest.approx(
        (CALM_LATER, 0, 100 + CALM_LATER, 50)
    )
    assert calmed((80, 0, 180, 50), (0, 0, 100, 50), 1) == (80, 0, 180, 50)
    between = calmed((20, 0, 120, 50), (0, 0, 100, 50), 1)[0]
    assert 20 * CALM < between < 20
