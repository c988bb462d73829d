"""Slow, obvious float64 definitions of operators, and differentiation by central differences.

Nothing here shares code with the project: loops over output positions, written from the operators'
definitions.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

STEP = 1e-6


def numeric_gradient(
    forward: Callable[[np.ndarray], np.ndarray], x: np.ndarray, cotangent: np.ndarray
) -> np.ndarray:
    """d(sum(cotangent * forward(x))) / dx by central differences in float64."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[index] += STEP
        low[index] -= STEP
        gradient[index] = np.sum(cotangent * (forward(high) - forward(low))) / (2 * STEP)
    return gradient


def padded(x: np.ndarray, pads: tuple[int, int, int, int], value: float) -> np.ndarray:
    top, left, bottom, right = pads
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


def conv(x, weight, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """Cross-correlation, one output value at a time."""
    n, _, _, _ = x.shape
    out_channels, per_group, kh, kw = weight.shape
    x = padded(x, pads, 0.0)
    out_h = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((n, out_channels, out_h, out_w))
    for b, o, i, j in np.ndindex(y.shape):
        group = o // (out_channels // groups)
        for c, u, v in np.ndindex(per_group, kh, kw):
            pixel = x[
                b,
                group * per_group + c,
                i * stride[0] + u * dilation[0],
                j * stride[1] + v * dilation[1],
            ]
            y[b, o, i, j] += weight[o, c, u, v] * pixel
    return y


def pool(x, kind, kernel, stride, pads=(0, 0, 0, 0), ceil=False, count_pads=False):
    """Max or mean of each window; windows may start inside the padding's end only if they reach the
    image or its padding.
    """
    height, width = x.shape[2:]
    sizes = []
    for axis, length in enumerate((height, width)):
        span = length + pads[axis] + pads[axis + 2] - kernel[axis]
        count = (math.ceil if ceil else math.floor)(span / stride[axis]) + 1
        if ceil and (count - 1) * stride[axis] >= length + pads[axis]:
            count -= 1
        sizes.append(count)
    y = np.zeros((*x.shape[:2], *sizes))
    for b, c, i, j in np.ndindex(y.shape):
        values, area = [], 0
        for u, v in itertools.product(range(kernel[0]), range(kernel[1])):
            row, column = i * stride[0] + u - pads[0], j * stride[1] + v - pads[1]
            area += row < height + pads[2] and column < width + pads[3]
            if 0 <= row < height and 0 <= column < width:
                values.append(x[b, c, row, column])
        y[b, c, i, j] = (
            max(values) if kind == "max" else sum(values) / (area if count_pads else len(values))
        )
    return y


def lrn(x, size, alpha, beta, bias):
    """Krizhevsky et al. 2012, section 3.3, with ONNX's window: floor((n-1)/2) channels before,
    ceil((n-1)/2) after.
    """
    y = np.zeros(x.shape)
    for c in range(x.shape[1]):
        low, high = max(0, c - (size - 1) // 2), min(x.shape[1] - 1, c + math.ceil((size - 1) / 2))
        squares = sum(x[:, k] ** 2 for k in range(low, high + 1))
        y[:, c] = x[:, c] / (bias + alpha / size * squares) ** beta
    return y


def slow_stretch(maps_chw, x0, y0, width, height):
    """Bilinear interpolation of some cells to the whole grid, one value at a time."""
    channels, side, _ = maps_chw.shape
    part = maps_chw[:, y0 : y0 + height, x0 : x0 + width]
    result = np.zeros(maps_chw.shape)
    for c, i, j in np.ndindex(channels, side, side):
        y = min(max((i + 0.5) * height / side - 0.5, 0), height - 1)
        x = min(max((j + 0.5) * width / side - 0.5, 0), width - 1)
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        upper = (1 - dx) * part[c, top, left] + dx * part[c, top, right]
        lower = (1 - dx) * part[c, bottom, left] + dx * part[c, bottom, right]
        result[c, i, j] = (1 - dy) * upper + dy * lower
    return result
