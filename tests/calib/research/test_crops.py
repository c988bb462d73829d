"""Pairs that are made of single photos, and the crop scorer that is fitted to crops of them."""

import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.research.crops import fit_crop_scorer, pairs, pasted, ridge, side_by_side
from engines.errors import SourceError

QUIET = Console(quiet=True)
BOX = np.array([30.0, 20.0, 90.0, 80.0])


def photo(colour):
    """A grey photo whose object is a square of one colour."""
    image = np.full((100, 120, 3), 128, np.uint8)
    image[20:80, 30:90] = colour
    return image


def sample(name, colour, class_name="cat"):
    return Sample(name, lambda: photo(colour), (Truth(class_name, tuple(BOX)),))


@pytest.mark.parametrize("make", [side_by_side, pasted])
def test_boxes_of_a_pair_hold_its_objects(make):
    """Red pixels lie in the first box and blue ones in the second, up to the soft edge and
    resampling.
    """
    for seed in range(12):
        made = make(
            (photo((0, 0, 255)), BOX), (photo((255, 0, 0)), BOX), np.random.default_rng(seed)
        )
        if made is None:
            continue
        image, boxes = made
        for channel, (x0, y0, x1, y1) in zip((2, 0), boxes, strict=True):
            rows, columns = np.nonzero((image[..., channel] > 240) & (image[..., 2 - channel] < 16))
            assert columns.min() >= x0 - 2
            assert columns.max() <= x1 + 2
            assert rows.min() >= y0 - 2
            assert rows.max() <= y1 + 2
            assert (np.ptp(columns) + 1) * (np.ptp(rows) + 1) > 0.5 * (x1 - x0) * (y1 - y0)


def test_as_many_pairs_as_asked_and_never_a_photo_with_itself():
    samples = [sample("a", (0, 0, 255)), sample("b", (255, 0, 0), "dog")]
    made = list(pairs(samples, 6, np.random.default_rng(0)))
    assert len(made) == 6
    for image, boxes in made:
        assert boxes.shape == (2, 4)
        assert (image[..., 0] > 240).any()
        assert (image[..., 2] > 240).any()


def test_ridge_against_its_definition():
    """The penalised loss is least: no step to any side lowers it."""
    rng = np.random.default_rng(1)
    values, right = rng.normal(2, 3, (40, 5)), rng.random(40)
    weight, bias = ridge(values, right)
    scale = values.std(axis=0)

    def loss(w, b):
        return ((values @ w + b - right) ** 2).sum() + len(values) * ((w * scale) ** 2).sum()

    for _ in range(50):
        assert loss(weight + rng.normal(0, 1e-3, 5), bias + rng.normal(0, 1e-3)) > loss(
            weight, bias
        )


def test_a_judge_is_fitted_to_the_shipped_head():
    samples = [
        sample(str(i), tuple(np.random.default_rng(i).integers(0, 256, 3).tolist()))
        for i in range(3)
    ]
    crop_scorer = fit_crop_scorer(samples, 2, 2, QUIET)
    assert np.isfinite(crop_scorer.weight).all()
    assert crop_scorer.weight.any()
    with pytest.raises(SourceError, match="at least two photos"):
        fit_crop_scorer(samples[:1], 2, 2, QUIET)
