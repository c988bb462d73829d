"""Ridge against its definition, and folds that keep frames of a sequence together."""

from itertools import pairwise

import numpy as np
import pytest

from calib.heads.linear import FeatureTable, Ridge, choose_strength, folds, held_out_boxes
from engines.boxes import iou


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_ridge_is_its_definition(shape):
    """argmin |y - x w|^2 + strength |w|^2 on standardized features, by the normal equations."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(shape) * 3 + 1, rng.random((shape[0], 4))
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    for strength in (0.1, 10.0):
        w = np.linalg.inv(z.T @ z + strength * np.eye(shape[1])) @ z.T @ (y - y.mean(0))
        weight, bias = Ridge(x, y).solve(strength)
        np.testing.assert_allclose(x @ weight.T + bias, z @ w + y.mean(0), atol=1e-8)


def test_cross_validation_finds_that_noise_wants_a_strong_penalty():
    rng = np.random.default_rng(2)
    boxes = np.clip(np.array([0.2, 0.2, 0.8, 0.8]) + 0.02 * rng.standard_normal((60, 4)), 0, 1)
    noise = rng.standard_normal((60, 50)).astype(np.float32)
    groups, indices = tuple(map(str, range(60))), np.zeros(60, np.int64)
    table, rows = FeatureTable(noise, noise, boxes, ("x",) * 60, indices, groups), np.arange(60)
    assert choose_strength(table, rows, (0.01, 1e5)) == 1e5
    ious = iou(held_out_boxes(table, rows, 1e5), boxes)
    assert ious.mean() > 0.85
    assert (ious > 0.5).all()


def grouped(names):
    nothing = np.zeros((len(names), 4), np.float32)
    return FeatureTable(
        nothing, nothing, nothing.astype(np.float64), names, np.zeros(len(names), np.int64), names
    )


def test_photos_keep_the_folds_that_they_always_had():
    """Numbers that were published hang on them."""
    table, rows = grouped(tuple(map(str, range(60)))), np.arange(60)[::2]
    fold = np.random.default_rng(0).permutation(30) % 5
    for number, (kept, held) in enumerate(folds(table, rows)):
        assert (held.tolist(), kept.tolist()) == (
            rows[fold == number].tolist(),
            rows[fold != number].tolist(),
        )


def test_frames_of_one_sequence_stay_in_one_fold():
    names = tuple(f"v{number % 7}" for number in range(60))
    found = folds(grouped(names), np.arange(60))
    assert sorted(row for _, held in found for row in held) == list(range(60))
    for kept, held in found:
        assert len(held)
        assert not {names[row] for row in kept} & {names[row] for row in held}


@pytest.mark.parametrize("sequences", [1, 4])
def test_too_few_sequences_for_folds_are_cut_into_blocks_of_frames(sequences):
    rows = np.random.default_rng(1).permutation(100)[:52]
    found = folds(grouped(tuple(f"v{number * sequences // 100}" for number in range(100))), rows)
    assert sorted(len(held) for _, held in found) == [10, 10, 10, 11, 11]
    blocks = sorted((held.min(), held.max()) for _, held in found)
    assert all(end < start for (_, end), (start, _) in pairwise(blocks))
