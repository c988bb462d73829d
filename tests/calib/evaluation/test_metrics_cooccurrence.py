"""Co-occurrence by hand arithmetic."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.evaluation.metrics import Predicted, conditional_probabilities, rescored

BOX = (0.0, 0.0, 1.0, 1.0)


def sample(name, *classes):
    return Sample(
        name, lambda: np.zeros((8, 8, 3), np.uint8), tuple(Truth(each, BOX) for each in classes)
    )


def test_of_the_images_with_one_class_the_share_that_has_the_other():
    """Four images with a person, two of which have a dog; one dog is alone; two persons in an image
    count once.
    """
    samples = [
        sample("a", "person", "person", "dog"),
        sample("b", "person"),
        sample("c", "person"),
        sample("d", "person", "dog"),
    ]
    given = conditional_probabilities([*samples, sample("e", "dog")])
    assert given["person"] == {"dog": 0.5}
    assert given["dog"] == {"person": pytest.approx(2 / 3)}
    assert conditional_probabilities([]) == {}


def test_scores_rise_with_what_is_seen_beside_them():
    """s_i + alpha * sum p(i|j) s_j: 0.2 + 0.5 * (0.5 * 0.8); of two persons the better counts;
    other images do not.
    """
    given = {"person": {"dog": 0.5}, "dog": {"person": 0.25}}
    predicted = [
        Predicted("a", "dog", 0.2, BOX),
        Predicted("a", "person", 0.8, BOX),
        Predicted("a", "person", 0.3, BOX),
        Predicted("b", "dog", 0.4, BOX),
    ]
    scores = [each.score for each in rescored(predicted, given, alpha=0.5)]
    assert scores == pytest.approx(
        [0.2 + 0.5 * 0.5 * 0.8, 0.8 + 0.5 * 0.25 * 0.2, 0.3 + 0.5 * 0.25 * 0.2, 0.4]
    )
    assert [each.score for each in rescored(predicted, given, alpha=0)] == [0.2, 0.8, 0.3, 0.4]
