"""Arithmetic of boxes, and the boxes of regions of a map. A box is its edges x0, y0, x1, y1."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

BoxXyxy = tuple[float, float, float, float]
FINER_THAN_PIXELS = 100
SOFTNESS = 0.3
"""Of ``ranked``; chosen on VOC 2007's validation photos."""


def iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union (Everingham et al. 2010, PASCAL VOC, equation 3), with broadcasting
    over leading axes.

    ``[..., 4]`` and ``[..., 4]`` to ``[...]``. Boxes without area have IoU 0 with everything.
    """
    common, *areas = _areas(a_xyxy, b_xyxy)
    union = areas[0] + areas[1] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(union), where=union > 0))


def shared(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """Share of the smaller box that lies in the other, with broadcasting as of ``iou``; 0 where one
    has no area.
    """
    common, *areas = _areas(a_xyxy, b_xyxy)
    smaller = np.minimum(*areas)
    return np.asarray(np.divide(common, smaller, out=np.zeros_like(smaller), where=smaller > 0))


def _areas(
    a_xyxy: ArrayLike, b_xyxy: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(of what two boxes have in common, of the one, of the other)."""
    a, b = np.asarray(a_xyxy, np.float64), np.asarray(b_xyxy, np.float64)
    width, height = (
        np.maximum(np.minimum(a[..., high], b[..., high]) - np.maximum(a[..., low], b[..., low]), 0)
        for low, high in ((0, 2), (1, 3))
    )
    first, second = (
        np.maximum(box[..., 2] - box[..., 0], 0) * np.maximum(box[..., 3] - box[..., 1], 0)
        for box in (a, b)
    )
    return width * height, first, second


def distinct(
    boxes_xyxy: NDArray[np.float64], scores: ArrayLike, most_iou: float = 0.5
) -> NDArray[np.int64]:
    """Which of boxes ``[L, 4]`` stay where those that overlap a better one are left out: their
    places, the best first (non-maximum suppression, as OpenCV does it).
    """
    boxes = np.asarray(boxes_xyxy, np.float64)
    if not len(boxes):
        return np.zeros(0, np.int64)
    corner_and_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    over_zero = np.asarray(scores) - np.min(scores) + 1  # the library takes no negative scores
    kept = cv2.dnn.NMSBoxes(corner_and_size.tolist(), over_zero.tolist(), 0.0, most_iou)
    return np.asarray(kept, np.int64).ravel()


def voted(
    boxes_xyxy: NDArray[np.float64], scores: NDArray[np.float64], places: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Some of boxes ``[L, 4]``, each as the mean of all that overlap it by half or more, with the
    weight of their score and overlap: box voting (Gidaris & Komodakis 2015, section 5).
    """
    alike = iou(boxes_xyxy[None], boxes_xyxy[places][:, None])
    weights = np.where(alike >= 0.5, alike * np.maximum(scores, 1e-6), 0.0)
    return np.asarray(weights @ boxes_xyxy / weights.sum(axis=1, keepdims=True))


def ranked(
    boxes_xyxy: NDArray[np.float64], scores: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(places, scores) of boxes ``[L, 4]``, the best first. A box that overlaps better ones loses
    the more of its score, 0..1, the more it does (Soft-NMS, Bodla et al. 2017, with a Gaussian
    penalty, as OpenCV does it): of two animals that touch, both stay.
    """
    boxes = np.asarray(boxes_xyxy, np.float64)
    if not len(boxes):
        return np.zeros(0, np.int64), np.zeros(0)
    fine = FINER_THAN_PIXELS * boxes  # the library takes whole numbers
    corner_and_size = np.concatenate([fine[:, :2], fine[:, 2:] - fine[:, :2]], axis=1).astype(int)
    left, kept = cv2.dnn.softNMSBoxes(
        corner_and_size.tolist(),
        np.asarray(scores, np.float64).tolist(),
        0.0,
        0.0,
        sigma=SOFTNESS,
        method=cv2.dnn.SoftNMSMethod_SOFTNMS_GAUSSIAN,
    )
    return np.asarray(kept, np.int64).ravel(), np.asarray(left, np.float64).ravel()


def overlap(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """``iou`` of two boxes, in plain Python: in the frame loop, arrays of four numbers cost twenty
    times as much.
    """
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a_xyxy, b_xyxy)]
    return float(width * height / (sum(areas) - width * height))


def shifted(box_xyxy: BoxXyxy, x: float, y: float) -> BoxXyxy:
    """A box, moved by ``x`` and ``y``."""
    x0, y0, x1, y1 = box_xyxy
    return x0 + x, y0 + y, x1 + x, y1 + y


def with_margin(box_xyxy: BoxXyxy, margin: float) -> BoxXyxy:
    """A box that is larger at each edge by ``margin``, a share of its width or height."""
    x0, y0, x1, y1 = box_xyxy
    x, y = margin * (x1 - x0), margin * (y1 - y0)
    return x0 - x, y0 - y, x1 + x, y1 + y


Mask = NDArray[np.bool_]
Boxes = NDArray[np.float64]


def bright_mask(map_hw: NDArray[np.float32], percentile: float) -> Mask:
    """Pixels at or over the ``percentile`` of the positive ones, ``[h, w]``; all False where none
    is positive.

    Of the positive ones, because a neuron sees only a part of the image: where its map is 0 for
    most pixels, so may be the percentile of all of them.
    """
    positive = map_hw[map_hw > 0]
    if not positive.size:
        return np.zeros(map_hw.shape, np.bool_)
    return np.asarray(map_hw >= np.percentile(positive, percentile))


def opened(mask: Mask, erode_px: int, dilate_px: int) -> Mask:
    """Erosion by a square of ``erode_px`` a side removes specks, dilation by one of ``dilate_px``
    joins what is near.

    Pixels outside the image neither erode nor dilate. A mask of which erosion leaves nothing is not
    eroded.
    """
    values = mask.astype(np.uint8)
    eroded = cv2.erode(values, np.ones((erode_px, erode_px), np.uint8))
    kept = eroded if eroded.any() else values
    return np.asarray(cv2.dilate(kept, np.ones((dilate_px, dilate_px), np.uint8)) > 0)


def box_of(mask: Mask) -> Boxes:
    """Bounding box of a mask as fractions of width and height, ``[4]``; the whole image where the
    mask is empty.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.array([0.0, 0.0, 1.0, 1.0])
    edges = [
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + 1) / width,
        (rows[-1] + 1) / height,
    ]
    return np.array(edges, np.float64)


def blobs(mask: Mask) -> list[Mask]:
    """The 8-connected parts of a mask, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    order = sorted(range(1, count), key=lambda label: -int(stats[label, cv2.CC_STAT_AREA]))
    return [np.asarray(labels == label) for label in order]
