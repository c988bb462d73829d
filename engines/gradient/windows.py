"""The gradients of sliding windows: convolution and pooling, for any kernel, stride, padding,
dilation and rounding.

With stride ``s``, input position ``i`` and padding ``p``, write ``i + p = s * q + r``: block ``q``,
phase ``r``. Kernel tap ``k = r + s * m`` of window ``q - m`` is the one that reads it, so the
adjoint needs only a few shifts ``m`` of whole maps, and the phases fall into place by a reshape.
For the usual 2x2 pool with stride 2 that is one comparison, with no shift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import Graph, attributes_of


@dataclass(frozen=True)
class Windows:
    """Sliding windows along the two image axes; every tuple is (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad_begin: tuple[int, int]
    pad_end: tuple[int, int]
    dilation: tuple[int, int]
    size_in: tuple[int, int]
    size_out: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks of ``stride`` positions cover the padded input and every window."""
        return (self._blocks(0), self._blocks(1))

    def _blocks(self, axis: int) -> int:
        last_read = self.stride[axis] * (self.size_out[axis] - 1) + self.kernel[axis]
        return math.ceil(
            max(self.size_in[axis] + self.pad_begin[axis], last_read) / self.stride[axis]
        )

    @property
    def beyond(self) -> tuple[int, int]:
        """Positions behind the input that the last blocks cover (negative: inputs that no window
        reads).
        """
        return (self._beyond(0), self._beyond(1))

    def _beyond(self, axis: int) -> int:
        return self.blocks[axis] * self.stride[axis] - self.size_in[axis] - self.pad_begin[axis]

    def counts(self, with_padding: bool) -> np.ndarray:
        """How many positions each window averages over: float32 ``[1, 1, out_h, out_w]``.

        Positions beyond the explicit padding (where the output size is rounded up) never count.
        """
        per_axis = []
        for axis in (0, 1):
            low = 0 if not with_padding else -self.pad_begin[axis]
            high = self.size_in[axis] + (self.pad_end[axis] if with_padding else 0)
            starts = np.arange(self.size_out[axis]) * self.stride[axis] - self.pad_begin[axis]
            ends = np.minimum(starts + self.kernel[axis], high)
            per_axis.append(ends - np.maximum(starts, low))
        return np.outer(*per_axis).astype(np.float32)[None, None]


def windows_of(graph: Graph, node: onnx.NodeProto) -> Windows:
    """The windows of a Conv, MaxPool or AveragePool node.

    Raises:
        ModelError: the node is not two-dimensional, or is a dilated pool.
    """
    at = attributes_of(node)
    where = f"node '{node.name or node.output[0]}' ({node.op_type})"
    shape_in, shape_out = graph.shape(node.input[0]), graph.shape(node.output[0])
    if len(shape_in) != 4:
        raise ModelError(f"{where}: only images [N, C, H, W] are supported, got {list(shape_in)}")
    kernel = tuple(at["kernel_shape"]) if "kernel_shape" in at else graph.shape(node.input[1])[2:]
    stride, dilation = tuple(at.get("strides", (1, 1))), tuple(at.get("dilations", (1, 1)))
    if node.op_type != "Conv" and dilation != (1, 1):
        raise ModelError(f"{where}: dilated pools are not supported")
    begin, end = _pads(at, kernel, stride, dilation, shape_in[2:], shape_out[2:])
    return Windows(kernel, stride, begin, end, dilation, shape_in[2:], shape_out[2:])  # type: ignore[arg-type]


def _pads(
    at: dict[str, Any],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    size_in: Sequence[int],
    size_out: Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(begin, end) padding, resolving ``auto_pad``."""
    mode = at.get("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        pads = at.get("pads", (0, 0, 0, 0))
        return (pads[0], pads[1]), (pads[2], pads[3])
    if mode == "VALID":
        return (0, 0), (0, 0)
    total = [
        max(0, (o - 1) * s + d * (k - 1) + 1 - i)
        for o, s, d, k, i in zip(size_out, stride, dilation, kernel, size_in, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    begin, end = (less, more) if mode == "SAME_UPPER" else (more, less)
    return (begin[0], begin[1]), (end[0], end[1])


def shifted(
    graph: Graph, tensor: str, begin: Sequence[int], end: Sequence[int], value: float = 0.0
) -> str:
    """Pad (positive) or crop (negative) the two last axes of ``[N, C, H, W]``."""
    crop_begin, crop_end = [max(0, -b) for b in begin], [max(0, -e) for e in end]
    if any(crop_begin + crop_end):
        size = graph.shape(tensor)[2:]
        stops = [n - c for n, c in zip(size, crop_end, strict=True)]
        bounds = [graph.constant(v, np.int64) for v in (crop_begin, stops, [2, 3])]
        tensor = graph.add("Slice", tensor, *bounds, hint="crop")
    pads = [0, 0, *(max(0, b) for b in begin), 0, 0, *(max(0, e) for e in end)]
    if any(pads):
        tensor = graph.add(
            "Pad", tensor, graph.constant(pads, np.int64), graph.constant(value), hint="pad"
        )
    return tensor


def spread_windows(
    graph: Graph, windows: Windows, cotangent: str, maximum: tuple[str, str] | None
) -> str:
    """Spread each window's cotangent over the positions that it read.

    The work is done channels last: there a whole pixel is contiguous, and OpenVINO, whose
        convolutions are channels last
    too, needs no reordering.

    Args:
        graph: appended to.
        windows: the pool's windows.
        cotangent: ``[N, C, out_h, out_w]``.
        maximum: (pool input, pool output) to give it to the largest element only, the first of
            equal ones in reading order, as PyTorch does; None to give it to all.

    Returns:
        ``[N, C, H, W]``.
    """
    (qh, qw), (sh, sw) = windows.blocks, windows.stride
    n, c = graph.shape(cotangent)[:2]
    shifts = _shifts(windows)
    ranks = _ranks(graph, windows, *maximum) if maximum else []
    best = _best_ranks(graph, windows, ranks) if maximum else ""
    total = ""
    for i, (shift, end) in enumerate(shifts):
        part = _blocked(graph, shifted(graph, cotangent, shift, end), (1, 1))
        if maximum:
            winner = _blocked(graph, shifted(graph, best, shift, end), (1, 1))
            hit = graph.add("Equal", ranks[i], winner, hint="is_max")
            part = graph.add("Where", hit, part, graph.constant(0.0), hint="to_max")
        else:
            part = graph.add(
                "Mul",
                part,
                graph.constant(_tap_ranks(windows, shift) > 0, np.float32),
                hint="to_taps",
            )
        total = graph.add("Add", total, part, hint="spread") if total else part
    full = graph.add(
        "Reshape", total, graph.constant([n, qh * sh, qw * sw, c], np.int64), hint="unblocked"
    )
    full = graph.add("Transpose", full, perm=[0, 3, 1, 2], hint="channels_first")
    return shifted(graph, full, [-p for p in windows.pad_begin], [-e for e in windows.beyond])


def _shifts(windows: Windows) -> list[tuple[tuple[int, ...], list[int]]]:
    """(m, padding behind) for each shift m of whole maps by which some tap reads a block."""
    ranges = [range(math.ceil(k / s)) for k, s in zip(windows.kernel, windows.stride, strict=True)]
    sizes = list(zip(windows.blocks, windows.size_out, strict=True))
    return [(m, [q - t - d for (q, t), d in zip(sizes, m, strict=True)]) for m in product(*ranges)]


def _blocked(graph: Graph, tensor: str, per_block: tuple[int, int]) -> str:
    """``[N, C, q_h * s_h, q_w * s_w]`` to ``[N, q_h, s_h, q_w, s_w, C]``."""
    n, c, height, width = graph.shape(tensor)
    last = graph.add("Transpose", tensor, perm=[0, 2, 3, 1], hint="channels_last")
    shape = [n, height // per_block[0], per_block[0], width // per_block[1], per_block[1], c]
    return graph.add("Reshape", last, graph.constant(shape, np.int64), hint="blocked")


def _ranks(graph: Graph, windows: Windows, x: str, y: str) -> list[str]:
    """Per shift, at each position the rank of its tap where it equals the window's maximum, else 0
    (blocked).
    """
    x_blocked = _blocked(
        graph, shifted(graph, x, windows.pad_begin, windows.beyond, -np.inf), windows.stride
    )
    ranks = []
    for shift, end in _shifts(windows):
        equal = graph.add(
            "Equal",
            x_blocked,
            _blocked(graph, shifted(graph, y, shift, end), (1, 1)),
            hint="equals_max",
        )
        rank = graph.constant(_tap_ranks(windows, shift))
        ranks.append(graph.add("Where", equal, rank, graph.constant(0.0), hint="rank"))
    return ranks


def _best_ranks(graph: Graph, windows: Windows, ranks: Sequence[str]) -> str:
    """The highest rank in each window: ``[N, C, out_h, out_w]``. Ranks fall in reading order, so
    the first maximum wins.
    """
    (qh, qw), (sh, sw), (out_h, out_w) = windows.blocks, windows.stride, windows.size_out
    best = ""
    for rank, ((down, right), _) in zip(ranks, _shifts(windows), strict=True):
        n, c = graph.shape(rank)[0], graph.shape(rank)[5]
        flat = graph.add(
            "Reshape", rank, graph.constant([n, qh * sh, qw * sw, c], np.int64), hint="rank_flat"
        )
        image = graph.add("Transpose", flat, perm=[0, 3, 1, 2], hint="rank_image")
        pooled = graph.add(
            "MaxPool", image, kernel_shape=[sh, sw], strides=[sh, sw], hint="block_rank"
        )
        pooled = shifted(graph, pooled, (-down, -right), (down + out_h - qh, right + out_w - qw))
        best = graph.add("Max", best, pooled, hint="best_rank") if best else pooled
    return best


def _tap_ranks(windows: Windows, shift: Sequence[int]) -> np.ndarray:
    """Rank of each phase's tap at this shift, counting down to 1 in reading order, 0 for no tap:
    ``[1, 1, s_h, 1, s_w, 1]``.
    """
    (kh, kw), (sh, sw) = windows.kernel, windows.stride
    rows, columns = np.arange(sh) + sh * shift[0], np.arange(sw) + sw * shift[1]
    ranks = kh * kw - (rows[:, None] * kw + columns[None, :])
    inside = (rows < kh)[:, None] & (columns < kw)[None, :]
    return np.where(inside, ranks, 0).astype(np.float32).reshape(1, 1, sh, 1, sw, 1)


def convolution_adjoint(
    graph: Graph, node: onnx.NodeProto, weight: np.ndarray, cotangent: str
) -> str:
    """Gradient of a convolution with respect to its input, as a convolution.

    Stride 1: correlation with the flipped kernel. Of a larger stride there are two forms. Where a
    filter reads one channel, or one pixel, zeros between the values of the cotangent turn it into
    stride 1. Else one convolution makes all phases as channels, and DepthToSpace puts them in
    place, so nothing is multiplied by inserted zeros. OpenVINO's kernels for depthwise convolutions
    take one channel each, and with four phases for each channel it is five times slower (measured).
    """
    windows = windows_of(graph, node)
    groups = int(attributes_of(node).get("group", 1))
    if (
        weight.ndim != 4
        or len(weight) % groups
        or weight.shape[1] * groups != graph.shape(node.input[0])[1]
    ):
        raise ModelError(
            f"node '{node.name or node.output[0]}' (Conv): a weight {list(weight.shape)} in"
            f" {groups} groups does not fit {graph.shape(node.input[0])[1]} channels"
        )
    if windows.stride == (1, 1):
        return _plain_adjoint(graph, windows, groups, weight, cotangent)
    if weight.shape[2:] == (1, 1):
        small = replace(windows, stride=(1, 1), pad_begin=(0, 0), pad_end=(0, 0))
        result = _plain_adjoint(graph, small, groups, weight, cotangent)
        return _fitted(graph, apart(graph, result, windows.stride), windows)
    if weight.shape[1] == 1 and len(weight) == groups:
        size = [s * n for s, n in zip(windows.stride, windows.size_out, strict=True)]
        reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
        each = zip(windows.size_in, size, windows.pad_begin, reach, strict=True)
        end = [n + r - i - p for i, n, p, r in each]  # of as many outputs as there are zeros too
        whole = replace(windows, stride=(1, 1), pad_end=(end[0], end[1]))
        spaced = apart(graph, cotangent, windows.stride)
        return _plain_adjoint(graph, whole, groups, weight, spaced)
    return _strided_adjoint(graph, windows, groups, weight, cotangent)


def _plain_adjoint(
    graph: Graph, windows: Windows, groups: int, weight: np.ndarray, cotangent: str
) -> str:
    """Of stride 1."""
    kernel = _adjoint_kernel(weight, groups)
    reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
    begin = [r - p for r, p in zip(reach, windows.pad_begin, strict=True)]
    end = [r - p for r, p in zip(reach, windows.pad_end, strict=True)]
    source = shifted(graph, cotangent, [min(0, b) for b in begin], [min(0, e) for e in end])
    pads = [max(0, v) for v in (*begin, *end)]
    return graph.add(
        "Conv",
        source,
        graph.constant(kernel, hint="weight_adjoint"),
        hint="grad_conv",
        kernel_shape=list(windows.kernel),
        pads=pads,
        dilations=list(windows.dilation),
        group=groups,
    )


def apart(graph: Graph, tensor: str, stride: tuple[int, int]) -> str:
    """``[N, C, h, w]`` with zeros behind each value: ``[N, C, h * s_h, w * s_w]``.

    One product, channels last, see ``spread_windows``.
    """
    (n, c, height, width), (sh, sw) = graph.shape(tensor), stride
    place = np.zeros((1, 1, sh, 1, sw, 1), np.float32)
    place[0, 0, 0, 0, 0, 0] = 1
    spaced = graph.add("Mul", _blocked(graph, tensor, (1, 1)), graph.constant(place), hint="spaced")
    rows = graph.constant([n, height * sh, width * sw, c], np.int64)
    flat = graph.add("Reshape", spaced, rows, hint="spaced_rows")
    return graph.add("Transpose", flat, perm=[0, 3, 1, 2], hint="spaced_first")


def _fitted(graph: Graph, tensor: str, windows: Windows) -> str:
    """What covers the padded input, from its first position on, cut or padded to the input."""
    size = graph.shape(tensor)[2:]
    beyond = [i + p - n for i, p, n in zip(windows.size_in, windows.pad_begin, size, strict=True)]
    return shifted(graph, tensor, [-p for p in windows.pad_begin], beyond)


def _strided_adjoint(
    graph: Graph, windows: Windows, groups: int, weight: np.ndarray, cotangent: str
) -> str:
    weight = _dilated(weight, windows.dilation)
    (sh, sw), (kh, kw) = windows.stride, weight.shape[2:]
    mh, mw = math.ceil(kh / sh), math.ceil(kw / sw)
    taps = np.zeros((*weight.shape[:2], mh * sh, mw * sw), weight.dtype)
    taps[:, :, :kh, :kw] = weight
    out_channels, per_group = weight.shape[:2]
    # [O, I, m_h, s_h, m_w, s_w] -> [O, I * s_h * s_w, m_h, m_w]; the phase is the fastest part of
    # the channel (CRD).
    phases = taps.reshape(out_channels, per_group, mh, sh, mw, sw).transpose(0, 1, 3, 5, 2, 4)
    kernel = _adjoint_kernel(phases.reshape(out_channels, per_group * sh * sw, mh, mw), groups)
    whole = replace(windows, kernel=(kh, kw), dilation=(1, 1))
    end = [q - t for q, t in zip(whole.blocks, windows.size_out, strict=True)]
    result = graph.add(
        "Conv",
        cotangent,
        graph.constant(kernel, hint="weight_adjoint"),
        hint="grad_conv",
        kernel_shape=[mh, mw],
        pads=[mh - 1, mw - 1, *end],
        group=groups,
    )
    if sh == sw:
        result = graph.add("DepthToSpace", result, blocksize=sh, mode="CRD", hint="phases")
    else:
        n, channels, (qh, qw) = graph.shape(result)[0], groups * per_group, whole.blocks
        split = graph.constant([n, channels, sh, sw, qh, qw], np.int64)
        result = graph.add(
            "Transpose", graph.add("Reshape", result, split), perm=[0, 1, 4, 2, 5, 3]
        )
        result = graph.add(
            "Reshape", result, graph.constant([n, channels, qh * sh, qw * sw], np.int64)
        )
    return _fitted(graph, result, windows)


def _adjoint_kernel(weight: np.ndarray, groups: int) -> np.ndarray:
    """``[O, I/g, kh, kw]`` to ``[I, O/g, kh, kw]``, flipped in both image axes."""
    out_channels, per_group, kh, kw = weight.shape
    grouped = weight.reshape(groups, out_channels // groups, per_group, kh, kw).swapaxes(1, 2)
    return np.ascontiguousarray(
        grouped.reshape(groups * per_group, out_channels // groups, kh, kw)[:, :, ::-1, ::-1]
    )


def _dilated(weight: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """The kernel with its zeros written out."""
    (dh, dw), (kh, kw) = dilation, weight.shape[2:]
    full = np.zeros((*weight.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1), weight.dtype)
    full[:, :, ::dh, ::dw] = weight
    return full


def lrn_adjoint(graph: Graph, node: onnx.NodeProto, cotangent: str) -> str:
    """Gradient of local response normalization (Krizhevsky et al. 2012, section 3.3) with respect
    to its input.

    With s = bias + alpha / n * sum over the window of x^2 and y = x * s^-beta:
    dx = g * s^-beta - (2 * alpha * beta / n) * x * sum over the reversed window of (g * y / s).
    """
    at, (x,), (y,) = attributes_of(node), node.input, node.output
    size, alpha, beta = int(at["size"]), float(at.get("alpha", 1e-4)), float(at.get("beta", 0.75))
    before, after = (size - 1) // 2, size // 2

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        return graph.add(op, *inputs, hint=f"grad_{y}", **attributes)

    def window_sum(tensor: str, pads: tuple[int, int]) -> str:
        shape = graph.shape(tensor)
        rows = add(
            "Reshape",
            tensor,
            graph.constant([shape[0], 1, shape[1], math.prod(shape[2:])], np.int64),
        )
        mean = add(
            "AveragePool",
            rows,
            kernel_shape=[size, 1],
            pads=[pads[0], 0, pads[1], 0],
            count_include_pad=1,
        )
        return add(
            "Mul",
            add("Reshape", mean, graph.constant(shape, np.int64)),
            graph.constant(float(size)),
        )

    scaled = add("Mul", window_sum(add("Mul", x, x), (before, after)), graph.constant(alpha / size))
    s = add("Add", scaled, graph.constant(float(at.get("bias", 1.0))))
    direct = add("Mul", cotangent, add("Pow", s, graph.constant(-beta)))
    inner = add("Div", add("Mul", cotangent, y), s)
    across = add("Mul", x, window_sum(inner, (after, before)))
    return add("Sub", direct, add("Mul", across, graph.constant(2 * alpha * beta / size)))
