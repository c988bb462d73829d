"""Few images: what is added to a head is a ridge regression on what it says of its boxes."""

import numpy as np

from calib.heads.dense_few import fit_few
from calib.heads.dense_layers import Layers, Look
from calib.heads.dense_names import Names
from calib.heads.dense_scenes import Reader, Scene

SIZE_PX, FEATURES = 64, 9
BOX = np.array([[16.0, 16, 48, 48]])


def looked(rng):
    """Proposals that are as far from the object as the first feature says."""
    features = rng.normal(size=(12, FEATURES)).astype(np.float32)
    features[:, -1] = 1
    features[:, 0] = rng.uniform(0, 1, 12)
    moves = np.outer(features[:, 0], [1, 1, 1, 1]) * 10
    scene = Scene((), BOX, np.ones(1, np.int64))
    return [Look(scene, BOX + moves, np.zeros(12), features)]


def test_what_is_said_of_boxes_is_fitted_and_the_boxes_stay():
    rng = np.random.default_rng(0)
    looks = [looked(rng) for _ in range(20)]
    start = Layers(*[np.zeros((FEATURES, 0))] * 2, *(np.zeros((FEATURES, n)) for n in (4, 1, 3)))
    names = Names(("old", "new"), np.array([False, True, False]))
    found = fit_few(looks, np.arange(20) % 5, Reader((), SIZE_PX, 16), names, start)
    assert found.layers.expected[0, 0] < 0  # the farther, the less is to be expected
    assert found.layers.names[0, 1] < 0
    np.testing.assert_array_equal(found.layers.names[:, [0, 2]], 0)
    np.testing.assert_array_equal(found.layers.corrections, start.corrections)
    before, after = (
        np.mean([each.overlaps[each.expected.argmax()] for each in answers])
        for answers in (found.started, found.found)
    )
    assert after > before
    np.testing.assert_array_equal(found.found[0].boxes, found.started[0].boxes)


def test_an_image_is_answered_by_layers_that_did_not_see_it():
    rng = np.random.default_rng(1)
    looks = [looked(rng) for _ in range(5)]
    start = Layers(*[np.zeros((FEATURES, 0))] * 2, *(np.zeros((FEATURES, n)) for n in (4, 1, 3)))
    names = Names(("old", "new"), np.array([False, True, False]))
    reader = Reader((), SIZE_PX, 16)
    all_but_first = fit_few(looks[1:], np.zeros(4, int), reader, names, start).layers
    first = fit_few(looks, np.arange(5), reader, names, start).found[0]
    expected = looks[0][0].features @ all_but_first.expected
    np.testing.assert_allclose(first.expected, expected[:, 0], atol=1e-3)
