"""DAM's steps against slow float64 definitions, written from the paper's algorithm."""

import math

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.boxes import blobs, box_of, bright_mask, opened
from engines.build import IMAGE, WANTED_CLASS
from engines.errors import EngineError, ModelError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from engines.search.dam import (
    DamEngine,
    DamSettings,
    build_scores_graph,
    build_walks_graph,
    grouped,
    masked_images,
    regions_of,
)
from tests.engines.double import run_in_float64
from tests.engines.search.slow_walks import layer_end, slow_backward, slow_forward

SIDE, LAYER, KMAX = 32, "conv4_1", 4


def test_neurons_and_walks_are_the_oracles(tiny, image):
    """Activation times gradient of the class score picks them; each is walked back alone, by guided
    backpropagation.
    """
    settings = DamSettings(layer=LAYER, kmax=KMAX, k=2)
    model = build_walks_graph(tiny, settings)
    found = run_in_float64(model, {IMAGE: image, WANTED_CLASS: np.array([-1])})
    steps, scores, last = slow_forward(tiny, image)
    best = int(np.argmax(scores))
    assert found["class_index"] == best
    assert found["score"] == pytest.approx(
        math.exp(scores[best]) / sum(map(math.exp, scores)), rel=1e-5
    )
    end = layer_end(LAYER)
    activations = steps[end - 1][2]
    top = steps[-1][2]
    cotangent = np.broadcast_to(last[best][None, :, None, None] / np.prod(top.shape[2:]), top.shape)
    gradient = slow_backward(steps[end:], cotangent, guided=False)
    importance = (activations * gradient).ravel()
    expected = np.argsort(-importance, kind="stable")[:KMAX]
    assert importance[expected[-1]] > 0, "the oracle must have something to choose"
    np.testing.assert_array_equal(found["neurons"], expected)
    np.testing.assert_allclose(found["importances"], importance[expected], rtol=1e-5)
    std = np.float32(1 / np.array(tiny.preprocessing.std)).astype(np.float64)
    for place, walk in zip(expected, found["walks"], strict=True):
        one = np.zeros(activations.size)
        one[place] = 1
        # The neuron is what its ReLU wrote: the walk begins behind that ReLU.
        traced = slow_backward(steps[:end], one.reshape(activations.shape), guided=True)
        np.testing.assert_allclose(
            walk, np.abs(traced[0] * std[:, None, None]).max(axis=0), rtol=1e-4, atol=1e-12
        )
        assert walk.max() > 0


def test_a_named_class_has_neurons_of_its_own(tiny, image):
    model = build_walks_graph(tiny, DamSettings(layer=LAYER, kmax=KMAX, k=2))
    engine = OpenVinoEngine(model, "fp32")
    first, second = (engine.infer({IMAGE: image, WANTED_CLASS: np.array([i])}) for i in (1, 2))
    assert first["class_index"] == 1
    assert list(first["neurons"]) != list(second["neurons"])


def test_scores_of_a_batch_are_those_of_each_image_alone(tiny):
    images = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)
    together = OpenVinoEngine(build_scores_graph(tiny, 3), "fp32").infer({IMAGE: images})["scores"]
    alone = OpenVinoEngine(build_scores_graph(tiny, 1), "fp32")
    np.testing.assert_allclose(
        together,
        np.concatenate([alone.infer({IMAGE: i[None]})["scores"] for i in images]),
        rtol=1e-4,
    )
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)


