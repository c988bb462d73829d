"""Ranges against definitions that look at every value, not at a histogram."""

import numpy as np
import pytest
from rich.console import Console

from calib.precision.ranges import BINS, METHODS, PERCENTILE, Histogram, histograms, ranges_of
from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.errors import ModelError
from engines.int8 import STEPS
from engines.localizer import Localizer
from engines.networks.registry import load_classifier

RNG = np.random.default_rng(5)
TAILED = np.abs(RNG.standard_t(3, 200_000))
FLAT = RNG.random(200_000)


def histogram_of(values):
    counts, _ = np.histogram(values, BINS, (0, values.max()))
    return Histogram(counts.astype(np.int64), float(values.max()))


def slow_error(values, largest):
    """Mean squared error of rounding each value to 127 steps and clipping it."""
    step = largest / STEPS
    return np.mean((np.clip(np.rint(values / step), 0, STEPS) * step - values) ** 2)


def test_histograms_count_what_the_engine_computes():
    classifier = load_classifier("compact", "random", 64)
    localizer = Localizer(
        OpenVinoEngine(build_graph(classifier, expose=["conv2_2", "scores"]), "fp32")
    )
    images = [
        localizer.prepare(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)) for _ in range(3)
    ]
    found = histograms(localizer, ["conv2_2", "scores"], images, Console(quiet=True))
    for name in ("conv2_2", "scores"):
        values = np.concatenate(
            [np.abs(localizer.infer([image])[f"{name}_out"]).ravel() for image in images]
        )
        assert found[name].largest == values.max()
        expected, _ = np.histogram(values, BINS, (0, values.max()))
        assert found[name].counts.sum() == len(values)
        assert (
            np.abs(found[name].counts - expected).sum() <= 0.001 * len(values) + 6
        )  # float32 against float64 edges


def test_minmax_clips_nothing():
    assert METHODS["minmax"](histogram_of(TAILED)) == TAILED.max()


def test_percentile_leaves_out_zeros():
    values = np.concatenate([np.zeros(300_000), TAILED])
    found, expected = METHODS["percentile"](histogram_of(values)), np.percentile(TAILED, PERCENTILE)
    assert found == pytest.approx(expected, abs=2 * values.max() / BINS + 0.02 * expected)


@pytest.mark.parametrize("values", [TAILED, FLAT], ids=["tailed", "flat"])
def test_mse_is_near_the_best_of_all_ranges(values):
    found = METHODS["mse"](histogram_of(values))
    best = min(slow_error(values, share * values.max()) for share in np.linspace(0.03, 1, 120))
    assert slow_error(values, found) < 1.05 * best


def test_entropy_clips_a_long_tail_and_not_a_flat_distribution():
    assert METHODS["entropy"](histogram_of(FLAT)) > 0.95
    assert METHODS["entropy"](histogram_of(TAILED)) < 0.5 * TAILED.max()


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_always_zero_has_a_range(method):
    assert METHODS[method](Histogram(np.eye(1, BINS, dtype=np.int64)[0] * 50, 0.0)) == 0


def test_unknown_methods_are_named():
    with pytest.raises(
        ModelError, match="unknown range method 'max': use minmax, percentile, entropy, mse"
    ):
        ranges_of({}, "max")
