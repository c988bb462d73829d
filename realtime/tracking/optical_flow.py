"""Finds how a frame has moved since the last one: dense optical flow between two small frames."""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.localizer import ImageBgr
from engines.resizing import shrunk
from realtime.frames import BoxPx

Gray = NDArray[np.uint8]

LONGEST_SIDE = 80
"""Cells along the longer side of the grid. On the tuning sequences, 128 and 160 find no more, and
take up to four times as long.
"""
BLANK_DEVIATION = 3.0
"""A frame whose grey levels have a smaller standard deviation is blank: a covered lens, a camera
that starts, a blackout.
"""
CUT_CORRELATION = 0.3
"""The scene is cut where a frame correlates less than this with the last one, propagated to it."""
ALIKE = 0.5
"""Two frames are of one scene, whatever their correlation, if their mean difference is below so
many standard deviations.
"""
FLOW_ROUNDS = 6
"""Gradient descent steps of the optical flow for each patch."""
FLOW_STRIDE = 6
"""The distance between the patches of the optical flow."""
CORE = 0.15
"""A box moves as its middle does: this share at each of its sides is left out."""
MOST_GROWTH = 0.08
"""A box grows or shrinks by at most this share from frame to frame."""


@dataclass(frozen=True)
class MotionState:
    """What of a source's frames so far decides the motion to the next one.

    Attributes:
        last: the last frame that was not blank, on the grid, ``[h, w]``; None before the first.
        was_blank: whether the last one was blank.
    """

    last: Gray | None = None
    was_blank: bool = False

    def json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        last = None if self.last is None else b64encode(self.last.tobytes()).decode()
        return {"last": last, "was_blank": self.was_blank}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], shape: tuple[int, int]) -> "MotionState":
        """What ``json`` gave, on a grid of that shape.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        last, was_blank = stored["last"], stored["was_blank"]
        if last is not None:
            last = np.frombuffer(b64decode(last), np.uint8).reshape(shape)
        return cls(last, was_blank)


@dataclass(frozen=True)
class MotionStep:
    """The motion from the last frame to this one.

    Attributes:
        after: the state after this frame.
        flow: where each cell of this frame was in the last one, as (x, y) displacements in cells,
            ``[h, w, 2]``; None for a first, a blank or a cut frame, and the first after blank ones.
        blank: whether the frame shows nothing.
        cut: whether a new scene begins.
        frozen: whether it is the last frame again.
    """

    after: MotionState
    flow: NDArray[np.float32] | None = None
    blank: bool = False
    cut: bool = False
    frozen: bool = False


class Motion:
    """Computes the motion between the frames of one source, all of one size.

    Args:
        width_px, height_px: size of the frames.

    Attributes:
        shape: height and width of the grid, in cells.
        state: after the last frame.
    """

    def __init__(self, width_px: int, height_px: int) -> None:
        share = LONGEST_SIDE / max(width_px, height_px)
        self.shape = max(8, round(height_px * share)), max(8, round(width_px * share))
        h, w = self.shape
        self.state = MotionState()
        self._cell_px = width_px / w, height_px / h
        self._ys, self._xs = np.mgrid[0:h, 0:w].astype(np.float32)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._dis.setFinestScale(0)
        self._dis.setGradientDescentIterations(FLOW_ROUNDS)
        self._dis.setPatchStride(FLOW_STRIDE)

    def step(self, image_bgr: ImageBgr) -> MotionStep:
        """The motion to the next frame."""
        before, gray = self.state, self._shrunk(image_bgr)
        if _deviation(gray) < BLANK_DEVIATION:
            self.state = replace(before, was_blank=True)
            return MotionStep(self.state, blank=True)
        self.state = MotionState(gray)
        if before.last is None:
            return MotionStep(self.state, cut=True)
        if not before.was_blank and np.array_equal(gray, before.last):
            return MotionStep(self.state, np.zeros((*self.shape, 2), np.float32), frozen=True)
        flow = np.asarray(self._dis.calc(gray, before.last, None), np.float32)  # type: ignore[call-overload]
        if _is_cut(gray, self._propagated(before.last, flow)):
            return MotionStep(self.state, cut=True)
        # after blank frames, how things moved meanwhile is not known
        return MotionStep(self.state, None if before.was_blank else flow)

    def carried(self, box_px: BoxPx, flow: NDArray[np.float32]) -> BoxPx:
        """A box of the last frame, where it is in this one: moved by the median flow of its middle,
        and larger or smaller as the flow of its halves differs.
        """
        h, w = self.shape
        cell_x, cell_y = self._cell_px
        x0, y0, x1, y1 = box_px
        left, right = _cells(x0, x1, cell_x, w)
        top, bottom = _cells(y0, y1, cell_y, h)
        part = flow[top:bottom, left:right]
        part = part[:: 1 + (bottom - top) // 10, :: 1 + (right - left) // 10]
        rows, columns = part.shape[:2]
        middle = np.sort(part.reshape(-1, 2), axis=0)[rows * columns // 2]
        x_px, y_px = -float(middle[0]) * cell_x, -float(middle[1]) * cell_y
        growth = 0.0
        if rows >= 4 and columns >= 4:
            half = columns // 2
            wider = float(part[:, :half, 0].mean() - part[:, -half:, 0].mean())
            half_rows = rows // 2
            taller = float(part[:half_rows, :, 1].mean() - part[-half_rows:, :, 1].mean())
            growth = (wider / ((right - left) / 2) + taller / ((bottom - top) / 2)) / 2
            growth = min(max(growth, -MOST_GROWTH), MOST_GROWTH)
        x, y = growth * (x1 - x0) / 2, growth * (y1 - y0) / 2
        return x0 + x_px - x, y0 + y_px - y, x1 + x_px + x, y1 + y_px + y

    def _shrunk(self, image_bgr: ImageBgr) -> Gray:
        """The green of a frame, which is most of its grey, averaged to the cells of the grid.

        Most rows of large frames are left out, because the means hardly change.
        """
        h, w = self.shape
        rows = image_bgr[:: max(1, image_bgr.shape[0] // (3 * h))]
        green = np.asarray(cv2.extractChannel(rows, 1), np.uint8)
        if green.shape[0] > h and green.shape[1] > w:
            return shrunk(green[..., None], self.shape)
        return np.asarray(cv2.resize(green, (w, h), interpolation=cv2.INTER_AREA), np.uint8)

    def _propagated(self, last: Gray, flow: NDArray[np.float32]) -> Gray:
        """The last frame, propagated to this one by a flow."""
        xs, ys = self._xs + flow[..., 0], self._ys + flow[..., 1]
        return np.asarray(
            cv2.remap(last, xs, ys, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8
        )


def _cells(low_px: float, high_px: float, cell_px: float, cells: int) -> tuple[int, int]:
    """The cells along one axis that the middle of a box covers: at least two."""
    away = CORE * (high_px - low_px)
    first = max(0, min(round((low_px + away) / cell_px), cells - 2))
    return first, max(first + 2, min(round((high_px - away) / cell_px), cells))


def _is_cut(gray: Gray, propagated: Gray) -> bool:
    """Whether a frame has little in common with the last one, propagated to it."""
    if cv2.norm(gray, propagated, cv2.NORM_L1) < ALIKE * gray.size * _deviation(gray):
        return False  # without the correlation, which takes longer
    return float(cv2.matchTemplate(gray, propagated, cv2.TM_CCOEFF_NORMED)[0, 0]) < CUT_CORRELATION


def _deviation(gray: Gray) -> float:
    """The standard deviation of a frame, in grey levels."""
    return float(cv2.meanStdDev(gray)[1][0, 0])
