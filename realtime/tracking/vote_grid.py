"""The vote grid: log odds on a small grid that say where the object is, moved along with the
optical flow.

Each frame adds votes: what moves by itself, where the sensitivity map of the window is high, what
lies in the window's box. What was voted before fades. The object's box is the box of the heaviest
blob.
"""

import cv2
import numpy as np

from realtime.frames import BoxPx
from realtime.tracking.geometry import widened
from realtime.tracking.optical_flow import Map, Motion, Step, two_kinds

KEPT, KEPT_STILL, MOST = 0.8, 0.95, 4.0
"""Share of the votes that is left after a frame, and after one in which nothing moved; the most
that votes may come to.
"""
UNSEEN = -0.3
"""What is believed of what comes into view."""
MAP_VOTE = {"whole": 0.6, "window": 1.0}
BOX_VOTE = 0.3
MAP_STILL, BOX_STILL = 0.3, 0.8
"""What is left of the map's votes, and what the box's are, while nothing moves."""
HOT = 0.3
"""Of the logarithm of a map: how far over the cut between its two kinds a place must be to be voted
for.
"""
TRIM = 0.015
"""Share of the blob's weight that is left out at each side of its box: legs, tails and shadows."""
SUREST = 0.8
"""Of the most votes in a box: a cell with more moves as the object does, surely."""
NEAR, FAR_MOTION, FAR_BLOB = 0.25, 0.3, 0.3
"""Margin, of a box's sides, around an object that is followed; what votes of motion and blobs count
for beyond it.
"""


class VoteGrid:
    """The votes for one source's object; the frames are of one size.

    Args:
        motion: whose grid it is on.
        width_px, height_px: of the frames.
    """

    def __init__(self, motion: Motion, width_px: int, height_px: int) -> None:
        self._motion, (h, w) = motion, motion.shape
        self.cell_px = width_px / w, height_px / h
        self.empty: Map = np.zeros((h, w), np.float32)

    def propagated(
        self, votes: Map, step: Step, near_px: BoxPx | None = None, rated: bool = True
    ) -> Map:
        """The votes as they are in the next frame, before its answer is known.

        Args:
            votes: of the last frame.
            step: to the next.
            near_px: where the object was; what moves far from there counts for little.
            rated: whether what moves has a vote; finding that out takes time.
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
        """The votes with those of an answer.

        Args:
            votes: of this frame, as ``propagated``.
            map_hw: of the window.
            box_px: what the head says, in the frame.
            window_px: what the engine saw of the frame.
            whole: that was all of it.
            moving: how much moves; where nothing does, the head's box is the only one to tell the
                object's extent.
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
        """The cells that a box covers, at least two a side."""
        h, w = self.empty.shape
        x0, y0, x1, y1 = self._rounded(box_px)
        x0, y0 = max(0, min(x0, w - 2)), max(0, min(y0, h - 2))
        return x0, y0, min(max(x1, x0 + 2), w), min(max(y1, y0 + 2), h)

    def _nearness(self, near_px: BoxPx | None, beyond: float) -> Map:
        """1 in and around a box, ``beyond`` elsewhere; 1 everywhere without a box."""
        if near_px is None:
            return np.ones_like(self.empty)
        shares = np.full_like(self.empty, beyond)
        x0, y0, x1, y1 = self.cells(widened(near_px, NEAR))
        shares[y0:y1, x0:x1] = 1
        return shares

    def _rounded(self, box_px: BoxPx) -> tuple[int, int, int, int]:
        (x0, y0, x1, y1), (x, y) = box_px, self.cell_px
        return round(x0 / x), round(y0 / y), round(x1 / x), round(y1 / y)

    def box(self, votes: Map, near_px: BoxPx | None = None) -> BoxPx | None:
        """The object's box in the frame; None where nothing is voted for. Blobs far from
        ``near_px`` weigh less.
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
        low, high = [], []
        for axis in (0, 1):
            below = blob.sum(axis=axis).cumsum()
            low.append(int(np.searchsorted(below, TRIM * below[-1])))
            high.append(int(np.searchsorted(below, (1 - TRIM) * below[-1])) + 1)
        x, y = self.cell_px
        return low[0] * x, low[1] * y, high[0] * x, high[1] * y

    def marked(self, box_px: BoxPx) -> Map:
        """The votes of a user who draws a box: all for it, all against the rest."""
        votes = np.full_like(self.empty, -MOST)
        x0, y0, x1, y1 = self.cells(box_px)
        votes[y0:y1, x0:x1] = MOST
        return votes

    def shift_px(self, votes: Map, step: Step, box_px: BoxPx) -> tuple[float, float]:
        """By how much (x, y) what lies in a box moved since the last frame: the mean over the
        surest cells.
        """
        if step.flow is None:
            return 0.0, 0.0
        x0, y0, x1, y1 = self.cells(box_px)
        flow, votes = step.flow[y0:y1, x0:x1], votes[y0:y1, x0:x1]
        most = cv2.minMaxLoc(votes)[1]
        sure = cv2.inRange(votes, SUREST * most, most) if most > 0 else None
        x, y, _, _ = cv2.mean(flow, sure)
        return -x * self.cell_px[0], -y * self.cell_px[1]

    def placed(self, map_hw: Map, window_px: BoxPx) -> Map:
        """A window's map as one of the whole frame, 0 where the engine did not look."""
        x0, y0, x1, y1 = self.cells(window_px)
        whole = np.zeros_like(self.empty)
        whole[y0:y1, x0:x1] = cv2.resize(map_hw, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        return whole
