"""Average precision of points and boxes over classes, and the correction of scores by classes that
occur together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calib.data.datasets import Sample
from engines.boxes import iou

DETECTION_IOU = 0.5


@dataclass(frozen=True)
class Predicted:
    """One detection in one image.

    Attributes:
        image: which one.
        class_name: what it is said to be.
        score: compares with the others of its class.
        box_xyxy: its box; a point, for localization, is a box of no size.
    """

    image: str
    class_name: str
    score: float
    box_xyxy: tuple[float, ...]


Truths = Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]]
"""Class name to image to its boxes."""


def average_precision(correct: Sequence[bool], total: int) -> float:
    """Area under the precision envelope over recall (VOC's since 2010; Everingham et al. 2015,
    section 4.2).

    Args:
        correct: of each prediction, the highest score first.
        total: how many there were to find.
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
    """AP of each class: a detection is right where its IoU with a true box, that no better one
    took, is at least 0.5 (VOC).
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
    """AP of each class when a point inside any true box of the class is right (Oquab et al. 2015,
    section 5).

    Of one class and image only the best-scoring point counts, and images are what there is to
    find.
    """
    found = {}
    for name, per_image in truths.items():
        seen: set[str] = set()
        correct = []
        for each in _ranked(predicted, name):
            if each.image not in seen:
                seen.add(each.image)
                correct.append(
                    any(_inside(each.box_xyxy, box) for box in per_image.get(each.image, ()))
                )
        found[name] = average_precision(correct, len(per_image))
    return found


def mean_ap(per_class: Mapping[str, float]) -> float:
    """Mean over classes; 0 of none."""
    return float(np.mean(list(per_class.values()))) if per_class else 0.0


def peak_xy(map_hw: NDArray[np.float32]) -> tuple[float, float]:
    """The centre of the highest place of a map, as fractions of width and height; of a plateau, the
    mean of its places.
    """
    rows, columns = np.nonzero(map_hw == map_hw.max())
    return float((columns.mean() + 0.5) / map_hw.shape[1]), float(
        (rows.mean() + 0.5) / map_hw.shape[0]
    )


def all_found(
    found_xyxy: Sequence[Sequence[float]],
    true_xyxy: Sequence[Sequence[float]],
    least_iou: float = 0.5,
) -> bool:
    """Whether each true box has a found box of its own with at least that IoU; pairs are made best
    first.
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
    return sorted(
        (each for each in predicted if each.class_name == name), key=lambda each: -each.score
    )


def _inside(point_xyxy: Sequence[float], box_xyxy: Sequence[float]) -> bool:
    x, y = point_xyxy[:2]
    return bool(box_xyxy[0] <= x <= box_xyxy[2] and box_xyxy[1] <= y <= box_xyxy[3])


ALPHA = 0.1

Given = Mapping[str, Mapping[str, float]]
"""p(i | j) as ``given[j][i]``."""


def conditional_probabilities(samples: Sequence[Sample]) -> Given:
    """p(i | j): of the images with class j, the share that has class i too; never of a class with
    itself.
    """
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
    """The same detections, each with alpha * sum p(b_i | b_j) s_j added, over the other classes'
    best scores in its image.
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
