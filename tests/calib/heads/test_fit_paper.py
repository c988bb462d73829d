"""The papers' descent, against the same descent on the weights themselves."""

import numpy as np

from calib.heads.fit import RATE, fit_by_sgd


def test_steps_on_combinations_are_steps_on_weights():
    rng = np.random.default_rng(0)
    values, boxes = rng.random((12, 30)), rng.random((12, 4))
    weight, bias = fit_by_sgd(values, boxes, iterations=50)
    scale = np.sqrt((values**2).sum(axis=1).mean())
    x, w, b = values / scale, np.zeros((4, 30)), boxes.mean(axis=0)
    for _ in range(50):  # the batch is the whole set; the error is averaged over four coordinates
        residual = x @ w.T + b - boxes
        w = w - RATE / 2 * residual.T @ x / len(x)
        b = b - RATE / 2 * residual.mean(axis=0)
    np.testing.assert_allclose(weight, w / scale, atol=1e-6)
    np.testing.assert_allclose(bias, b, atol=1e-6)


def test_it_learns_where_the_mass_is():
    rng = np.random.default_rng(1)
    start = rng.integers(0, 12, 300)
    maps = np.zeros((300, 16))
    for row, place in enumerate(start):
        maps[row, place : place + 4] = 1
    boxes = np.stack([start / 16, np.full(300, 0.2), (start + 4) / 16, np.full(300, 0.8)], axis=1)
    weight, bias = fit_by_sgd(maps, boxes, iterations=4000)
    left = maps @ weight[0] + bias[0]
    assert np.abs(left - boxes[:, 0]).mean() < 0.5 * np.abs(boxes[:, 0].mean() - boxes[:, 0]).mean()
