"""Rewrites a float32 graph into the one that TensorRT reads: half precision, and products as
convolutions.

Strongly typed engines (TensorRT 10 and later) compute in the types that the graph names, so
precision is a matter of the graph. Float16 holds 6e-5 .. 65504 at full precision, and loses digits
down to 6e-8; what does not fit stays float32:

- everything before the first and behind the last convolution or matrix product: pixels, softmax and
  arg-max, the objective's own gradient, maps, features, box;
- powers, squares, exponentials and normalizations, and what is computed of them up to the next
  convolution or matrix product.

Gradients are small: the backward pass of a class score, measured in float32 on the shipped network,
SqueezeNet and VGG16, has values of 4e-8 .. 0.3. It is linear in the gradient that it starts from,
so that one is multiplied by a power of two, as in mixed-precision training (Micikevicius et al.
2018, "Mixed precision training", section 3.2), and what leaves float16 is divided by it again.
Neither rounds anything.

TensorRT for RTX (1.7) refuses float32 matrix products for compute capability 7.5, and takes the
same product as a convolution.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.engine import Array
from engines.errors import EngineError, ModelError
from engines.graph import BACKWARD_STARTS, attributes_of, needed
from engines.int8 import is_quantized

GRADIENT_SCALE = 4096.0
"""With it the measured gradients lie at 2e-4 .. 1,300: a factor of 50 below the largest float16."""
MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
WIDE_OPS = frozenset(
    {
        "Cast",
        "Softmax",
        "LogSoftmax",
        "ArgMax",
        "OneHot",
        "LRN",
        "Pow",
        "Exp",
        "Log",
        "LayerNormalization",
        "InstanceNormalization",
        "LpNormalization",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSumExp",
        "QuantizeLinear",
        "DequantizeLinear",
        "TopK",
    }
)
"""Operators that stay in float32 wherever they are."""
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto, gradient_scale: float = GRADIENT_SCALE) -> onnx.ModelProto:
    """The same graph with convolutions, matrix products and what lies between them in float16.

    Args:
        model: what ``engines.build.build_graph`` made; it is not changed.
        gradient_scale: a power of two.

    Returns:
        A model of the same inputs and outputs, in name, order, type and shape.

    Raises:
        ModelError: there is nothing to convert, or a weight does not fit float16.
    """
    writer = _HalfWriter(model, gradient_scale)
    for node in model.graph.node:
        writer.write(node)
    result = onnx.ModelProto()
    result.CopyFrom(without_initializers(model))
    del result.graph.node[:]
    result.graph.node.extend(writer.nodes)
    read = {name for node in writer.nodes for name in node.input}
    result.graph.initializer.extend(
        t for t in (*model.graph.initializer, *writer.constants.values()) if t.name in read
    )
    onnx.checker.check_model(result)
    return result


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float64, for ``onnx.reference``: what rounding does not hide is seen so."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    for tensor in double.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in double.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = _doubled(attribute.i)
    for value in (*double.graph.input, *double.graph.output):
        kind = value.type.tensor_type
        kind.elem_type = _doubled(kind.elem_type)
    return double


def _doubled(elem: int) -> int:
    return TensorProto.DOUBLE if elem == TensorProto.FLOAT else elem


class _HalfWriter:
    """Writes the nodes once more, with casts between the two types and one scale on the way in and
    out of the gradient.
    """

    def __init__(self, model: onnx.ModelProto, gradient_scale: float) -> None:
        self._scale = gradient_scale
        self._floats = set(float_ranks(model))
        self._weights = {t.name: t for t in model.graph.initializer}
        self._starts = backward_starts(model)
        self._half_nodes = _half_nodes(model, self._floats, self._starts)
        if not self._half_nodes:
            raise ModelError(
                "the graph holds no convolution or matrix product: there is nothing to compute in"
                " fp16"
            )
        self._half = {
            name
            for node in model.graph.node
            if node.output[0] in self._half_nodes
            for name in node.output
        }
        self._scaled = downstream(model.graph.node, self._starts) - self._starts
        self._written: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def write(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        half = node.output[0] in self._half_nodes
        for place, name in enumerate(node.input):
            if name in self._floats:
                copy.input[place] = (
                    self._as_half(name)
                    if half and _takes_half(node, place)
                    else self._as_float(name)
                )
        self.nodes.append(copy)

    def _as_half(self, name: str) -> str:
        if name in self._half:
            return name
        if name in self._weights:
            return self._half_constant(name)
        source = self._times(name, self._scale) if self._scaled_in_float(name) else name
        return self._cast(source, f"{name}_half", TensorProto.FLOAT16)

    def _scaled_in_float(self, name: str) -> bool:
        """It belongs to the backward pass, and is not multiplied yet."""
        return name in self._starts or name in self._scaled

    def _as_float(self, name: str) -> str:
        if name not in self._half:
            return name
        cast = self._cast(name, f"{name}_float", TensorProto.FLOAT)
        return self._times(cast, 1 / self._scale) if name in self._scaled else cast

    def _cast(self, name: str, output: str, to: int) -> str:
        return self._once(helper.make_node("Cast", [name], [output], name=output, to=to))

    def _times(self, name: str, factor: float) -> str:
        constant = f"gradient_times_{factor:g}"
        self.constants.setdefault(
            constant, numpy_helper.from_array(np.array(factor, np.float32), constant)
        )
        output = f"{name}_times_{factor:g}"
        return self._once(helper.make_node("Mul", [name, constant], [output], name=output))

    def _once(self, node: onnx.NodeProto) -> str:
        output = str(node.output[0])
        if output not in self._written:
            self._written.add(output)
            self.nodes.append(node)
        return output

    def _half_constant(self, name: str) -> str:
        output = f"{name}_half"
        if output not in self.constants:
            value: Array = numpy_helper.to_array(self._weights[name])
            value = value * np.float32(self._scale) if name in self._starts else value
            finite = value[np.isfinite(value)]  # pools pad with minus infinity, which float16 has
            if finite.size and np.abs(finite).max() > LARGEST:
                raise ModelError(
                    f"weight '{name}' reaches {np.abs(finite).max():.3g}, beyond float16: use fp32",
                    option="precision",
                )
            self.constants[output] = numpy_helper.from_array(value.astype(np.float16), output)
        return output


def downstream(nodes: Iterable[onnx.NodeProto], starts: Iterable[str]) -> set[str]:
    """``starts`` and every tensor that depends on one of them."""
    reached = set(starts)
    for node in nodes:
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached


def _upstream(nodes: Sequence[onnx.NodeProto], ends: Iterable[str]) -> set[str]:
    reached = set(ends)
    for node in reversed(nodes):
        if reached.intersection(node.output):
            reached.update(node.input)
    return reached


def backward_starts(model: onnx.ModelProto) -> set[str]:
    """The tensors that the backward pass begins from, as the graph says; none where it has no such
    pass.
    """
    stated = {prop.key: prop.value for prop in model.metadata_props}.get(BACKWARD_STARTS, "[]")
    return set(json.loads(stated))


def _half_nodes(model: onnx.ModelProto, floats: set[str], starts: set[str]) -> set[str]:
    """First outputs of the nodes that compute in float16: matrix products, and what lies between
    two of them.

    What the backward pass starts from stays in float32: it is scaled before it is rounded.
    """
    nodes, weights = list(model.graph.node), {t.name for t in model.graph.initializer}
    maps = [
        node.input[0] for node in nodes if "map" in node.output
    ]  # what reads the map reads small differences: float32
    behind_map = downstream(nodes, maps)
    products = [
        node
        for node in nodes
        if node.op_type in MATRIX_OPS
        and (weights.intersection(node.input) or node.op_type == "MatMul")
        and not behind_map.intersection(node.input)
    ]
    after = downstream(nodes, [node.output[0] for node in products])
    before = _upstream(nodes, [name for node in products for name in node.input])
    chosen, wide = {node.output[0] for node in products}, set[str]()
    for node in nodes:
        if (
            node.output[0] in chosen
            or node.output[0] in starts
            or not _computes_in_floats(node, floats)
        ):
            continue
        square = node.op_type == "Mul" and node.input[0] == node.input[1]
        if node.op_type in WIDE_OPS or square or wide.intersection(node.input):
            wide.update(node.output)
        elif after.intersection(node.input) and before.intersection(node.output):
            chosen.add(node.output[0])
    return chosen


def _computes_in_floats(node: onnx.NodeProto, floats: set[str]) -> bool:
    return bool(floats.intersection([*node.input, *node.output]))


def _takes_half(node: onnx.NodeProto, place: int) -> bool:
    """Whether the operator allows float16 there: the scales of a Resize, say, are always
    float32.
    """
    schema = onnx.defs.get_schema(node.op_type)
    formal = schema.inputs[min(place, len(schema.inputs) - 1)]
    return "tensor(float16)" in formal.types


def float_ranks(model: onnx.ModelProto) -> dict[str, int | None]:
    """The float32 tensors by name, with their number of axes where it is known.

    Weights stand in as inputs, so that no gigabyte is copied to learn their types; axes and shapes
    are needed as they are.
    """
    bare = without_initializers(model)
    bare.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
    )
    bare.graph.initializer.extend(
        t for t in model.graph.initializer if t.data_type == TensorProto.INT64
    )
    graph = onnx.shape_inference.infer_shapes(bare).graph
    values = [
        v
        for v in (*graph.input, *graph.output, *graph.value_info)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    return {
        v.name: len(v.type.tensor_type.shape.dim) if v.type.tensor_type.HasField("shape") else None
        for v in values
    }


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything else of it, metadata included."""
    graph = helper.make_graph(
        model.graph.node, model.graph.name, model.graph.input, model.graph.output
    )
    bare = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    bare.producer_name = model.producer_name
    bare.metadata_props.extend(model.metadata_props)
    return bare


