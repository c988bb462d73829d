"""What runs where no option is given: the default network with the head that it comes with."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from engines.choose import choose_head, open_localizer
from engines.dense import DenseHead
from engines.errors import ModelError
from engines.networks.registry import NETWORKS
from engines.options import EngineOptions
from engines.presets import presets
from realtime.doctor import PHOTO
from tests.command_line import ROOT

DEFAULT = EngineOptions("lite0")


def default_of(**environment) -> str:
    """The network that a new process takes."""
    code = "from engines.options import EngineOptions; print(EngineOptions().model)"
    known = {name: value for name, value in os.environ.items() if name != "SIGHTLINE_MODEL"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**known, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_default_is_lite0_and_a_machine_may_have_another():
    assert default_of() == "lite0"
    assert default_of(SIGHTLINE_MODEL="compact") == "compact"


def test_the_default_head_of_each_network_is_shipped_and_fits_it():
    named = {name: each.default_head for name, each in NETWORKS.items() if each.default_head}
    assert named == {"lite0": "lite0_dense"}
    for model, head in named.items():
        choice = EngineOptions(model)
        assert choice.default_head == head
        assert isinstance(choose_head(choice, choice.classifier()), DenseHead)


def test_the_default_sees_the_whole_frame_and_finds_the_cat():
    photo = np.asarray(cv2.imread(str(PHOTO)), np.uint8)
    with open_localizer(DEFAULT) as localizer:
        assert (localizer.size_px, localizer.resizing.kind) == (320, "letterbox")
        found = localizer.localize([photo])[0]
    assert "cat" in found.class_name
    assert found.confidence > 0.8
    assert not found.detections, "one object is looked for"


@pytest.mark.parametrize(
    ("options", "size_px", "kind", "dense"),
    [
        ({"size_px": 192}, 192, "letterbox", True),
        ({"resize": "letterbox"}, 320, "letterbox", True),
        ({"resize": "squash"}, 224, "squash", False),
        ({"layer": "pixels"}, 224, "squash", False),
        ({"method": "gestalt"}, 224, "squash", False),
        ({"head": "none"}, 224, "squash", False),
        ({"head": "lite0_sensitivity"}, 224, "squash", False),
        ({"weights": "random"}, 224, "squash", False),
    ],
    ids=str,
)
def test_what_needs_another_head_gets_the_input_of_that_head(options, size_px, kind, dense):
    choice = EngineOptions("lite0", **options)
    classifier = choice.classifier()
    assert (classifier.size_px, classifier.preprocessing.resize) == (size_px, kind)
    assert isinstance(choose_head(choice, classifier), DenseHead) == dense


def test_presets_go_from_large_inputs_to_small_ones_and_to_the_compact_network():
    *found, _ = presets(DEFAULT)
    assert [each.choice.size_px for each in found[-4:]] == [320, 256, 192, 128]
    assert [each.choice.model for each in found[-4:]] == ["lite0", "lite0", "lite0", "compact"]
    costs = [each.cost for each in found]
    assert costs == sorted(costs, reverse=True)
    several = presets(EngineOptions("lite0", objects=3))
    assert {each.choice.model for each in several} == {"lite0"}, "compact finds one object"
    named = presets(EngineOptions("lite0", head="lite0_dense"))
    assert {each.choice.head for each in named} == {"lite0_dense"}


def test_what_the_default_cannot_do_is_said_with_what_to_do():
    with pytest.raises(ModelError, match="no int8 calibration of these lite0 weights at 320 px"):
        open_localizer(DEFAULT, precision="int8")
    with pytest.raises(ModelError, match="a multiple of it, not 100 px"):
        open_localizer(DEFAULT, size_px=100)
