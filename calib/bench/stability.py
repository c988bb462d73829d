"""When a measurement has settled: successive windows whose values agree. No clock in here: sequences in, a verdict out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOWS = 3
TOLERANCE = 0.05
WINDOW_ROUNDS = 5
WINDOW_FRAMES = 100

Measure = Callable[[NDArray[np.float64]], float]
"""One number for a window of samples."""


def median(values: NDArray[np.float64]) -> float:
    """The middle sample."""
    return float(np.median(values))


def mean(values: NDArray[np.float64]) -> float:
    """The average sample: of times from frame to frame, what a throughput is made of."""
    return float(np.mean(values))


def window_values(samples: Sequence[float], length: int, measure: Measure = median) -> list[float]:
    """``measure`` of each complete window of ``length`` successive samples; a shorter rest belongs to none.

    Fewer samples than ``WINDOWS`` windows would take are cut into that many shorter ones, so that there is a spread to see.
    """
    if len(samples) < WINDOWS * length:
        length = max(1, len(samples) // WINDOWS)
    count = len(samples) // length
    return [measure(window) for window in np.asarray(samples, np.float64)[: count * length].reshape(count, length)]


def spread(values: Sequence[float]) -> float:
    """Largest less smallest, as a share of the median; nan where there are fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return (max(values) - min(values)) / max(float(np.median(values)), 1e-12)


def notch(values: Sequence[float]) -> float:
    """Half the width of a box plot's notch, as a share of the median; nan where there are fewer than two values.

    Medians of two samples whose notches do not overlap differ with about 95 % confidence (McGill, Tukey & Larsen,
    "Variations of box plots", The American Statistician 1978): 1.57 times the range between the quartiles, over the root of
    the sample's size.
    """
    if len(values) < 2:
        return float("nan")
    lower, middle, upper = np.percentile(values, [25, 50, 75])
    return float(1.57 * (upper - lower) / np.sqrt(len(values)) / max(middle, 1e-12))


@dataclass(frozen=True)
class Rule:
    """What counts as settled: the last ``WINDOWS`` windows of ``length`` samples differ by at most ``tolerance``.

    Attributes:
        length: samples in a window.
        unit: what a sample is called: ``rounds``, ``frames``.
        tolerance: largest less smallest window, as a share of their median.
    """

    length: int
    unit: str
    tolerance: float = TOLERANCE

    def settled(self, series: Mapping[str, Sequence[float]], measures: Mapping[str, Measure] | None = None) -> bool:
        """Whether every series has settled; asked in the middle of a window, the answer is that of the last whole one.

        Args:
            series: name to samples, in order.
            measures: what is taken of a window, by the same names; the median where there is none.
        """
        return bool(series) and all(
            self._agree(samples, (measures or {}).get(name, median)) for name, samples in series.items()
        )

    def _agree(self, samples: Sequence[float], measure: Measure) -> bool:
        if len(samples) < WINDOWS * self.length:
            return False
        return spread(window_values(samples, self.length, measure)[-WINDOWS:]) <= self.tolerance

    def __str__(self) -> str:
        return f"{WINDOWS} successive windows of {self.length} {self.unit} within {100 * self.tolerance:g} %"

    def report(self, stable: bool, seconds: float) -> dict[str, object]:
        """For the JSON: what was asked, and whether it came to pass within the time limit."""
        return {
            "stable": stable, "windows": WINDOWS, "window": self.length, "unit": self.unit, "tolerance": self.tolerance,
            "time_limit_s": seconds,
        }  # fmt: skip


def until_settled(
    take: Callable[[], Mapping[str, float]], rule: Rule, seconds: float, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], bool]:
    """Take samples until every series has settled or the time is up.

    Args:
        take: one more sample of each series.
        rule: see ``Rule``.
        seconds: the time limit; at least ``WINDOWS`` samples are taken whatever it is.
        clock: seconds that pass.

    Returns:
        (every sample by name, whether they settled).
    """
    start, series = clock(), {name: [value] for name, value in take().items()}
    count = 1
    while count % rule.length or not rule.settled(series):  # looked at as a window ends: it is the whole series that is read
        if count >= WINDOWS and clock() - start >= seconds:
            return series, False
        for name, value in take().items():
            series[name].append(value)
        count += 1
    return series, True
