"""What is measured of tracking against hand arithmetic, and the confidence model that is fitted."""

import numpy as np
import pytest

from calib.research.clips import Film
from calib.research.tracking import Followed, Take, fit_model, main_row, save, several_row
from engines.localizer import Localization
from realtime.frames import NO_MAP, Track, Tracked
from realtime.tracking.confidence import CUES, load_confidence_model

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


def take(boxes, alone=()):
    answers = [Localization(box, 0, "cat", 0.5, NO_MAP) for box in alone]
    return Take(Film("f", (), tuple(boxes)), [], answers, [])


def tracked(number, box):
    return Tracked(box, 0, "cat", 0.5, Track("following", 0.9, number, box))


def test_objects_numbers_and_boxes_on_nothing_are_counted():
    objects = [
        [tracked(1, LEFT), tracked(2, RIGHT)],  # both right
        [tracked(1, LEFT), tracked(3, (0.0, 8.0, 10.0, 18.0))],  # the second is nobody's
        [tracked(4, RIGHT)],  # the right one is back under another number
        [],
    ]
    row = several_row([Followed(take([{0: LEFT, 1: RIGHT}] * 4), objects=objects)])
    assert row["each right"] == pytest.approx(4 / 8)
    assert row["on nothing"] == pytest.approx(1 / 4)
    assert row["changes"] == 1
    assert row["MOTA"] == pytest.approx(1 - (4 + 1 + 1) / 8)
    assert 0 < row["HOTA"] < row["IDF1"] < 1


def test_the_main_object_alone_and_followed():
    boxes = [{0: LEFT}, {0: LEFT}, {}, {0: RIGHT}]
    row = main_row(Followed(take(boxes, [LEFT, RIGHT, None, None]), main=[LEFT, LEFT, LEFT, RIGHT]))
    assert (row["alone"], row["followed"]) == (pytest.approx(1 / 3), 1.0)
    assert (row["followed on nothing"], row["alone on nothing"]) == (1.0, 0.0)
    assert row["followed jitter"] == 0.0
    assert row["alone jitter"] == 25.0  # of two of four edges, 50 pixels


def rated(count, truth):
    random = np.random.default_rng(0)
    cues = random.normal(size=(count, len(CUES)))
    right = (random.random(count) < truth(cues)).astype(float)
    found = Followed(take([]), cues=cues.tolist(), cues_right=right.tolist())
    return cues, right, {"sways": [found]}


def test_the_model_says_what_is_true_of_its_boxes(tmp_path):
    def truth(cues):
        return 1 / (1 + np.exp(-(1.5 * cues[:, 0] - cues[:, 1] + 0.5)))

    cues, right, groups = rated(16000, truth)
    model = fit_model(groups)
    said = np.array([model(row) for row in cues])
    assert np.abs(said - truth(cues)).mean() < 0.05
    sure = (said > 0.75) & (said < 0.85)
    assert right[sure].mean() == pytest.approx(0.8, abs=0.05)
    save(model, tmp_path / "model.json")
    assert load_confidence_model(tmp_path / "model.json") == model
