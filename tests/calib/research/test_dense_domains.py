"""Images that are made of photos keep their true boxes, and empty ones hold no object."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.dense import FINER, numbers
from calib.research.dense_domains import further

ORANGE = (20, 110, 240)


def photo(number: int) -> Sample:
    """A grey photo with one orange box in it."""
    rng = np.random.default_rng(number)
    width, height = rng.integers(30, 60, 2)
    x, y = int(rng.integers(0, 100)), int(rng.integers(0, 60))
    image = np.full((150, 240, 3), 120, np.uint8)
    image[y : y + height, x : x + width] = ORANGE
    truth = Truth("thing", (x, y, x + float(width), y + float(height)))
    return Sample(f"{number}.png", image.copy, (truth,))


PHOTOS = [photo(number) for number in range(12)]
MADE = further(PHOTOS, PHOTOS, 12)


def is_orange(image: np.ndarray, x: float, y: float) -> bool:
    return bool(np.abs(image[int(y), int(x)].astype(int) - ORANGE).sum() < 120)


@pytest.mark.parametrize("kind", ["squeezed", "far away"])
def test_boxes_lie_on_what_they_are_of(kind):
    assert len(MADE[kind]) == 12
    for sample in MADE[kind]:
        image, (x0, y0, x1, y1) = sample.read(), sample.truths[0].box_xyxy_px
        corners = [(x0 + 2, y0 + 2), (x1 - 3, y0 + 2), (x0 + 2, y1 - 3), (x1 - 3, y1 - 3)]
        assert all(is_orange(image, *corner) for corner in corners)
        assert sample.group in {each.group for each in PHOTOS}


def test_nothing_is_in_empty_images():
    assert MADE["empty"]
    assert len(MADE["drawn"]) > 100
    for sample in MADE["empty"]:
        image = sample.read().astype(int)
        assert not sample.truths
        assert min(image.shape[:2]) >= 96
        assert (np.abs(image - ORANGE).sum(axis=2) > 120).all()
    for sample in MADE["drawn"][:10]:
        assert sample.read().dtype == np.uint8


def test_classes_of_imagenet_are_of_one_kind_each():
    assert numbers("3 7-9") == [3, 7, 8, 9]
    places = [place for ranges in FINER.values() for place in numbers(ranges)]
    assert len(places) == len(set(places))
    assert len(FINER) == 20
