"""Measures of boxes (IoU, CorLoc), and the constant boxes that every result is compared with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.heads.features import relative_boxes
from engines.boxes import iou
from engines.errors import SourceError
from engines.localizer import Localizer

Boxes = NDArray[np.float64]
CORLOC_IOU = 0.5
BOX_ACC_IOUS = (0.3, 0.5, 0.7)
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def corloc(ious: NDArray[np.float64]) -> float:
    """Share of images with IoU over 0.5 (Deselaers et al. 2012, section 6): the paper's measure."""
    return float(np.mean(ious > CORLOC_IOU)) if len(ious) else 0.0


def box_acc_v2(ious: NDArray[np.float64]) -> dict[str, float]:
    """Share of images with IoU of at least 0.3, 0.5 and 0.7, under these names, and the ``mean`` of
    the three.

    MaxBoxAccV2 (Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right",
    2020, extended 2022) less its
    maximum: that is taken over the thresholds at which a method cuts its map, and a box head, which
        reads the box straight
    off the map, has none. Unlike CorLoc, an IoU equal to the threshold counts.

    Args:
        ious: ``[N]``, of each box with the true box that fits best.
    """
    shares = {
        str(least): float(np.mean(ious >= least)) if len(ious) else 0.0 for least in BOX_ACC_IOUS
    }
    return {**shares, "mean": float(np.mean(list(shares.values())))}


def iou_histogram(ious: NDArray[np.float64]) -> list[int]:
    """How many IoUs lie in each tenth of 0..1; 1 belongs to the last."""
    return [int(count) for count in np.histogram(ious, bins=10, range=(0.0, 1.0))[0]]


def scored(found_xyxy: Boxes, true_xyxy: Boxes) -> tuple[float, float]:
    """(CorLoc, mean IoU) of boxes ``[N, 4]`` or one for all, against ``[N, 4]``."""
    ious = iou(found_xyxy, true_xyxy)
    return corloc(ious), float(ious.mean())


def centre_correct(found_xyxy: Boxes, true_xyxy: Boxes, margin: float) -> NDArray[np.bool_]:
    """Whether the found box's centre lies inside the true box shrunk by ``margin`` of its size in
    all (half at each side).

    Margin 0 is the whole true box, 0.5 its middle half. ``[N, 4]`` and ``[N, 4]`` to ``[N]``.
    """
    centre = (found_xyxy[:, :2] + found_xyxy[:, 2:]) / 2
    inset = (true_xyxy[:, 2:] - true_xyxy[:, :2]) * margin / 2
    inside: NDArray[np.bool_] = np.all(
        (centre >= true_xyxy[:, :2] + inset) & (centre <= true_xyxy[:, 2:] - inset), axis=1
    )
    return inside


@dataclass(frozen=True)
class ConstantBoxes:
    """Boxes that need no image, as fractions of width and height, from a training set.

    Attributes:
        mean_box: the mean of each edge.
        best_constant: of the training boxes and their quantile boxes, the one with the highest
            CorLoc on that set.
    """

    mean_box: tuple[float, ...]
    best_constant: tuple[float, ...]


WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def constant_boxes(boxes_xyxy: Boxes) -> ConstantBoxes:
    """Fit the constant boxes to a training set ``[N, 4]`` of fractions."""
    low, high = np.meshgrid(np.linspace(0.02, 0.5, 13), np.linspace(0.5, 0.98, 13))
    quantile_boxes = [
        np.concatenate(
            [np.quantile(boxes_xyxy[:, :2], a, axis=0), np.quantile(boxes_xyxy[:, 2:], b, axis=0)]
        )
        for a, b in zip(low.ravel(), high.ravel(), strict=True)
    ]
    candidates = np.concatenate(
        [boxes_xyxy[:4000], np.array(quantile_boxes), boxes_xyxy.mean(axis=0)[None]]
    )
    scores = [corloc(iou(candidate, boxes_xyxy)) for candidate in candidates]
    best = candidates[int(np.argmax(scores))]
    return ConstantBoxes(tuple(boxes_xyxy.mean(axis=0).tolist()), tuple(best.tolist()))


def best_iou(found_xyxy: Sequence[float], truths_xyxy: Sequence[Sequence[float]]) -> float:
    """IoU with the true box that fits best."""
    return float(np.max(iou(np.asarray(found_xyxy), np.asarray(truths_xyxy))))


def baselines(localizer: Localizer, training: Sequence[Sample] | None) -> ConstantBoxes | None:
    """Constant boxes of ``training`` where it is given, else those kept with the localizer's fitted
    head, else None.

    Raises:
        SourceError: ``training`` has no image with exactly one object, or cannot be read.
    """
    if training is None:
        kept = localizer.description.get("constant_boxes")
        return ConstantBoxes(**kept) if kept else None
    singles = [sample for sample in training if sample.one_box]
    if not singles:
        raise SourceError("--train has no image with exactly one object: constant boxes need some")
    return constant_boxes(relative_boxes(singles, [size_of(sample.read()) for sample in singles]))


def check_disjoint(training: Sequence[Sample], measured: Sequence[Sample], remedy: str) -> None:
    """Refuse to measure on images that something was fitted on; the pixels decide, not the names.

    Raises:
        SourceError: an image is in both sets; ``remedy`` says how to name others.
    """
    seen = {_digest(sample) for sample in training}
    shared = [sample.name for sample in measured if _digest(sample) in seen]
    if shared:
        raise SourceError(
            f"{len(shared)} images are both fitted on and measured, {shared[0]} among them:"
            f" {remedy}"
        )


def _digest(sample: Sample) -> bytes:
    image = sample.read()
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
