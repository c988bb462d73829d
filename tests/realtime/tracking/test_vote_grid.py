"""Votes on the grid: propagated, added and read, against loops over cells."""

import numpy as np
import pytest

from realtime.tracking.optical_flow import Motion, MotionStep
from realtime.tracking.vote_grid import KEPT, KEPT_STILL, MOST, UNSEEN, VoteGrid

W, H = 160, 80  # two pixels a cell


@pytest.fixture
def vote_grid():
    return VoteGrid(Motion(W, H), W, H)


def field(vote_grid, *boxes):
    votes = np.full_like(vote_grid.empty, -1.0)
    for (x0, y0, x1, y1), value in boxes:
        votes[y0:y1, x0:x1] = value
    return votes


def test_the_box_is_that_of_the_heaviest_blob(vote_grid):
    votes = field(vote_grid, ((5, 5, 15, 15), 1.0), ((40, 10, 60, 30), 2.0))
    assert vote_grid.box(votes) == pytest.approx((80, 20, 120, 60), abs=2)
    assert vote_grid.box(field(vote_grid)) is None


def test_a_lighter_blob_near_the_last_box_beats_a_heavier_one_far_away(vote_grid):
    votes = field(vote_grid, ((5, 5, 20, 20), 1.0), ((50, 10, 68, 28), 1.0))
    assert vote_grid.box(votes)[0] == pytest.approx(100, abs=2)
    assert vote_grid.box(votes, near_px=(10, 10, 40, 40))[0] == pytest.approx(10, abs=2)


def test_votes_go_with_the_flow_fade_and_take_the_motion_in(vote_grid):
    votes = np.random.default_rng(0).normal(size=vote_grid.empty.shape).astype(np.float32)
    flow = np.zeros((*vote_grid.empty.shape, 2), np.float32)
    flow[..., 0] = -3  # what is here was three cells to the left
    evidence = np.random.default_rng(1).uniform(-1, 1, vote_grid.empty.shape).astype(np.float32)
    found = vote_grid.propagated(votes, MotionStep(flow, lambda: (evidence, 1.0)))
    for y, x in [(0, 3), (10, 40), (39, 79)]:
        assert found[y, x] == pytest.approx(KEPT * votes[y, x - 3] + evidence[y, x], abs=1e-5)
    assert found[5, 1] == pytest.approx(KEPT * UNSEEN + evidence[5, 1], abs=1e-5)


def test_where_nothing_moves_votes_hardly_fade(vote_grid):
    votes = field(vote_grid, ((5, 5, 15, 15), 1.0))
    still = MotionStep(
        np.zeros((*vote_grid.empty.shape, 2), np.float32), lambda: (vote_grid.empty, 0.0)
    )
    assert vote_grid.propagated(votes, still) == pytest.approx(KEPT_STILL * votes)


def unmoved():
    raise AssertionError("what moves is not computed here: that takes time")


def test_where_motion_is_not_rated_votes_are_propagated_and_fade(vote_grid):
    votes = field(vote_grid, ((5, 5, 15, 15), 1.0))
    flow = np.zeros((*vote_grid.empty.shape, 2), np.float32)
    assert vote_grid.propagated(votes, MotionStep(flow, unmoved), rated=False) == pytest.approx(
        KEPT * votes
    )


def test_a_blank_frame_lets_votes_fade_and_a_cut_forgets_them(vote_grid):
    votes = field(vote_grid, ((5, 5, 15, 15), 1.0))
    still = MotionStep(None, lambda: (vote_grid.empty, 0.0), blank=True)
    assert vote_grid.propagated(votes, still) == pytest.approx(KEPT * votes)
    assert not vote_grid.propagated(votes, MotionStep(None, unmoved, cut=True)).any()


def test_an_answer_votes_in_its_window_only_for_what_is_hot_and_boxed(vote_grid):
    map_hw = np.full((16, 16), 0.1, np.float32)
    map_hw[4:12, 4:12] = 1
    found = vote_grid.voted(
        vote_grid.empty, map_hw, (50, 30, 70, 50), (40, 20, 80, 60), whole=False, moving=1.0
    )
    assert found[20, 30] > 1  # in the middle of the window
    assert found[11, 21] < 0  # in its corner
    outside = np.ones(found.shape, bool)
    outside[10:30, 20:40] = False
    assert not found[outside].any()
    assert (
        np.abs(
            vote_grid.voted(
                found + 9, map_hw, (50, 30, 70, 50), (40, 20, 80, 60), whole=False, moving=1.0
            )
        ).max()
        == MOST
    )


def test_cells_are_at_least_two_a_side_and_inside(vote_grid):
    assert vote_grid.cells((-30, -30, -20, -20)) == (0, 0, 2, 2)
    assert vote_grid.cells((158, 78, 400, 400)) == (78, 38, 80, 40)
    assert vote_grid.cells((20, 20, 40, 60)) == (10, 10, 20, 30)


def test_a_map_is_put_where_its_window_is(vote_grid):
    placed = vote_grid.placed(np.ones((16, 16), np.float32), (40, 20, 80, 60))
    assert placed.sum() == 20 * 20
    assert placed[10:30, 20:40].all()


def test_what_lies_in_a_box_moved_as_its_surest_cells_did(vote_grid):
    flow = np.zeros((*vote_grid.empty.shape, 2), np.float32)
    flow[10:20, 10:20] = (-2, 1)
    votes = field(vote_grid, ((10, 10, 20, 20), 1.0), ((40, 10, 50, 20), 0.5))
    assert vote_grid.shift_px(votes, MotionStep(flow, unmoved), (10, 10, 60, 60)) == (4, -2)
    assert vote_grid.shift_px(votes, MotionStep(None, unmoved, cut=True), (10, 10, 60, 60)) == (
        0,
        0,
    )
