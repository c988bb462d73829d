"""Few images: what is added to a head is a ridge regression, and is added only where it helps."""

from dataclasses import replace

import numpy as np
import pytest

from calib.heads import dense_few
from calib.heads.dense_few import chosen, fit_few
from calib.heads.dense_layers import Layers, Look
from calib.heads.dense_names import Names, Sureness
from calib.heads.dense_scenes import Reader, Scene

SIZE_PX, FEATURES = 64, 9
BOX = np.array([[16.0, 16, 48, 48]])


@pytest.mark.parametrize(
    ("gains", "best"),
    [({None: 0.5, 100.0: 0.6, 30.0: 0.7}, 30.0), ({None: 0.5, 100.0: 0.5, 30.0: 0.4}, None)],
)
def test_the_strength_that_helps_most_is_chosen_or_none(gains, best):
    assert chosen({strength: np.full(3, gain) for strength, gain in gains.items()}) == best
    assert chosen({None: np.zeros(0), 30.0: np.zeros(0)}) is None


def test_nothing_is_added_where_no_proposal_is_near_an_object():
    rng = np.random.default_rng(0)
    looks = [looked(rng, 0.0) for _ in range(5)]
    looks = [[replace(look, boxes=look.boxes * 0.1)] for (look,) in looks]
    start = Layers(*[np.zeros((FEATURES, 0))] * 2, *(np.zeros((FEATURES, n)) for n in (4, 1, 3)))
    names = Names(("old", "new"), np.array([False, True, False]))
    sure = Sureness(names, None, (1.0, 0.0), SIZE_PX, 4.0)
    found = fit_few(looks, np.arange(5), Reader((), SIZE_PX, 16), names, start, sure)
    np.testing.assert_array_equal(found.layers.corrections, start.corrections)


def looked(rng, shift):
    """Proposals that are all moved by as much as the first feature says, times the shift."""
    features = rng.normal(size=(12, FEATURES)).astype(np.float32)
    features[:, -1] = 1
    features[:, 0] = rng.uniform(-0.2, 0.2, 12)
    moves = np.outer(features[:, 0], [1, 1, 1, 1]) * 32 * shift
    scene = Scene((), BOX, np.ones(1, np.int64))
    return [Look(scene, BOX + moves, np.zeros(12), features)]


@pytest.mark.parametrize("shift", [1.0, 0.0])
def test_boxes_are_corrected_where_what_is_read_tells_how(shift, monkeypatch):
    monkeypatch.setattr(dense_few, "STRENGTHS", (1.0, 0.01))  # few features bear little penalty
    rng = np.random.default_rng(0)
    looks = [looked(rng, shift) for _ in range(20)]
    reader = Reader((), SIZE_PX, 16)
    nothing = np.zeros((FEATURES, 0))
    start = Layers(nothing, nothing, *(np.zeros((FEATURES, n)) for n in (4, 1, 3)))
    names = Names(("old", "new"), np.array([False, True, False]))
    sure = Sureness(names, None, (1.0, 0.0), SIZE_PX, 4.0)
    found = fit_few(looks, np.arange(20) % 5, reader, names, start, sure)
    assert len(found.found) == len(found.started) == 20
    assert np.abs(found.layers.names[:, 1]).max() > 0
    if not shift:  # all proposals are right, so that nothing can be better
        assert found.strength is None
        np.testing.assert_array_equal(found.layers.corrections, start.corrections)
        return
    assert found.strength is not None
    before, after = (
        np.mean([each.overlaps.mean() for each in answers])
        for answers in (found.started, found.found)
    )
    assert after > before
    assert found.layers.corrections[0].max() < 0  # back to where the object is
