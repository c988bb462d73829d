"""Finds how a frame has moved since the last one, and what in it moves by itself: dense optical
flow between two small frames, less the motion of the camera.

Nothing but frames goes in, so that what comes out is the same however the engine answers.
"""

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

Map = NDArray[np.float32]
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
FIT_STRIDE = 5
"""The motion of the camera is fitted to every so many rows and columns."""
FIT_ROUNDS = 4
STILL = 0.05
"""Flow of so many cells is noise."""
LEAST_SPREAD = 0.7
"""The natural logarithm of a ratio of speeds that tells moving from still with certainty."""
MOVING_SHARE = 0.005
"""Something moves by itself where so large a share of the grid gains by flow, see ``_moving``."""
NOISE_LEVELS = 0.3
"""The grey levels that a sensor's noise gains by flow."""
TEXTURE = 5.0
"""Grey levels of a Laplacian at which flow is half believed. Without texture, flow is a guess."""
GAIN = 2.0
KEPT = 0.85
"""The share of the evidence that is left after two frames."""
MOST = 3.0
"""The largest magnitude of the evidence."""
UNSEEN = -0.3
"""The evidence of a place that comes into view."""
CORE = 0.15
"""A box moves as its middle does: this share at each of its sides is left out."""
MOST_GROWTH = 0.08
"""A box grows or shrinks by at most this share from frame to frame."""
LEAST_BLOB = 8
"""Cells of the smallest thing that is found by its motion alone."""


