"""The confidence of a box: a logistic model on a few numbers of the answer, fitted to how often
such boxes were right.

"Right" is an IoU over 0.5 with the truth. A model belongs to a head, whose file holds it: ``fit``
makes it of boxes of images that the head did not see (``calib.heads.confidence``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.features import area_matrix
from engines.reading import number

SIDE = 16
"""Cells a side that a map is averaged to: its cues then hardly depend on where the backward pass
stopped.
"""
CUES = ("logit", "probability", "strength", "inside", "spread", "off_centre", "size", "aspect")
FURTHEST = 3.0
"""Deviations from the training set's mean at which a cue is held: what was never seen tells no more
than the strangest.
"""
MOST_LOGIT = 500.0
"""At which an exponential still is a float; the probability is 0 or 1 long before."""
TINY = 1e-12
LARGEST = 1e12
"""Magnitude of a stored number: beyond it the sums are no numbers any more."""
_CENTRES = (np.arange(SIDE) + 0.5) / SIDE
_LEFT = np.arange(SIDE, dtype=np.float64)


@dataclass(frozen=True)
class ConfidenceModel:
    """Probability that a box is right, from its cues.

    Attributes:
        mean, scale: of each cue in the training set.
        weight: of each standardized cue.
        bias: what is left.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    def stored(self) -> dict[str, Any]:
        """For JSON; ``confidence_model_of`` reads it back."""
        return {**asdict(self), "signs": CUES}

    def __call__(self, cues: Sequence[float]) -> float:
        """0..1."""
        total = self.bias
        for cue, mean, scale, weight in zip(cues, self.mean, self.scale, self.weight, strict=True):
            total += weight * min(max((cue - mean) / scale, -FURTHEST), FURTHEST)
        return 1 / (1 + math.exp(-min(max(total, -MOST_LOGIT), MOST_LOGIT)))


def confidence_model_of(stored: Mapping[str, Any] | None) -> ConfidenceModel | None:
    """What ``ConfidenceModel.stored`` and JSON leave; None where there is none, or one of another
    version's cues.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    if stored is None or tuple(stored["signs"]) != CUES:
        return None
    least = {"mean": -LARGEST, "scale": 1 / LARGEST, "weight": -LARGEST}
    mean, scale, weight = (
        tuple(number(value, f"a {name} of its trust", low, LARGEST) for value in stored[name])
        for name, low in least.items()
    )
    if {len(mean), len(scale), len(weight)} != {len(CUES)}:
        raise ValueError("its trust has not as many weights as signs")
    return ConfidenceModel(
        mean, scale, weight, number(stored["bias"], "the bias of its trust", -LARGEST, LARGEST)
    )


def averaged(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """A map averaged to ``[SIDE, SIDE]``."""
    if map_hw.shape == (SIDE, SIDE):
        return map_hw
    rows, columns = (_cells(length) for length in map_hw.shape)
    return np.asarray(rows @ map_hw @ columns.T, np.float32)


@lru_cache(maxsize=8)
def _cells(length: int) -> NDArray[np.float32]:
    return area_matrix(length, SIDE)


def cues_of(
    box_xyxy: Sequence[float], map_hw: NDArray[np.float32], probability: float, logit: float
) -> list[float]:
    """The cues of a box, in the order of ``CUES``.

    Args:
        box_xyxy: in fractions of width and height.
        map_hw: the sensitivity map, not normalised: how strong it is is a cue, too.
        probability: of the class.
        logit: its score before the softmax.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box_xyxy)
    cells = averaged(map_hw).astype(np.float64)
    total = max(float(cells.sum()), TINY)
    columns, rows = cells.sum(axis=0) / total, cells.sum(axis=1) / total
    inside = float(_covered(y0, y1) @ cells @ _covered(x0, x1)) / total
    width, height = max(x1 - x0, 1 / SIDE), max(y1 - y0, 1 / SIDE)
    return [
        logit,
        math.sqrt(max(probability, 0.0)),
        math.log(max(float(cells.max()), TINY)),
        inside,
        math.log(_deviation(columns) * _deviation(rows)),
        abs((x0 + x1) / 2 - 0.5),
        math.log(width * height),
        abs(math.log(width / height)),
    ]


def _covered(low: float, high: float) -> NDArray[np.float64]:
    """Of each of ``SIDE`` cells, the part that lies between two places in 0..1."""
    return np.asarray(
        (np.minimum(_LEFT + 1, high * SIDE) - np.maximum(_LEFT, low * SIDE)).clip(0.0)
    )


def _deviation(shares: NDArray[np.float64]) -> float:
    """Standard deviation of the places of a marginal that sums to 1; at least a tenth of a cell."""
    mean = float(shares @ _CENTRES)
    return max(math.sqrt(max(float(shares @ (_CENTRES - mean) ** 2), 0.0)), 0.1 / SIDE)
