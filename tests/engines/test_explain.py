"""Explanations beside the answers of the engines that they are of."""

import cv2
import pytest

from engines.boxes import iou
from engines.choose import open_localizer
from engines.confidence import CUES
from engines.dense_names import CUES as DENSE_CUES
from engines.errors import ModelError
from engines.explain import CUE_WORDS, SAME_IOU, Explainer
from engines.options import EngineOptions
from realtime.documents import ASSETS


@pytest.fixture(scope="module")
def photo():
    return cv2.imread(str(ASSETS / "chelsea.jpg"))


@pytest.mark.parametrize("model", ["lite0", "compact"])
def test_an_explanation_is_of_the_answer_that_is_given(photo, model):
    choice = EngineOptions(model, precision="fp32")
    with open_localizer(choice) as localizer:
        (found,) = localizer.localize([photo])
    explainer = Explainer(choice)
    why = explainer.explain(photo)
    assert iou(why.box_xyxy_px, found.box_xyxy_px) > 0.95
    assert why.confidence == pytest.approx(found.confidence, abs=0.02)
    assert why.label == found.label
    assert why.map_hw == pytest.approx(found.map_hw, rel=0.05, abs=1e-4)
    assert found.class_name in {each.name for each in why.classes}
    assert 0 < sum(each.probability for each in why.classes) <= 1.0001
    shares = [abs(each.share) for each in why.cues]
    assert shares == sorted(shares, reverse=True)
    assert {each.name for each in why.cues} == set(DENSE_CUES if model == "lite0" else CUES)
    assert why.to_dict()["cues"][0]["words"] == CUE_WORDS[why.cues[0].name]
    if model == "lite0":
        assert why.names[0].name == "cat"
        assert why.input_px == (320, 256)
        assert explainer.explain(photo, (0.0, 0.0, 20.0, 20.0)).box_xyxy_px is None
        asked = (150.0, 60.0, 350.0, 250.0)
        near = explainer.explain(photo, asked)
        assert iou(near.box_xyxy_px, asked) >= SAME_IOU
        assert near.confidence <= why.confidence
    explainer.close()


def test_every_cue_has_words():
    assert set(CUE_WORDS) >= {*CUES, *DENSE_CUES}


def test_a_network_without_a_head_is_explained_by_its_classes(photo):
    why = Explainer(EngineOptions("compact", head="none")).explain(photo)
    assert (why.box_xyxy_px, why.confidence, why.cues) == (None, None, ())
    assert why.classes[0].name == "Egyptian cat"


def test_what_a_search_finds_is_not_explained(photo):
    with pytest.raises(ModelError, match="nothing tells how sure they are"):
        Explainer(EngineOptions("compact", method="beam")).explain(photo)
