"""A small append-only writer of ONNX graphs that knows every tensor's shape and every constant's
value.

A node can only read what is already written, so the node list is always in topological order and
the gradient graph can be appended behind the forward graph it reads. Shapes are static: each node's
output is inferred as it is appended, and a mistake is an error at the line that made it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import InferenceError, infer_node_outputs

from engines.engine import Array
from engines.errors import ModelError
from engines.files import Kind

OPSET = 20
IR_VERSION = 10
GRAPH_FILE = Kind("ONNX file", (), rb"\x08.\x12\x09sightline")
BACKWARD_STARTS = "backward_starts"
"""The model's metadata under this name list the tensors that its backward pass begins from."""
SHARED_UP_TO = 4096  # elements: comparing larger constants costs more than it saves
FOLDED = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "BatchNormalization",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators that are computed at once where all they read is constant: their cost is that of
reading and writing once.
"""
FOLDED_FREELY, FOLDED_SHARE = 1 << 24, 16
"""Values that folding may read and write in all: so many, and so many times the values of the
constants that were given.
"""
MOST_VALUES = 1 << 40
"""Of any tensor: no memory holds it, and products of shapes stay exact."""
MOST_BYTES = (1 << 31) - (1 << 20)
"""Of a graph's constants: protobuf, in which every engine reads a graph, holds 2 GB."""


@dataclass(frozen=True)
class TensorType:
    """ONNX element type (``TensorProto.FLOAT`` ...) and static shape of one tensor."""

    elem: int
    shape: tuple[int, ...]

    def proto(self) -> onnx.TypeProto:
        return helper.make_tensor_type_proto(self.elem, self.shape)


