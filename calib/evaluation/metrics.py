"""The measures of an evaluation: CorLoc and IoU, constant boxes, reliability, average precision.

Constant boxes need no image, and every result is compared with them. Reliability compares the
confidence of boxes with how often they are right. Average precision is that of points and of boxes
over classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.data.labels import SizePx
from engines.boxes import iou
from engines.errors import SourceError
from engines.localizer import Localizer

Boxes = NDArray[np.float64]
CORLOC_IOU = 0.5
BOX_ACC_IOUS = (0.3, 0.5, 0.7)
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def corloc(ious: NDArray[np.float64]) -> float:
    """The share of images with an IoU over 0.5 (Deselaers et al. 2012, section 6)."""
    return float(np.mean(ious > CORLOC_IOU)) if len(ious) else 0.0


def box_acc_v2(ious: NDArray[np.float64]) -> dict[str, float]:
    """The share of images with an IoU of at least 0.3, 0.5 and 0.7, by these names, and ``mean``.

    This is MaxBoxAccV2 (Choe et al., "Evaluating Weakly Supervised Object Localization Methods
    Right", 2020, extended 2022) without its maximum. That maximum is taken over the thresholds at
    which a method cuts its map, and a head reads the box off the map without a threshold. Unlike
    with CorLoc, an IoU that is equal to the threshold counts.

    Args:
        ious: the IoU of each box with the true box that fits best, ``[N]``.
    """
    shares = {
        str(least): float(np.mean(ious >= least)) if len(ious) else 0.0 for least in BOX_ACC_IOUS
    }
    return {**shares, "mean": float(np.mean(list(shares.values())))}


def iou_histogram(ious: NDArray[np.float64]) -> list[int]:
    """How many IoUs lie in each tenth of 0..1. An IoU of 1 counts in the last tenth."""
    return [int(count) for count in np.histogram(ious, bins=10, range=(0.0, 1.0))[0]]


def scored(found_xyxy: Boxes, true_xyxy: Boxes) -> tuple[float, float]:
    """The CorLoc and the mean IoU of boxes.

    Args:
        found_xyxy: ``[N, 4]``, or one box for all images, ``[4]``.
        true_xyxy: ``[N, 4]``.
    """
    ious = iou(found_xyxy, true_xyxy)
    return corloc(ious), float(ious.mean())


def centre_correct(found_xyxy: Boxes, true_xyxy: Boxes, margin: float) -> NDArray[np.bool_]:
    """Whether the centre of each found box lies inside the true box, which is made smaller first
    (Dwaraknath et al., "Fast Unsupervised Object Localization", section 5.2.2).

    Args:
        found_xyxy: ``[N, 4]``.
        true_xyxy: ``[N, 4]``.
        margin: the share of its width or height that the true box loses at each side: 0 leaves the
            whole box, 0.2 its middle three fifths, 0.5 its centre.

    Returns:
        bool ``[N]``.
    """
    centre = (found_xyxy[:, :2] + found_xyxy[:, 2:]) / 2
    inset = (true_xyxy[:, 2:] - true_xyxy[:, :2]) * margin
    inside: NDArray[np.bool_] = np.all(
        (centre >= true_xyxy[:, :2] + inset) & (centre <= true_xyxy[:, 2:] - inset), axis=1
    )
    return inside


@dataclass(frozen=True)
class ConstantBoxes:
    """Boxes that need no image, fitted to a training set, in fractions of width and height.

    Attributes:
        mean_box: the mean of each edge.
        best_constant: the box with the highest CorLoc on the training set. It is chosen from the
            training boxes and their quantile boxes.
        centre_box: in the middle of the image, of their average width and height, the baseline of
            Ebrahimpour & Noelle ("Fast Object Localization via Sensitivity Analysis", table 3);
            None in heads from before it was kept.
    """

    mean_box: tuple[float, ...]
    best_constant: tuple[float, ...]
    centre_box: tuple[float, ...] | None = None


WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def constant_boxes(boxes_xyxy: Boxes) -> ConstantBoxes:
    """Fit the constant boxes to the boxes of a training set, ``[N, 4]`` in fractions."""
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
    half = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).mean(axis=0) / 2
    centre_box = tuple(np.concatenate([0.5 - half, 0.5 + half]).tolist())
    return ConstantBoxes(tuple(boxes_xyxy.mean(axis=0).tolist()), tuple(best.tolist()), centre_box)


def best_iou(found_xyxy: Sequence[float], truths_xyxy: Sequence[Sequence[float]]) -> float:
    """The IoU of a box with the true box that fits best."""
    return float(np.max(iou(np.asarray(found_xyxy), np.asarray(truths_xyxy))))


INSIDE = 0.9
"""A box of which so much lies in an ignored region is of something in it, such as one of a
crowd.
"""


def is_ignored(found_xyxy: Sequence[float], sample: Sample) -> bool:
    """Whether a box is right for no object of an image, and is of what is to be ignored in it."""
    if not sample.ignored:
        return False
    truths = [truth.box_xyxy_px for truth in sample.truths]
    if truths and best_iou(found_xyxy, truths) > CORLOC_IOU:
        return False
    x0, y0, x1, y1 = found_xyxy
    area = max((x1 - x0) * (y1 - y0), 1e-9)
    for each in sample.ignored:
        left, top, right, bottom = each.box_xyxy_px
        common = max(0.0, min(x1, right) - max(x0, left)) * max(0.0, min(y1, bottom) - max(y0, top))
        if common > INSIDE * area or best_iou(found_xyxy, [each.box_xyxy_px]) > CORLOC_IOU:
            return True
    return False


def relative_boxes(singles: Sequence[Sample], sizes_px: Sequence[SizePx]) -> NDArray[np.float64]:
    """The box of each image in fractions of its width and height, clipped to the image.

    Args:
        singles: N images with one box each.
        sizes_px: (width, height) of each image.

    Returns:
        ``[N, 4]``.
    """
    boxes = np.array([sample.truths[0].box_xyxy_px for sample in singles])
    return np.asarray(np.clip(boxes / np.tile(np.array(sizes_px, np.float64), 2), 0, 1))


def baselines(localizer: Localizer, training: Sequence[Sample] | None) -> ConstantBoxes | None:
    """The constant boxes to compare with.

    Args:
        localizer: if it has a fitted head, the head's file has constant boxes.
        training: a labelled set to fit constant boxes to instead; None for those of the head.

    Returns:
        The boxes; None where there are none.

    Raises:
        SourceError: ``training`` has no image with exactly one object, or cannot be read.
    """
    if training is None:
        kept = localizer.description.get("constant_boxes")
        return ConstantBoxes(**kept) if kept else None
    singles = [sample for sample in training if sample.one_box]
    if not singles:
        raise SourceError(
            "no image to take constant boxes from has exactly one object", option="train"
        )
    return constant_boxes(relative_boxes(singles, [size_of(sample.read()) for sample in singles]))


def check_disjoint(
    training: Sequence[Sample], measured: Sequence[Sample], option: tuple[str, str]
) -> None:
    """Refuse to measure on images that something was fitted on. Pixels are compared, not names.

    Args:
        training: the images that something was fitted on.
        measured: the images to measure on.
        option: the options that name one of the two sets, and which of its images to keep.

    Raises:
        SourceError: an image is in both sets.
    """
    seen = {_digest(sample) for sample in training}
    shared = [sample.name for sample in measured if _digest(sample) in seen]
    if shared:
        raise SourceError(
            f"{len(shared)} images are both fitted on and measured, {shared[0]} among them:"
            " name those to keep in a file",
            option=option,
        )


def _digest(sample: Sample) -> bytes:
    image = sample.read()
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


Confidences = NDArray[np.float64]
Right = NDArray[np.bool_]
INTERVAL_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
COVERAGES = tuple(round(0.1 * tenth, 1) for tenth in range(10))


def reliability(confidences: Confidences, right: Right) -> list[dict[str, float]]:
    """Compare the confidence of boxes with how often they are right.

    Args:
        confidences: of each box, 0..1, ``[N]``.
        right: whether each box is right, ``[N]``.

    Returns:
        For each interval of ``INTERVAL_EDGES`` that has boxes: their number ``boxes``, their mean
        confidence ``said``, and the share of them that is ``right``.
    """
    rows = []
    for low, high in pairwise(INTERVAL_EDGES):
        inside = (confidences >= low) & ((confidences < high) | (high == 1.0))
        if inside.any():
            rows.append(
                {
                    "boxes": float(inside.sum()),
                    "said": float(confidences[inside].mean()),
                    "right": float(right[inside].mean()),
                }
            )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """The expected calibration error (Guo et al. 2017, equation 3), from the rows of
    ``reliability``: the mean distance, over boxes, between confidence and share of right boxes.
    """
    boxes = sum(row["boxes"] for row in rows)
    return sum(row["boxes"] * abs(row["said"] - row["right"]) for row in rows) / max(boxes, 1)


def coverage(confidences: Confidences, right: Right) -> dict[str, dict[str, float]]:
    """What is left of the boxes for each least confidence of ``COVERAGES``, see ``kept_of``."""
    return {str(least): kept_of(right[confidences >= least], len(right)) for least in COVERAGES}


def kept_of(right: Right, boxes: int) -> dict[str, float]:
    """The figures of the boxes that are kept.

    Args:
        right: whether each of the kept boxes is right.
        boxes: the number of all boxes.

    Returns:
        ``kept``: the share of all boxes that is kept. ``corloc``: the share of the kept boxes that
        is right, 0 where none is kept.
    """
    return {
        "kept": len(right) / max(boxes, 1),
        "corloc": float(right.mean()) if len(right) else 0.0,
    }


def confidence_report(confidences: Confidences, right: Right, least: float) -> dict[str, Any]:
    """``reliability``, ``calibration_error`` and ``coverage`` of boxes, by these names.

    Where ``least`` is more than 0, ``at_min_score`` says what is kept at that confidence.
    """
    rows = reliability(confidences, right)
    report: dict[str, Any] = {
        "reliability": rows,
        "calibration_error": calibration_error(rows),
        "coverage": coverage(confidences, right),
    }
    if least > 0:
        kept = kept_of(right[confidences >= least], len(right))
        report["at_min_score"] = {"min_score": least, **kept}
    return report


def rounded(value: Any) -> Any:
    """The same value with every float in it, at any depth of lists and mappings, to four places."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def print_confidence_report(report: Mapping[str, Any], console: Console) -> None:
    """Print how confidence compares with right boxes, and what a least confidence keeps."""
    table = Table("said", "was right", "boxes", title="How sure", title_justify="left")
    for row in report["reliability"]:
        table.add_row(
            f"{100 * row['said']:.0f} %", f"{100 * row['right']:.0f} %", f"{row['boxes']:.0f}"
        )
    off = f"{100 * report['calibration_error']:.1f} %"
    console.print(table, f"how sure boxes say they are is {off} off in the mean")
    if asked := report.get("at_min_score"):
        kept, right = (f"{100 * asked[key]:.1f} %" for key in ("kept", "corloc"))
        console.print(
            f"at --min-score {asked['min_score']:g}, {kept} of images keep a box, and {right} of"
            " those are right"
        )


DETECTION_IOU = 0.5


@dataclass(frozen=True)
class Predicted:
    """One detection in one image.

    Attributes:
        image: the name of the image.
        class_name: the class of the detection.
        score: ranks the detections of a class.
        box_xyxy: the box; a point is a box without size.
    """

    image: str
    class_name: str
    score: float
    box_xyxy: tuple[float, ...]


Truths = Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]]
"""The true boxes by class name and then by image."""