def products_as_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without float32 Gemm and MatMul.

    Of a constant matrix and two, three or four axes a row of K values becomes K channels of one
    pixel, and a matrix ``[K, M]`` a kernel ``[M, K, 1, 1]``. A MatMul of two that are computed
    becomes products one by one, and their sums. A Gemm of another kind is left alone.
    """
    ranks = float_ranks(model)
    weights = {t.name: t for t in model.graph.initializer}
    rounded = {
        n.output[0]: n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in weights
    }
    writer = _ConvolutionWriter({})
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
        if node.op_type == "MatMul" and not places:
            _sum_of_products(writer, node, [ranks.get(name) for name in node.input])
            continue
        if rewrite is None or rank not in (2, 3, 4):
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


class _ConvolutionWriter:
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
        if not axes:
            self.add("Conv", [x, kernel, *bias], y, kernel_shape=[1, 1])
            return
        missing = self.constant(f"axes_{'_'.join(map(str, axes))}", np.array(axes, np.int64))
        image = self.add("Unsqueeze", [x, missing], f"{y}_image")
        self.add(
            "Squeeze",
            [self.add("Conv", [image, kernel, *bias], f"{y}_conv", kernel_shape=[1, 1]), missing],
            y,
        )


def _gemm(
    writer: _ConvolutionWriter, node: onnx.NodeProto, matrix: Array, place: int, _: int | None
) -> None:
    """``alpha * x @ op(B) + beta * c`` with a bias of one row."""
    at = attributes_of(node)
    if place != 1 or at.get("transA", 0) or at.get("beta", 1.0) != 1.0:
        writer.nodes.append(node)
        return
    kernel = (matrix if at.get("transB", 0) else matrix.T) * np.float32(at.get("alpha", 1.0))
    writer.product(node.input[0], kernel, list(node.input[2:]), node.output[0], [2, 3])


def _rounded_gemm(
    writer: _ConvolutionWriter, node: onnx.NodeProto, source: onnx.NodeProto, integers: Array
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
    writer: _ConvolutionWriter, node: onnx.NodeProto, matrix: Array, place: int, rank: int | None
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
    elif rank == 4:
        # The axis that is summed over becomes the channels, and goes back where it was.
        there, back = ([0, 2, 1, 3], [0, 2, 1, 3]) if place == 0 else ([0, 3, 1, 2], [0, 2, 3, 1])
        turned = writer.add("Transpose", [node.input[1 - place]], f"{y}_turned", perm=there)
        kernel = matrix if place == 0 else matrix.T
        writer.product(turned, kernel, [], f"{y}_mixed", [])
        writer.add("Transpose", [f"{y}_mixed"], y, perm=back)
    elif place == 1:
        writer.product(node.input[0], matrix.T, [], y, [2, 3])
    else:
        writer.nodes.append(node)


def _sum_of_products(
    writer: _ConvolutionWriter, node: onnx.NodeProto, ranks: Sequence[int | None]
) -> None:
    """``[.., M, K] @ [.., K, N]`` as the sum over K of ``[.., M, K, 1] * [.., 1, K, N]``."""
    if any(rank is None or rank < 2 for rank in ranks):
        writer.nodes.append(node)
        return
    y = str(node.output[0])
    spread = [
        writer.add(
            "Unsqueeze",
            [name, writer.constant(f"axis{axis}", np.array([axis]))],
            f"{y}_spread_{side}",
        )
        for name, axis, side in zip(node.input, (-1, -3), ("left", "right"), strict=True)
    ]
    products = writer.add("Mul", spread, f"{y}_products")
    summed = writer.constant("axis-2", np.array([-2]))
    writer.add("ReduceSum", [products, summed], y, keepdims=0)


_REWRITES: dict[
    str, Callable[[_ConvolutionWriter, onnx.NodeProto, Array, int, int | None], None]
] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
}


PRECISIONS = ("fp32", "fp16", "int8")
USUAL_PRECISION = "fp16"
TURING = "sm75"


def checked_precision(precision: str) -> str:
    """What TensorRT is to compute in; ``auto`` is ``USUAL_PRECISION``.

    Raises:
        EngineError: it is none of ``PRECISIONS``.
    """
    if precision == "auto":
        return USUAL_PRECISION
    if precision not in PRECISIONS:
        raise EngineError(f"TensorRT engines run in {', '.join(PRECISIONS)}, not {precision}")
    return precision


def typed_graph(model: onnx.ModelProto, precision: str, library: str, sm: str) -> onnx.ModelProto:
    """The graph as TensorRT is to read it: its types say the precision.

    Args:
        model: from ``engines.build.build_graph``, in float32; for int8 with its pairs of
            QuantizeLinear and DequantizeLinear.
        precision: one of ``PRECISIONS``.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        sm: the GPU's compute capability.

    Raises:
        EngineError: int8 is asked for, and the graph has no scales.
    """
    quantized = is_quantized(model)
    if quantized != (precision == "int8"):
        raise EngineError(
            f"a graph {'with' if quantized else 'without'} 8-bit scales cannot be built in"
            f" {precision}"
        )
    typed = to_half(model) if precision == "fp16" else model
    return products_as_convolutions(typed) if library == "tensorrt_rtx" and sm == TURING else typed