class Graph:
    """The graph under construction. Tensors are named by strings, as in ONNX.

    Attributes:
        backward_starts: the tensors that a backward pass begins from, see
            ``engines.gradient.attach_gradient``. All that depends on them is linear in them, up to
            the maps.
        backward_ends: the gradients that it gives.
    """

    def __init__(self, name: str = "sightline") -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.constants: dict[str, Array] = {}
        self.types: dict[str, TensorType] = {}
        self.backward_starts: set[str] = set()
        self.backward_ends: set[str] = set()
        self._constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}
        self._given = self._folding = (
            0  # values of constants that came from outside; that folding read and wrote
        )

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Static shape of a tensor that is already in the graph."""
        return self.types[tensor].shape

    def fresh(self, hint: str) -> str:
        """A tensor name that is not taken: ``hint``, then ``hint_1``, ``hint_2`` ..."""
        while True:
            count = self._counts.get(hint, 0)
            self._counts[hint] = count + 1
            name = f"{hint}_{count}" if count else hint
            if name not in self.types:
                return name

    def input(self, name: str, elem: int, shape: Sequence[int]) -> str:
        """Declare a graph input."""
        self.types[name] = TensorType(elem, tuple(shape))
        self.inputs.append(name)
        return name

    def constant(self, value: Any, dtype: Any = np.float32, hint: str = "const") -> str:
        """A constant tensor; small equal values (shape, type and bytes) share one name."""
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        self._given += array.size
        if array.size > SHARED_UP_TO:
            name = self.fresh(hint)
            self._store_constant(name, array)
            return name
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = self.fresh(hint)
            self._store_constant(name, array)
            self._constant_names[key] = name
        return self._constant_names[key]

    def keep_constant(self, name: str, array: Array) -> None:
        """Store a constant under the name that another graph's nodes read it by, unless it is
        there.
        """
        if name not in self.types:
            self._store_constant(name, array)

    def _store_constant(self, name: str, array: Array) -> None:
        self.constants[name] = array
        self.types[name] = TensorType(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    def add(self, op: str, *inputs: str, hint: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name. Empty strings are omitted
        optional inputs.
        """
        output = self.fresh(hint or op.lower())
        self.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def top(self, values: str, count: int) -> tuple[str, str]:
        """Append a search for the ``count`` largest values of each row ``[N, L]``: (the values in
        order, their places), each ``[N, count]``.
        """
        found, places = self.fresh("largest"), self.fresh("largest_places")
        wanted = self.constant([count], np.int64)
        self.append(
            helper.make_node(
                "TopK", [values, wanted], [found, places], name=found, axis=1, largest=1, sorted=1
            )
        )
        return found, places

    def append(self, node: onnx.NodeProto) -> None:
        """Append a ready node, keeping its names; nodes whose inputs are all constant become
        constants.

        Raises:
            ModelError: the node is invalid, or its output shape cannot be known.
        """
        if self._folded(node):
            return
        self._infer(node)
        self.nodes.append(node)

    def _folded(self, node: onnx.NodeProto) -> bool:
        if node.op_type in ("Shape", "Size") and node.input[0] in self.types:
            shape, at = np.asarray(self.shape(node.input[0]), np.int64), attributes_of(node)
            part = shape[at.get("start", 0) : at.get("end", len(shape))]
            value = part if node.op_type == "Shape" else np.asarray(shape.prod())
            self._store_constant(node.output[0], value)
            return True
        if node.op_type not in FOLDED or not all(
            name in self.constants for name in node.input if name
        ):
            return False
        written = sum(math.prod(kind.shape) for kind in self._inferred(node).values())
        feeds = {name: self.constants[name] for name in node.input if name}
        self._folding += written + sum(value.size for value in feeds.values())
        if self._folding > FOLDED_FREELY + FOLDED_SHARE * self._given:
            raise ModelError(
                f"{_where(node)} computes {written:,} constant values: more than the network's"
                " weights account for"
            )
        types = [helper.make_value_info(name, self.types[name].proto()) for name in feeds]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = helper.make_graph([node], "fold", types, outputs)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        from onnx.reference import ReferenceEvaluator  # only where a node is left to compute

        try:
            with np.errstate(all="ignore"):
                values = [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]
        except Exception as error:  # NumPy and the evaluator raise whatever they meet
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{_where(node)} cannot be computed from its constants: {reason[:200]}"
            ) from error
        for name, value in zip([o.name for o in outputs], values, strict=True):
            if value.dtype.kind == "f" and value.size > 1 and not np.isfinite(value).all():
                raise ModelError(
                    f"{_where(node)} computes constants that are not finite: the network's weights"
                    " are damaged"
                )
            self._store_constant(name, value)
        return True

    def _infer(self, node: onnx.NodeProto) -> None:
        self.types.update(self._inferred(node))

    def _inferred(self, node: onnx.NodeProto) -> dict[str, TensorType]:
        """Types of what the node writes, by name, as ONNX's own inference finds them."""
        missing = [name for name in node.input if name and name not in self.types]
        if missing:
            raise ModelError(
                f"{_where(node)} reads '{missing[0]}', which nothing before it writes: sort the"
                " model's nodes"
            )
        try:
            schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
            types = {name: self.types[name].proto() for name in node.input if name}
            data = {
                name: numpy_helper.from_array(self.constants[name], name)
                for name in node.input
                if name in self.constants and self.constants[name].size <= 64
            }
            found = infer_node_outputs(
                schema, node, types, data, opset_imports=[helper.make_opsetid("", OPSET)]
            )
        except (
            onnx.defs.SchemaError,
            onnx.checker.ValidationError,
            InferenceError,
            RuntimeError,
            ValueError,
        ) as error:
            raise ModelError(
                f"{_where(node)} is not valid ONNX: {(str(error).strip() or '?').splitlines()[0]}"
            ) from error
        return {name: _static_type(node, name, found.get(name)) for name in node.output if name}

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that writes ``tensor``; None for inputs and constants."""
        return next((node for node in reversed(self.nodes) if tensor in node.output), None)

    def output(self, tensor: str, name: str) -> str:
        """Publish a tensor as the graph output ``name``."""
        self.append(helper.make_node("Identity", [tensor], [name], name=name))
        self.outputs.append(name)
        return name

    def model(self, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
        """The checked model, holding only the nodes and constants that its outputs need.

        Raises:
            ModelError: the ONNX checker refuses it.
        """
        nodes = needed(self.nodes, self.outputs)
        held = sum(
            self.constants[name].nbytes
            for name in {n for node in nodes for n in node.input} & self.constants.keys()
        )
        if held > MOST_BYTES:
            raise ModelError(
                f"the network needs {held / 1e9:.1f} GB of weights, forwards and backwards: a graph"
                " holds 2 GB"
            )
        read = {name for node in nodes for name in node.input} | set(self.outputs)
        graph = helper.make_graph(
            nodes,
            self.name,
            [helper.make_value_info(name, self.types[name].proto()) for name in self.inputs],
            [helper.make_value_info(name, self.types[name].proto()) for name in self.outputs],
            [
                numpy_helper.from_array(value, name)
                for name, value in self.constants.items()
                if name in read
            ],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="sightline",
        )
        starts = sorted(self.backward_starts & read)
        helper.set_model_props(
            model, {**(metadata or {}), **({BACKWARD_STARTS: json.dumps(starts)} if starts else {})}
        )
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"the built graph is not valid ONNX: {str(error).splitlines()[0]}"
            ) from error
        return model


def _where(node: onnx.NodeProto) -> str:
    return f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"


def _static_type(node: onnx.NodeProto, name: str, found: onnx.TypeProto | None) -> TensorType:
    """Element type and shape, if they are known before running and no tensor is empty or larger
    than any memory.
    """
    tensor = found.tensor_type if found is not None and found.HasField("tensor_type") else None
    if (
        tensor is None
        or not tensor.HasField("shape")
        or not all(d.HasField("dim_value") for d in tensor.shape.dim)
    ):
        raise ModelError(
            f"{_where(node)}: the shape of '{name}' is not known before running; export static"
            " shapes"
        )
    shape = tuple(d.dim_value for d in tensor.shape.dim)
    if any(length < 0 for length in shape) or math.prod(shape) > MOST_VALUES:
        raise ModelError(
            f"{_where(node)}: '{name}' would have the shape {list(shape)}: the image is too small"
            " or too large for it"
        )
    return TensorType(tensor.elem_type, shape)


def needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that ``outputs`` depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


FLOAT, UINT8, INT64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
