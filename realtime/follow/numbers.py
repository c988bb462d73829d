"""Numbers for what is followed. An object that was lost keeps its own for a short time."""

import math

from realtime.frames import BoxPx

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
        """The number of what is followed from now on: that of the nearest one that was lost, or a new one."""
        self._lost = {number: (box, then) for number, (box, then) in self._lost.items() if pts_s - then <= SHORT_LOSS_S}
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
