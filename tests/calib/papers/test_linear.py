"""The papers' linear mapping (Ebrahimpour & Noelle, equation 4), against literal float64 oracles."""

import numpy as np
import pytest
from rich.console import Console

from calib.heads.fit import fit_by_sgd
from calib.papers import linear
from calib.papers.linear import Dual, descended, descended_by, in_order, products, scaled, streamed
from calib.papers.maps import Images, MapStore
from engines.networks.registry import load_classifier

QUIET = Console(quiet=True)
IMAGES, PIXELS = 30, 64


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Stored maps of 8 x 8 pixels, as small as real ones are."""
    classifier = load_classifier("compact", "random", 32)
    store = MapStore(classifier, "gestalt", "fp32", tmp_path_factory.mktemp("maps"))
    rng = np.random.default_rng(0)
    digests = tuple(f"{index:032d}" for index in range(IMAGES))
    for digest in digests:
        maps = rng.random((2, 8, 8)) ** 3
        path = store.path(digest)
        path.parent.mkdir(exist_ok=True)
        np.savez(
            path,
            maps=(maps / maps.max()).astype(np.float16),
            peaks=np.full(2, 3e-5 * rng.random(), np.float32),
            pooled=rng.random(4).astype(np.float32),
            class_index=np.int64(0),
        )
    return Images(store, digests, ((100, 80),) * IMAGES)


@pytest.fixture(scope="module")
def boxes():
    """Up to three of each image."""
    rng = np.random.default_rng(1)
    return [
        np.sort(rng.random((rng.integers(1, 4), 2, 2)), axis=1).reshape(-1, 4)
        for _ in range(IMAGES)
    ]


def least_squares(maps, pairs, penalty):
    """Equation 4 and a penalty on W, written out: one row for each box, one for each weight."""
    rows = [np.concatenate([maps[row], [1]]) / np.sqrt(len(pairs)) for row, _ in pairs]
    targets = [box / np.sqrt(len(pairs)) for _, box in pairs]
    rows += list(np.sqrt(penalty) * np.eye(PIXELS, PIXELS + 1))
    targets += [np.zeros(4)] * PIXELS
    found = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return found[:-1].T, found[-1]


def pairs_of(boxes):
    return [(row, box) for row, each in enumerate(boxes) for box in each]


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_every_way_of_solving_is_least_squares_written_out(images, boxes, strength):
    maps = images.maps("max").astype(np.float64)
    pairs = pairs_of(boxes)
    seen = np.array([maps[row] for row, _ in pairs])
    penalty = strength * float(((seen - seen.mean(axis=0)) ** 2).sum(axis=1).mean())
    weight, bias = least_squares(maps, pairs, penalty)
    means, counts = np.array([each.mean(axis=0) for each in boxes]), [len(each) for each in boxes]
    counts = np.array(counts, np.float64)
    alpha, own = Dual(maps @ maps.T, means, counts).solve(strength, np.arange(IMAGES))
    np.testing.assert_allclose(alpha.T @ maps, weight, rtol=1e-6, atol=1e-6 * abs(weight).max())
    np.testing.assert_allclose(own, bias, atol=1e-8)
    one = streamed(images, "max", means, counts, strength, QUIET, rounds=200)
    np.testing.assert_allclose(one.weight, weight, rtol=1e-4, atol=1e-4 * abs(weight).max())
    np.testing.assert_allclose(one.boxes(maps), in_order(maps @ weight.T + bias), atol=1e-5)


def literal_descent(maps, pairs, iterations):
    """Equation 4's gradient, coordinate by coordinate, on the whole set."""
    weight, bias = np.zeros((4, PIXELS)), np.zeros(4)
    for _ in range(iterations):
        slope, slope_bias = np.zeros_like(weight), np.zeros(4)
        for row, box in pairs:
            for j in range(4):
                error = box[j] - (weight[j] @ maps[row] + bias[j])
                slope[j] += -2 * error * maps[row] / 4 / len(pairs)
                slope_bias[j] += -2 * error / 4 / len(pairs)
        weight, bias = weight - linear.RATE * slope, bias - linear.RATE * slope_bias
    return weight, bias


