"""Constant boxes come from a training set or from the head, and nothing is measured on what was
fitted.
"""

import cv2
import numpy as np
import pytest

from calib.data.datasets import load_dataset
from calib.evaluation.metrics import baselines, check_disjoint
from engines.choose import open_localizer
from engines.errors import SourceError
from engines.localizer import Localizer
from engines.options import EngineOptions
from tests.engines.mock import MockEngine
from tests.realtime.media import picture


def labelled(folder, seeds):
    (folder / "s").mkdir(parents=True)
    lines = ["file,class,x0,y0,x1,y1"]
    for place, seed in enumerate(seeds):
        cv2.imwrite(str(folder / "s" / f"{place}.png"), picture(seed))
        lines.append(f"{place}.png,cat,12.8,9.6,64,48")
    (folder / "s.csv").write_text("\n".join(lines))
    return load_dataset(folder / "s.csv")


def test_constant_boxes_of_a_training_set_are_fractions(tmp_path):
    found = baselines(Localizer(MockEngine(96)), labelled(tmp_path, range(3)))
    np.testing.assert_allclose(found.mean_box, [0.1, 0.1, 0.5, 0.5])


def test_a_fitted_head_brings_its_own_and_the_training_free_one_has_none():
    shipped = baselines(open_localizer(EngineOptions()), None)
    assert 0 < shipped.best_constant[0] < shipped.best_constant[2] < 1
    assert baselines(open_localizer(EngineOptions(method="heuristic")), None) is None


def test_the_same_pixels_under_another_name_are_the_same_image(tmp_path):
    training, apart = labelled(tmp_path / "a", [1, 2, 3]), labelled(tmp_path / "b", [4, 5])
    check_disjoint(training, apart, ("train", "train_ids"))
    with pytest.raises(
        SourceError,
        match=r"1 images are both fitted on and measured, 0\.png among them: name those to keep",
    ):
        check_disjoint(training, labelled(tmp_path / "c", [3, 6]), ("train", "train_ids"))
