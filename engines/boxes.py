"""Arithmetic of boxes, as continuous pixel edges x0, y0, x1, y1."""

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
