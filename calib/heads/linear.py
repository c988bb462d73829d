"""Fits the linear layer from features to boxes: ridge regression, strength by cross-validation,
then refinement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.features import FeatureTable
from engines.boxes import iou

Array64 = NDArray[np.float64]


MANY = 2000


@dataclass(frozen=True)
class Refinement:
    """How the refinement goes.

    Attributes:
        softness: width, in IoU, of the sigmoid that stands in for "IoU > 0.5"; large values climb
            the plain mean IoU.
        hold: penalty on the squared distance from the ridge weights, of standardized features; with
            fewer than ``MANY`` boxes it grows as they get fewer, so that a few boxes do not carry
            the head away.
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
    start = np.concatenate(
        [weight * scale, (bias + weight @ centre)[:, None]], axis=1
    )  # [4, D + 1]
    now, moment, power = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(how.steps):
        found = x @ now[:, :-1].T.astype(np.float32) + now[:, -1]
        per_box = -_gradient(found, boxes, how.softness) / len(boxes)
        gradient = np.concatenate(
            [per_box.T.astype(np.float32) @ x, per_box.sum(axis=0)[:, None]], axis=1
        )
        gradient[:, :-1] += 2 * hold * (now - start)[:, :-1]
        moment = 0.9 * moment + 0.1 * gradient
        power = 0.999 * power + 0.001 * gradient**2
        unbiased = moment / (1 - 0.9 ** (step + 1)), power / (1 - 0.999 ** (step + 1))
        now -= how.rate * (1 - step / how.steps) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    final = now[:, :-1] / scale
    return final, now[:, -1] - final @ centre


def _gradient(found: Array64, true: Array64, softness: float) -> Array64:
    """Of ``4 * softness * sigmoid((IoU - 0.5) / softness)``, whose slope is that of the IoU at 0.5:
    ``[N, 4]``.
    """
    overlap, slope = iou_and_gradient(found, true)
    share = 1 / (1 + np.exp(-(overlap - CORLOC_IOU) / softness))
    return np.asarray(4 * (share * (1 - share))[:, None] * slope)


def iou_and_gradient(found: Array64, true: Array64) -> tuple[Array64, Array64]:
    """IoU ``[N]`` of boxes ``[N, 4]``, and its gradient ``[N, 4]`` with respect to ``found``.

    With I the intersection, A and B the areas and U = A + B - I:
    ``dIoU = dI (U + I) / U^2 - dA I / U^2``. Boxes that do not meet have no gradient.
    """
    low, high = np.maximum(found[:, :2], true[:, :2]), np.minimum(found[:, 2:], true[:, 2:])
    sides, own, other = (
        np.maximum(high - low, 0),
        found[:, 2:] - found[:, :2],
        true[:, 2:] - true[:, :2],
    )
    shared, area = _area(sides), _area(np.maximum(own, 0))
    union = np.maximum(area + _area(other) - shared, 1e-12)
    across = sides[:, ::-1]  # d(w h) / dw = h
    d_shared = np.concatenate(
        [-across * (found[:, :2] > true[:, :2]), across * (found[:, 2:] < true[:, 2:])], axis=1
    )
    d_area = np.concatenate([-own[:, ::-1], own[:, ::-1]], axis=1)
    slope = (d_shared * (union + shared)[:, None] - d_area * shared[:, None]) / union[:, None] ** 2
    slope[(sides[:, 0] <= 0) | (sides[:, 1] <= 0)] = 0
    return shared / union, slope


def _area(sides: Array64) -> Array64:
    """``[N]`` of ``[N, 2]``: in a tenth of the time of a product over so short an axis."""
    return sides[:, 0] * sides[:, 1]


Rows = NDArray[np.int64]
Fitter = Callable[[FeatureTable, Rows, float], tuple[Array64, Array64]]
"""(table, rows to fit on, ridge penalty) to (weight ``[4, D]``, bias ``[4]``)."""
FOLDS = 5
STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)


