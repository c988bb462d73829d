"""DAM as published against slow float64 definitions, written from the paper's algorithms, and where
they leave a step open from its authors' code.
"""

import math

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.boxes import box_of
from engines.build import IMAGE, WANTED_CLASS
from engines.choose import open_localizer
from engines.errors import ModelError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from engines.search.dam_published import (
    DILATIONS,
    EROSIONS,
    REGIONS,
    PublishedDamEngine,
    PublishedDamSettings,
    best_regions,
    build_published_walks,
    build_region_scores,
    over_percentile,
    regions_of,
    similar_classes,
)
from tests.engines.double import run_in_float64
from tests.engines.search.slow_walks import layer_end, slow_backward, slow_forward

SIDE, LAYER, KMAX = 32, "conv4_1", 3


def test_neurons_and_walks_are_the_oracles(tiny, image):
    """Equations 1 to 5: the effect is rectified on its way, too; the loop over neurons takes each
    filter once; a walk is the mean over channels with its sign.
    """
    settings = PublishedDamSettings(layer=LAYER, kmax=KMAX, k=2)
    model = build_published_walks(tiny, settings)
    found = run_in_float64(model, {IMAGE: image, WANTED_CLASS: np.array([-1])})
    steps, scores, last = slow_forward(tiny, image)
    best = int(np.argmax(scores))
    assert found["class_index"] == best
    exponentials = np.exp(scores - scores.max())
    np.testing.assert_allclose(found["probabilities"][0], exponentials / exponentials.sum())
    end = layer_end(LAYER)
    activations, top = steps[end - 1][2], steps[-1][2]
    cotangent = np.broadcast_to(last[best][None, :, None, None] / np.prod(top.shape[2:]), top.shape)
    effect = slow_backward(steps[end:], cotangent, guided=True)
    rank_score, taken, expected = activations * effect, [], []
    while len(expected) < KMAX:
        place = np.unravel_index(np.argmax(rank_score), rank_score.shape)
        if place[1] not in taken:
            taken.append(place[1])
            expected.append(np.ravel_multi_index(place, rank_score.shape))
        rank_score[place] = -1000
    np.testing.assert_array_equal(found["neurons"], expected)
    std = np.float32(1 / np.array(tiny.preprocessing.std)).astype(np.float64)
    for place, walk in zip(expected, found["walks"], strict=True):
        one = np.zeros(activations.size)
        one[place] = 1
        traced = slow_backward(steps[:end], one.reshape(activations.shape), guided=True)
        by_hand = (traced[0] * std[:, None, None]).mean(axis=0)
        np.testing.assert_allclose(walk, by_hand, rtol=1e-4, atol=1e-12)


def test_scores_are_those_before_the_softmax_of_the_image_outside_the_region_at_the_mean(
    tiny, image
):
    regions = np.zeros((2, 1, SIDE, SIDE), np.float32)
    regions[0, 0, 3:20, 5:30] = 1
    regions[1, 0, 2, 2] = regions[1, 0, 30, 7] = 1
    scores = run_in_float64(
        build_region_scores(tiny, 2), {IMAGE: image, REGIONS: regions.astype(np.float64)}
    )["scores"]
    mean = np.array(tiny.preprocessing.mean)[::-1]
    for region, found in zip(regions, scores, strict=True):
        shown = np.where(region[0][..., None] > 0, image[0], mean)
        _, expected, _ = slow_forward(tiny, shown[None])
        np.testing.assert_allclose(found, expected, rtol=1e-4)


CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


def slow_eroded(pixels, side):
    """Those whose four neighbours are in it, too; beyond the edge nothing is."""
    return {(y, x) for y, x in pixels if all((y + v, x + u) in pixels for v, u in CROSS)}


def slow_dilated(pixels, side, shape=CROSS):
    grown = {(y + v, x + u) for y, x in pixels for v, u in shape}
    return {(y, x) for y, x in grown if 0 <= y < side and 0 <= x < side}


def slow_region(walk, percentile, dilations, erosions):
    """Pixel by pixel, as the authors' ``find_blob`` and ``process_blob`` read."""
    side, positive = len(walk), sorted(v for v in walk.ravel() if v > 0)
    place = (len(positive) - 1) * percentile / 100
    low, high = positive[math.floor(place)], positive[math.ceil(place)]
    least = low + (high - low) * (place - math.floor(place))
    pixels = {(y, x) for y, x in np.ndindex(walk.shape) if walk[y, x] > least}
    for _ in range(4):
        pixels = slow_dilated(slow_eroded(pixels, side), side)
    # a convolution with 4 x 4 ones reads from one pixel before to two behind
    square = [(-v, -u) for v in range(-1, 3) for u in range(-1, 3)]
    pixels = slow_dilated(pixels, side, square)
    for _ in range(dilations):
        pixels = slow_dilated(pixels, side)
    for _ in range(erosions):
        pixels = slow_eroded(pixels, side)
    return np.array([[(y, x) in pixels for x in range(side)] for y in range(side)])


