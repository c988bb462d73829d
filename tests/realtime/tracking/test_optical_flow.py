"""Motion on a small grid: against known displacements."""

import json

import cv2
import numpy as np
import pytest

from realtime.tracking.optical_flow import Motion, MotionState
from tests.realtime.tracking.scenes import SIZE_PX, scene, texture


def watched(images):
    motion = Motion(*SIZE_PX)
    return motion, [motion.step(image) for image in images]


def test_flow_is_the_displacement_in_cells():
    images, _ = scene(2, speed=(0, 0), pan=(6, 3))
    motion, steps = watched(images)
    cell = SIZE_PX[0] / motion.shape[1]
    middle = (
        steps[1].flow[10:-10, 45:-15].reshape(-1, 2)
    )  # clear of the patch, which moves with the view
    assert np.median(middle, axis=0) == pytest.approx([6 / cell, 3 / cell], abs=0.3)


def test_black_frames_and_cuts_are_noticed():
    images, _ = scene(2)
    black = np.zeros_like(images[0])
    _, steps = watched([images[0], images[1], black, images[1], texture(SIZE_PX[1], SIZE_PX[0], 9)])
    assert [step.blank for step in steps] == [False, False, True, False, False]
    assert [step.cut for step in steps] == [True, False, False, False, True]
    assert [step.flow is None for step in steps] == [True, False, True, True, True]


def test_the_same_frame_again_is_frozen():
    images, _ = scene(2)
    _, steps = watched([images[0], images[1], images[1]])
    assert [step.frozen for step in steps] == [False, False, True]
    assert not steps[-1].flow.any()


@pytest.mark.parametrize("zoom", [1.0, 1.02, 0.98])
def test_a_box_is_carried_with_what_is_in_it_and_grows_as_it_does(zoom):
    field = texture(*SIZE_PX[::-1], 1)
    place = np.array([[zoom, 0, 3 - 100 * (zoom - 1)], [0, zoom, 2 - 80 * (zoom - 1)]])
    motion, steps = watched([field, cv2.warpAffine(field, place, SIZE_PX)])
    x0, y0, x1, y1 = motion.carried((60, 40, 140, 120), steps[1].flow)
    half = 40 * zoom
    expected = (103 - half, 82 - half, 103 + half, 82 + half)
    assert (x0, y0, x1, y1) == pytest.approx(expected, abs=1.0)


def test_a_state_is_what_it_was_after_a_file():
    images, _ = scene(5, speed=(6, 3))
    motion, steps = watched(images)
    again = MotionState.from_json(json.loads(json.dumps(steps[-1].after.json())), motion.shape)
    assert np.array_equal(again.last, steps[-1].after.last)
    assert not again.was_blank
