"""Names and confidences of boxes, fitted to answers of which everything is known."""

import numpy as np

from calib.heads.dense_names import Answer, Names, Sureness, least_right, name_targets, with_finer
from engines.dense_names import Naming

RNG = np.random.default_rng(2)
CLASSES = 3


def answers(images: int, kind: str = "") -> list[Answer]:
    """Each with a box on its only object, and seven elsewhere. The scores know the class of four of
    five objects.
    """
    found = []
    for _ in range(images):
        x, y = RNG.uniform(0, 160, 2)
        true = np.array([[x, y, x + 100, y + 100]])
        others = np.sort(RNG.uniform(200, 320, (7, 2, 2)), axis=1).reshape(7, 4)
        wanted = int(RNG.integers(CLASSES))
        scores = RNG.normal(0, 0.05, (8, CLASSES + 1))
        scores[1:, -1] += 0.8
        if RNG.uniform() < 0.8:
            scores[0, wanted] += 0.8
        else:
            scores[0, int(RNG.integers(CLASSES))] += 0.4
        expected = np.concatenate([[0.8], RNG.uniform(0, 0.3, 7)])
        boxes = np.concatenate([true + 3, others])
        found.append(Answer(boxes, expected, expected, scores, true, np.array([wanted]), kind))
    return found


def test_sharpened_scores_are_probabilities():
    seen, new = answers(400), answers(400)
    names = Names.of(["a", "b", "c"], None).sharpened(seen)
    shares = np.array([names.probabilities(each.scores)[0] for each in new])
    wanted = np.array([each.wanted[0] for each in new])
    right = shares[:, :-1].argmax(axis=1) == wanted
    assert abs(shares[:, :-1].max(axis=1).mean() - right.mean()) < 0.1
    others = np.concatenate([names.probabilities(each.scores)[1:, -1] for each in new])
    assert others.mean() > 0.9


def test_the_layer_of_a_head_gives_the_same_probabilities():
    seen = answers(200)
    names = Names.of(["a", "b", "c"], None).sharpened(seen)
    weights = RNG.normal(size=(6, CLASSES + 1))
    naming, figures = names.layer(weights, None, seen)
    features = RNG.normal(size=(10, 5))
    found = features @ naming.weight.T + naming.bias
    wanted = names.logits(np.concatenate([features, np.ones((10, 1))], axis=1) @ weights)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert figures["names_right"] >= 0.92
    assert figures["named"] > 0.5


def test_classes_of_ones_own_are_added_to_those_that_a_head_knows():
    fitted = Naming(("dog", "cat"), np.zeros((3, 5), np.float32), np.zeros(3, np.float32), 0.6)
    names = Names.of(["cat", "mug"], fitted)
    assert names.names == ("dog", "cat", "mug")
    assert names.learned.tolist() == [False, False, True, False]
    seen = answers(300)  # scores 0 and 1 and the background's are the fitted layer's logits
    for each in seen:
        each.scores[:, [0, 1, 3]] *= 6
    names = names.sharpened(seen)
    assert names.factor > 1
    scores = seen[0].scores
    np.testing.assert_array_equal(names.logits(scores)[:, [0, 1, 3]], scores[:, [0, 1, 3]])
    naming, _ = names.layer(np.zeros((6, 4)), fitted, seen)
    assert naming.names == ("dog", "cat", "mug")
    assert naming.shown_from == 0.6


def test_a_threshold_leaves_the_wanted_share_of_right_ones():
    probability = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, True, False, True, False])
    assert least_right(probability, right, 0.9) == 0.8
    assert least_right(probability, right, 0.75) == 0.6
    assert least_right(probability, ~right, 0.9) == 1.0
    assert least_right(probability, probability > 0, 0.9) == 0.5
    assert least_right(probability[:2], right[:2], 0.9) == 0.5
    assert least_right(np.zeros(0), np.zeros(0, np.bool_), 0.9) == 1.0


def test_a_confidence_is_true_and_empty_images_show_nothing():
    names = Names.of(["a", "b", "c"], None)
    seen = answers(300)
    empty = [
        Answer(
            each.boxes[1:],
            each.expected[1:],
            each.objectness[1:],
            each.scores[1:],
            each.true[:0],
            each.classes[:0],
            "empty",
        )
        for each in answers(100)
    ]
    sure = Sureness(names, None, (1.0, 0.0), 320, 4.0).fitted([*seen, *empty])
    least = sure.shown_from([*seen, *empty])
    assert least is not None
    assert np.mean([sure(each).max() >= least for each in empty]) <= 0.05
    assert np.mean([sure(each)[0] >= least for each in answers(100)]) > 0.9
    assert sure.shown_from(seen) is None


def test_what_a_box_should_be_called():
    true = np.array([[0.0, 0, 100, 100], [200, 200, 300, 300]])
    boxes = np.array([[0.0, 0, 100, 100], [0, 0, 100, 40], [200, 200, 300, 300], [120, 0, 140, 20]])
    found = name_targets(boxes, true, np.array([1, -1]), 2)
    np.testing.assert_allclose(found, [[0, 1, 0], [0, 0.5, 0.5], [0, 0, 0], [0, 0, 1]], atol=1e-6)
    assert name_targets(boxes, true[:0], np.zeros(0, np.int64), 2)[:, 2].tolist() == [1] * 4


def test_kinds_of_names_are_found_by_the_networks_class():
    naming = Naming(("dog", "cat"), np.zeros((3, 5), np.float32), np.zeros(3, np.float32), 0.6)
    assert with_finer(naming, {"cat": [2, 3]}, 5).finer.tolist() == [-1, -1, 1, 1, -1]
