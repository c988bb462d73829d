"""What users and files say of a network's input, in every way that it is written."""

import pytest

from engines.errors import InputError
from engines.networks.preprocessing import (
    CAFFE,
    IDENTITY,
    IMAGENET,
    UNIT,
    GivenInput,
    Preprocessing,
    numbers_of,
    parsed_channels,
    parsed_scale,
)

UNITS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((*UNITS, None), LEVELS),
        ((*UNITS, 255.0), LEVELS),
        ((*UNITS, 1 / 255), LEVELS),
        ((*LEVELS, None), LEVELS),
        ((*LEVELS, 1.0), LEVELS),
        (((104.0, 117.0, 123.0), None, None), ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0))),
        (((104.0, 117.0, 123.0), (1.0,) * 3, None), ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0))),
        (((0.5,) * 3, (0.5,) * 3, None), ((127.5,) * 3, (127.5,) * 3)),
        (((1.0,) * 3, (1.0,) * 3, 127.5), ((127.5,) * 3, (127.5,) * 3)),
        ((None, None, 255.0), ((0.0,) * 3, (255.0,) * 3)),
        ((None, None, 1.0), ((0.0,) * 3, (1.0,) * 3)),
        (((0.0,) * 3, (1.0,) * 3, None), ((0.0,) * 3, (255.0,) * 3)),
        (((0.0,) * 3, (255.0,) * 3, None), ((0.0,) * 3, (255.0,) * 3)),
    ],
)
def test_both_notations_become_numbers_of_pixels(given, expected):
    mean, std = numbers_of(*given)
    assert mean == pytest.approx(expected[0])
    assert std == pytest.approx(expected[1])


def test_the_usual_numbers_are_exactly_the_usual_ones():
    """Or a digest would change."""
    assert Preprocessing("rgb", *numbers_of(*UNITS)) == IMAGENET
    assert Preprocessing("rgb", *numbers_of(None, None, 255.0)) == UNIT


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((UNITS[0], LEVELS[1], None), "not of the same pixels.*255 or 1"),
        ((LEVELS[0], UNITS[1], None), "not of the same pixels"),
        ((None, (0.2, 0.0, 0.2), None), "more than 0, not 0"),
        ((None, (0.2, -1.0, 0.2), None), "more than 0, not -1"),
        ((None, None, 0.0), "scale must be more than 0"),
        (((float("nan"),) * 3, None, None), "finite"),
        ((None, (float("inf"),) * 3, None), "finite"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        numbers_of(*given)


def test_what_is_typed():
    assert parsed_channels("0.485,0.456, 0.406") == UNITS[0]
    assert parsed_channels("[0.485 0.456 0.406]") == UNITS[0]
    assert parsed_channels("127.5") == (127.5, 127.5, 127.5)
    assert parsed_scale("255") == 255.0
    assert parsed_scale("1/255") == pytest.approx(1 / 255)
    for text in ("", "1,2", "a,b,c", "1,2,3,4"):
        with pytest.raises(InputError, match="one number, or three"):
            parsed_channels(text)
    for text in ("", "1/0", "x"):
        with pytest.raises(InputError, match="255, or 1/255"):
            parsed_scale(text)
    with pytest.raises(InputError, match="order 'gbr' is none of rgb, bgr"):
        GivenInput(order="gbr")


@pytest.mark.parametrize(
    ("preprocessing", "formula"),
    [
        (IMAGENET, "(pixel - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)"),
        (CAFFE, "pixel - (104, 117, 123)"),
        (UNIT, "pixel / 255"),
        (IDENTITY, "pixel as it is"),
        (Preprocessing("rgb", (127.5,) * 3, (127.5,) * 3), "(pixel - 127.5) / 127.5"),
    ],
)
def test_the_formula_says_what_is_done_to_a_pixel(preprocessing, formula):
    assert preprocessing.formula == formula
    assert formula in preprocessing.describe(224)


def test_digests_of_before_do_not_know_of_resizing():
    assert list(IMAGENET.stored()) == ["order", "mean", "std"]
    stored = [Preprocessing(resize=r, crop_share=0.875).stored() for r in ("letterbox", "crop")]
    assert len({str(each) for each in (IMAGENET.stored(), *stored)}) == 3


def test_the_mean_pixel_is_bgr():
    assert IMAGENET.mean_bgr == (104, 116, 124)
    assert CAFFE.mean_bgr == (104, 117, 123)
    assert Preprocessing("rgb", (-5.0, 300.0, 0.0)).mean_bgr == (0, 255, 0)
