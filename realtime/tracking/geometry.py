"""Moves, widens and smooths boxes from frame to frame, and gives tracked objects their numbers."""

import math

from engines.boxes import overlap
from realtime.frames import BoxPx

EDGE = 0.02
"""Of a window's sides: a box that comes so near to its edge may go on beyond it, and the next
window is a larger one.
"""
CALM, CALM_LATER, CALM_FRAMES, CALM_IOU, ANOTHER_IOU = 0.3, 0.12, 4, 0.9, 0.35
"""The calm box, carried along, goes a third of the way to a new one that is much the same (IoU),
all of it to another. The
longer it was there, the less far: after N frames CALM_FRAMES / N of the way, at least
CALM_LATER."""


def touches(box_px: BoxPx, window_px: BoxPx, size_px: tuple[int, int]) -> bool:
    """Whether a box reaches an edge of its window beyond which the frame goes on."""
    for low, high, first, last, size in zip(
        box_px[:2], box_px[2:], window_px[:2], window_px[2:], size_px, strict=True
    ):
        near = EDGE * (last - first)
        if (first > 0 and low < first + near) or (last < size and high > last - near):
            return True
    return False


def moved(box_px: BoxPx, window_px: BoxPx) -> BoxPx:
    """A box in the frame's pixels, from one in the window's: shifted by the window's corner."""
    x, y = window_px[:2]
    return box_px[0] + x, box_px[1] + y, box_px[2] + x, box_px[3] + y


def calmed(raw_px: BoxPx, expected_px: BoxPx | None, frames: int) -> BoxPx:
    """Between where the box should be and where it was found; a box that is elsewhere altogether is
    taken as it is.

    Args:
        raw_px: where it was found.
        expected_px: the last one, carried along; None without one.
        frames: since the scene began.
    """
    if expected_px is None:
        return raw_px
    alike = (overlap(raw_px, expected_px) - ANOTHER_IOU) / (CALM_IOU - ANOTHER_IOU)
    least = min(CALM, max(CALM_LATER, CALM_FRAMES / max(frames, 1)))
    share = 1 - (1 - least) * min(max(alike, 0.0), 1.0)
    x0, y0, x1, y1 = (
        then + share * (now - then) for then, now in zip(expected_px, raw_px, strict=True)
    )
    return x0, y0, x1, y1


def widened(box_px: BoxPx, margin: float) -> BoxPx:
    """A box with a margin, a share of its sides."""
    x, y = (margin * (high - low) for low, high in zip(box_px[:2], box_px[2:], strict=True))
    return box_px[0] - x, box_px[1] - y, box_px[2] + x, box_px[3] + y


SHORT_LOSS_S = 2.0
"""An object that is found again within that time keeps its number."""


class Numbers:
    """Numbers of one source's objects, from 1 on.

    Args:
        reach_px: what is found farther from where an object was lost is another one.
    """

    def __init__(self, reach_px: float = math.inf) -> None:
        self._last, self._reach_px = 0, reach_px
        self._lost: dict[int, tuple[BoxPx, float]] = {}

    def lose(self, number: int, box_px: BoxPx, pts_s: float) -> None:
        """An object is not followed any more; where, and when, it was last."""
        self._lost[number] = box_px, pts_s

    def found(self, box_px: BoxPx, pts_s: float) -> int:
        """The number of what is followed from now on: that of the nearest one that was lost, or a
        new one.
        """
        self._lost = {
            number: (box, then)
            for number, (box, then) in self._lost.items()
            if pts_s - then <= SHORT_LOSS_S
        }
        away_px = {number: _distance_px(box, box_px) for number, (box, _) in self._lost.items()}
        nearest = min(away_px, key=away_px.__getitem__, default=0)
        if nearest and away_px[nearest] <= self._reach_px:
            del self._lost[nearest]
            return nearest
        return self.new()

    def new(self) -> int:
        """A number that no object had."""
        self._last += 1
        return self._last


def _distance_px(a_px: BoxPx, b_px: BoxPx) -> float:
    """Between the centres of two boxes."""
    return math.dist(*(((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in (a_px, b_px)))
