"""Fits a head's confidence model: logistic regression on the boxes of images that the head has not
seen.
"""

import numpy as np

from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.features import FeatureTable
from calib.heads.linear import Array64
from engines.boxes import iou
from engines.confidence import FURTHEST, ConfidenceModel

PENALTY = 3.0
"""On the squared weights of standardized cues, beside a sum over the boxes: of few boxes little
more than the share of right ones is said. On animal_pose_voc train, cross-validated, anything from
1 to 10 does about as well."""


def fit_confidence_model(table: FeatureTable, boxes_xyxy: Array64) -> ConfidenceModel | None:
    """The model of how sure boxes are; None where the table does not know what was answered.

    Args:
        table: images with one true box each.
        boxes_xyxy: a box in each, found by a head that did not see the image, ``[N, 4]``.
    """
    if table.answers is None:
        return None
    right = (iou(boxes_xyxy, table.boxes_xyxy) > CORLOC_IOU).astype(np.float64)
    cues = table.answers.cues(boxes_xyxy)
    mean, scale = cues.mean(axis=0), cues.std(axis=0) + 1e-3
    held = np.clip((cues - mean) / scale, -FURTHEST, FURTHEST)
    weight, bias = logistic(held, smoothed(right), np.ones(len(right)), PENALTY)
    rounded = [tuple(np.round(each, 5).tolist()) for each in (mean, scale, weight)]
    return ConfidenceModel(rounded[0], rounded[1], rounded[2], round(bias, 5))


def smoothed(right: Array64) -> Array64:
    """Platt's targets (1999, section 2.2): with few boxes, all of them right, the next one is still
    not certain to be.
    """
    rights = right.sum()
    return np.asarray(
        np.where(right > 0, (rights + 1) / (rights + 2), 1 / (len(right) - rights + 2))
    )


def logistic(x: Array64, target: Array64, counts: Array64, penalty: float) -> tuple[Array64, float]:
    """(weight ``[D]``, bias) of a logistic regression with a quadratic penalty, by Newton's method.

    (Hastie et al. 2009, section 4.4.1.)

    Args:
        x: ``[N, D]``.
        target: 0..1, ``[N]``.
        counts: what each row counts for, ``[N]``.
        penalty: on the squared weights; the bias goes free.
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
