"""Smooths drawn boxes over time: the 1 euro filter (Casiez, Roussel & Vogel 2012)."""

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.boxes import iou
from engines.localizer import Localization
from realtime.frames import Tracked

Boxed = TypeVar("Boxed", Localization, Tracked)

LIGHT_HZ, HEAVY_HZ = 4.0, 0.15
"""Cut-off frequencies of a box at rest for the least and the greatest strength."""
BETA = 6.0
"""Hz that a box which crosses the frame in a second gains: fast boxes are followed, not dragged
behind.
"""
DERIVATIVE_HZ = 1.0  # the paper's own
STALE_S = 1.0
ANOTHER_OBJECT_IOU = 0.1


class OneEuro:
    """Low-pass filter whose cut-off rises with speed: steady at rest, prompt in motion (algorithm 1
    of the paper).

    Args:
        min_cutoff_hz: at rest; lower is steadier.
        beta: Hz gained per unit of speed; higher lags less.
    """

    def __init__(self, min_cutoff_hz: float, beta: float) -> None:
        self.min_cutoff_hz, self._beta = min_cutoff_hz, beta
        self._last_s = 0.0
        self._value = np.empty(0)
        self._speed = np.empty(0)

    def __call__(self, value: NDArray[np.float64], now_s: float) -> NDArray[np.float64]:
        """The filtered value; ``now_s`` must be later than the last."""
        if not self._value.size:
            self._last_s = now_s
            self._value = value
            self._speed = np.zeros_like(value)
            return value
        passed_s, self._last_s = now_s - self._last_s, now_s
        kept = _passed(DERIVATIVE_HZ, passed_s)
        self._speed = self._speed + kept * ((value - self._value) / passed_s - self._speed)
        share = _passed(self.min_cutoff_hz + self._beta * np.abs(self._speed), passed_s)
        self._value = self._value + share * (value - self._value)
        return self._value


class BoxSmoother:
    """Smooths the boxes of one source over time. It begins anew after a pause, a change of size, or
    a jump to another object.
    """

    def __init__(self) -> None:
        self._filter = OneEuro(0.0, BETA)
        self._size = (0, 0)
        self._last_s = -math.inf
        self._last: tuple[float, ...] = ()

    def smoothed(
        self, found: Boxed, pts_s: float, width_px: int, height_px: int, strength: float
    ) -> Boxed:
        """A copy with the box to draw.

        Args:
            found: what was found; left as it is.
            pts_s: when, in the source's time.
            width_px: of the frame.
            height_px: of the frame.
            strength: 0 (off) to 1.
        """
        box = found.box_xyxy_px
        if strength <= 0 or box is None:
            self._last = ()
            return found
        passed_s = pts_s - self._last_s
        another = (
            not self._last
            or (width_px, height_px) != self._size
            or iou(box, self._last) < ANOTHER_OBJECT_IOU
        )
        if another or not 0 < passed_s <= STALE_S:
            self._filter = OneEuro(0.0, BETA)
        self._filter.min_cutoff_hz = LIGHT_HZ * (HEAVY_HZ / LIGHT_HZ) ** min(1.0, strength)
        scale = np.array(
            [width_px, height_px, width_px, height_px], np.float64
        )  # speeds in frames a second, at any size
        x0, y0, x1, y1 = (
            float(edge) for edge in self._filter(np.asarray(box) / scale, pts_s) * scale
        )
        self._size = (width_px, height_px)
        self._last_s = pts_s
        self._last = (x0, y0, x1, y1)
        return replace(found, box_xyxy_px=(x0, y0, x1, y1))


def _passed(cutoff_hz: float | NDArray[np.float64], passed_s: float) -> NDArray[np.float64]:
    """How far the output goes towards the input (equation 6): a low pass with this cut-off, after
    this time.
    """
    turn = 2 * math.pi * np.asarray(cutoff_hz) * passed_s
    return np.asarray(turn / (turn + 1))
