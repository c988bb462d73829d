"""How an image becomes the network's input, and how boxes and maps of it come back to the image.

Every way is a cut and a scale along each axis. So all of the geometry is one rectangle: what the
input shows, in the image's pixels (``Resizing.seen``). Squashed, that is the image. Of a crop it
is a part of it, and letterboxed it is more than the image.

The input is a square. Only what is letterboxed may have another shape, in which less is filling:
see ``frame_shape``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.engine import Array
from engines.errors import ModelError
from engines.maps import area_matrix
from engines.networks.network import Shape
from engines.networks.preprocessing import CROP, LETTERBOX, SQUASH, Preprocessing

BoxPx = tuple[float, float, float, float]
SHAPE_STEP_PX = 64
"""The shorter side of a shape is a multiple of this. Photos of five data sets have 5 or 6 such
shapes, which cost 5 % more than the 10 to 13 shapes of a step of 32. And the cells of a network
lie where those of the square lie.
"""
LEAST_SIDE_PX = 128
"""The shorter side of a shape, for images that are longer than all usual ones."""
FINEST = 8
"""A map over a whole image has at most so many times the cells of the network's along a side."""


@dataclass(frozen=True)
class Resizing:
    """One of the ways.

    Attributes:
        kind: ``squash``, ``crop`` or ``letterbox``.
        crop_share: of the shorter side, what a crop shows.
        filling_bgr: the colour around a letterboxed image.
    """

    kind: str = SQUASH
    crop_share: float = 1.0
    filling_bgr: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "Resizing":
        """That of a network's preprocessing."""
        return cls(preprocessing.resize, preprocessing.crop_share, preprocessing.mean_bgr)

    @classmethod
    def stored(cls, found: Mapping[str, Any] | None) -> "Resizing":
        """That of a graph's description; squashing where it says nothing."""
        if found is None:
            return cls()
        blue, green, red = found["filling_bgr"]
        return cls(found["kind"], found["crop_share"], (blue, green, red))

    def seen(self, width_px: int, height_px: int, shape: Shape) -> BoxPx:
        """What an input of that shape shows of an image: x0, y0, x1, y1 in the image's pixels.
        Letterboxed, it reaches beyond the image.
        """
        if self.kind == CROP:
            side = max(1, round(min(width_px, height_px) * self.crop_share))
            left, top = (width_px - side) // 2, (height_px - side) // 2
            return float(left), float(top), float(left + side), float(top + side)
        if self.kind == LETTERBOX:
            x, y = self._inner(width_px, height_px, shape)
            (x0, x1), (y0, y1) = _around(*x, shape[1]), _around(*y, shape[0])
            return x0, y0, x1, y1
        return 0.0, 0.0, float(width_px), float(height_px)

    def prepared(self, image_bgr: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
        """An image of any size as ``[rows, columns, 3]``."""
        height, width = image_bgr.shape[:2]
        if self.kind == LETTERBOX:
            (_, inner_w), (_, inner_h) = self._inner(width, height, shape)
            return self.within(resized(image_bgr, (inner_h, inner_w)), shape)
        if self.kind == CROP:
            x0, y0, x1, y1 = (int(edge) for edge in self.seen(width, height, shape))
            return resized(image_bgr[y0:y1, x0:x1], shape)
        return resized(image_bgr, shape)

    def within(self, inner_bgr: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
        """An image in the middle of a filling, ``[rows, columns, 3]``; itself where it has that
        shape.
        """
        rows, columns = inner_bgr.shape[:2]
        if (rows, columns) == shape:
            return inner_bgr
        top, left = (shape[0] - rows) // 2, (shape[1] - columns) // 2
        below, right = shape[0] - rows - top, shape[1] - columns - left
        border = (top, below, left, right)
        filled = cv2.copyMakeBorder(inner_bgr, *border, cv2.BORDER_CONSTANT, value=self.filling_bgr)
        return np.asarray(filled, np.uint8)

    def _inner(self, width_px: int, height_px: int, shape: Shape) -> list[tuple[int, int]]:
        """Along x and y: (length of the image, length of it within the input)."""
        rows, columns = shape
        scale = min(columns / width_px, rows / height_px)
        return [(length, max(1, round(length * scale))) for length in (width_px, height_px)]

    def in_image(
        self, box_xyxy: Array | Sequence[float], size_px: tuple[int, int], shape: Shape
    ) -> BoxPx | None:
        """A box in fractions of an input of that shape, its first four values, as edges in an image
        of (width, height), clipped to it; None where nothing of it is in the image.
        """
        width, height = size_px
        x0, y0, x1, y1 = (float(value) for value in box_xyxy[:4])
        if self.kind == SQUASH:
            return x0 * width, y0 * height, x1 * width, y1 * height
        left, top, right, bottom = self.seen(width, height, shape)
        x0, x1 = (min(max(left + x * (right - left), 0.0), width) for x in (x0, x1))
        y0, y1 = (min(max(top + y * (bottom - top), 0.0), height) for y in (y0, y1))
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def inside(
        self, boxes_xyxy: Array, size_px: tuple[int, int], shape: Shape
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """``in_image`` of boxes ``[L, 4 or more]``: the places of the K that have something in the
        image, and their edges there, ``[K, 4]``.
        """
        left, top, right, bottom = self.seen(*size_px, shape)
        start, length = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
        edges = np.clip(start + boxes_xyxy[:, :4] * length, 0, size_px * 2)
        places = np.flatnonzero((edges[:, 2:] > edges[:, :2]).all(axis=1))
        return places, edges[places]

    def over_image(
        self, map_hw: NDArray[np.float32], size_px: tuple[int, int], shape: Shape
    ) -> NDArray[np.float32]:
        """A map of the input as one of the image: 0 where the input does not show it. Each cell is
        the mean of what it covers, so that nothing moves.
        """
        if self.kind == SQUASH:
            return map_hw
        left, top, right, bottom = self.seen(*size_px, shape)
        rows = _covering(
            map_hw.shape[0], -top / (bottom - top), (size_px[1] - top) / (bottom - top)
        )
        columns = _covering(
            map_hw.shape[1], -left / (right - left), (size_px[0] - left) / (right - left)
        )
        return np.asarray(rows @ map_hw @ columns.T, np.float32)


def frame_shape(width_px: int, height_px: int, longer_px: int) -> Shape:
    """The shape for letterboxed images of that size: the longer side is ``longer_px``, the shorter
    one as short as it may be.
    """
    scale = longer_px / max(width_px, height_px)
    least = max(LEAST_SIDE_PX, round(min(width_px, height_px) * scale))
    shorter = min(longer_px, math.ceil(least / SHAPE_STEP_PX) * SHAPE_STEP_PX)
    return (shorter, longer_px) if width_px >= height_px else (longer_px, shorter)


def _around(length: int, inner: int, side_px: int) -> tuple[float, float]:
    """Where an input begins and ends along a side, in an image that fills the ``inner`` pixels in
    its middle.
    """
    scale = length / inner
    start = -((side_px - inner) // 2) * scale
    return start, start + side_px * scale


@lru_cache(maxsize=32)
def _covering(cells: int, start: float, end: float) -> NDArray[np.float32]:
    """A matrix that gives, of a row of cells that are 0..1, means over even parts of start..end,
    which are about as wide as the cells; beyond the cells there is 0.
    """
    count = min(max(math.ceil(cells * (end - start) - 1e-9), 1), FINEST * cells)
    edges = np.linspace(start, end, count + 1) * cells
    low = np.maximum(edges[:-1, None], np.arange(cells))
    high = np.minimum(edges[1:, None], np.arange(1, cells + 1))
    return np.asarray(np.maximum(high - low, 0) / (edges[1] - edges[0]), np.float32)


MOST_ROWS = 16  # in a group; the products grow with it, and no longer pay
MOST_PRODUCTS = (
    1 << 18
)  # in one call: OpenBLAS keeps these on the calling thread, away from the engine's
BLOCK_BYTES = 1 << 19  # of float32 at a time: it stays in the core's own cache


def resized(image_bgr: NDArray[np.uint8], shape: Shape | int) -> NDArray[np.uint8]:
    """Squash an image of any size to ``[rows, columns, 3]``, or to a square of that side: means of
    what a pixel covers, or where it covers less than one along a side, bilinear.
    """
    rows, columns = (shape, shape) if isinstance(shape, int) else shape
    height, width = image_bgr.shape[:2]
    if height > rows and width > columns:
        return shrunk(image_bgr, (rows, columns))
    found = cv2.resize(image_bgr, (columns, rows), interpolation=cv2.INTER_LINEAR)
    return np.asarray(found, np.uint8)


def shrunk(image_bgr: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Squash an image, larger than that on both sides, to ``[rows, columns, 3]``; each pixel is the
    mean of what it covers.

    Equal to ``cv2.resize(..., interpolation=cv2.INTER_AREA)`` but for means that end in exactly one
    half: either may round them the other way, by one level.
    """
    rows_px, columns_px = shape
    height, width, channels = image_bgr.shape
    groups = gcd(height, rows_px)
    whole = height % rows_px == 0 and width % columns_px == 0  # OpenCV has a fast way for these
    if whole or rows_px // groups > MOST_ROWS:
        found = cv2.resize(image_bgr, (columns_px, rows_px), interpolation=cv2.INTER_AREA)
        return np.asarray(found, np.uint8)
    means = _row_means(height // groups, rows_px // groups)
    source = np.ascontiguousarray(image_bgr).reshape(groups, height // groups, width * channels)
    rows = np.empty((groups, rows_px // groups, width * channels), np.float32)
    block, step = max(1, BLOCK_BYTES // (4 * source[0].size)), MOST_PRODUCTS // means.size
    for start in range(0, groups, block):
        for left in range(0, width * channels, step):
            part = (slice(start, start + block), slice(None), slice(left, left + step))
            np.matmul(means, source[part].astype(np.float32), out=rows[part])
    tall = rows.reshape(rows_px, width, channels)
    result = cv2.resize(tall, (columns_px, rows_px), interpolation=cv2.INTER_AREA)
    return np.rint(result).astype(np.uint8)


@lru_cache(maxsize=8)
def _row_means(length: int, cells: int) -> NDArray[np.float32]:
    return area_matrix(length, cells)


def interpolation(length: int, cells: int) -> NDArray[np.float32]:
    """``[cells, length]``: bilinear values at the middles of ``cells`` even parts."""
    places = np.clip((np.arange(cells) + 0.5) * length / cells - 0.5, 0, length - 1)
    near = 1 - np.abs(places[:, None] - np.arange(length))
    return np.asarray(np.maximum(near, 0), np.float32)


def cell_centres(rows: int, columns: int, stride_px: int) -> NDArray[np.float32]:
    """The middles of cells, row by row: x and y in pixels, ``[rows * columns, 2]``."""
    y, x = ((np.arange(each, dtype=np.float32) + 0.5) * stride_px for each in (rows, columns))
    x, y = np.meshgrid(x, y)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def cell_window(layer_side: int, side: int, kernel: int) -> tuple[int, int]:
    """(stride, padding) along rows or columns with which a layer of ``layer_side`` cells is read
    for ``side`` cells.

    A finer layer is read in blocks that do not overlap, another one around each of its cells.

    Raises:
        ModelError: the cells of the two do not fit, or the kernel does not.
    """
    if layer_side > side:
        if layer_side != kernel * side:
            raise ModelError(
                f"a dense head reads {kernel} x {kernel} cells of a layer in one of its own: a"
                f" layer of {layer_side} cells does not fit {side}"
            )
        return kernel, 0
    if kernel % 2 == 0:
        raise ModelError(f"a window of {kernel} cells around a cell has no middle")
    return 1, kernel // 2
