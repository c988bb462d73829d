"""Finds what moves by itself: dense optical flow between two small frames, less the motion of the
camera.

``Motion`` compares each frame of a source with the one before it. ``MotionHistory`` remembers how
each place has moved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.localizer import ImageBgr

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
HISTORY_KEPT = 0.95
"""The share of the mean motion that is left after a frame: it is a mean over about 20 frames."""
ALIKE_SHARE = 0.7
"""A place may differ from an object's motion by this share of the object's speed."""
ALIKE_LEAST = 0.1
"""A place may always differ by so many cells."""
SHIFT_ROUNDS = 3
"""Rounds of mean shift."""
MEDIAN_STRIDE = 5
"""The motion of most of the frame is the median of every so many rows and columns."""
ENOUGH = 64
"""So many cells are enough to find an object's motion."""


@dataclass(frozen=True)
class MotionStep:
    """The motion from the last frame to this one.

    Attributes:
        flow: where each cell of this frame was in the last one, as (x, y) displacements in cells,
            ``[h, w, 2]``; None for a first, a blank or a cut frame.
        rate: computes ``evidence`` and ``moving`` when they are first used.
        evidence: from -1, for a cell that moves with the camera, to 1, for one that moves by
            itself, ``[h, w]``.
        moving: from 0, where nothing moves by itself, to 1, where something does.
        blank: whether the frame shows nothing.
        cut: whether a new scene begins.
    """

    flow: NDArray[np.float32] | None
    rate: Callable[[], tuple[Map, float]]
    blank: bool = False
    cut: bool = False

    @property
    def evidence(self) -> Map:
        """See the attributes."""
        return self._rated[0]

    @property
    def moving(self) -> float:
        """See the attributes."""
        return self._rated[1]

    @cached_property
    def _rated(self) -> tuple[Map, float]:
        return self.rate()


class Motion:
    """Computes the motion between the frames of one source, all of one size.

    Args:
        width_px, height_px: size of the frames.

    Attributes:
        shape: height and width of the grid, in cells.
    """

    def __init__(self, width_px: int, height_px: int) -> None:
        share = LONGEST_SIDE / max(width_px, height_px)
        self.shape = max(8, round(height_px * share)), max(8, round(width_px * share))
        h, w = self.shape
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
        self._last: Gray | None = None

    def step(self, image_bgr: ImageBgr) -> MotionStep:
        """The motion to the next frame."""
        gray = self._shrunk(image_bgr)
        last = self._last
        if deviation(gray) < BLANK_DEVIATION:
            self._last = None  # the next frame may show anything
            return MotionStep(None, self._nothing, blank=True)
        self._last = gray
        if last is None:
            return MotionStep(None, self._nothing, cut=True)
        flow = np.asarray(self._dis.calc(gray, last, None), np.float32)  # type: ignore[call-overload]
        propagated = self._propagated(last, flow)
        if _is_cut(gray, propagated):
            return MotionStep(None, self._nothing, cut=True)
        return MotionStep(flow, partial(self._rate, flow, gray, last, propagated))

    def _nothing(self) -> tuple[Map, float]:
        """The evidence and ``moving`` of a frame without flow."""
        return np.zeros(self.shape, np.float32), 0.0

    def _rate(
        self, flow: NDArray[np.float32], gray: Gray, last: Gray, propagated: Gray
    ) -> tuple[Map, float]:
        """The evidence and ``moving`` of a frame, see ``MotionStep``.

        Args:
            flow: to the frame.
            gray: the frame.
            last: the frame before it.
            propagated: ``last``, propagated to the frame by the flow.
        """
        camera = self.camera_flow(flow)
        moving = _moving(gray, propagated, self._propagated(last, camera))
        own = flow - camera
        votes = _evidence(np.asarray(cv2.magnitude(own[..., 0], own[..., 1]), np.float32), gray)
        return np.where(votes < 0, moving * votes, votes), moving

    def remap_grid(self, flow: NDArray[np.float32]) -> tuple[Map, Map]:
        """The x and the y, each ``[h, w]``, that each cell comes from, for OpenCV's remap."""
        return self._xs + flow[..., 0], self._ys + flow[..., 1]

    def _shrunk(self, image_bgr: ImageBgr) -> Gray:
        """The green of a frame, which is most of its grey, averaged to the cells of the grid.

        Most rows of large frames are left out, because the means hardly change.
        """
        h, w = self.shape
        rows = image_bgr[:: max(1, image_bgr.shape[0] // (3 * h))]
        return np.asarray(
            cv2.resize(cv2.extractChannel(rows, 1), (w, h), interpolation=cv2.INTER_AREA), np.uint8
        )

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
        return np.asarray(
            cv2.remap(
                last, *self.remap_grid(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            ),
            np.uint8,
        )


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


def _evidence(speed: Map, gray: Gray) -> Map:
    """The evidence of motion ``[h, w]``, from the speed against the camera.

    It is positive where the speed is of the faster of two kinds, and weak where there is no
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


class MotionHistory:
    """The mean motion of what is at each cell, compared with most of the frame.

    It is propagated along the optical flow.

    Args:
        motion: of the source; the grid is the same.
    """

    def __init__(self, motion: Motion) -> None:
        self._motion = motion
        self._sums = np.zeros((*motion.shape, 3), np.float32)
        self._mean = np.zeros((*motion.shape, 2), np.float32)

    def add(self, step: MotionStep) -> None:
        """Add the next step. After a cut or a blank frame, the history begins anew."""
        if step.flow is None:
            self._sums = np.zeros_like(self._sums)
            self._mean = np.zeros_like(self._mean)
            return
        now = np.ones_like(self._sums)
        sparse = step.flow[::MEDIAN_STRIDE, ::MEDIAN_STRIDE].reshape(-1, 2)
        now[..., :2] = step.flow - np.median(sparse, axis=0)
        propagated = cv2.remap(
            self._sums,
            *self._motion.remap_grid(step.flow),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        )
        self._sums = np.asarray(HISTORY_KEPT * propagated + (1 - HISTORY_KEPT) * now, np.float32)
        self._mean = self._sums[..., :2] / self._sums[..., 2:]

    def alike(self, cells: tuple[int, int, int, int], votes: Map) -> Map:
        """How much each cell moves as an object does: from 0, for not at all, to 1, ``[h, w]``.

        Where two objects share the cells, the larger one is meant.

        Args:
            cells: of the object, as x0, y0, x1, y1.
            votes: for the object, ``[h, w]``; cells without votes over 0 are left out.
        """
        x0, y0, x1, y1 = cells
        mine = self._mean[y0:y1, x0:x1][votes[y0:y1, x0:x1] > 0]
        if not len(mine):
            mine = self._mean[y0:y1, x0:x1].reshape(-1, 2)
        mine = mine[:: 1 + len(mine) // ENOUGH]
        middle: NDArray[np.float32] = np.median(mine, axis=0)
        width = max(ALIKE_LEAST, ALIKE_SHARE * float(np.hypot(*middle)))
        for _ in range(SHIFT_ROUNDS):
            weights = _kernel(mine, middle, width) + 1e-6
            middle = (weights[:, None] * mine).sum(axis=0) / weights.sum()
        return _kernel(self._mean, middle, width)


def _kernel(
    motion: NDArray[np.float32], middle: NDArray[np.float32], width: float
) -> NDArray[np.float32]:
    """A Gaussian of the distance between motions ``[..., 2]`` and a middle one: ``[...]``."""
    return np.asarray(np.exp(-np.square(motion - middle).sum(axis=-1) / (2 * width**2)), np.float32)
