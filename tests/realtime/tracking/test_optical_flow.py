"""Motion on a small grid: against known displacements, and a brute-force cut."""

import json

import cv2
import numpy as np
import pytest

from engines.boxes import overlap
from realtime.tracking.optical_flow import MOST, Motion, MotionState, two_kinds
from tests.realtime.tracking.scenes import SIZE_PX, scene, texture


def watched(images):
    motion = Motion(*SIZE_PX)
    return motion, [motion.step(image) for image in images]


@pytest.mark.parametrize("pan", [(0, 0), (4, 0), (2, 3)])
def test_what_moves_by_itself_is_told_from_what_the_camera_moves(pan):
    images, boxes = scene(9, speed=(6, 3), pan=pan)
    motion, steps = watched(images)
    evidence = steps[-1].after.evidence
    cell = SIZE_PX[0] / motion.shape[1]
    x0, y0, x1, y1 = (round(edge / cell) for edge in boxes[-1])
    inside = np.zeros(motion.shape, bool)
    inside[y0:y1, x0:x1] = True
    around = cv2.dilate(inside.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert evidence[inside].mean() > 0.3
    assert evidence[~around].mean() < -0.05
    assert np.abs(evidence).max() <= MOST
    assert motion.moves(boxes[-1], evidence) > 0.15
    assert motion.moves((150, 20, 230, 50), evidence) == 0
    if pan == (0, 0):
        assert any(overlap(blob, boxes[-1]) > 0.4 for blob in motion.blobs())


def test_flow_is_the_displacement_in_cells():
    images, _ = scene(2, speed=(0, 0), pan=(6, 3))
    motion, steps = watched(images)
    cell = SIZE_PX[0] / motion.shape[1]
    middle = (
        steps[1].flow[10:-10, 45:-15].reshape(-1, 2)
    )  # clear of the patch, which moves with the view
    assert np.median(middle, axis=0) == pytest.approx([6 / cell, 3 / cell], abs=0.3)


def test_a_still_scene_speaks_neither_for_nor_against_anything_for_all_its_noise():
    field = texture(480, 720, 4).astype(np.float64)
    random = np.random.default_rng(0)
    motion = Motion(720, 480)
    steps = [
        motion.step(np.clip(field + random.normal(0, 2, field.shape), 0, 255).astype(np.uint8))
        for _ in range(4)
    ]
    assert np.abs(steps[3].after.evidence).max() < 0.05
    assert not motion.blobs()
    assert not steps[2].cut
    assert not steps[2].blank


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
    assert np.array_equal(again.evidence, steps[-1].after.evidence)
    assert (again.frames, again.was_blank) == (5, False)


def test_the_camera_is_fitted_without_regard_to_what_moves_otherwise():
    """Against plain least squares over the field alone."""
    motion = Motion(320, 180)
    ys, xs = np.mgrid[0 : motion.shape[0], 0 : motion.shape[1]].astype(np.float32)
    flow = np.stack([1.5 + 0.01 * xs, -0.5 + 0.02 * ys], axis=-1)
    flow[15:30, 30:50] += 4
    found = motion.camera_flow(flow)
    field = np.ones(motion.shape, bool)
    field[15:30, 30:50] = False
    terms = np.stack([xs[field], ys[field], np.ones(field.sum())], axis=1)
    oracle = np.linalg.lstsq(terms, flow[field], rcond=None)[0]
    everywhere = np.stack([xs, ys, np.ones_like(xs)], axis=-1) @ oracle
    assert np.abs(found - everywhere).max() < 0.05


def test_two_kinds_part_where_the_variance_between_them_is_greatest():
    values = np.concatenate(
        [np.random.default_rng(0).normal(0, 0.3, 300), np.random.default_rng(1).normal(3, 0.5, 100)]
    ).astype(np.float32)
    cut, low, high = two_kinds(values.reshape(20, 20))

    def between(level):
        below, above = values[values <= level], values[values > level]
        return len(below) * len(above) * (below.mean() - above.mean()) ** 2

    levels = np.linspace(values.min(), values.max(), 256)[1:-1]
    best = max(between(level) for level in levels)
    assert between(cut) > 0.995 * best
    assert (low, high) == pytest.approx((0, 3), abs=0.2)
    assert two_kinds(np.ones((3, 3), np.float32)) == (1, 1, 1)
