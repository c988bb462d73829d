"""Images that are made of photos keep their true boxes, and empty ones hold no object."""

import numpy as np
import pytest

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.dense import FINER, called, kinds, numbers
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


PHOTOS = [photo(number) for number in range(24)]
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


def test_what_moves_is_blurred_where_it_was():
    assert len(MADE["moving"]) == 12
    photos = {each.name: each for each in PHOTOS}
    for sample in MADE["moving"]:
        still = photos[sample.group]
        assert sample.truths == still.truths
        image, before = (each.read().astype(float) for each in (sample, still))
        assert image.shape == before.shape
        steps = [np.abs(np.diff(each, axis=1)).max() for each in (image, before)]
        assert steps[0] < steps[1]
        x0, y0, x1, y1 = map(int, still.truths[0].box_xyxy_px)
        inside = image[(y0 + y1) // 2, (x0 + x1) // 2]
        assert inside[2] > 2 * inside[0]  # it is orange still


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


def test_synsets_of_a_list_have_the_names_that_they_are_kinds_of(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("n02124075\tEgyptian cat\nn07734744\tmushroom\nn04146614\tschool bus, bus\n")
    found = kinds(words)
    assert found == {"n02124075": "cat", "n04146614": "bus"}
    truths = (Truth("n02124075", (0, 0, 9, 9)), Truth("n07734744", (1, 1, 5, 5)))
    sample = called(Sample("a.png", PHOTOS[0].read, truths), found)
    assert [each.class_name for each in sample.truths] == ["cat", "n07734744"]
