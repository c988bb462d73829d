"""What Sightline's default finds, as the papers' tables count it."""

import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.papers import defaults
from calib.papers.defaults import Defaults, default_ap, found_by_default
from calib.papers.reproduce import TABLES, ReproduceOptions, Request
from engines.dense_names import OBJECT, BoxName
from engines.localizer import Detection, Localization
from engines.options import EngineOptions
from tests.realtime.media import picture

REQUEST = Request(
    TABLES["beam-voc"],
    ReproduceOptions(),
    EngineOptions(),
    Console(quiet=True, force_terminal=False),
)
DOG, SCREEN = (4.0, 4.0, 24.0, 24.0), (40.0, 4.0, 60.0, 24.0)


def detection(box, name, confidence):
    return Detection(box, 7, "beagle", 0.5, confidence, name)


def test_a_box_is_of_the_class_that_people_would_call_it(monkeypatch):
    """Not of the finer name that is written beside it, nor of the network's own class."""
    photo = np.zeros((32, 64, 3), np.uint8)
    samples = [Sample("a", lambda: photo, (Truth("dog", DOG), Truth("tvmonitor", SCREEN)))]
    boxes = (
        detection(DOG, BoxName("dog", "beagle", 0.9), 0.8),
        detection((0.0, 0.0, 64.0, 32.0), BoxName("dog", "", 0.9), 0.7),
        detection(SCREEN, BoxName("screen", "", 0.6), 0.5),
        detection(SCREEN, BoxName(OBJECT, "", 0.0), 0.9),
    )
    found = Localization(DOG, 7, "beagle", 0.5, np.zeros((1, 1), np.float32), boxes, 0.8)
    default = Defaults((found,), np.zeros((1, 4)), 3.0, "lite0")
    monkeypatch.setattr(defaults, "found_by_default", lambda *_, **__: default)
    truths = {"dog": {"a": [DOG]}, "tvmonitor": {"a": [SCREEN]}}
    numbers = default_ap(samples, truths, 0.5, REQUEST)
    assert numbers["ap"] == {
        "localization": {"dog": 1.0, "tvmonitor": 1.0},
        "detection": {"dog": 1.0, "tvmonitor": 1.0},
    }
    assert numbers["ms_per_image"] == 3.0


@pytest.mark.parametrize("several", [False, True])
def test_each_image_has_a_box_in_fractions(several):
    samples = [Sample("a", lambda: picture(1), (Truth("dog", DOG),))]
    default = found_by_default(samples, REQUEST, several)
    (box,) = default.boxes
    assert ((box >= 0) & (box <= 1)).all()
    assert default.ms_per_image > 0
