"""The vote grid: log odds on a small grid that say where the object is, propagated along the
optical flow.

Each frame adds votes: for what moves by itself, for where the sensitivity map of the window is
high, and for what lies in the head's box. The votes of earlier frames fade. The object's box is the
box of the blob with the most votes.
"""

import cv2
import numpy as np

from engines.boxes import with_margin
from realtime.frames import BoxPx
from realtime.tracking.optical_flow import Map, Motion, MotionStep, two_kinds

KEPT = 0.8
"""The share of the votes that is left after a frame in which something moves."""
KEPT_STILL = 0.95
"""The share of the votes that is left after a frame in which nothing moves."""
MOST = 4.0
"""The largest magnitude of votes."""
UNSEEN = -0.3
"""The votes of a place that comes into view."""
MAP_VOTE = {"whole": 0.6, "window": 1.0}
"""The most votes that a map gives: one of the whole frame, and one of a window."""
MAP_STILL = 0.3
"""The share of those that is left while nothing moves."""
BOX_VOTE = 0.3
"""The votes that the head's box gives to what lies in it, and takes from the rest of the window."""
BOX_STILL = 0.8
"""The same votes while nothing moves."""
HOT = 0.3
"""A place gets votes if the logarithm of the map is so far above the cut between its two kinds."""
TRIM = 0.015
"""The share of a blob's votes that its box leaves out at each side: legs, tails and shadows."""
SUREST = 0.8
"""A cell with this share of the most votes in a box, or more, is taken to move as the object."""
NEAR = 0.25
"""The margin around a tracked object that is still near it, as a share of its box's sides."""
FAR_MOTION = 0.3
"""The weight of motion that is not near the object."""
FAR_BLOB = 0.3
"""The weight of blobs that are not near the object."""


