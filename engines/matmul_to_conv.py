"""Replaces matrix products by 1x1 convolutions, which one generation of GPUs needs.

TensorRT for RTX (1.7) refuses float32 matrix products for compute capability 7.5, and takes the
same product as a convolution.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines.engine import Array
from engines.fp16 import float_ranks, without_initializers
from engines.graph import attributes_of, needed


def products_as_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without float32 Gemm and MatMul of a constant matrix and two or three axes;
    others are left alone.

    A row of K values becomes K channels of one pixel, and a matrix ``[K, M]`` a kernel
    ``[M, K, 1, 1]``.
    """
    ranks = float_ranks(model)
    weights = {t.name: t for t in model.graph.initializer}
    rounded = {
        n.output[0]: n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in weights
    }
    writer = _Writer({})
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in rounded and ranks.get(node.input[0]) == 2:
            source = rounded[node.input[1]]
            _rounded_gemm(writer, node, source, numpy_helper.to_array(weights[source.input[0]]))
            continue
        places = [
            place
            for place, name in enumerate(node.input[:2])
            if name in weights and ranks.get(name) == 2
        ]
        rewrite = _REWRITES.get(node.op_type)
        rank = ranks.get(node.input[1 - places[0]]) if len(places) == 1 else None
        if rewrite is None or rank not in (2, 3):
            writer.nodes.append(node)
            continue
        matrix: Array = numpy_helper.to_array(weights[node.input[places[0]]])
        rewrite(writer, node, matrix, places[0], rank)
    result = without_initializers(model)
    nodes = needed(writer.nodes, [output.name for output in model.graph.output])
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    result.graph.initializer.extend(
        t for t in (*model.graph.initializer, *writer.constants.values()) if t.name in read
    )
    onnx.checker.check_model(result)
    return result


class _Writer:
    def __init__(self, constants: dict[str, onnx.TensorProto]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants = constants

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def product(self, x: str, kernel_mk: Array, bias: list[str], y: str, axes: list[int]) -> None:
        """``y = x @ kernel^T + bias`` over axis 1 of ``x``, which lacks ``axes`` to be an image."""
        self.convolution(
            x, self.constant(f"{y}_kernel", kernel_mk[:, :, None, None]), bias, y, axes
        )

    def convolution(self, x: str, kernel: str, bias: list[str], y: str, axes: list[int]) -> None:
        """The same with a kernel that is written already."""
        missing = self.constant(f"axes_{'_'.join(map(str, axes))}", np.array(axes, np.int64))
        image = self.add("Unsqueeze", [x, missing], f"{y}_image")
        self.add(
            "Squeeze",
            [self.add("Conv", [image, kernel, *bias], f"{y}_conv", kernel_shape=[1, 1]), missing],
            y,
        )


def _gemm(writer: _Writer, node: onnx.NodeProto, matrix: Array, place: int, _: int | None) -> None:
    """``alpha * x @ op(B) + beta * c`` with a bias of one row."""
    at = attributes_of(node)
    if place != 1 or at.get("transA", 0) or at.get("beta", 1.0) != 1.0:
        writer.nodes.append(node)
        return
    kernel = (matrix if at.get("transB", 0) else matrix.T) * np.float32(at.get("alpha", 1.0))
    writer.product(node.input[0], kernel, list(node.input[2:]), node.output[0], [2, 3])


def _rounded_gemm(
    writer: _Writer, node: onnx.NodeProto, source: onnx.NodeProto, integers: Array
) -> None:
    """A Gemm whose weight is 8-bit, rounded per output: the convolution reads the same integers,
    with the same scales.
    """
    at = attributes_of(node)
    plain = (
        at.get("transB", 0)
        and not at.get("transA", 0)
        and at.get("alpha", 1.0) == at.get("beta", 1.0) == 1.0
    )
    if not plain or integers.ndim != 2 or attributes_of(source).get("axis", 1) != 0:
        writer.nodes.append(node)
        return
    y = str(node.output[0])
    kernel = writer.constant(f"{y}_kernel8", integers[:, :, None, None])
    wide = writer.add("DequantizeLinear", [kernel, *source.input[1:]], f"{y}_kernel", axis=0)
    writer.convolution(node.input[0], wide, list(node.input[2:]), y, [2, 3])


def _matmul(
    writer: _Writer, node: onnx.NodeProto, matrix: Array, place: int, rank: int | None
) -> None:
    """A constant from the left mixes the rows of a map ``[N, h, w]``; from the right, its columns,
    or rows of values.
    """
    y = str(node.output[0])
    if place == 0 and rank == 3:
        writer.product(node.input[1], matrix, [], y, [3])
    elif place == 1 and rank == 3:
        turned = writer.add("Transpose", [node.input[0]], f"{y}_turned", perm=[0, 2, 1])
        writer.product(turned, matrix.T, [], f"{y}_mixed", [3])
        writer.add("Transpose", [f"{y}_mixed"], y, perm=[0, 2, 1])
    elif place == 1:
        writer.product(node.input[0], matrix.T, [], y, [2, 3])
    else:
        writer.nodes.append(node)


_REWRITES: dict[str, Callable[[_Writer, onnx.NodeProto, Array, int, int | None], None]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
}