@dataclass(frozen=True)
class MotionState:
    """What of a source's frames so far decides the motion to the next one.

    Attributes:
        last: the last frame that was not blank, on the grid, ``[h, w]``; None before the first.
        evidence: sums over frames of votes, positive where a cell moves by itself and negative
            where it moves with the camera, ``[h, w]``.
        frames: how many there have been.
        was_blank: whether the last one was blank.
    """

    last: Gray | None
    evidence: Map
    frames: int = 0
    was_blank: bool = False

    def json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        last = None if self.last is None else b64encode(self.last.tobytes()).decode()
        evidence = b64encode(self.evidence.tobytes()).decode()
        known = {"frames": self.frames, "was_blank": self.was_blank}
        return {"last": last, "evidence": evidence, **known}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], shape: tuple[int, int]) -> "MotionState":
        """What ``json`` gave, on a grid of that shape.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        last = None
        if stored["last"] is not None:
            last = np.frombuffer(b64decode(stored["last"]), np.uint8).reshape(shape)
        evidence = np.frombuffer(b64decode(stored["evidence"]), np.float32).reshape(shape)
        return cls(last, evidence, stored["frames"], stored["was_blank"])


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
        self._nothing: Map = np.zeros(self.shape, np.float32)
        self.state = MotionState(None, self._nothing)
        self._cell_px = width_px / w, height_px / h
        ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
        self._xs = xs
        self._ys = ys
        self._terms = np.stack([xs / w - 0.5, ys / h - 0.5, np.ones_like(xs)], axis=-1)
        every = slice(FIT_STRIDE // 2, None, FIT_STRIDE)
        self._sparse = (every, every)
        self._fit_terms = self._terms[self._sparse].reshape(-1, 3).astype(np.float64)
        near_border = np.abs(self._fit_terms[:, :2]).max(axis=1) > 0.3
        self._first_weights = np.where(near_border, 1.0, 0.3)  # the object is rarely at the border
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._dis.setFinestScale(0)
        self._dis.setGradientDescentIterations(FLOW_ROUNDS)
        self._dis.setPatchStride(FLOW_STRIDE)

    def step(self, image_bgr: ImageBgr) -> MotionStep:
        """The motion to the next frame."""
        before, gray = self.state, self._shrunk(image_bgr)
        frames = before.frames + 1
        if deviation(gray) < BLANK_DEVIATION:
            self.state = replace(before, frames=frames, was_blank=True)
            return MotionStep(self.state, blank=True)
        self.state = MotionState(gray, self._nothing, frames)
        if before.last is None:
            return MotionStep(self.state, cut=True)
        if not before.was_blank and np.array_equal(gray, before.last):
            self.state = replace(before, frames=frames)
            still = np.zeros((*self.shape, 2), np.float32)
            return MotionStep(self.state, still, frozen=True)
        flow = np.asarray(self._dis.calc(gray, before.last, None), np.float32)  # type: ignore[call-overload]
        if _is_cut(gray, self._propagated(before.last, flow)):
            return MotionStep(self.state, cut=True)
        if before.was_blank:  # how things moved meanwhile is not known
            return MotionStep(self.state)
        self.state = MotionState(gray, self._next_evidence(flow, gray, before), frames)
        return MotionStep(self.state, flow)

    def _next_evidence(self, flow: NDArray[np.float32], gray: Gray, before: MotionState) -> Map:
        """The evidence, propagated; in every other frame with the votes of this one, because they
        take time.
        """
        last = before.last
        assert last is not None  # there is a flow
        moved = cv2.remap(
            before.evidence,
            self._xs + flow[..., 0],
            self._ys + flow[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=UNSEEN,
        )
        if before.frames % 2:
            return np.asarray(moved, np.float32)
        camera = self.camera_flow(flow)
        moving = _moving(gray, self._propagated(last, flow), self._propagated(last, camera))
        own = flow - camera
        # OpenCV's magnitude depends on where in memory an array begins, and so would a resumed run.
        votes = _votes(np.sqrt(own[..., 0] ** 2 + own[..., 1] ** 2), gray)
        votes = np.where(votes < 0, moving * votes, votes)
        return np.asarray(np.clip(np.float32(KEPT) * moved + votes, -MOST, MOST), np.float32)

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

    def moves(self, box_px: BoxPx, evidence: Map) -> float:
        """How surely what is in a box moves by itself, from 0 to 1."""
        h, w = self.shape
        left, right = _cells(box_px[0], box_px[2], self._cell_px[0], w)
        top, bottom = _cells(box_px[1], box_px[3], self._cell_px[1], h)
        mean = cv2.mean(evidence[top:bottom, left:right])[0]
        return min(max(mean / MOST, 0.0), 1.0)

    def blobs(self) -> list[BoxPx]:
        """The boxes of what moves by itself in the last frame."""
        found = list[BoxPx]()
        x, y = self._cell_px
        _, _, stats, _ = cv2.connectedComponentsWithStats(
            (self.state.evidence > MOST / 3).astype(np.uint8), connectivity=4
        )
        for left, top, wide, tall, area in stats[1:].tolist():
            if area >= LEAST_BLOB and area > 0.3 * wide * tall:
                found.append((left * x, top * y, (left + wide) * x, (top + tall) * y))
        return found

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

    def camera_flow(self, flow: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part of a flow that comes from the camera: the affine motion of most of the frame.

        It is fitted by iteratively reweighted least squares.

        Args:
            flow: ``[h, w, 2]``.

        Returns:
            ``[h, w, 2]``.
        """
        there = flow[self._sparse].reshape(-1, 2).astype(np.float64)
        weights = self._first_weights
        terms = self._fit_terms
        for _ in range(FIT_ROUNDS):
            weighted = terms.T * weights
            motion = np.linalg.solve(weighted @ terms + 1e-6 * np.eye(3), weighted @ there)
            squares = np.square(there - terms @ motion).sum(axis=1)
            median = float(np.partition(squares, len(squares) // 2)[len(squares) // 2])
            weights = 1 / np.square(1 + squares / max(2.25 * median, STILL**2))
        return np.asarray(self._terms @ motion.astype(np.float32))

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
    if cv2.norm(gray, propagated, cv2.NORM_L1) < ALIKE * gray.size * deviation(gray):
        return False  # without the correlation, which takes longer
    return float(cv2.matchTemplate(gray, propagated, cv2.TM_CCOEFF_NORMED)[0, 0]) < CUT_CORRELATION


def _moving(gray: Gray, by_flow: Gray, by_camera: Gray) -> float:
    """Whether anything moves by itself: from 0, where nothing does, to 1.

    Something does where the flow explains a frame better than the motion of the camera, by more
    than a sensor's noise. What it gains is measured in grey levels.

    Args:
        gray: the frame.
        by_flow: the last frame, propagated to it by the flow.
        by_camera: the last frame, propagated to it by the camera's motion.
    """
    worse = cv2.boxFilter(cv2.absdiff(gray, by_camera), cv2.CV_32F, (5, 5))
    better = cv2.boxFilter(cv2.absdiff(gray, by_flow), cv2.CV_32F, (5, 5))
    gains = (worse - better).ravel()
    place = round((1 - MOVING_SHARE) * (gains.size - 1))
    gain = float(np.partition(gains, place)[place])
    return min(max((gain - NOISE_LEVELS) / NOISE_LEVELS, 0.0), 1.0)


def deviation(gray: Gray) -> float:
    """The standard deviation of a frame, in grey levels."""
    return float(cv2.meanStdDev(gray)[1][0, 0])


def _votes(speed: Map, gray: Gray) -> Map:
    """The votes of a frame ``[h, w]``, -1..1, from the speed against the camera.

    They are positive where the speed is of the faster of two kinds, and weak where there is no
    texture.
    """
    logs = np.log(speed + STILL)
    cut, slow, fast = two_kinds(logs)
    votes = np.clip(
        GAIN * (logs - max(cut, float(np.log(2 * STILL)))) / max(fast - slow, LEAST_SPREAD), -1, 1
    )
    texture = cv2.boxFilter(np.abs(cv2.Laplacian(gray, cv2.CV_32F)), -1, (5, 5))
    return np.asarray(votes * (texture / (texture + TEXTURE)), np.float32)


def two_kinds(values: Map) -> tuple[float, float, float]:
    """Part values into the two most compact kinds (Otsu 1979).

    Returns:
        The cut between them, the mean of the values below it, and the mean of those above it.
    """
    low, high, _, _ = cv2.minMaxLoc(values)
    if high - low < 1e-6:
        return high, low, high
    scale = 255 / (high - low)
    level, above = cv2.threshold(
        cv2.convertScaleAbs(values, alpha=scale, beta=-low * scale), 0, 255, cv2.THRESH_OTSU
    )
    return (
        low + (level + 0.5) / scale,
        cv2.mean(values, cv2.bitwise_not(above))[0],
        cv2.mean(values, above)[0],
    )
