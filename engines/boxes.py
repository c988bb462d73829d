"""Arithmetic of boxes, as continuous pixel edges x0, y0, x1, y1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union (Everingham et al. 2010, PASCAL VOC, equation 3), with broadcasting over leading axes.

    ``[..., 4]`` and ``[..., 4]`` to ``[...]``. Boxes without area have IoU 0 with everything.
    """
    a, b = np.asarray(a_xyxy, np.float64), np.asarray(b_xyxy, np.float64)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., 2:], b[..., 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(np.clip(box[..., 2:] - box[..., :2], 0, None), axis=-1) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(union), where=union > 0))


def overlap(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """``iou`` of two boxes, in plain Python: in the frame loop, arrays of four numbers cost twenty times as much."""
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a_xyxy, b_xyxy)]
    return float(width * height / (sum(areas) - width * height))
