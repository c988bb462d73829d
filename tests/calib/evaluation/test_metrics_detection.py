"""Average precision by hand arithmetic and against a slow definition."""

import numpy as np
import pytest

from calib.data.choose import KNOWN, everyday_names
from calib.evaluation.metrics import (
    Predicted,
    all_found,
    average_precision,
    detection_ap,
    localization_ap,
    mean_ap,
    peak_xy,
)
from engines.networks.registry import imagenet_classes


def test_the_area_under_the_envelope_by_hand():
    """Right, wrong, right of 4: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4: 1/4 * 1 + 1/4 *
    2/3.
    """
    assert average_precision([True, False, True], 4) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision([True, True], 2) == 1
    assert (
        average_precision([False], 3)
        == average_precision([], 3)
        == average_precision([True], 0)
        == 0
    )


def slow_ap(correct, total):
    """At each step of recall the best precision from there on."""
    area, hits = 0.0, 0
    for k, right in enumerate(correct):
        if right:
            hits += 1
            best = max(sum(correct[: n + 1]) / (n + 1) for n in range(k, len(correct)))
            area += best / total
    return area


def test_the_area_is_the_slow_definitions():
    rng = np.random.default_rng(0)
    for _ in range(20):
        correct = list(rng.random(15) < 0.4)
        assert average_precision(correct, 12) == pytest.approx(slow_ap(correct, 12))


TRUTHS = {
    "cat": {"a": [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)], "b": [(0.0, 0.0, 4.0, 4.0)]},
    "dog": {"b": [(5.0, 5.0, 9.0, 9.0)]},
}


def test_a_true_box_is_found_once_and_classes_do_not_mix():
    """Cats by score: right, the same box again, right, in an image without cats. The dog's box
    overlaps by 9/16 only.
    """
    predicted = [
        Predicted("a", "cat", 0.9, (0, 0, 10, 9)),
        Predicted("a", "cat", 0.8, (0, 0, 10, 10)),
        Predicted("a", "cat", 0.7, (20, 0, 30, 10)),
        Predicted("c", "cat", 0.6, (0, 0, 10, 10)),
        Predicted("b", "dog", 0.5, (5, 5, 8, 8)),
        Predicted("b", "cow", 0.9, (0, 0, 1, 1)),
    ]
    found = detection_ap(predicted, TRUTHS)
    assert found == {"cat": pytest.approx((1 + 2 / 3) / 3), "dog": 1}
    assert detection_ap(predicted, TRUTHS, 0.6)["dog"] == 0
    assert mean_ap(found) == pytest.approx((found["cat"] + 1) / 2)
    assert mean_ap({}) == 0


def test_a_point_in_any_box_of_the_class_is_right_and_an_image_counts_once():
    predicted = [
        Predicted("a", "cat", 0.9, (25, 5)),
        Predicted("a", "cat", 0.8, (15, 5)),
        Predicted("b", "cat", 0.7, (8, 8)),
        Predicted("b", "dog", 0.5, (8, 8)),
    ]
    assert localization_ap(predicted, TRUTHS) == {"cat": 0.5, "dog": 1}


def test_the_peak_of_a_plateau_is_its_middle():
    heat = np.zeros((4, 8), np.float32)
    heat[1:3, 4:8] = 2
    assert peak_xy(heat) == (0.75, 0.5)


def test_both_objects_need_a_box_each():
    truths = [(0, 0, 10, 10), (20, 0, 30, 10)]
    assert all_found([(20, 0, 30, 9), (0, 0, 10, 8)], truths)
    assert not all_found([(0, 0, 10, 10)], truths)
    assert not all_found([(0, 0, 10, 10), (0, 0, 10, 9)], truths)


def test_every_breed_is_a_dog_and_unknown_classes_are_nobodys():
    names = tuple(name for _, name in imagenet_classes())
    wanted = frozenset({"dog", "cow", "person"})
    everyday = everyday_names(names, wanted)
    assert everyday[names.index("beagle")] == "dog"
    assert everyday[names.index("ox")] == "cow"
    assert everyday[names.index("tabby")] == ""
    assert sum(name == "dog" for name in everyday) == 118
    assert everyday_names(("thing", "dog"), wanted) == ("", "dog")
    assert all(0 <= i < 1000 for indices in KNOWN.values() for i in indices)