def slow_region(walk, percentile, erode, dilate):
    """Pixel by pixel: at or over the percentile of the positive pixels, eroded, dilated."""
    positive = sorted(v for v in walk.ravel() if v > 0)
    place = (len(positive) - 1) * percentile / 100
    low, high = positive[math.floor(place)], positive[math.ceil(place)]
    least = low + (high - low) * (place - math.floor(place))
    bright = {(y, x) for y, x in np.ndindex(walk.shape) if walk[y, x] >= least * (1 - 1e-6)}

    def near(y, x, side):
        reach = range(-(side // 2), side - side // 2)
        places = [(y + dy, x + dx) for dy in reach for dx in reach]
        return [(v, u) for v, u in places if 0 <= v < walk.shape[0] and 0 <= u < walk.shape[1]]

    eroded = {
        place
        for place in np.ndindex(walk.shape)
        if all(each in bright for each in near(*place, erode))
    } or bright
    return np.array(
        [
            [any(p in eroded for p in near(y, x, dilate)) for x in range(walk.shape[1])]
            for y in range(len(walk))
        ]
    )


@pytest.mark.parametrize(
    ("percentile", "erode", "dilate"), [(80, 3, 3), (50, 1, 5), (20, 3, 5), (99.9, 3, 3)]
)
def test_regions_are_the_oracles(percentile, erode, dilate):
    walk = np.random.default_rng(2).random((20, 20)).astype(np.float32)
    walk = np.maximum(walk - 0.3, 0)
    found = opened(bright_mask(walk, percentile), erode, dilate)
    np.testing.assert_array_equal(found, slow_region(walk, percentile, erode, dilate))
    shares = DamSettings(percentile=percentile, erode=erode / 20, dilate=dilate / 20)
    np.testing.assert_array_equal(regions_of(walk[None], shares)[0], found)


def test_an_empty_walk_has_an_empty_region_and_the_whole_images_box():
    region = regions_of(np.zeros((1, 16, 16), np.float32), DamSettings())[0]
    assert not region.any()
    np.testing.assert_array_equal(box_of(region), [0, 0, 1, 1])


def test_blobs_are_8_connected_and_the_largest_comes_first():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[1, 1] = True
    mask[3:6, 4:8] = True
    first, second = blobs(mask)
    assert (first.sum(), second.sum()) == (12, 2)
    np.testing.assert_allclose(box_of(second), [0, 0, 2 / 8, 2 / 6])


def test_what_is_judged_is_the_box_of_the_region_on_the_mean_colour():
    image = np.full((8, 8, 3), 200, np.uint8)
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2, 3] = masks[0, 4, 6] = True
    first, second = masked_images(image, masks, np.array([1, 2, 3], np.uint8))
    assert (first[2:5, 3:7] == 200).all()
    assert (first[:2] == [1, 2, 3]).all()
    assert (second == [1, 2, 3]).all()


def masks_at(*boxes):
    masks = np.zeros((len(boxes), 10, 10), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_one_object_is_the_union_of_the_best_k():
    masks = masks_at((0, 0, 3, 3), (7, 7, 10, 10), (2, 2, 5, 5))
    scores = np.array([0.5, 0.1, 0.9], np.float32)
    assert grouped(masks, scores, DamSettings(kmax=3, k=2)) == [[2, 0]]
    np.testing.assert_allclose(box_of(np.any(masks[[2, 0]], axis=0)), [0, 0, 0.5, 0.5])


def test_several_objects_are_regions_that_do_not_overlap():
    """Best first: 1 begins; 3 overlaps it; 0 lies apart; 2 would be a third object, of which there
    may be two.
    """
    masks = masks_at((0, 0, 2, 2), (6, 6, 10, 10), (0, 8, 2, 10), (7, 5, 9, 9))
    scores = np.array([0.4, 0.9, 0.3, 0.5], np.float32)
    settings = DamSettings(kmax=4, k=4, objects=2)
    assert grouped(masks, scores, settings) == [[1, 3], [0]]
    assert grouped(masks, scores, DamSettings(kmax=4, k=4, objects=3)) == [[1, 3], [0], [2]]
    assert grouped(masks, scores, DamSettings(kmax=4, k=1, objects=2)) == [[1], [0]]


def test_an_image_takes_two_calls_and_gives_a_localization():
    classifier = load_classifier("compact", "random", 64)
    engine = DamEngine(
        classifier, DamSettings(objects=3), lambda graph: OpenVinoEngine(graph, "fp32")
    )
    localizer = Localizer(engine)
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    found = localizer.localize([image])[0]
    assert engine.calls == 2
    assert localizer.box_reader.startswith("dam: 10 neurons")
    assert 1 <= len(found.detections) <= 3
    assert found.detections[0].box_xyxy_px == found.box_xyxy_px
    assert found.map_hw.shape == (64, 64)
    assert 0 <= found.box_xyxy_px[0] < found.box_xyxy_px[2] <= 96
    again = localizer.localize([image])[0]
    assert again.detections == found.detections
    engine.close()


def test_what_cannot_be_says_so():
    with pytest.raises(ModelError, match="k <= kmax"):
        DamSettings(k=11)
    classifier = load_classifier("compact", "random", 64)
    with pytest.raises(EngineError, match="no layer 'conv9'"):
        build_walks_graph(classifier, DamSettings(layer="conv9"))
    with pytest.raises(ModelError, match="fewer neurons"):
        build_walks_graph(classifier, DamSettings(layer="pool5", kmax=10**6))
