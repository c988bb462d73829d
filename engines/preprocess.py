"""Prepares a frame for the network: the host resizes it, the graph normalizes it."""

from functools import lru_cache
from math import gcd

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.features import area_matrix
from engines.graph import FLOAT, UINT8, Graph
from engines.networks.network import Preprocessing

IMAGE = "image_nhwc_bgr"


def append_preprocessing(
    graph: Graph, batch: int, size_px: int, preprocessing: Preprocessing
) -> tuple[str, str]:
    """Declare the image input and append its normalisation.

    Args:
        graph: appended to.
        batch: images per call.
        size_px: side of the square image.
        preprocessing: channel order, mean and standard deviation.

    Returns:
        (pixels, normalised): float32 ``[N, 3, S, S]`` in 0..255 and the network's channel order,
        which gradients "to the pixels" are taken by, and the network's input.
    """
    image = graph.input(IMAGE, UINT8, (batch, size_px, size_px, 3))
    pixels = graph.add(
        "Transpose", graph.add("Cast", image, to=FLOAT), perm=[0, 3, 1, 2], hint="pixels"
    )
    if preprocessing.order == "rgb":
        pixels = graph.add(
            "Gather", pixels, graph.constant([2, 1, 0], np.int64), axis=1, hint="pixels_rgb"
        )
    x = graph.add("Sub", pixels, _per_channel(graph, preprocessing.mean), hint="centred")
    if any(value != 1 for value in preprocessing.std):
        x = graph.add(
            "Mul",
            x,
            _per_channel(graph, [1 / value for value in preprocessing.std]),
            hint="normalised",
        )
    return pixels, x


def _per_channel(graph: Graph, values: tuple[float, ...] | list[float]) -> str:
    return graph.constant(np.reshape(values, (1, 3, 1, 1)))


MOST_ROWS = 16  # in a group; the products grow with it, and no longer pay
MOST_PRODUCTS = (
    1 << 18
)  # in one call: OpenBLAS keeps these on the calling thread, away from the engine's
BLOCK_BYTES = 1 << 19  # of float32 at a time: it stays in the core's own cache


def resized(image_bgr: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Squash an image of any size to ``[size_px, size_px, 3]``: means of what a pixel covers, or
    where it covers less than one along a side, bilinear.
    """
    if min(image_bgr.shape[:2]) > size_px:
        return shrunk(image_bgr, size_px)
    return np.asarray(
        cv2.resize(image_bgr, (size_px, size_px), interpolation=cv2.INTER_LINEAR), np.uint8
    )


def shrunk(image_bgr: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Squash an image, larger than that on both sides, to ``[size_px, size_px, 3]``; each pixel is
    the mean of what it covers.

    Equal to ``cv2.resize(..., interpolation=cv2.INTER_AREA)`` but for means that end in exactly one
    half: either may round them the other way, by one level.
    """
    side = (size_px, size_px)
    height, width, channels = image_bgr.shape
    groups = gcd(height, size_px)
    whole = height % size_px == 0 and width % size_px == 0  # OpenCV has a fast way for these
    if whole or size_px // groups > MOST_ROWS:
        return np.asarray(cv2.resize(image_bgr, side, interpolation=cv2.INTER_AREA), np.uint8)
    means = _row_means(height // groups, size_px // groups)
    source = np.ascontiguousarray(image_bgr).reshape(groups, height // groups, width * channels)
    rows = np.empty((groups, size_px // groups, width * channels), np.float32)
    block, step = max(1, BLOCK_BYTES // (4 * source[0].size)), MOST_PRODUCTS // means.size
    for start in range(0, groups, block):
        for left in range(0, width * channels, step):
            part = (slice(start, start + block), slice(None), slice(left, left + step))
            np.matmul(means, source[part].astype(np.float32), out=rows[part])
    result = cv2.resize(rows.reshape(size_px, width, channels), side, interpolation=cv2.INTER_AREA)
    return np.rint(result).astype(np.uint8)


@lru_cache(maxsize=8)
def _row_means(length: int, cells: int) -> NDArray[np.float32]:
    return area_matrix(length, cells)