class VoteGrid:
    """The grid of one source, whose frames are of one size. It holds no votes itself.

    Args:
        motion: of the source; the grid is the same.
        width_px, height_px: size of the frames.

    Attributes:
        cell_px: width and height of a cell.
        empty: votes of 0, ``[h, w]``.
    """

    def __init__(self, motion: Motion, width_px: int, height_px: int) -> None:
        h, w = motion.shape
        self._motion = motion
        self.cell_px = width_px / w, height_px / h
        self.empty: Map = np.zeros((h, w), np.float32)

    def propagated(
        self, votes: Map, step: MotionStep, near_px: BoxPx | None = None, rated: bool = True
    ) -> Map:
        """The votes in the next frame, before its answer.

        Args:
            votes: in the last frame, ``[h, w]``.
            step: the motion to the next frame.
            near_px: where the object was; motion that is not near it has less weight.
            rated: whether what moves gets votes. Finding that out takes time.
        """
        if step.blank:
            return votes * np.float32(KEPT)
        if step.flow is None:
            return self.empty
        xs, ys = self._motion.remap_grid(step.flow)
        moved = cv2.remap(
            votes, xs, ys, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=UNSEEN
        )
        if not rated:
            return np.asarray(np.float32(KEPT) * moved, np.float32)
        kept = KEPT * step.moving + KEPT_STILL * (1 - step.moving)
        return np.asarray(
            kept * moved + step.evidence * self._nearness(near_px, FAR_MOTION), np.float32
        )

    def voted(
        self, votes: Map, map_hw: Map, box_px: BoxPx, window_px: BoxPx, whole: bool, moving: float
    ) -> Map:
        """The votes in a frame, with those of its answer.

        Args:
            votes: in this frame, before the answer, ``[h, w]``.
            map_hw: the map of the window.
            box_px: the head's box, in the frame.
            window_px: what the engine saw of the frame.
            whole: whether that was the whole frame.
            moving: see ``MotionStep``. Where nothing moves, only the head's box tells how large the
                object is, and gets more votes.
        """
        x0, y0, x1, y1 = self.cells(window_px)
        logs = np.log(map_hw / max(float(map_hw.mean()), 1e-30) + 0.1)
        cut, cold, hot = two_kinds(logs)
        logs = cv2.resize(logs, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        heat = np.clip(2 * (logs - cut - HOT) / max(hot - cold, 1e-6), -1, 1)
        map_vote = MAP_VOTE["whole" if whole else "window"] * (MAP_STILL + (1 - MAP_STILL) * moving)
        box_vote = BOX_VOTE * moving + BOX_STILL * (1 - moving)
        said = np.full(heat.shape, -box_vote, np.float32)
        left, top, right, bottom = self._rounded(box_px)
        said[max(top - y0, 0) : max(bottom - y0, 0), max(left - x0, 0) : max(right - x0, 0)] = (
            box_vote
        )
        result = votes.copy()
        result[y0:y1, x0:x1] += map_vote * heat + said
        return np.clip(result, -MOST, MOST)

    def cells(self, box_px: BoxPx) -> tuple[int, int, int, int]:
        """The cells that a box covers, as x0, y0, x1, y1: at least two along each side."""
        h, w = self.empty.shape
        x0, y0, x1, y1 = self._rounded(box_px)
        x0 = max(0, min(x0, w - 2))
        y0 = max(0, min(y0, h - 2))
        return x0, y0, min(max(x1, x0 + 2), w), min(max(y1, y0 + 2), h)

    def _nearness(self, near_px: BoxPx | None, beyond: float) -> Map:
        """Weights ``[h, w]``: 1 in and near a box, ``beyond`` elsewhere; 1 without a box."""
        if near_px is None:
            return np.ones_like(self.empty)
        shares = np.full_like(self.empty, beyond)
        x0, y0, x1, y1 = self.cells(with_margin(near_px, NEAR))
        shares[y0:y1, x0:x1] = 1
        return shares

    def _rounded(self, box_px: BoxPx) -> tuple[int, int, int, int]:
        """A box in cells, which may lie outside the grid."""
        x0, y0, x1, y1 = box_px
        x, y = self.cell_px
        return round(x0 / x), round(y0 / y), round(x1 / x), round(y1 / y)

    def box(self, votes: Map, near_px: BoxPx | None = None) -> BoxPx | None:
        """The box of the object in the frame: that of the blob with the most votes.

        Args:
            votes: ``[h, w]``.
            near_px: where the object was; blobs that are not near it have less weight.

        Returns:
            The box; None where no cell has votes over 0.
        """
        count, labels, _, _ = cv2.connectedComponentsWithStats(
            (votes > 0).astype(np.uint8), connectivity=4
        )
        if count < 2:
            return None
        weights = np.bincount(
            labels.ravel(),
            weights=(np.maximum(votes, 0) * self._nearness(near_px, FAR_BLOB)).ravel(),
        )
        blob = np.where(labels == 1 + int(np.argmax(weights[1:])), votes, 0)
        low: list[int] = []
        high: list[int] = []
        for axis in (0, 1):
            below = blob.sum(axis=axis).cumsum()
            low.append(int(np.searchsorted(below, TRIM * below[-1])))
            high.append(int(np.searchsorted(below, (1 - TRIM) * below[-1])) + 1)
        x, y = self.cell_px
        return low[0] * x, low[1] * y, high[0] * x, high[1] * y

    def marked(self, box_px: BoxPx) -> Map:
        """The votes for a box that a user selects: the most for it, the fewest for the rest."""
        votes = np.full_like(self.empty, -MOST)
        x0, y0, x1, y1 = self.cells(box_px)
        votes[y0:y1, x0:x1] = MOST
        return votes

    def shift_px(self, votes: Map, step: MotionStep, box_px: BoxPx) -> tuple[float, float]:
        """How far (x, y) the object has moved since the last frame: the mean over cells with many
        votes.

        Args:
            votes: in the last frame, ``[h, w]``.
            step: the motion since then.
            box_px: where the object was.
        """
        if step.flow is None:
            return 0.0, 0.0
        x0, y0, x1, y1 = self.cells(box_px)
        flow = step.flow[y0:y1, x0:x1]
        votes = votes[y0:y1, x0:x1]
        most = cv2.minMaxLoc(votes)[1]
        sure = cv2.inRange(votes, SUREST * most, most) if most > 0 else None
        x, y, _, _ = cv2.mean(flow, sure)
        return -x * self.cell_px[0], -y * self.cell_px[1]

    def placed(self, map_hw: Map, window_px: BoxPx) -> Map:
        """The map of a window as one of the whole frame, ``[h, w]``: 0 outside the window."""
        x0, y0, x1, y1 = self.cells(window_px)
        whole = np.zeros_like(self.empty)
        whole[y0:y1, x0:x1] = cv2.resize(map_hw, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        return whole
