"""How sure: the model's arithmetic, its file, and that signs tell good boxes from bad ones."""

import numpy as np
import pytest

from engines.boxes import iou, overlap
from engines.errors import ModelError
from realtime.tracking.confidence import SHIPPED, SIGNS, Trust, expanded, load_trust, signs_of
from realtime.tracking.optical_flow import Motion
from realtime.tracking.vote_grid import Memory


def test_the_probability_is_logistic_in_signs_and_their_products():
    count = len(SIGNS)
    signs = np.linspace(-1, 2, count)
    weight = np.random.default_rng(0).normal(size=count + count * (count + 1) // 2)
    total = 0.3 + sum(w * s for w, s in zip(weight, signs, strict=False))
    place = count
    for i in range(count):
        for j in range(i, count):
            total += weight[place] * signs[i] * signs[j]
            place += 1
    model = Trust(np.zeros(count), np.ones(count), weight, 0.3)
    assert model(signs) == pytest.approx(1 / (1 + np.exp(-total)))
    assert expanded(np.full(count, 9.0)).max() == 9  # held at 3, then squared


def test_the_shipped_model_fits_and_a_damaged_one_is_refused(tmp_path):
    assert 0 < load_trust()(np.zeros(len(SIGNS))) < 1
    for text in ("{", '{"signs": ["x"]}', SHIPPED.read_text().replace('"bias"', '"b"')):
        (tmp_path / "t.json").write_text(text)
        load_trust.cache_clear()
        with pytest.raises(ModelError):
            load_trust(tmp_path / "t.json")
    load_trust.cache_clear()


def test_a_box_on_a_clear_blob_is_surer_than_one_on_nothing():
    memory = Memory(Motion(160, 80), 160, 80)
    votes = np.full_like(memory.empty, -2.0)
    votes[10:30, 20:40] = 3.5
    right, wrong = (40.0, 20.0, 80.0, 60.0), (100.0, 10.0, 140.0, 50.0)
    good = signs_of(memory, votes, votes / 4, right, right, right, 0.7, 20)
    bad = signs_of(memory, votes, votes / 4, wrong, (0.0, 0.0, 160.0, 80.0), None, 0.05, 20)
    assert load_trust()(good) > 0.8
    assert load_trust()(bad) < 0.2


def test_the_plain_overlap_is_the_iou():
    boxes = np.random.default_rng(0).uniform(0, 10, (200, 2, 2, 2))
    for a, b in np.sort(boxes, axis=2).reshape(200, 2, 4):
        assert overlap(a, b) == pytest.approx(float(iou(a, b)))
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
