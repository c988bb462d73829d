"""Which way places go, on flow made by hand."""

import numpy as np
import pytest

from realtime.tracking.optical_flow import Motion, MotionHistory, MotionStep

W, H = 160, 80  # two pixels a cell


def step(*moving, shake=0.0, seed=0):
    """A step in which cells (x0, y0, x1, y1) move by (x, y), each by a random shake more."""
    flow = np.zeros((40, 80, 2), np.float32)
    for (x0, y0, x1, y1), by in moving:
        flow[y0:y1, x0:x1] = -np.array(by, np.float32)
        flow[y0:y1, x0:x1] += (
            np.random.default_rng(seed).normal(0, shake, (y1 - y0, x1 - x0, 2)).astype(np.float32)
        )
    return MotionStep(flow, lambda: (np.zeros((40, 80), np.float32), 1.0))


@pytest.fixture
def course():
    return MotionHistory(Motion(W, H))


LEFT, RIGHT, BOTH = (20, 10, 32, 20), (32, 10, 38, 20), (20, 10, 38, 20)
VOTES = np.ones((40, 80), np.float32)


def test_of_two_in_a_box_that_go_their_own_ways_the_larger_is_meant(course):
    for _ in range(8):
        course.add(step((LEFT, (0.4, 0)), (RIGHT, (-0.4, 0))))
    alike = course.alike(BOTH, VOTES)
    assert alike[12:18, 24:30].mean() > 0.9
    assert alike[12:18, 34:36].mean() < 0.3


def test_parts_of_one_that_shake_are_alike_after_a_few_frames(course):
    first = None
    for number in range(20):
        course.add(step((LEFT, (0.5, 0)), shake=0.5, seed=number))
        first = course.alike(LEFT, VOTES)[12:18, 23:29].mean() if first is None else first
    assert course.alike(LEFT, VOTES)[12:18, 23:29].mean() > first + 0.2


def test_a_cut_begins_anew(course):
    course.add(step((LEFT, (1, 0))))
    course.add(MotionStep(None, lambda: (np.zeros((40, 80), np.float32), 0.0), cut=True))
    assert course.alike(LEFT, VOTES) == pytest.approx(1.0)