def test_a_step_of_the_descent_is_equation_4s(images, boxes):
    """Fewer examples than a batch: each batch is all of them."""
    maps = images.maps("mean").astype(np.float64)
    maps /= np.linalg.norm(maps, axis=1).mean()
    pairs = pairs_of(boxes)
    weight, bias = literal_descent(maps, pairs, 25)
    rows, every = np.array([row for row, _ in pairs]), np.concatenate(boxes)
    alpha, own = descended(maps @ maps.T, rows, every, iterations=25)
    np.testing.assert_allclose(alpha.T @ maps, weight, atol=1e-9)
    np.testing.assert_allclose(own, bias, atol=1e-9)
    # the product's own descent takes the same steps, on maps of a mean squared length of 1
    firsts = np.array([each[0] for each in boxes])
    maps /= np.sqrt((maps**2).sum(axis=1).mean())
    mine, bias = fit_by_sgd(maps, firsts, iterations=1)
    start = firsts.mean(axis=0)
    error = start - firsts
    np.testing.assert_allclose(mine, -0.05 * error.T @ maps / IMAGES, atol=1e-6)


def test_a_rate_too_large_for_the_maps_is_told_from_a_result(images, boxes):
    maps = images.maps("max").astype(np.float64) * 1e8
    alpha, _ = descended(maps @ maps.T, np.arange(IMAGES), np.zeros((IMAGES, 4)) + 0.5)
    assert not np.isfinite(alpha).any()


def test_scales_that_descend_together_are_those_that_descend_alone(images, boxes):
    maps = images.maps("max").astype(np.float64)
    every, rows = np.concatenate(boxes), np.array([row for row, _ in pairs_of(boxes)])
    factors = np.array([scaled(images, "max", "unit length"), np.full(IMAGES, 1e8)])
    own = maps @ maps.T
    alphas, biases = descended_by(factors, own, rows, every, iterations=40)
    multiplied = maps * factors[0][:, None]
    alpha, bias = descended(multiplied @ multiplied.T, rows, every, iterations=40)
    np.testing.assert_allclose(alphas[0].T @ maps, alpha.T @ multiplied, atol=1e-9)
    np.testing.assert_allclose(biases[0], bias, atol=1e-12)
    assert np.isnan(alphas[1]).all()


def test_products_are_kept_and_scales_are_what_they_say(images):
    maps = images.maps("max").astype(np.float64)
    for _ in range(2):  # the second time from disk
        found = products(images, images, "max", QUIET)
        np.testing.assert_allclose(found, maps @ maps.T, rtol=1e-4)
    part = images.take([3, 5])
    np.testing.assert_allclose(products(part, images, "max", QUIET), found[[3, 5]], rtol=1e-5)
    for scale, measure in (
        ("unit length", lambda each: np.linalg.norm(each, axis=1)),
        ("mean 1", lambda each: each.mean(axis=1)),
        ("peak 1", lambda each: each.max(axis=1)),
    ):
        multiplied = maps * scaled(images, "max", scale)[:, None]
        np.testing.assert_allclose(measure(multiplied), 1, rtol=1e-5)
    np.testing.assert_array_equal(scaled(images, "max", "as they are"), 1)


def test_the_penalty_is_the_one_whose_held_out_boxes_score_best(images, boxes):
    means = np.array([each.mean(axis=0) for each in boxes])
    maps = images.maps("max")
    dual = Dual(maps @ maps.T, means, np.ones(IMAGES))
    far = dual.strength(lambda found, held: -float(np.abs(found - means.mean(axis=0)).mean()))
    assert far == max(linear.STRENGTHS)