def fit_rows(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """(weight ``[4, D]``, bias ``[4]``) fitted on some rows of the table alone, strength
    included.
    """
    return solve(table, rows, choose_strength(table, rows))


def solve(table: FeatureTable, rows: Rows, strength: float) -> tuple[Array64, Array64]:
    """Ridge regression on some rows and their mirror images, then the refinement on their
    overlap.
    """
    values, boxes = mirrored_pairs(table, rows)
    return refined(values, boxes, *Ridge(values, boxes).solve(strength))


def mirrored_pairs(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """Features and boxes of the images and their mirror images: ``[2 N, D]`` and ``[2 N, 4]``."""
    boxes = table.boxes_xyxy[rows]
    flipped = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    values = np.concatenate([table.values[rows], table.mirrored[rows]]).astype(np.float64)
    return values, np.concatenate([boxes, flipped])


class Ridge:
    """Ridge regression of boxes on standardized features (Hoerl & Kennard 1970), in closed form for
    any penalty.

    Works in the smaller of the primal and the dual space.

    Args:
        values: ``[N, D]``.
        boxes: ``[N, 4]``.
    """

    def __init__(self, values: Array64, boxes: Array64) -> None:
        self._centre, self._scale = values.mean(axis=0), values.std(axis=0) + 1e-6
        self._mean_box = boxes.mean(axis=0)
        x = (values - self._centre) / self._scale
        self._back = None if x.shape[1] <= x.shape[0] else x.T
        self._gram = x.T @ x if self._back is None else x @ x.T
        self._target = (
            x.T @ (boxes - self._mean_box) if self._back is None else boxes - self._mean_box
        )

    def solve(self, strength: float) -> tuple[Array64, Array64]:
        """(weight ``[4, D]``, bias ``[4]``) for features as they come."""
        solution = np.linalg.solve(self._gram + strength * np.eye(len(self._gram)), self._target)
        if self._back is not None:
            solution = self._back @ solution
        weight = (solution / self._scale[:, None]).T
        return weight, self._mean_box - weight @ self._centre


def predict(values: NDArray[np.float32], weight: Array64, bias: Array64) -> Array64:
    """Boxes ``[N, 4]`` as the graph gives them: clipped to the image, corners in order."""
    raw = np.clip(values @ weight.T + bias, 0, 1)
    return np.concatenate(
        [np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], axis=1
    )


def group_numbers(groups: Sequence[str], rows: Rows) -> Rows:
    """Which group each of some rows belongs to, counted from 0 as they come.

    Where there are fewer groups than folds, as in a single sequence, the rows in their order make
    ``FOLDS`` blocks instead: of neighbouring frames, few then lie on both sides of a split.
    """
    names = [groups[row] for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) < FOLDS:
        return np.argsort(np.argsort(rows)) * FOLDS // max(1, len(rows))
    return np.array([numbers[name] for name in names])


def folds(table: FeatureTable, rows: Rows) -> list[tuple[Rows, Rows]]:
    """(training rows, held-out rows) of each fold; a group, and an image with its mirror, stay in
    one.
    """
    numbers = group_numbers(table.groups, rows)
    fold = (np.random.default_rng(0).permutation(numbers.max() + 1) % FOLDS)[numbers]
    return [(rows[fold != held], rows[fold == held]) for held in range(FOLDS)]


def choose_strength(
    table: FeatureTable,
    rows: Rows,
    strengths: Sequence[float] = STRENGTHS,
    refine: bool = True,
    splits: int = FOLDS,
) -> float:
    """The strongest ridge penalty whose out-of-fold mean IoU is within one standard error of the
    best.

    (Hastie et al. 2009, section 7.10.) The network may have seen the photos that heads are fitted
    on, and then a penalty that is best for them is too weak for others. Judged after the
    refinement, if there is to be one, and on the first ``splits`` folds.
    """
    ious: list[Array64] = []
    for kept, held in folds(table, rows)[:splits]:
        values, boxes = mirrored_pairs(table, kept)
        model = Ridge(values, boxes)
        heads = [model.solve(strength) for strength in strengths]
        if refine:
            heads = [refined(values, boxes, *head) for head in heads]
        found = [predict(table.values[held], *head) for head in heads]
        ious.append(np.stack([iou(each, table.boxes_xyxy[held]) for each in found]))
    joined = np.concatenate(ious, axis=1)
    means = joined.mean(axis=1)
    best = int(np.argmax(means))
    close = means >= means[best] - joined[best].std() / np.sqrt(joined.shape[1])
    return max(strength for strength, near in zip(strengths, close, strict=True) if near)


def held_out_boxes(
    table: FeatureTable, rows: Rows, strength: float, fitter: Fitter = solve
) -> Array64:
    """Each row's box by a head that did not see it, ``[N, 4]``."""
    found = np.zeros((len(table.values), 4))
    for kept, held in folds(table, rows):
        found[held] = predict(table.values[held], *fitter(table, kept, strength))
    return found[rows]


def held_out_ious(
    table: FeatureTable, rows: Rows, strength: float, fitter: Fitter = solve
) -> Array64:
    """IoU of those boxes with the true ones, ``[N]``."""
    return iou(held_out_boxes(table, rows, strength, fitter), table.boxes_xyxy[rows])
