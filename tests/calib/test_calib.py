"""Data sets in every layout, ridge against its definition, metrics by hand, training that resumes exactly."""

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.evaluation.evaluate import evaluate
from calib.evaluation.metrics import centre_correct, constant_boxes, corloc
from calib.heads.features import FeatureTable
from calib.heads.fit import fit_head
from calib.heads.linear import Ridge, choose_strength, folds, held_out_ious
from calib.shipped.sure import with_trust
from engines.backends.mock import MockEngine
from engines.backends.openvino import OpenVinoEngine
from engines.base import ModelError, SourceError
from engines.build import build_graph
from engines.classifiers import load_classifier
from engines.features import Feature
from engines.localizer import Localizer
from engines.maps import MapSpec
from tests.realtime.media import picture

QUIET = Console(quiet=True)


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_ridge_is_its_definition(shape):
    """argmin |y - x w|^2 + strength |w|^2 on standardized features, by the normal equations."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(shape) * 3 + 1, rng.random((shape[0], 4))
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    for strength in (0.1, 10.0):
        w = np.linalg.inv(z.T @ z + strength * np.eye(shape[1])) @ z.T @ (y - y.mean(0))
        weight, bias = Ridge(x, y).solve(strength)
        np.testing.assert_allclose(x @ weight.T + bias, z @ w + y.mean(0), atol=1e-8)


def test_cross_validation_finds_that_noise_wants_a_strong_penalty():
    rng = np.random.default_rng(2)
    boxes = np.clip(np.array([0.2, 0.2, 0.8, 0.8]) + 0.02 * rng.standard_normal((60, 4)), 0, 1)
    noise = rng.standard_normal((60, 50)).astype(np.float32)
    groups, indices = tuple(map(str, range(60))), np.zeros(60, np.int64)
    table, rows = FeatureTable(noise, noise, boxes, ("x",) * 60, indices, groups), np.arange(60)
    assert choose_strength(table, rows, (0.01, 1e5)) == 1e5
    ious = held_out_ious(table, rows, 1e5)
    assert ious.mean() > 0.85
    assert (ious > 0.5).all()


def grouped(names):
    nothing = np.zeros((len(names), 4), np.float32)
    return FeatureTable(nothing, nothing, nothing.astype(np.float64), names, np.zeros(len(names), np.int64), names)


def test_photos_keep_the_folds_that_they_always_had():
    """Numbers that were published hang on them."""
    table, rows = grouped(tuple(map(str, range(60)))), np.arange(60)[::2]
    fold = np.random.default_rng(0).permutation(30) % 5
    for number, (kept, held) in enumerate(folds(table, rows)):
        assert (held.tolist(), kept.tolist()) == (rows[fold == number].tolist(), rows[fold != number].tolist())


def test_frames_of_one_sequence_stay_in_one_fold():
    names = tuple(f"v{number % 7}" for number in range(60))
    found = folds(grouped(names), np.arange(60))
    assert sorted(row for _, held in found for row in held) == list(range(60))
    for kept, held in found:
        assert len(held)
        assert not {names[row] for row in kept} & {names[row] for row in held}


@pytest.mark.parametrize("sequences", [1, 4])
def test_too_few_sequences_for_folds_are_cut_into_blocks_of_frames(sequences):
    rows = np.random.default_rng(1).permutation(100)[:52]
    found = folds(grouped(tuple(f"v{number * sequences // 100}" for number in range(100))), rows)
    assert sorted(len(held) for _, held in found) == [10, 10, 10, 11, 11]
    blocks = sorted((held.min(), held.max()) for _, held in found)
    assert all(end < start for (_, end), (start, _) in pairwise(blocks))


def test_a_head_learns_where_a_square_is(tmp_path):
    """Fitted on 40 made pictures, with a random network: the box must follow the square."""
    names, lines = [f"{i}.png" for i in range(56)], []
    (tmp_path / "sq").mkdir()
    rng = np.random.default_rng(4)
    for name in names:
        image = np.full((64, 64, 3), 30, np.uint8)
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 16, 16), (24, 24, 32, 32)))
        image[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3))
        cv2.imwrite(str(tmp_path / "sq" / name), image)
        lines.append(f"{name},square,{x},{y},{x + w},{y + h}")
    (tmp_path / "sq.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(lines))
    samples = load_dataset(tmp_path / "sq.csv")
    classifier = load_classifier("compact", "random", 64)
    features = [Feature("quantiles", layer, 9, power) for layer in ("pixels", "conv2_2") for power in (1.0, 2.0)]
    fitted = fit_head(samples[:40], classifier, MapSpec(), features, QUIET, "squares")
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, head=fitted.head), "fp32"))
    report, cases = evaluate(samples[40:], localizer, QUIET, constant_boxes(np.array([[0.2, 0.2, 0.7, 0.7]])))
    assert len(cases) == report["images"] == 16
    assert report["corloc"] > 0.8
    assert report["corloc"] > report["baselines"]["best_constant"]
    bare = replace(fitted.head, trust=None)
    assert (
        with_trust(bare, samples[:40], classifier, QUIET).trust == fitted.head.trust
    )  # as for heads from before there was one
    assert abs(np.mean([case.confidence for case in cases]) - fitted.cv_corloc) < 0.15
    assert set(report["center_correctness"]) == {"0.0", "0.1", "0.2", "0.3", "0.4", "0.5"}
    with pytest.raises(SourceError, match="needs at least 10"):
        fit_head(samples[:5], classifier, MapSpec(), features, QUIET, "few")


def test_evaluate_counts_an_image_once_for_each_of_its_classes(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    (tmp_path / "d.csv").write_text("file,class,x0,y0,x1,y1\na.png,cat,4,30,28,54\na.png,dog,90,0,120,20\n")
    report, _ = evaluate(load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None)
    assert report["corloc_per_class"] == {"cat": 1.0, "dog": 0.0}
    assert report["corloc"] == 0.5
    assert report["images"] == 1
    with pytest.raises(SourceError, match="exactly one"):
        evaluate(load_dataset(tmp_path / "d.csv"), Localizer(MockEngine(96)), QUIET, None, single=True)


def test_evaluate_needs_a_head(tiny_localizer):
    with pytest.raises(ModelError, match="no box head"):
        evaluate([], tiny_localizer, QUIET, None)


def test_metrics_by_hand():
    assert corloc(np.array([0.5, 0.51, 0.9, 0.1])) == 0.5  # 0.5 itself does not count
    true = np.array([[0.0, 0.0, 10.0, 10.0]] * 3)
    found = np.array([[4.0, 4, 6, 6], [0, 0, 4, 4], [8, 8, 16, 16]])  # centres 5,5 and 2,2 and 12,12
    assert centre_correct(found, true, 0.0).tolist() == [True, True, False]
    assert centre_correct(found, true, 0.5).tolist() == [True, False, False]  # the middle half is 2.5 .. 7.5


def test_the_best_constant_box_beats_the_mean_where_boxes_have_two_kinds():
    boxes = np.array([[0.0, 0, 0.5, 0.5]] * 6 + [[0.5, 0.5, 1, 1]] * 4)
    constants = constant_boxes(boxes)
    assert constants.best_constant == (0.0, 0.0, 0.5, 0.5)
    assert constants.mean_box == pytest.approx((0.2, 0.2, 0.7, 0.7))
