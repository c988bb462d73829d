"""Finds what moves by itself: dense optical flow between two small frames, less the motion of the
camera.
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
"""Of the grid that everything is remembered on: 128 and 160 find no more (on the tuning sequences),
and cost up to four times as much."""
BLANK_DEVIATION = 3.0
"""Grey levels; a frame with less shows nothing: a covered lens, a camera that starts, a
blackout.
"""
CUT_CORRELATION = 0.3
"""Where a frame and the last one, carried along, have less in common, the scene was cut."""
ALIKE = 0.5
"""Mean difference, in deviations, under which they need no closer look."""
FLOW_ROUNDS, FLOW_STEP, FIT_STEP, FIT_ROUNDS = 6, 6, 5, 4
STILL, LEAST_SPREAD = 0.05, 0.7
"""Pixels of the grid within which flow is noise; natural logarithm of the ratio that tells moving
from still with certainty.
"""
MOVING_SHARE, NOISE_LEVELS = 0.005, 0.3
"""Grey levels that noise gains by flow; where so large a share of the grid gains twice that,
something moves by itself.
"""
TEXTURE = 5.0
"""Grey levels of a Laplacian that make flow half believable: where nothing can be told apart, flow
is a guess.
"""
GAIN = 2.0


@dataclass(frozen=True)
class Step:
    """From the last frame to this one.

    Attributes:
        flow: ``[h, w, 2]``: where each pixel of this frame was, as (x, y) displacements; None for a
            first frame, after a cut.
        rate: computes ``evidence`` and ``moving``, when they are first asked for.
        evidence: ``[h, w]`` -1 (moves with the camera) to 1 (moves by itself).
        moving: 0 (nothing moves by itself: no reason to vote against anything) to 1 (something
            does).
        blank: the frame shows nothing.
        cut: nothing of what was known of the frames before holds any more.
    """

    flow: NDArray[np.float32] | None
    rate: Callable[[], tuple[Map, float]]
    blank: bool = False
    cut: bool = False

    @property
    def evidence(self) -> Map:
        return self._rated[0]

    @property
    def moving(self) -> float:
        return self._rated[1]

    @cached_property
    def _rated(self) -> tuple[Map, float]:
        return self.rate()


class Motion:
    """Watches the frames of one source, all of one size.

    Args:
        width_px, height_px: of its frames.

    Attributes:
        shape: (h, w) of the grid.
    """

    def __init__(self, width_px: int, height_px: int) -> None:
        share = LONGEST_SIDE / max(width_px, height_px)
        self.shape = max(8, round(height_px * share)), max(8, round(width_px * share))
        h, w = self.shape
        ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
        self._xs, self._ys = xs, ys
        self._terms = np.stack([xs / w - 0.5, ys / h - 0.5, np.ones_like(xs)], axis=-1)
        self._sparse = (slice(FIT_STEP // 2, None, FIT_STEP), slice(FIT_STEP // 2, None, FIT_STEP))
        self._fit_terms = self._terms[self._sparse].reshape(-1, 3).astype(np.float64)
        near_border = np.abs(self._fit_terms[:, :2]).max(axis=1) > 0.3
        self._first_weights = np.where(near_border, 1.0, 0.3)  # the object is rarely at the border
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._dis.setFinestScale(0)
        self._dis.setGradientDescentIterations(FLOW_ROUNDS)
        self._dis.setPatchStride(FLOW_STEP)
        self._last: Gray | None = None

    def step(self, image_bgr: ImageBgr) -> Step:
        """The step to the next frame."""
        gray, last = self._shrunk(image_bgr), self._last
        if deviation(gray) < BLANK_DEVIATION:
            self._last = None  # what comes next may be anywhere
            return Step(None, self._nothing, blank=True)
        self._last = gray
        if last is None:
            return Step(None, self._nothing, cut=True)
        flow = np.asarray(self._dis.calc(gray, last, None), np.float32)  # type: ignore[call-overload]
        propagated = self._propagated(last, flow)
        if _is_cut(gray, propagated):
            return Step(None, self._nothing, cut=True)
        return Step(flow, partial(self._rate, flow, gray, last, propagated))

    def _nothing(self) -> tuple[Map, float]:
        return np.zeros(self.shape, np.float32), 0.0

    def _rate(
        self, flow: NDArray[np.float32], gray: Gray, last: Gray, propagated: Gray
    ) -> tuple[Map, float]:
        """(evidence, moving)."""
        camera = self._terms @ self._camera(flow).astype(np.float32)
        moving = _moving(gray, propagated, self._propagated(last, camera))
        own = flow - camera
        votes = _evidence(np.asarray(cv2.magnitude(own[..., 0], own[..., 1]), np.float32), gray)
        return np.where(votes < 0, moving * votes, votes), moving

    def remap_grid(self, flow: NDArray[np.float32]) -> tuple[Map, Map]:
        """The (x, y) that each pixel of the grid comes from, as OpenCV wants them."""
        return self._xs + flow[..., 0], self._ys + flow[..., 1]

    def _shrunk(self, image_bgr: ImageBgr) -> Gray:
        """Green, which is most of grey, on the grid. Of large frames most rows are left out: the
        mean is as good.
        """
        h, w = self.shape
        rows = image_bgr[:: max(1, image_bgr.shape[0] // (3 * h))]
        return np.asarray(
            cv2.resize(cv2.extractChannel(rows, 1), (w, h), interpolation=cv2.INTER_AREA), np.uint8
        )

    def _camera(self, flow: NDArray[np.float32]) -> NDArray[np.float64]:
        """Affine motion ``[3, 2]`` of most of the frame: iteratively reweighted least squares."""
        there = flow[self._sparse].reshape(-1, 2).astype(np.float64)
        weights, terms = self._first_weights, self._fit_terms
        for _ in range(FIT_ROUNDS):
            weighted = terms.T * weights
            motion = np.linalg.solve(weighted @ terms + 1e-6 * np.eye(3), weighted @ there)
            squares = np.square(there - terms @ motion).sum(axis=1)
            median = float(np.partition(squares, len(squares) // 2)[len(squares) // 2])
            weights = 1 / np.square(1 + squares / max(2.25 * median, STILL**2))
        return np.asarray(motion)

    def _propagated(self, last: Gray, flow: NDArray[np.float32]) -> Gray:
        """The last frame as this one would be."""
        return np.asarray(
            cv2.remap(
                last, *self.remap_grid(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            ),
            np.uint8,
        )


def _is_cut(gray: Gray, propagated: Gray) -> bool:
    """Whether a frame has little in common with the last one, carried along."""
    if cv2.norm(gray, propagated, cv2.NORM_L1) < ALIKE * gray.size * deviation(gray):
        return False  # no need to look closer
    return float(cv2.matchTemplate(gray, propagated, cv2.TM_CCOEFF_NORMED)[0, 0]) < CUT_CORRELATION


def _moving(gray: Gray, by_flow: Gray, by_camera: Gray) -> float:
    """Whether anything moves by itself: flow explains it better than the camera's motion, by more
    than a sensor's noise.
    """
    worse, better = (
        cv2.boxFilter(cv2.absdiff(gray, each), cv2.CV_32F, (5, 5)) for each in (by_camera, by_flow)
    )
    gains = (worse - better).ravel()
    place = round((1 - MOVING_SHARE) * (gains.size - 1))
    gain = float(np.partition(gains, place)[place])
    return min(max((gain - NOISE_LEVELS) / NOISE_LEVELS, 0.0), 1.0)


def deviation(gray: Gray) -> float:
    """Standard deviation, in grey levels."""
    return float(cv2.meanStdDev(gray)[1][0, 0])


def _evidence(speed: Map, gray: Gray) -> Map:
    """Speed against the camera, as a vote: positive where it is of the faster kind, weak where
    there is no texture.
    """
    logs = np.log(speed + STILL)
    cut, slow, fast = two_kinds(logs)
    votes = np.clip(
        GAIN * (logs - max(cut, float(np.log(2 * STILL)))) / max(fast - slow, LEAST_SPREAD), -1, 1
    )
    texture = cv2.boxFilter(np.abs(cv2.Laplacian(gray, cv2.CV_32F)), -1, (5, 5))
    return np.asarray(votes * (texture / (texture + TEXTURE)), np.float32)


def two_kinds(values: Map) -> tuple[float, float, float]:
    """(cut, mean below, mean above): the cut that parts values into the two most compact kinds
    (Otsu 1979).
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


