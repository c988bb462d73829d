"""Votes on the grid: carried, added and read, against loops over cells."""

import numpy as np
import pytest

from realtime.tracking.optical_flow import Motion, Step
from realtime.tracking.vote_grid import KEPT, KEPT_STILL, MOST, UNSEEN, Memory

W, H = 160, 80  # two pixels a cell


@pytest.fixture
def memory():
    return Memory(Motion(W, H), W, H)


def field(memory, *boxes):
    votes = np.full_like(memory.empty, -1.0)
    for (x0, y0, x1, y1), value in boxes:
        votes[y0:y1, x0:x1] = value
    return votes


def test_the_box_is_that_of_the_heaviest_blob(memory):
    votes = field(memory, ((5, 5, 15, 15), 1.0), ((40, 10, 60, 30), 2.0))
    assert memory.box(votes) == pytest.approx((80, 20, 120, 60), abs=2)
    assert memory.box(field(memory)) is None


def test_a_lighter_blob_near_the_last_box_beats_a_heavier_one_far_away(memory):
    votes = field(memory, ((5, 5, 20, 20), 1.0), ((50, 10, 68, 28), 1.0))
    assert memory.box(votes)[0] == pytest.approx(100, abs=2)
    assert memory.box(votes, near_px=(10, 10, 40, 40))[0] == pytest.approx(10, abs=2)


def test_votes_go_with_the_flow_fade_and_take_the_motion_in(memory):
    votes = np.random.default_rng(0).normal(size=memory.empty.shape).astype(np.float32)
    flow = np.zeros((*memory.empty.shape, 2), np.float32)
    flow[..., 0] = -3  # what is here was three cells to the left
    evidence = np.random.default_rng(1).uniform(-1, 1, memory.empty.shape).astype(np.float32)
    found = memory.carried(votes, Step(flow, lambda: (evidence, 1.0)))
    for y, x in [(0, 3), (10, 40), (39, 79)]:
        assert found[y, x] == pytest.approx(KEPT * votes[y, x - 3] + evidence[y, x], abs=1e-5)
    assert found[5, 1] == pytest.approx(KEPT * UNSEEN + evidence[5, 1], abs=1e-5)


def test_where_nothing_moves_votes_hardly_fade(memory):
    votes = field(memory, ((5, 5, 15, 15), 1.0))
    still = Step(np.zeros((*memory.empty.shape, 2), np.float32), lambda: (memory.empty, 0.0))
    assert memory.carried(votes, still) == pytest.approx(KEPT_STILL * votes)


def unmoved():
    raise AssertionError("nobody may ask what moves: that takes time")


def test_where_motion_is_not_judged_votes_are_carried_and_fade(memory):
    votes = field(memory, ((5, 5, 15, 15), 1.0))
    flow = np.zeros((*memory.empty.shape, 2), np.float32)
    assert memory.carried(votes, Step(flow, unmoved), judged=False) == pytest.approx(KEPT * votes)


def test_a_blank_frame_lets_votes_fade_and_a_cut_forgets_them(memory):
    votes = field(memory, ((5, 5, 15, 15), 1.0))
    still = Step(None, lambda: (memory.empty, 0.0), blank=True)
    assert memory.carried(votes, still) == pytest.approx(KEPT * votes)
    assert not memory.carried(votes, Step(None, unmoved, cut=True)).any()


def test_an_answer_votes_in_its_window_only_for_what_is_hot_and_boxed(memory):
    map_hw = np.full((16, 16), 0.1, np.float32)
    map_hw[4:12, 4:12] = 1
    found = memory.voted(memory.empty, map_hw, (50, 30, 70, 50), (40, 20, 80, 60), whole=False, moving=1.0)
    assert found[20, 30] > 1  # in the middle of the window
    assert found[11, 21] < 0  # in its corner
    outside = np.ones(found.shape, bool)
    outside[10:30, 20:40] = False
    assert not found[outside].any()
    assert np.abs(memory.voted(found + 9, map_hw, (50, 30, 70, 50), (40, 20, 80, 60), whole=False, moving=1.0)).max() == MOST


def test_cells_are_at_least_two_a_side_and_inside(memory):
    assert memory.cells((-30, -30, -20, -20)) == (0, 0, 2, 2)
    assert memory.cells((158, 78, 400, 400)) == (78, 38, 80, 40)
    assert memory.cells((20, 20, 40, 60)) == (10, 10, 20, 30)


def test_a_map_is_put_where_its_window_is(memory):
    placed = memory.placed(np.ones((16, 16), np.float32), (40, 20, 80, 60))
    assert placed.sum() == 20 * 20
    assert placed[10:30, 20:40].all()


def test_what_lies_in_a_box_moved_as_its_surest_cells_did(memory):
    flow = np.zeros((*memory.empty.shape, 2), np.float32)
    flow[10:20, 10:20] = (-2, 1)
    votes = field(memory, ((10, 10, 20, 20), 1.0), ((40, 10, 50, 20), 0.5))
    assert memory.shift_px(votes, Step(flow, unmoved), (10, 10, 60, 60)) == (4, -2)
    assert memory.shift_px(votes, Step(None, unmoved, cut=True), (10, 10, 60, 60)) == (0, 0)
