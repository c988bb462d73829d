"""Regions of an image from maps: the brightest pixels, cleaned, as masks, blobs and boxes. Plain OpenCV and NumPy."""

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Boxes = NDArray[np.float64]


def bright_mask(map_hw: NDArray[np.float32], percentile: float) -> Mask:
    """Pixels at or over the ``percentile`` of the positive ones, ``[h, w]``; all False where none is positive.

    Of the positive ones, because a neuron sees only a part of the image: where its map is 0 for most pixels, so may be the
    percentile of all of them.
    """
    positive = map_hw[map_hw > 0]
    if not positive.size:
        return np.zeros(map_hw.shape, np.bool_)
    return np.asarray(map_hw >= np.percentile(positive, percentile))


def opened(mask: Mask, erode_px: int, dilate_px: int) -> Mask:
    """Erosion by a square of ``erode_px`` a side removes specks, dilation by one of ``dilate_px`` joins what is near.

    Pixels outside the image neither erode nor dilate. A mask of which erosion leaves nothing is not eroded.
    """
    values = mask.astype(np.uint8)
    eroded = cv2.erode(values, np.ones((erode_px, erode_px), np.uint8))
    kept = eroded if eroded.any() else values
    return np.asarray(cv2.dilate(kept, np.ones((dilate_px, dilate_px), np.uint8)) > 0)


def box_of(mask: Mask) -> Boxes:
    """Bounding box of a mask as fractions of width and height, ``[4]``; the whole image where the mask is empty."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.array([0.0, 0.0, 1.0, 1.0])
    edges = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    return np.array(edges, np.float64)


def blobs(mask: Mask) -> list[Mask]:
    """The 8-connected parts of a mask, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    order = sorted(range(1, count), key=lambda label: -int(stats[label, cv2.CC_STAT_AREA]))
    return [np.asarray(labels == label) for label in order]