KEPT = 0.95
"""Share of the mean that is left after a frame: twenty frames, more or less."""
ALIKE_SHARE, ALIKE_LEAST = 0.7, 0.1
"""How far from an object's motion a place may be and still be of it: a share of the object's speed,
at least so many cells.
"""
ROUNDS, SPARSE, ENOUGH = 3, 5, 64
"""Of mean shift; one in so many rows and columns tells how most of the frame goes, and so many
cells how an object does.
"""


class MotionHistory:
    """Mean motion ``[h, w, 2]`` of what is at each cell of the grid, against most of the frame,
    carried along with the flow.

    Args:
        motion: whose grid it is on.
    """

    def __init__(self, motion: Motion) -> None:
        self._motion = motion
        self._sums, self._mean = (
            np.zeros((*motion.shape, 3), np.float32),
            np.zeros((*motion.shape, 2), np.float32),
        )

    def add(self, step: Step) -> None:
        """Take the next step in; after a cut or a blank frame it begins anew."""
        if step.flow is None:
            self._sums, self._mean = np.zeros_like(self._sums), np.zeros_like(self._mean)
            return
        now = np.ones_like(self._sums)
        now[..., :2] = step.flow - np.median(step.flow[::SPARSE, ::SPARSE].reshape(-1, 2), axis=0)
        propagated = cv2.remap(
            self._sums,
            *self._motion.remap_grid(step.flow),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        )
        self._sums = np.asarray(KEPT * propagated + (1 - KEPT) * now, np.float32)
        self._mean = self._sums[..., :2] / self._sums[..., 2:]

    def alike(self, cells: tuple[int, int, int, int], votes: Map) -> Map:
        """``[h, w]``: 1 where a cell goes as what is voted for among ``cells`` (x0, y0, x1, y1), 0
        where quite otherwise.
        """
        x0, y0, x1, y1 = cells
        mine = self._mean[y0:y1, x0:x1][votes[y0:y1, x0:x1] > 0]
        if not len(mine):
            mine = self._mean[y0:y1, x0:x1].reshape(-1, 2)
        mine = mine[:: 1 + len(mine) // ENOUGH]
        middle: NDArray[np.float32] = np.median(mine, axis=0)
        width = max(ALIKE_LEAST, ALIKE_SHARE * float(np.hypot(*middle)))
        for _ in range(
            ROUNDS
        ):  # mean shift: the larger of two objects in a box, not something between them
            weights = _kernel(mine, middle, width) + 1e-6
            middle = (weights[:, None] * mine).sum(axis=0) / weights.sum()
        return _kernel(self._mean, middle, width)


def _kernel(
    motion: NDArray[np.float32], middle: NDArray[np.float32], width: float
) -> NDArray[np.float32]:
    return np.asarray(np.exp(-np.square(motion - middle).sum(axis=-1) / (2 * width**2)), np.float32)
