"""The confidence of a box: a logistic model on a few numbers of the answer, fitted to how often
such boxes were right.

A box is right if its IoU with the truth is over 0.5. ``ConfidenceModel`` is the only such model. It
serves two kinds of boxes, each with cues of its own: those of a head (``CUES`` and ``cues_of``
here), and those of a tracker (``realtime.tracking.confidence``). ``calib.heads.confidence`` fits
the model of either kind. The file of a head holds the model of its boxes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.files import number
from engines.maps import area_matrix

Floats = TypeVar("Floats", bound=np.floating[Any])

SIDE = 16
"""A map is averaged to so many cells a side. Its cues then hardly depend on the layer at which the
backward pass stopped.
"""
CUES = ("logit", "probability", "strength", "inside", "spread", "off_centre", "size", "aspect")
"""The cues of a head's box, see ``cues_of``."""
FURTHEST = 3.0
"""A cue counts as at most so many standard deviations from its mean in the training set: a value
that was never seen there says no more than the strangest that was.
"""
MOST_LOGIT = 500.0
"""The exponential of this is still a float. The probability is 0 or 1 long before."""
TINY = 1e-12
LARGEST = 1e12
"""The largest magnitude of a stored number: with larger ones, sums overflow."""
_CENTRES = (np.arange(SIDE) + 0.5) / SIDE
_LEFT = np.arange(SIDE, dtype=np.float64)


@dataclass(frozen=True)
class Limits:
    """Which boxes are shown where a user asks for no confidence, and which of them are sure.

    Attributes:
        shown_from: boxes of less confidence are not shown.
        sure_from: boxes of less confidence are unsure. They are drawn dashed.
    """

    shown_from: float
    sure_from: float


SURE_FROM = 0.7
USUAL_LIMITS = Limits(0.5, SURE_FROM)
"""Of trackers, and of heads that bring no limit of their own."""


def limits_of(shown_from: float | None) -> Limits:
    """The limits of a head that shows boxes from that confidence on; None for the usual ones."""
    if shown_from is None:
        return USUAL_LIMITS
    return Limits(shown_from, max(shown_from, SURE_FROM))


@dataclass(frozen=True)
class ConfidenceModel:
    """Gives the probability that a box is right, from its cues.

    Attributes:
        cue_names: names of the S cues, in order.
        mean, scale: of each cue in the training set.
        weight: of each term, see ``terms``: S numbers, or S + S (S + 1) / 2 where the products of
            two cues are terms, too.
        bias: the logit where all terms are 0.
    """

    cue_names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    def stored(self) -> dict[str, Any]:
        """The model as JSON values, which ``confidence_model_of`` reads.

        The names of the cues are stored as ``signs``, as they always were.
        """
        return {
            "mean": self.mean,
            "scale": self.scale,
            "weight": self.weight,
            "bias": self.bias,
            "signs": self.cue_names,
        }

    def __call__(self, cues: Sequence[float]) -> float:
        """The probability, 0..1, from one value for each cue."""
        pairs = len(self.weight) > len(self.mean)
        logit = self.bias
        for term, weight in zip(
            terms(cues, self.mean, self.scale, pairs), self.weight, strict=True
        ):
            logit += weight * term
        return 1 / (1 + math.exp(-min(max(logit, -MOST_LOGIT), MOST_LOGIT)))

    def shares(self, cues: Sequence[float]) -> list[float]:
        """What each cue adds to the logit, beside a box with all cues at their means. All together
        they are the logit less ``bias``.

        A product of two cues counts half for each: these are the Shapley values (Lundberg & Lee
        2017, equation 4) of a sum of products of two.
        """
        count = len(self.mean)
        pairs = len(self.weight) > count
        found = terms(cues, self.mean, self.scale, pairs)
        weighed = [term * weight for term, weight in zip(found, self.weight, strict=True)]
        shares, products = weighed[:count], iter(weighed[count:])
        if pairs:
            for one, other in combinations_with_replacement(range(count), 2):
                half = next(products) / 2
                shares[one] += half
                shares[other] += half
        return shares


def terms(
    cues: Sequence[float], mean: Sequence[float], scale: Sequence[float], pairs: bool
) -> list[float]:
    """The numbers that a model weighs: the standardized cues, held within ``FURTHEST``.

    Args:
        cues: one value for each of S cues.
        mean: of each cue in the training set.
        scale: of each cue in the training set, the unit of its deviations from the mean.
        pairs: also the products of each two of the standardized cues, and the square of each: first
            those with the first cue, then the others with the second, and so on.
    """
    held = [
        min(max((cue - middle) / width, -FURTHEST), FURTHEST)
        for cue, middle, width in zip(cues, mean, scale, strict=True)
    ]
    if not pairs:
        return held
    return held + [one * other for one, other in combinations_with_replacement(held, 2)]


def confidence_model_of(
    stored: Mapping[str, Any] | None, cue_names: tuple[str, ...] = CUES
) -> ConfidenceModel | None:
    """Read a model from JSON values as ``ConfidenceModel.stored`` gives them.

    Args:
        stored: the values; None where a file has no model.
        cue_names: the cues that the caller can compute.

    Returns:
        The model; None where there is none, or where it needs other cues, as those of another
        version do.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of a model.
    """
    if stored is None or tuple(stored["signs"]) != cue_names:
        return None
    least = {"mean": -LARGEST, "scale": 1 / LARGEST, "weight": -LARGEST}
    mean, scale, weight = (
        tuple(
            number(value, f"a {name} of its confidence model", low, LARGEST)
            for value in stored[name]
        )
        for name, low in least.items()
    )
    count = len(cue_names)
    fits = len(weight) in (count, count + count * (count + 1) // 2)
    if {len(mean), len(scale)} != {count} or not fits:
        raise ValueError("its confidence model has not as many weights as cues")
    bias = number(stored["bias"], "the bias of its confidence model", -LARGEST, LARGEST)
    return ConfidenceModel(cue_names, mean, scale, weight, bias)


def softmax(logits: NDArray[Floats]) -> NDArray[Floats]:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def averaged(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average a map to ``[SIDE, SIDE]`` cells of equal area."""
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
    """The cues of a head's box, in the order of ``CUES``.

    Args:
        box_xyxy: the box in fractions of the image's width and height.
        map_hw: the sensitivity map, not normalised, because its strength is a cue.
        probability: the probability of the class.
        logit: the score of the class before the softmax.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box_xyxy)
    cells = averaged(map_hw).astype(np.float64)
    total = max(float(cells.sum()), TINY)
    columns = cells.sum(axis=0) / total
    rows = cells.sum(axis=1) / total
    inside = float(_covered(y0, y1) @ cells @ _covered(x0, x1)) / total
    width = max(x1 - x0, 1 / SIDE)
    height = max(y1 - y0, 1 / SIDE)
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
    """The share of each of ``SIDE`` cells that lies between two places in 0..1."""
    return np.asarray(
        (np.minimum(_LEFT + 1, high * SIDE) - np.maximum(_LEFT, low * SIDE)).clip(0.0)
    )


def _deviation(shares: NDArray[np.float64]) -> float:
    """The standard deviation of a marginal that sums to 1, in 0..1: at least a tenth of a cell."""
    mean = float(shares @ _CENTRES)
    return max(math.sqrt(max(float(shares @ (_CENTRES - mean) ** 2), 0.0)), 0.1 / SIDE)
