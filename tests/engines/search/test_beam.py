"""Beam search's steps against slow float64 definitions, written from the paper's text."""

from dataclasses import replace

import numpy as np
import pytest

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS
from engines.engine import Found
from engines.errors import EngineError, ModelError
from engines.localizer import Localizer
from engines.networks import alexnet
from engines.networks.registry import Classifier, load_classifier
from engines.search.beam import (
    COLUMNS,
    FEATURES,
    HEAT_SIDE,
    ROWS,
    BeamEngine,
    BeamSettings,
    Candidate,
    build_features_graph,
    build_tail_graph,
    children,
    cut,
    distinct,
    first_candidates,
    heat_map,
    objects_in,
    stretch,
    wanted_classes,
    without_cells,
    without_overlaps,
)
from tests.oracles import slow_stretch

SIDE_PX = 96  # conv5_3 is 6 x 6


@pytest.fixture(scope="module")
def compact():
    return load_classifier("compact", "random", SIDE_PX)


def cropped(map_chw, candidate):
    return np.einsum("ij,cjk,lk->cil", candidate.rows, map_chw, candidate.columns)


def test_candidates_are_crops_stretched_to_the_whole_map_again_and_again():
    """The matrices of a grandchild against interpolating step by step; its edges by hand."""
    grid = np.random.default_rng(0).random((2, 5, 5))
    whole = first_candidates(5)[0]
    once = cut(whole, (1, 4), (0, 5))
    twice = cut(once, (0, 5), (0, 4))
    by_hand = slow_stretch(slow_stretch(grid, 1, 0, 4, 5), 0, 0, 5, 4)
    np.testing.assert_allclose(cropped(grid, twice), by_hand, atol=1e-6)
    np.testing.assert_allclose(twice.edges, [0.2, 0, 1, 0.8], atol=1e-12)
    np.testing.assert_allclose(cut(twice, (0, 4), (1, 4)).edges, [0.2, 0.16, 0.84, 0.8], atol=1e-12)


def test_stretching_all_cells_changes_nothing_and_rows_sum_to_one():
    np.testing.assert_array_equal(stretch(7, 0, 7), np.eye(7, dtype=np.float32))
    np.testing.assert_allclose(stretch(7, 1, 6).sum(axis=1), 1, rtol=1e-6)
    assert (stretch(7, 1, 6)[:, 0] == 0).all()


def test_the_first_level_has_every_size_and_place_and_children_differ_in_one():
    """L = 4: one 4 x 4, two 3 x 4, two 4 x 3, four 3 x 3. A child is narrower or lower, never
    both.
    """
    first = first_candidates(4)
    sizes = sorted(
        (round(4 * (e[2] - e[0])), round(4 * (e[3] - e[1]))) for e in (c.edges for c in first)
    )
    assert sizes == [(3, 3)] * 4 + [(3, 4)] * 2 + [(4, 3)] * 2 + [(4, 4)]
    assert len(distinct(first)) == 9
    sizes = [(e[2] - e[0], e[3] - e[1]) for e in (c.edges for c in children(first[0]))]
    assert sorted(sizes) == [(0.75, 1), (0.75, 1), (1, 0.75), (1, 0.75)]


def test_a_rectangle_that_two_parents_share_is_there_once():
    whole = first_candidates(4)[0]
    left, top = cut(whole, (0, 3), (0, 4)), cut(whole, (0, 4), (0, 3))
    both = distinct([*children(left), *children(top)])
    assert len(both) == 7  # of eight: the left one cut to its top is the top one cut to its left
    assert (0, 0, 0.75, 0.75) in {each.edges for each in both}