@pytest.mark.parametrize("side", [56, 112])
def test_regions_are_the_oracles(side):
    """Two bright blobs with a gap that closing fills, one at the edge, and specks that openings
    remove.
    """
    noise = np.random.default_rng(2).random((side, side))
    walk = (noise - 0.9).astype(np.float32)
    q = side // 8
    walk[q : 3 * q, q : 2 * q] = 2 + noise[q : 3 * q, q : 2 * q]
    walk[q : 3 * q, 2 * q + 3 : 4 * q] = 2 + noise[q : 3 * q, 2 * q + 3 : 4 * q]
    walk[-q:, -2 * q :] = 3
    found = regions_of(walk[None], 40)[0]
    dilations, erosions = round(DILATIONS * side / 224), round(EROSIONS * side / 224)
    np.testing.assert_array_equal(found, slow_region(walk, 40, dilations, erosions))
    assert 0 < found.sum() < side * side
    assert found[2 * q, 2 * q + 1], "the gap is closed"


def test_pixels_are_over_the_percentile_of_the_positive_ones():
    walk = np.array([[-5.0, 0.0, 1.0], [2.0, 3.0, 4.0], [5.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(np.argwhere(over_percentile(walk, 75)), [[2, 0]])
    assert not over_percentile(-np.abs(walk), 80).any()


def test_the_best_regions_are_united_and_empty_ones_do_not_count():
    regions = np.zeros((4, 6, 6), np.bool_)
    regions[0, 0, 0] = regions[1, 5, 5] = regions[3, 2, 2] = True
    scores = np.array([1.0, 7.0, 9.0, 3.0], np.float32)
    assert best_regions(regions, scores, 2) == [1, 3]
    np.testing.assert_allclose(
        box_of(np.any(regions[best_regions(regions, scores, 2)], axis=0)), [2 / 6, 2 / 6, 1, 1]
    )
    assert best_regions(np.zeros_like(regions), scores, 2) == [0, 1, 2, 3]


def test_similarly_high_classes():
    probabilities = np.array([0.1, 0.4, 0.3, 0.2], np.float32)
    assert similar_classes(probabilities, PublishedDamSettings(classes=1)) == [1]
    assert similar_classes(probabilities, PublishedDamSettings(classes=3)) == [1, 2, 3]
    assert similar_classes(probabilities, PublishedDamSettings(classes=3, similar=0.7)) == [1, 2]


def test_algorithm_2_finds_for_each_class_what_algorithm_1_finds_for_it(tiny, image):
    """kmax neurons for each class, and the best k of each united."""

    def opened(classes):
        settings = PublishedDamSettings(LAYER, KMAX, 2, classes=classes, similar=0.01)
        return PublishedDamEngine(tiny, settings, lambda graph: OpenVinoEngine(graph, "fp32"))

    several, one = opened(3), opened(1)
    out = several.infer({IMAGE: image, WANTED_CLASS: np.array([-1])})
    classes = out["detections"][0, :, 4].astype(int)
    assert len(set(classes)) == 3
    assert several.calls == 1 + 3 + 2  # walks, scores of each, walks of the second and third
    for row in out["detections"][0]:
        alone = one.infer({IMAGE: image, WANTED_CLASS: np.array([int(row[4])])})
        np.testing.assert_allclose(alone["box_xyxy"][0], row[:4])
        np.testing.assert_allclose(alone["score"][0], row[5], rtol=1e-4)
    several.close()
    one.close()


def test_the_command_line_reaches_it_and_refuses_it_elsewhere():
    localizer = open_localizer(
        "compact", method="dam", as_published=True, weights="random", size_px=64, objects=2
    )
    assert localizer.box_reader.startswith("dam as published: 10 neurons of conv5_3, one a filter")
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    found = localizer.localize([image])[0]
    assert 1 <= len(found.detections) <= 2
    localizer.close()
    with pytest.raises(ModelError, match="have a form as published"):
        open_localizer("compact", method="gradcam", as_published=True)


def test_what_cannot_be_says_so():
    with pytest.raises(ModelError, match="k <= kmax"):
        PublishedDamSettings(k=11)
    classifier = load_classifier("compact", "random", 64)
    with pytest.raises(ModelError, match="fewer filters"):
        build_published_walks(classifier, PublishedDamSettings("conv1_1", 17))


def test_a_localizer_reads_it(tiny):
    settings = PublishedDamSettings(LAYER, KMAX, 2)
    engine = PublishedDamEngine(tiny, settings, lambda graph: OpenVinoEngine(graph, "fp32"))
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    found = Localizer(engine).localize([image])[0]
    assert engine.calls == 2
    assert found.map_hw.shape == (SIDE, SIDE)
    engine.close()
