"""Which way each place of the picture has been going lately: what tells two objects that touch from one.

In one frame the legs of an animal move otherwise than its body, and flow is noise; over a few, two objects go their own ways.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from realtime.follow.motion import Map, Motion, Step

KEPT = 0.95
"""Share of the mean that is left after a frame: twenty frames, more or less."""
ALIKE_SHARE, ALIKE_LEAST = 0.7, 0.1
"""How far from an object's motion a place may be and still be of it: a share of the object's speed, at least so many cells."""
ROUNDS, SPARSE, ENOUGH = 3, 5, 64
"""Of mean shift; one in so many rows and columns tells how most of the frame goes, and so many cells how an object does."""


class Course:
    """Mean motion ``[h, w, 2]`` of what is at each cell of the grid, against most of the frame, carried along with the flow.

    Args:
        motion: whose grid it is on.
    """

    def __init__(self, motion: Motion) -> None:
        self._motion = motion
        self._sums, self._mean = np.zeros((*motion.shape, 3), np.float32), np.zeros((*motion.shape, 2), np.float32)

    def add(self, step: Step) -> None:
        """Take the next step in; after a cut or a blank frame it begins anew."""
        if step.flow is None:
            self._sums, self._mean = np.zeros_like(self._sums), np.zeros_like(self._mean)
            return
        now = np.ones_like(self._sums)
        now[..., :2] = step.flow - np.median(step.flow[::SPARSE, ::SPARSE].reshape(-1, 2), axis=0)
        carried = cv2.remap(self._sums, *self._motion.whence(step.flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        self._sums = np.asarray(KEPT * carried + (1 - KEPT) * now, np.float32)
        self._mean = self._sums[..., :2] / self._sums[..., 2:]

    def alike(self, cells: tuple[int, int, int, int], votes: Map) -> Map:
        """``[h, w]``: 1 where a cell goes as what is voted for among ``cells`` (x0, y0, x1, y1), 0 where quite otherwise."""
        x0, y0, x1, y1 = cells
        mine = self._mean[y0:y1, x0:x1][votes[y0:y1, x0:x1] > 0]
        if not len(mine):
            mine = self._mean[y0:y1, x0:x1].reshape(-1, 2)
        mine = mine[:: 1 + len(mine) // ENOUGH]
        middle: NDArray[np.float32] = np.median(mine, axis=0)
        width = max(ALIKE_LEAST, ALIKE_SHARE * float(np.hypot(*middle)))
        for _ in range(ROUNDS):  # mean shift: the larger of two objects in a box, not something between them
            weights = _kernel(mine, middle, width) + 1e-6
            middle = (weights[:, None] * mine).sum(axis=0) / weights.sum()
        return _kernel(self._mean, middle, width)


def _kernel(motion: NDArray[np.float32], middle: NDArray[np.float32], width: float) -> NDArray[np.float32]:
    return np.asarray(np.exp(-np.square(motion - middle).sum(axis=-1) / (2 * width**2)), np.float32)
