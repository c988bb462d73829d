"""Ranges of tensors: what values they take on real images, and four ways to choose how many of
them 8 bits cover.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from engines.engine import Array
from engines.errors import ModelError
from engines.int8 import SMALLEST_RANGE, STEPS
from engines.localizer import ImageBgr, Localizer

BINS = 2048
SAMPLED = 1 << 18
"""Of a larger tensor, every n-th value is counted; the largest is always exact."""
PERCENTILE = 99.99


@dataclass(frozen=True)
class Histogram:
    """How often a tensor has values of each size.

    Attributes:
        counts: int64 ``[BINS]``, over equal bins of the magnitude from 0 to ``largest``.
        largest: the largest magnitude.
    """

    counts: NDArray[np.int64]
    largest: float

    @property
    def centres(self) -> Array:
        return (np.arange(BINS) + 0.5) * (self.largest / BINS)


def histograms(
    localizer: Localizer, tensors: Sequence[str], prepared: Sequence[ImageBgr], console: Console
) -> dict[str, Histogram]:
    """Histograms of ``tensors`` over prepared images. The engine gives them as ``NAME_out``."""
    largest = dict.fromkeys(tensors, 0.0)
    for image in track(prepared, "largest values", console=console):
        outputs = localizer.infer([image])
        for name in tensors:
            values = outputs[f"{name}_out"]
            largest[name] = max(largest[name], float(values.max()), -float(values.min()))
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for image in track(prepared, "histograms", console=console):
        outputs = localizer.infer([image])
        for name in tensors:
            counts[name] += _counted(outputs[f"{name}_out"], largest[name])
    return {name: Histogram(counts[name], largest[name]) for name in tensors}


def _counted(values: Array, largest: float) -> NDArray[np.int64]:
    flat = np.abs(values.reshape(-1)[:: 1 + values.size // SAMPLED])
    bins = np.minimum(flat * (BINS / max(largest, 1e-30)), BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=BINS)


def minmax(histogram: Histogram) -> float:
    """The largest value seen."""
    return histogram.largest


def percentile(histogram: Histogram) -> float:
    """The range below which ``PERCENTILE`` % of the values lie that are not zero."""
    counts = histogram.counts.copy()
    counts[0] = 0
    if not counts.any():
        return histogram.largest
    below = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(below, PERCENTILE / 100) + 1) * histogram.largest / BINS)


def mse(histogram: Histogram) -> float:
    """The range with the least expected squared error of rounding and clipping."""
    centres, counts = histogram.centres, histogram.counts
    errors = [float(counts @ _squared_error(centres, ends)) for ends in _candidates(histogram)]
    return float(_candidates(histogram)[int(np.argmin(errors))])


def _squared_error(values: Array, largest: float) -> Array:
    step = largest / STEPS
    return np.where(values > largest, (values - largest) ** 2, np.minimum(step**2 / 12, values**2))


def _candidates(histogram: Histogram) -> NDArray[np.float64]:
    return histogram.largest * np.arange(STEPS + 1, BINS + 1, 16) / BINS


def entropy(histogram: Histogram) -> float:
    """The range with the least Kullback-Leibler divergence at 127 steps (Migacz 2017)."""
    counts = histogram.counts.astype(np.float64)
    counts[0] = 0  # zero stays zero at any range
    if not counts.any():
        return histogram.largest
    divergences = {ends: _divergence(counts, ends) for ends in range(STEPS + 1, BINS + 1, 16)}
    best = min(divergences, key=lambda ends: divergences[ends])
    return best * histogram.largest / BINS


def _divergence(counts: NDArray[np.float64], ends: int) -> float:
    """Compares the counts below ``ends`` with themselves at 127 steps.

    What lies beyond ``ends`` is added to the last count.
    """
    clipped = counts[:ends].copy()
    clipped[-1] += counts[ends:].sum()
    steps = np.arange(ends) * STEPS // ends
    filled = clipped > 0
    mass = np.bincount(steps, counts[:ends], STEPS)
    share = np.bincount(steps, filled, STEPS)
    spread = np.where(filled, mass[steps] / np.maximum(share[steps], 1), 0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-30)
    return float((p[filled] * np.log(p[filled] / np.maximum(q[filled], 1e-12))).sum())


METHODS = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}


def ranges_of(histograms_by_name: Mapping[str, Histogram], method: str) -> dict[str, float]:
    """The range of each tensor. A tensor that is zero on every image gets ``SMALLEST_RANGE``.

    Raises:
        ModelError: the method is unknown.
    """
    if method not in METHODS:
        raise ModelError(f"unknown range method '{method}': use {', '.join(METHODS)}")
    return {
        name: max(METHODS[method](histogram), SMALLEST_RANGE)
        for name, histogram in histograms_by_name.items()
    }
