"""What a localizer takes for an image, and what it refuses."""

import numpy as np
import pytest

from engines.backends.torch_reference import TorchEngine
from engines.build import build_graph
from engines.choose import open_localizer
from engines.confidence import SURE_FROM, USUAL_LIMITS, Limits, limits_of
from engines.dense_names import BoxName
from engines.errors import InputError, ModelError
from engines.localizer import NAMED_FROM, box_name_of, label_of
from engines.maps import MapSpec
from engines.networks.network import NO_CLASSES
from engines.networks.registry import load_classifier

IMAGE = np.zeros((40, 48, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "got NoneType"),
        ("cat.jpg", "got str"),
        (7, "got int"),
        ([[0, 0, 0]], "got list"),
        (b"jpeg", "got bytes"),
        (IMAGE.astype(np.float32), "float32"),
        (IMAGE.astype(np.int64), "int64"),
        (IMAGE.astype(object), "object"),
        (IMAGE > 0, "bool"),
        (IMAGE[:, :, 0], r"\[40, 48\]"),
        (IMAGE[:, :, :1], r"\[40, 48, 1\]"),
        (np.zeros((40, 48, 4), np.uint8), r"\[40, 48, 4\]"),
        (IMAGE[None], r"\[1, 40, 48, 3\]"),
        (IMAGE[:0], r"\[0, 48, 3\]"),
        (IMAGE[:, :0], r"\[40, 0, 3\]"),
        (IMAGE[:4], "48x4 pixels"),
        (np.uint8(3), "got uint8"),
    ],
)
def test_what_is_no_image_is_named(tiny_localizer, image, words):
    with pytest.raises(InputError, match=words):
        tiny_localizer.localize([image])


@pytest.mark.parametrize("images", [None, 7, IMAGE, IMAGE[:, :, 0]])
def test_localize_takes_a_list(tiny_localizer, images):
    with pytest.raises(InputError, match="a list of images"):
        tiny_localizer.localize(images)


def test_any_layout_in_memory_is_the_same_image(tiny_localizer):
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    (expected,) = tiny_localizer.localize([image])
    padded = np.zeros((70, 180, 6), np.uint8)
    padded[:, ::2, ::2] = image
    mirrored = np.ascontiguousarray(image[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    read_only = image.copy()
    read_only.flags.writeable = False
    for same in (np.asfortranarray(image), padded[:, ::2, ::2], mirrored, read_only):
        (found,) = tiny_localizer.localize([same])
        np.testing.assert_array_equal(found.map_hw, expected.map_hw)
    assert tiny_localizer.localize([]) == []
    assert len(tiny_localizer.localize(np.stack([image, image]))) == 2


@pytest.mark.parametrize("index", [-1, 10**9, 1.5, "cat", np.nan])
def test_a_class_that_does_not_exist(tiny_localizer, index):
    with pytest.raises(InputError, match="class index"):
        tiny_localizer.look_for(index)


@pytest.mark.parametrize("confidence", [np.nan, -0.1, 1.5, np.inf])
def test_a_confidence_that_is_no_probability(tiny_localizer, confidence):
    with pytest.raises(InputError, match="least confidence"):
        tiny_localizer.abstain_below(confidence)


def test_an_unknown_signal_is_no_gradient():
    """The reference must not show something else than was asked for; nor must the graph."""
    spec = MapSpec()
    object.__setattr__(spec, "signal", "beauty")
    classifier = load_classifier("compact", "random", 64)
    with pytest.raises(ModelError, match="signal 'beauty'"):
        TorchEngine(classifier, spec)
    with pytest.raises(ModelError, match="unknown signal 'beauty'"):
        build_graph(classifier, spec)


def test_the_limit_is_the_heads_own_unless_one_is_asked_for():
    with open_localizer(backend="openvino", precision="fp32") as localizer:
        assert localizer.limits == USUAL_LIMITS
        assert localizer.least_confidence == USUAL_LIMITS.shown_from
        image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        localizer.abstain_below(0.0)
        shown = localizer.localize([image])[0]
        assert shown.box_xyxy_px is not None
        assert shown.confidence is not None
        assert shown.unsure == (shown.confidence < USUAL_LIMITS.sure_from)
        assert shown.label in ("object", shown.class_name)
        localizer.abstain_below(1.0)
        silent = localizer.localize([image])[0]
        assert silent.nothing_sure
        assert silent.confidence == shown.confidence


def test_where_nothing_tells_how_sure_a_box_is_all_are_given(tiny_localizer):
    assert tiny_localizer.limits is None
    tiny_localizer.abstain_below(None)
    assert tiny_localizer.least_confidence == 0.0
    with pytest.raises(ModelError, match="nothing tells"):
        tiny_localizer.abstain_below(0.1)


def test_limits_come_from_the_head():
    assert limits_of(None) == USUAL_LIMITS
    assert limits_of(0.3) == Limits(0.3, SURE_FROM)
    assert limits_of(0.9) == Limits(0.9, 0.9), "what is shown from there on is all sure"


def test_a_class_is_named_where_its_score_is_high_enough():
    assert label_of(box_name_of("beagle", NAMED_FROM), "beagle") == "beagle"
    assert label_of(box_name_of("beagle", NAMED_FROM - 0.01), "beagle") == "object"
    assert label_of(box_name_of(NO_CLASSES[0], 1.0), NO_CLASSES[0]) == "object"
    assert label_of(BoxName("dog", "beagle", 0.9), "beagle") == "dog (beagle)"
    assert label_of(None, "beagle") == "beagle"