def average_precision(correct: Sequence[bool], total: int) -> float:
    """The area under the envelope of precision over recall, as VOC has computed it since 2010
    (Everingham et al. 2015, section 4.2).

    Args:
        correct: whether each prediction is right, the one with the highest score first.
        total: how many objects there are to find.
    """
    if not total or not len(correct):
        return 0.0
    hits = np.cumsum(np.asarray(correct, np.float64))
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.concatenate([[0.0], recall])) * envelope))


def detection_ap(
    predicted: Sequence[Predicted], truths: Truths, least_iou: float = DETECTION_IOU
) -> dict[str, float]:
    """The average precision of boxes, for each class, as VOC defines it.

    A detection is right if its IoU with a true box is at least ``least_iou``, and no detection with
    a higher score has taken that box.
    """
    found = {}
    for name, per_image in truths.items():
        taken: dict[str, NDArray[np.bool_]] = {
            image: np.zeros(len(boxes), np.bool_) for image, boxes in per_image.items()
        }
        correct = []
        for each in _ranked(predicted, name):
            boxes = per_image.get(each.image, ())
            overlaps = iou(np.array(each.box_xyxy), np.array(boxes)) if len(boxes) else np.zeros(0)
            best = int(np.argmax(overlaps)) if len(boxes) else -1
            right = best >= 0 and overlaps[best] >= least_iou and not taken[each.image][best]
            if right:
                taken[each.image][best] = True
            correct.append(bool(right))
        found[name] = average_precision(correct, sum(map(len, per_image.values())))
    return found


