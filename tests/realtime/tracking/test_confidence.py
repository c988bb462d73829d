"""The shipped confidence model of tracked boxes: its file, and its cues, which tell good boxes from
bad ones.
"""

import numpy as np
import pytest

from engines.boxes import iou, overlap
from engines.errors import ModelError
from realtime.tracking.confidence import CUES, SHIPPED, cues_of, load_confidence_model
from realtime.tracking.optical_flow import Motion
from realtime.tracking.vote_grid import VoteGrid


def test_the_shipped_model_fits_and_a_damaged_one_is_refused(tmp_path):
    assert 0 < load_confidence_model()(np.zeros(len(CUES))) < 1
    for text in ("{", '{"signs": ["x"]}', SHIPPED.read_text().replace('"bias"', '"b"')):
        (tmp_path / "t.json").write_text(text)
        load_confidence_model.cache_clear()
        with pytest.raises(ModelError):
            load_confidence_model(tmp_path / "t.json")
    load_confidence_model.cache_clear()


def test_a_box_on_a_clear_blob_is_surer_than_one_on_nothing():
    vote_grid = VoteGrid(Motion(160, 80), 160, 80)
    votes = np.full_like(vote_grid.empty, -2.0)
    votes[10:30, 20:40] = 3.5
    right, wrong = (40.0, 20.0, 80.0, 60.0), (100.0, 10.0, 140.0, 50.0)
    good = cues_of(vote_grid, votes, votes / 4, right, right, right, 0.7, 20)
    bad = cues_of(vote_grid, votes, votes / 4, wrong, (0.0, 0.0, 160.0, 80.0), None, 0.05, 20)
    assert load_confidence_model()(good) > 0.8
    assert load_confidence_model()(bad) < 0.2


def test_the_plain_overlap_is_the_iou():
    boxes = np.random.default_rng(0).uniform(0, 10, (200, 2, 2, 2))
    for a, b in np.sort(boxes, axis=2).reshape(200, 2, 4):
        assert overlap(a, b) == pytest.approx(float(iou(a, b)))
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
