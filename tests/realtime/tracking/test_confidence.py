"""The shipped confidence model of tracked boxes: its file, and what it says of clear cases."""

import numpy as np
import pytest

from engines.errors import ModelError
from realtime.tracking.confidence import CUES, SHIPPED, load_confidence_model


def test_the_shipped_model_fits_and_a_damaged_one_is_refused(tmp_path):
    assert 0 < load_confidence_model()(np.zeros(len(CUES))) < 1
    for text in ("{", '{"signs": ["x"]}', SHIPPED.read_text().replace('"bias"', '"b"')):
        (tmp_path / "t.json").write_text(text)
        load_confidence_model.cache_clear()
        with pytest.raises(ModelError):
            load_confidence_model(tmp_path / "t.json")
    load_confidence_model.cache_clear()


def test_what_is_found_again_and_again_is_surer_than_what_was_missed():
    model = load_confidence_model()
    assert model([0.9, 0.9, 3.0, 0.0, -2.5, 0.0, 0.0]) > 0.8
    assert model([0.2, 0.6, 1.0, 4.0, -2.5, 0.0, -2.0]) < 0.3