def test_the_tail_scores_crops_as_the_network_scores_its_own_map(compact):
    """The whole map, uncut, has the image's own scores; a crop those of the crop, interpolated one
    value at a time.
    """
    settings = BeamSettings(beam=3)
    image = np.random.default_rng(1).integers(0, 256, (1, SIDE_PX, SIDE_PX, 3)).astype(np.uint8)
    features = OpenVinoEngine(build_features_graph(compact, settings), "fp32")
    out = features.infer({IMAGE: image, WANTED_CLASS: np.array([-1])})
    tail = OpenVinoEngine(build_tail_graph(compact, settings), "fp32")
    batch, side = tail.inputs[1].shape[0], tail.inputs[1].shape[2]
    assert (batch, side) == (12, 6)
    candidates = [*first_candidates(side), *[first_candidates(side)[0]] * 3]
    rows, columns = (
        np.stack([getattr(c, name) for c in candidates])[:, None] for name in ("rows", "columns")
    )
    scores = tail.infer({FEATURES: out[FEATURES], ROWS: rows, COLUMNS: columns})["scores"]
    np.testing.assert_allclose(scores[0], out["probabilities"][0], rtol=1e-4)
    assert out["score"][0] == pytest.approx(out["probabilities"][0].max(), rel=1e-5)
    crop = slow_stretch(out[FEATURES][0].astype(np.float64), 1, 0, 5, 6)
    pooled = crop.reshape(crop.shape[0], 3, 2, 3, 2).max(axis=(2, 4)).mean(axis=(1, 2))
    logits = (
        compact.weights["classifier.weight"].astype(np.float64) @ pooled
        + compact.weights["classifier.bias"]
    )
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(scores[2], expected / expected.sum(), rtol=1e-3)


def test_dense_layers_behind_the_map_score_crops_too():
    """AlexNet's pool and three dense layers as the tail."""
    weights = alexnet.random_weights(classes=10, hidden=16)
    classifier = Classifier(alexnet.ALEXNET, 227, "d", weights)
    engine = BeamEngine(
        classifier, BeamSettings(beam=2, levels=2), lambda graph: OpenVinoEngine(graph, "fp32")
    )
    image = np.random.default_rng(1).integers(0, 256, (1, 227, 227, 3)).astype(np.uint8)
    out = engine.infer({IMAGE: image, WANTED_CLASS: np.array([-1])})
    assert engine.calls == 3
    assert (out["box_xyxy"][0, 2:] > out["box_xyxy"][0, :2]).all()


def slow_search(score, side, beam, levels):
    """The paper's loop on plain lists of cuts: (edges, score) of what each level keeps."""
    kept, waiting = [], [(c, c.edges) for c in first_candidates(side)]
    for _ in range(levels):
        unique = {}
        for candidate, edges in waiting:
            unique[tuple(round(e, 6) for e in edges)] = candidate
        ranked = sorted(unique.values(), key=lambda c: -score(c))[:beam]
        kept += [(c.edges, score(c)) for c in ranked]
        waiting = [(child, child.edges) for c in ranked for child in children(c)]
    return kept


def test_the_beam_keeps_what_the_oracle_keeps(compact):
    """Every candidate scored alone in float64, without the engine, sorted and cut as the paper
    says.
    """
    settings = BeamSettings(beam=3, levels=4)
    engine = BeamEngine(compact, settings, lambda graph: OpenVinoEngine(graph, "fp32"))
    features = (np.random.default_rng(4).random((1, 256, 6, 6)) ** 6 * 20).astype(np.float32)
    weight, bias = (
        compact.weights[f"classifier.{k}"].astype(np.float64) for k in ("weight", "bias")
    )

    def score(candidate):
        crop = cropped(features[0].astype(np.float64), candidate)
        logits = weight @ crop.reshape(256, 3, 2, 3, 2).max(axis=(2, 4)).mean(axis=(1, 2)) + bias
        return np.exp(logits[7] - logits.max()) / np.exp(logits - logits.max()).sum()

    expected = slow_search(score, 6, 3, 4)
    found = engine._beams({FEATURES: features}, [7])[7]
    assert len(found) == 12
    np.testing.assert_allclose(
        [value for _, value in found], [value for _, value in expected], rtol=1e-3
    )
    np.testing.assert_allclose(
        [c.edges for c, _ in found], [edges for edges, _ in expected], atol=1e-9
    )


