"""Beam search as published against slow float64 definitions, written from the paper's text."""

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS
from engines.choose import open_localizer
from engines.errors import EngineError, ModelError
from engines.networks import alexnet
from engines.networks.registry import Classifier, load_classifier
from engines.search.beam import FEATURES, summed
from engines.search.beam_published import (
    WHOLE,
    Crops,
    Grid,
    PublishedBeamEngine,
    PublishedBeamSettings,
    Reading,
    build_maps_graph,
    build_stretched_graph,
    children_of,
    detections,
    heat_side,
    searched,
    sub_grids,
)
from tests.oracles import slow_stretch

L = 4


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.fixture
def maps():
    return np.random.default_rng(0).random((3, L, L))


@pytest.fixture
def weight():
    """Of one fully connected layer, for two classes."""
    return np.random.default_rng(1).standard_normal((2, 3 * L * L))


def slow_grid_search(maps, weight, index, beam, levels):
    """Section 3.4 to the letter, on boxes [x, y, w, h] of whole cells."""
    kept, nodes = [], [(0, 0, L, L)]
    for _ in range(levels):
        below = set()
        for x, y, w, h in nodes:
            for xj, yj, wj, hj in np.ndindex(L, L, L + 1, L + 1):
                lies_within = x <= xj and y <= yj and xj + wj <= x + w and yj + hj <= y + h
                one_narrower = (wj, hj) in ((w - 1, h), (w, h - 1))
                if lies_within and one_narrower and wj >= 1 and hj >= 1:
                    below.add((xj, yj, wj, hj))

        def score(box):
            return softmax(weight @ slow_stretch(maps, *box).ravel())[index]

        nodes = sorted(below, key=lambda box: -score(box))[:beam]
        kept += [
            ((x / L, y / L, (x + w) / L, (y + h) / L), score((x, y, w, h))) for x, y, w, h in nodes
        ]
    return kept


@pytest.mark.parametrize(("beam", "levels", "index"), [(1, 6, 0), (3, 6, 1), (8, 10, 0)])
def test_the_grid_is_searched_as_the_oracle_does(maps, weight, beam, levels, index):
    """Greedy, a small beam, and the paper's: deeper than the tree, which ends in single cells."""

    def classify(stretched):
        return softmax(stretched.reshape(len(stretched), -1).astype(np.float64) @ weight.T)

    found = searched(Grid(maps, classify), index, beam, levels)
    expected = slow_grid_search(maps, weight, index, beam, levels)
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)
    np.testing.assert_allclose([e for e, _ in found], [e for e, _ in expected], atol=1e-8)
    smallest = min((e[2] - e[0]) * (e[3] - e[1]) for e, _ in found)
    assert smallest == pytest.approx((1 if levels >= 6 else 2) / L**2)


def test_crops_are_searched_as_the_oracle_does(weight):
    """Equation 5: the image at a node's box goes through the convolutions, which here are means of
    a fourth each way, again, and its children are L - 1 of its own L cells.
    """
    image = np.random.default_rng(3).random((3, 64, 64))

    def convolved(box):
        x0, y0, x1, y1 = box
        result = np.zeros((3, L, L))
        for c, i, j in np.ndindex(3, L, L):
            top, bottom = (y0 + (y1 - y0) * k / L for k in (i, i + 1))
            left, right = (x0 + (x1 - x0) * k / L for k in (j, j + 1))
            cut = image[
                c,
                round(64 * top) : max(round(64 * bottom), round(64 * top) + 1),
                round(64 * left) : max(round(64 * right), round(64 * left) + 1),
            ]
            result[c, i, j] = cut.mean()
        return result

    def classify(stretched):
        return softmax(stretched.reshape(len(stretched), -1).astype(np.float64) @ weight.T)

    expected, nodes = [], [WHOLE]
    for _ in range(4):
        below = {}
        for x0, y0, x1, y1 in nodes:
            maps, w, h = convolved((x0, y0, x1, y1)), (x1 - x0) / L, (y1 - y0) / L
            for x, y, width, height in ((1, 0, 3, 4), (0, 0, 3, 4), (0, 1, 4, 3), (0, 0, 4, 3)):
                score = softmax(weight @ slow_stretch(maps, x, y, width, height).ravel())[1]
                box = (x0 + x * w, y0 + y * h, x0 + (x + width) * w, y0 + (y + height) * h)
                key = tuple(round(edge, 9) for edge in box)
                below[key] = max(score, below.get(key, 0))
        nodes = sorted(below, key=lambda box: -below[box])[:2]
        expected += [(box, below[box]) for box in nodes]
    tree = Crops(lambda boxes: np.stack([convolved(box) for box in boxes]), classify)
    found = searched(tree, 1, 2, 4)
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)
    np.testing.assert_allclose([e for e, _ in found], [e for e, _ in expected], atol=1e-7)


def test_children_differ_in_width_or_height_but_not_in_both():
    """Equation 6 and the sentence behind it; a single cell has none."""
    found = children_of(WHOLE, 1 / 6, 1 / 6)
    cells = [(round(6 * (x1 - x0)), round(6 * (y1 - y0))) for x0, y0, x1, y1 in found]
    assert cells == [(5, 6), (5, 6), (6, 5), (6, 5)]
    assert len(set(found)) == 4
    assert children_of((0.0, 0.0, 0.25, 0.25), 0.25, 0.25) == []
    assert len(children_of((0.0, 0.0, 0.25, 0.5), 0.25, 0.25)) == 2


