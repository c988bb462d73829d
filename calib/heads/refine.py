"""From squared error to overlap: the last step of fitting a head, on the measure that boxes are judged by.

Ridge regression treats the four edges as four separate numbers. A box is judged by its overlap, where an error of one edge
weighs more on a small box than on a large one. The refinement starts at the ridge solution and climbs the smoothed share
of boxes whose IoU is over 0.5, held back by a penalty on how far it strays; the head stays a linear layer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.evaluation.metrics import CORLOC_IOU

Array64 = NDArray[np.float64]


MANY = 2000


@dataclass(frozen=True)
class Refinement:
    """How the refinement goes.

    Attributes:
        softness: width, in IoU, of the sigmoid that stands in for "IoU > 0.5"; large values climb the plain mean IoU.
        hold: penalty on the squared distance from the ridge weights, of standardized features; with fewer than ``MANY``
            boxes it grows as they get fewer, so that a few boxes do not carry the head away.
        steps: of full-batch Adam (Kingma & Ba 2015) with a rate that falls linearly to 0.
        rate: the first step's size.
    """

    softness: float = 0.15
    hold: float = 1.0
    steps: int = 100
    rate: float = 1e-3


def refined(
    values: Array64, boxes: Array64, weight: Array64, bias: Array64, how: Refinement | None = None
) -> tuple[Array64, Array64]:
    """(weight, bias) that overlap better on the training set than the ones given.

    Args:
        values: features ``[N, D]``.
        boxes: true boxes ``[N, 4]``, fractions of width and height.
        weight: ``[4, D]``, to start from.
        bias: ``[4]``, to start from.
        how: see ``Refinement``.
    """
    how = how or Refinement()
    hold = how.hold * max(1.0, MANY / len(boxes))
    centre, scale = values.mean(axis=0), values.std(axis=0) + 1e-6
    x = ((values - centre) / scale).astype(np.float32)
    start = np.concatenate([weight * scale, (bias + weight @ centre)[:, None]], axis=1)  # [4, D + 1]
    now, moment, power = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(how.steps):
        found = x @ now[:, :-1].T.astype(np.float32) + now[:, -1]
        per_box = -_gradient(found, boxes, how.softness) / len(boxes)
        gradient = np.concatenate([per_box.T.astype(np.float32) @ x, per_box.sum(axis=0)[:, None]], axis=1)
        gradient[:, :-1] += 2 * hold * (now - start)[:, :-1]
        moment = 0.9 * moment + 0.1 * gradient
        power = 0.999 * power + 0.001 * gradient**2
        unbiased = moment / (1 - 0.9 ** (step + 1)), power / (1 - 0.999 ** (step + 1))
        now -= how.rate * (1 - step / how.steps) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    final = now[:, :-1] / scale
    return final, now[:, -1] - final @ centre


def _gradient(found: Array64, true: Array64, softness: float) -> Array64:
    """Of ``4 * softness * sigmoid((IoU - 0.5) / softness)``, whose slope is that of the IoU at 0.5: ``[N, 4]``."""
    overlap, slope = iou_and_gradient(found, true)
    share = 1 / (1 + np.exp(-(overlap - CORLOC_IOU) / softness))
    return np.asarray(4 * (share * (1 - share))[:, None] * slope)


def iou_and_gradient(found: Array64, true: Array64) -> tuple[Array64, Array64]:
    """IoU ``[N]`` of boxes ``[N, 4]``, and its gradient ``[N, 4]`` with respect to ``found``.

    With I the intersection, A and B the areas and U = A + B - I: ``dIoU = dI (U + I) / U^2 - dA I / U^2``. Boxes that do not
    meet have no gradient.
    """
    low, high = np.maximum(found[:, :2], true[:, :2]), np.minimum(found[:, 2:], true[:, 2:])
    sides, own, other = np.maximum(high - low, 0), found[:, 2:] - found[:, :2], true[:, 2:] - true[:, :2]
    shared, area = _area(sides), _area(np.maximum(own, 0))
    union = np.maximum(area + _area(other) - shared, 1e-12)
    across = sides[:, ::-1]  # d(w h) / dw = h
    d_shared = np.concatenate([-across * (found[:, :2] > true[:, :2]), across * (found[:, 2:] < true[:, 2:])], axis=1)
    d_area = np.concatenate([-own[:, ::-1], own[:, ::-1]], axis=1)
    slope = (d_shared * (union + shared)[:, None] - d_area * shared[:, None]) / union[:, None] ** 2
    slope[(sides[:, 0] <= 0) | (sides[:, 1] <= 0)] = 0
    return shared / union, slope


def _area(sides: Array64) -> Array64:
    """``[N]`` of ``[N, 2]``: in a tenth of the time of a product over so short an axis."""
    return sides[:, 0] * sides[:, 1]
