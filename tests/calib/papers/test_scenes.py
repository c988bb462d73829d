"""How boxes are scored: by hand."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.papers.scenes import (
    CLASSES,
    IMAGES,
    MEAN,
    OBJECTS,
    SINGLE,
    Scenes,
    constant_scores,
    scored,
)

LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


def scenes_of(*images):
    """Of images, each the (class, box) of its objects."""
    samples = tuple(
        Sample(str(place), None, tuple(Truth(name, box) for name, box in objects))
        for place, objects in enumerate(images)
    )
    return Scenes(
        samples,
        None,
        tuple(np.array([box for _, box in objects]) for objects in images),
        tuple(tuple(name for name, _ in objects) for objects in images),
    )


def test_each_way_of_counting_by_hand():
    scenes = scenes_of(
        [("cat", LEFT), ("cat", RIGHT), ("dog", RIGHT)],
        [("dog", LEFT)],
        [("dog", WHOLE), ("cow", RIGHT)],
    )
    found = scored(np.array([LEFT, LEFT, LEFT]), scenes)
    assert found[OBJECTS] == {
        "all": pytest.approx(2 / 6),
        "cat": 0.5,
        "dog": pytest.approx(1 / 3),
        "cow": 0.0,
        MEAN: pytest.approx((1 / 2 + 1 / 3) / 3),
    }  # an IoU of one half, as the whole image has with its left, is not more than one half
    assert found[CLASSES]["all"] == pytest.approx(2 / 5)
    assert found[CLASSES]["cat"] == 1.0
    assert found[IMAGES]["all"] == pytest.approx(2 / 3)
    assert found[SINGLE] == {"all": 1.0, "dog": 1.0, MEAN: 1.0}


def test_the_largest_object_and_the_mean_box_of_an_image():
    scenes = scenes_of([("cat", LEFT), ("dog", WHOLE)], [("cow", RIGHT)])
    largest = scenes.of_largest
    assert largest.names == (("dog",), ("cow",))
    np.testing.assert_array_equal(largest.mean_boxes, [WHOLE, RIGHT])
    np.testing.assert_allclose(scenes.mean_boxes[0], (0, 0, 0.75, 1))
    np.testing.assert_array_equal(scenes.counts, [2, 1])
    assert scenes.single.tolist() == [1]


def test_the_constant_centre_box_has_the_average_size():
    """Ebrahimpour & Noelle, table 3: in the middle of the image, of average size."""
    training = [np.array([[0.0, 0.0, 0.5, 0.4]]), np.array([[0.7, 0.0, 1.0, 1.0]])]
    scenes = scenes_of([("cat", (0.3, 0.15, 0.7, 0.85))], [("cat", LEFT)])
    scores = constant_scores(training, scenes)["constant centre box of average size"]
    assert scores[IMAGES]["all"] == 0.5
