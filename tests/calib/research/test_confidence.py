"""The confidence model of tracked boxes that is fitted: whether it is true, and its file."""

import numpy as np
import pytest

from calib.heads.confidence import RatedBoxes
from calib.research.confidence import fit_tracking_model, save
from realtime.tracking.confidence import CUES, load_confidence_model


def test_the_model_says_what_is_true_of_its_boxes():
    random = np.random.default_rng(0)
    cues = random.normal(size=(4000, len(CUES)))
    cues[:, CUES.index("missed")] = 0.0
    true = 1 / (1 + np.exp(-(1.5 * cues[:, 0] - cues[:, 1] + 0.5)))
    right = (random.random(4000) < true).astype(float)
    model = fit_tracking_model(RatedBoxes(cues, right, np.ones(4000)))
    said = np.array([model(row) for row in cues])
    assert np.abs(said - true).mean() < 0.05
    sure = (said > 0.75) & (said < 0.85)
    assert right[sure].mean() == pytest.approx(0.8, abs=0.05)


def test_what_is_saved_is_what_is_read(tmp_path):
    random = np.random.default_rng(0)
    right = (random.random(200) > 0.5).astype(float)
    boxes = RatedBoxes(random.normal(size=(200, len(CUES))), right, np.ones(200))
    model = fit_tracking_model(boxes)
    save(model, tmp_path / "model.json")
    assert load_confidence_model(tmp_path / "model.json") == model