def test_heat_is_the_sum_of_the_scores_of_what_covers_a_place():
    none = np.eye(2, dtype=np.float32)
    ranked = [
        (Candidate(none, none, (0, 0, 0.5, 1)), 0.8),
        (Candidate(none, none, (0.25, 0, 1, 0.5)), 0.4),
    ]
    heat = heat_map(ranked) * 2
    places = {(0.1, 0.9): 0.8, (0.3, 0.1): 1.2, (0.3, 0.9): 0.8, (0.9, 0.1): 0.4, (0.9, 0.9): 0.0}
    for (x, y), value in places.items():
        assert heat[int(y * HEAT_SIDE), int(x * HEAT_SIDE)] == pytest.approx(value)
    slow = np.zeros((HEAT_SIDE, HEAT_SIDE))
    for i, j in np.ndindex(slow.shape):
        x, y = (j + 0.5) / HEAT_SIDE, (i + 0.5) / HEAT_SIDE
        slow[i, j] = sum(
            s for c, s in ranked if c.edges[0] <= x < c.edges[2] and c.edges[1] <= y < c.edges[3]
        )
    np.testing.assert_allclose(heat, slow, atol=1e-12)


def test_each_blob_over_the_threshold_is_an_object_with_its_mean_heat():
    heat = np.zeros((8, 8))
    heat[0:2, 0:4] = 1.0
    heat[0, 0] = 0.5
    heat[5:8, 6:8] = 0.4
    first, second = objects_in(heat, 3, 0.4)
    assert first.box_xyxy == pytest.approx((0, 0, 0.5, 0.25))
    assert first.score == pytest.approx(7.5 / 8)
    assert second.box_xyxy == pytest.approx((6 / 8, 5 / 8, 1, 1))
    assert (second.class_index, second.score) == (3, pytest.approx(0.4))
    assert len(objects_in(heat, 3, 0.45)) == 1


def test_the_weaker_of_two_boxes_on_one_object_goes():
    strong, same, other = (
        Found((0, 0, 0.5, 1), 1, 0.9),
        Found((0, 0, 0.45, 1), 2, 0.5),
        Found((0.5, 0, 1, 1), 2, 0.1),
    )
    assert without_overlaps([other, same, strong], 0.5) == [strong, other]


def test_cells_of_found_objects_are_emptied():
    features = np.ones((1, 2, 4, 4), np.float32)
    left = without_cells(features, [Found((0, 0, 0.5, 0.6), 1, 1.0)])
    assert (left[0, :, :2, :2] == 0).all()
    assert left.sum() == 2 * 12


def test_classes_that_are_unlikely_beside_the_first_are_not_searched_for():
    probabilities = np.array([0.05, 0.6, 0.3, 0.01], np.float32)
    assert wanted_classes(probabilities, BeamSettings(classes=3)) == [1, 2]
    assert wanted_classes(probabilities, BeamSettings(classes=1)) == [1]


def test_a_level_is_one_call_and_several_classes_share_it(compact):
    engine = BeamEngine(
        compact,
        BeamSettings(levels=5, classes=2, least_share=0.0),
        lambda g: OpenVinoEngine(g, "fp32"),
    )
    localizer = Localizer(engine)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    found = localizer.localize([image])[0]
    assert engine.calls == 1 + 5
    assert localizer.box_reader.startswith("beam: M 8, H 5")
    assert found.map_hw.shape == (HEAT_SIDE, HEAT_SIDE)
    localizer.look_for(11)
    named = localizer.localize([image])[0]
    assert named.class_index == 11
    assert {each.class_index for each in named.detections} == {11}
    engine.close()


def test_what_cannot_be_says_so(compact):
    with pytest.raises(ModelError, match="at least one candidate"):
        BeamSettings(beam=0)
    with pytest.raises(EngineError, match="no layer 'conv9'"):
        build_tail_graph(compact, BeamSettings(layer="conv9"))
    with pytest.raises(EngineError, match="no usual layer"):
        build_tail_graph(
            replace(compact, network=replace(compact.network, beam_layer=None)),
            BeamSettings(),
        )