def localization_ap(predicted: Sequence[Predicted], truths: Truths) -> dict[str, float]:
    """The average precision of points, for each class (Oquab et al. 2015, section 5).

    A point is right if it lies inside any true box of its class. In each image only the point with
    the highest score of a class counts, and recall counts images.
    """
    found = {}
    for name, per_image in truths.items():
        seen: set[str] = set()
        correct = []
        for each in _ranked(predicted, name):
            if each.image not in seen:
                seen.add(each.image)
                correct.append(
                    any(is_inside(each.box_xyxy, box) for box in per_image.get(each.image, ()))
                )
        found[name] = average_precision(correct, len(per_image))
    return found


def mean_ap(per_class: Mapping[str, float]) -> float:
    """The mean over classes; 0 where there is none."""
    return float(np.mean(list(per_class.values()))) if per_class else 0.0


def is_ignored_point(point_xy: tuple[float, float], sample: Sample) -> bool:
    """Whether a point is on no object of an image, and on what is to be ignored in it."""
    on_object, on_ignored = (
        any(is_inside(point_xy, truth.box_xyxy_px) for truth in truths)
        for truths in (sample.truths, sample.ignored)
    )
    return on_ignored and not on_object


def peak_xy(map_hw: NDArray[np.float32]) -> tuple[float, float]:
    """The centre of a map's highest cell, in fractions of width and height. If several are equally
    high, it is their mean.
    """
    rows, columns = np.nonzero(map_hw == map_hw.max())
    height, width = map_hw.shape
    return float((columns.mean() + 0.5) / width), float((rows.mean() + 0.5) / height)


