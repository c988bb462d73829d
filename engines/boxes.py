"""Arithmetic of boxes. A box is its continuous pixel edges x0, y0, x1, y1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BoxXyxy = tuple[float, float, float, float]


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
    """(of what two boxes have in common, of the one, of the other), each broadcast."""
    a, b = np.broadcast_arrays(np.asarray(a_xyxy, np.float64), np.asarray(b_xyxy, np.float64))
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    common, first, second = (
        np.prod(np.clip(sides, 0, None), axis=-1)
        for sides in (high - low, a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])
    )
    return common, first, second


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