def test_sub_grids_are_interpolated_over_the_entire_grid(maps):
    boxes = [(0, 0, 4, 4), (1, 0, 3, 4), (2, 1, 1, 3), (1, 2, 3, 1)]
    edges = [(x / L, y / L, (x + w) / L, (y + h) / L) for x, y, w, h in boxes]
    for found, box in zip(sub_grids(maps, edges), boxes, strict=True):
        np.testing.assert_allclose(found, slow_stretch(maps, *box), rtol=1e-5)


def test_scoring_all_sub_grids_first_changes_nothing():
    """On 7 x 7 cells, whose edges are no short numbers."""
    rng, calls = np.random.default_rng(4), []
    maps, weight = rng.random((2, 7, 7)), rng.standard_normal((2, 98))

    def classify(stretched):
        calls.append(len(stretched))
        return softmax(stretched.reshape(len(stretched), -1).astype(np.float64) @ weight.T)

    step_by_step, at_once = Grid(maps, classify), Grid(maps, classify)
    expected = searched(step_by_step, 1, 8, 10)
    calls.clear()
    at_once.score_all()
    found = searched(at_once, 1, 8, 10)
    assert [edges for edges, _ in found] == [edges for edges, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)
    assert calls == [28 * 28]


def test_heat_is_summed_and_a_rectangle_has_the_mean_of_all_that_it_encloses():
    heat = summed([((0.0, 0.0, 0.5, 0.5), 0.5), ((0.25, 0.25, 0.5, 1.0), 0.25)], 4)
    np.testing.assert_allclose(
        heat, [[0.5, 0.5, 0, 0], [0.5, 0.75, 0, 0], [0, 0.25, 0, 0], [0, 0.25, 0, 0]]
    )
    both = detections(heat, 5, 0.3)
    assert [each.box_xyxy for each in both] == [pytest.approx((0, 0, 0.5, 1))]
    assert both[0].score == pytest.approx((4 * 0.5 + 3 * 0.25) / 8), "the hollow counts"
    (only,) = detections(heat, 5, 0.5)
    assert only.box_xyxy == pytest.approx((0, 0, 0.5, 0.5))
    assert only.score == pytest.approx(2.25 / 4)
    assert only.class_index == 5
    assert heat_side(7) % 7 == heat_side(6) % 6 == heat_side(4) % 4 == 0


@pytest.fixture(scope="module")
def tiny() -> Classifier:
    """AlexNet with few hidden units: 6 x 6 pooled maps and three fully connected layers."""
    weights = alexnet.random_weights(classes=10, hidden=16)
    return Classifier(alexnet.ALEXNET, 227, "d", weights)


@pytest.mark.parametrize("reading", [Reading.GRID, Reading.CROPS])
def test_an_engine_gives_the_searchs_detections_and_heat(tiny, reading):
    settings = PublishedBeamSettings(reading=reading, beam=2, levels=3, objects=4, classes=2)
    engine = PublishedBeamEngine(tiny, settings, lambda graph: OpenVinoEngine(graph, "fp32"))
    side = 2 * 227
    image = np.random.default_rng(1).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    found = engine.infer({IMAGE: image, WANTED_CLASS: np.array([3])})
    assert found["map"].shape == (1, heat_side(6), heat_side(6))
    assert (found["detections"][0, 0, 4], found["box_xyxy"].shape) == (3, (1, 4))
    maps = engine._first.infer(engine.first_feeds({IMAGE: image, WANTED_CLASS: np.array([3])}))
    maps = maps[FEATURES][0]
    assert maps.shape[1:] == (6, 6)
    whole = Grid(maps, engine.classify)
    if reading == Reading.CROPS:
        whole = Crops(lambda boxes: engine.maps_of(image[0], boxes, maps), engine.classify)
    expected = summed(searched(whole, 3, 2, 3), heat_side(6))
    np.testing.assert_allclose(found["map"][0], expected, rtol=1e-4)
    engine.close()


def test_the_tail_is_the_rest_of_the_network(tiny):
    """Pooled maps, uncut, have the image's own scores."""
    image = np.random.default_rng(1).integers(0, 256, (1, 227, 227, 3)).astype(np.uint8)
    maps = OpenVinoEngine(build_maps_graph(tiny, None, 1), "fp32").infer({IMAGE: image})[FEATURES]
    tail = OpenVinoEngine(build_stretched_graph(tiny, None, 2), "fp32")
    maps = maps / (40 * maps.std())  # scores that the softmax does not round to 0 and 1
    scores = tail.infer({FEATURES: np.concatenate([maps, 2 * maps])})["scores"]
    w = {name: value.astype(np.float64) for name, value in tiny.weights.items()}
    for row, x in zip(scores, (maps, 2 * maps), strict=True):
        y = x.ravel().astype(np.float64)
        for layer in ("fc6", "fc7", "fc8"):
            y = w[f"{layer}.weight"] @ y + w[f"{layer}.bias"]
            y = np.maximum(y, 0) if layer != "fc8" else y
        assert softmax(y).max() < 0.99
        np.testing.assert_allclose(row, softmax(y), rtol=1e-3)


def test_the_command_line_reaches_it():
    localizer = open_localizer(
        "compact", method="beam", as_published=True, weights="random", size_px=64, objects=3
    )
    assert localizer.box_reader.startswith("beam as published: M 8, H 10, crops at pool5")
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    found = localizer.localize([image])[0]
    assert found.detections[0].box_xyxy_px == found.box_xyxy_px
    localizer.close()


def test_what_cannot_be_says_so():
    with pytest.raises(ModelError, match="at least one candidate"):
        PublishedBeamSettings(beam=0)
    with pytest.raises(ModelError, match="shares"):
        PublishedBeamSettings(thresholds={3: 1.5})
    classifier = load_classifier("squeezenet", "random")
    with pytest.raises(EngineError, match="name one"):
        build_maps_graph(classifier, None, 1)