def all_found(
    found_xyxy: Sequence[Sequence[float]],
    true_xyxy: Sequence[Sequence[float]],
    least_iou: float = 0.5,
) -> bool:
    """Whether each true box has a found box of its own with at least ``least_iou``. Boxes are
    paired with the highest IoU first.
    """
    if len(found_xyxy) < len(true_xyxy):
        return False
    overlaps = iou(np.asarray(true_xyxy)[:, None], np.asarray(found_xyxy)[None])
    for _ in true_xyxy:
        row, column = np.unravel_index(int(np.argmax(overlaps)), overlaps.shape)
        if overlaps[row, column] < least_iou:
            return False
        overlaps[row, :], overlaps[:, column] = -1, -1
    return True


def _ranked(predicted: Sequence[Predicted], name: str) -> list[Predicted]:
    """The detections of a class, the highest score first."""
    return sorted(
        (each for each in predicted if each.class_name == name), key=lambda each: -each.score
    )


def is_inside(point_xyxy: Sequence[float], box_xyxy: Sequence[float]) -> bool:
    """Whether the first corner of a box lies in another one, or on its edge."""
    x, y = point_xyxy[:2]
    return bool(box_xyxy[0] <= x <= box_xyxy[2] and box_xyxy[1] <= y <= box_xyxy[3])


ALPHA = 0.1
Given = Mapping[str, Mapping[str, float]]
"""The conditional probability p(i | j) as ``given[j][i]``."""


def conditional_probabilities(samples: Sequence[Sample]) -> Given:
    """p(i | j) for each two different classes: the share of the images with j that have i, too."""
    seen = [{truth.class_name for truth in sample.truths} for sample in samples]
    names = sorted(set().union(*seen)) if seen else []
    counts = {j: sum(j in image for image in seen) for j in names}
    return {
        j: {
            i: sum(i in image and j in image for image in seen) / counts[j] for i in names if i != j
        }
        for j in names
    }


def rescored(predicted: Sequence[Predicted], given: Given, alpha: float = ALPHA) -> list[Predicted]:
    """Raise the scores of detections whose class often occurs with the others in their image.

    Each score gains ``alpha`` times the sum of p(i | j) s_j over the other classes j in the image,
    where s_j is the highest score of class j.
    """
    best: dict[str, dict[str, float]] = {}
    for each in predicted:
        scores = best.setdefault(each.image, {})
        scores[each.class_name] = max(each.score, scores.get(each.class_name, 0.0))

    def support(each: Predicted) -> float:
        others = (
            (name, score) for name, score in best[each.image].items() if name != each.class_name
        )
        return sum(given.get(name, {}).get(each.class_name, 0.0) * score for name, score in others)

    return [replace(each, score=each.score + alpha * support(each)) for each in predicted]
