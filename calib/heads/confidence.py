"""Fits confidence models: logistic regression of whether boxes were right on their cues.

``fit_confidence_model`` fits every model. ``head_confidence_model`` fits that of a head, on boxes
in images that the head did not see. ``calib.research.tracking`` fits that of tracked boxes.
"""

from dataclasses import dataclass

import numpy as np

from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.linear import Array64, FeatureTable
from engines.confidence import CUES, ConfidenceModel, terms

HEAD_PENALTY = 3.0
"""The penalty for a head's boxes. From few boxes, the model then says little more than the share of
right ones. In a cross-validation on animal_pose_voc train, every value from 1 to 10 did about as
well.
"""
DECIMALS = 5


@dataclass(frozen=True)
class RatedBoxes:
    """N boxes of which it is known whether they are right.

    Attributes:
        cues: the S cues of each box, ``[N, S]``.
        right: 1 for a right box and 0 for a wrong one, or a value between them, ``[N]``.
        counts: how much each box counts, ``[N]``.
    """

    cues: Array64
    right: Array64
    counts: Array64


def fit_confidence_model(
    boxes: RatedBoxes, cue_names: tuple[str, ...], penalty: float, pairs: bool = False
) -> ConfidenceModel:
    """Fit a confidence model. Its numbers are rounded as its file has them.

    Args:
        boxes: what to fit it on.
        cue_names: the names of the cues, in order.
        penalty: on the squared weights of the terms, beside a sum over the boxes.
        pairs: whether the products of each two cues are terms, see ``engines.confidence.terms``.
    """
    mean = boxes.cues.mean(axis=0)
    scale = boxes.cues.std(axis=0) + 1e-3
    middle, width = mean.tolist(), scale.tolist()
    x = np.array([terms(row, middle, width, pairs) for row in boxes.cues.tolist()])
    weight, bias = logistic(x, boxes.right, boxes.counts, penalty)
    return ConfidenceModel(
        cue_names, _rounded(mean), _rounded(scale), _rounded(weight), round(bias, DECIMALS)
    )


def _rounded(values: Array64) -> tuple[float, ...]:
    return tuple(values.round(DECIMALS).tolist())


def head_confidence_model(table: FeatureTable, boxes_xyxy: Array64) -> ConfidenceModel | None:
    """Fit the confidence model of a head.

    Args:
        table: N images with one true box each.
        boxes_xyxy: a box in the square of each image, found by a head that did not see the image,
            ``[N, 4]``.

    Returns:
        The model; None where the table does not hold the engine's answers.
    """
    if table.answers is None:
        return None
    rows = np.arange(len(boxes_xyxy))
    right = (table.ious(boxes_xyxy, rows) > CORLOC_IOU).astype(np.float64)
    rated = RatedBoxes(table.answers.cues(boxes_xyxy), smoothed(right), np.ones(len(right)))
    return fit_confidence_model(rated, CUES, HEAD_PENALTY)


def smoothed(right: Array64) -> Array64:
    """Move the targets 0 and 1 towards each other, by Platt's rule (1999, section 2.2).

    With few boxes, all of them right, it is still not certain that the next one is.
    """
    rights = right.sum()
    return np.asarray(
        np.where(right > 0, (rights + 1) / (rights + 2), 1 / (len(right) - rights + 2))
    )


def logistic(x: Array64, target: Array64, counts: Array64, penalty: float) -> tuple[Array64, float]:
    """Logistic regression with a quadratic penalty, by Newton's method.

    (Hastie et al. 2009, section 4.4.1.)

    Args:
        x: ``[N, D]``.
        target: 0..1, ``[N]``.
        counts: how much each row counts, ``[N]``.
        penalty: on the squared weights; there is next to none on the bias.

    Returns:
        The weight ``[D]`` and the bias.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    hold = np.diag([penalty] * (x.shape[1] - 1) + [1e-6])
    weight = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ weight))
        slope = x.T @ (counts * (target - p)) - hold @ weight
        curvature = (x.T * (counts * p * (1 - p) + 1e-9)) @ x + hold
        weight = weight + np.linalg.solve(curvature, slope)
    return weight[:-1], float(weight[-1])
