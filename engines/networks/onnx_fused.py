"""Operators that are written as several of ours: those of ONNX Runtime's optimizer, and two of
ONNX's own that would be computed wrongly or roughly as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import Graph, attributes_of

VENDOR = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def _given(node: onnx.NodeProto, index: int) -> str:
    """The name of an input; empty where it is left out."""
    return str(node.input[index]) if len(node.input) > index else ""


def _named(graph: Graph, node: onnx.NodeProto, operator: str, *inputs: str, **how: Any) -> None:
    """The last of the nodes, which writes what the fused one was to write."""
    output = list(node.output[:1])
    graph.append(onnx.helper.make_node(operator, inputs, output, name=node.name, **how))


def _lrn(graph: Graph, node: onnx.NodeProto) -> None:
    """LRN with a bias of 1 and a factor: ``(b + a s)^-beta = b^-beta (1 + a/b s)^-beta``.

    OpenVINO's CPU plugin computes with bias 1 whatever the node says (2026.4; ONNX Runtime and
    float64 agree with each other).
    """
    at = attributes_of(node)
    size, bias, beta = int(at["size"]), float(at.get("bias", 1.0)), float(at.get("beta", 0.75))
    if not (bias > 0 and np.isfinite([bias, beta, at.get("alpha", 1e-4)]).all()):
        raise ModelError(
            f"node '{node.name or node.output[0]}' (LRN): its bias must be positive, and its"
            " numbers finite"
        )
    if size % 2 == 0:
        raise ModelError(
            f"node '{node.name or node.output[0]}' (LRN): an even window of {size} channels is not"
            " supported"
        )
    alpha = float(at.get("alpha", 1e-4)) / bias
    scaled = graph.add(
        "LRN", node.input[0], size=size, alpha=alpha, beta=beta, bias=1.0, hint="lrn_scaled"
    )
    _named(graph, node, "Mul", scaled, graph.constant(bias**-beta))


def _group_normalization(graph: Graph, node: onnx.NodeProto) -> None:
    """By InstanceNormalization over rows of groups, as PyTorch exports it: ONNX's own definition
    takes the difference of two large numbers.
    """
    x, scale, bias = node.input[:3]
    at, shape = attributes_of(node), graph.shape(x)
    groups, channels = int(at["num_groups"]), shape[1]
    if groups < 1 or channels % groups:
        raise ModelError(
            f"node '{node.name or node.output[0]}' (GroupNormalization): {groups} groups do not"
            f" divide {channels} channels"
        )
    ones, zeros = (graph.constant(np.full(groups, value)) for value in (1.0, 0.0))
    rows = graph.add("Reshape", x, graph.constant([shape[0], groups, -1], np.int64))
    normal = graph.add(
        "InstanceNormalization", rows, ones, zeros, epsilon=float(at.get("epsilon", 1e-5))
    )
    per_group = graph.shape(scale)[0] == groups != channels  # as opset 18 has it
    rest = [groups, -1] if per_group else [channels, -1]
    apart = graph.add("Reshape", normal, graph.constant([shape[0], *rest], np.int64))
    column = graph.constant([-1, 1], np.int64)
    scaled = graph.add("Mul", apart, graph.add("Reshape", scale, column))
    moved = graph.add("Add", scaled, graph.add("Reshape", bias, column))
    _named(graph, node, "Reshape", moved, graph.constant(shape, np.int64))


def _convolution(graph: Graph, node: onnx.NodeProto) -> None:
    """A convolution, a sum where there is a fourth input, and an activation."""
    at = attributes_of(node)
    kind = at.pop("activation", b"").decode(errors="replace")
    numbers = [float(value) for value in at.pop("activation_params", [])]
    x = graph.add("Conv", *(name for name in node.input[:3] if name), **at)
    if _given(node, 3):
        x = graph.add("Add", x, _given(node, 3))
    if kind == "Clip" and len(numbers) == 2:
        _named(graph, node, "Clip", x, *(graph.constant(value) for value in numbers))
    elif kind in ("LeakyRelu", "HardSigmoid") and numbers:
        how = dict(zip(("alpha", "beta"), numbers, strict=False))
        _named(graph, node, kind, x, **how)
    elif kind in ("Relu", "Sigmoid", "Tanh"):
        _named(graph, node, kind, x)
    elif not kind:
        _named(graph, node, "Identity", x)
    else:
        raise ModelError(
            f"node '{node.name or node.output[0]}' (FusedConv) ends in '{kind}', which is not"
            " known: give the model from before ONNX Runtime optimised it"
        )


def _product(graph: Graph, node: onnx.NodeProto) -> None:
    """A matrix product with turned inputs and a factor."""
    at = attributes_of(node)
    if at.get("transBatchA") or at.get("transBatchB"):
        raise ModelError(
            f"node '{node.name or node.output[0]}' (FusedMatMul) turns its batches: give the model"
            " from before ONNX Runtime optimised it"
        )
    sides = list(node.input[:2])
    for side, name in enumerate(("transA", "transB")):
        if at.get(name):
            rank = len(graph.shape(sides[side]))
            perm = [*range(rank - 2), rank - 1, rank - 2]
            sides[side] = graph.add("Transpose", sides[side], perm=perm)
    product = graph.add("MatMul", *sides)
    _named(graph, node, "Mul", product, graph.constant(float(at.get("alpha", 1.0))))


def _gelu(graph: Graph, node: onnx.NodeProto) -> None:
    x, bias = node.input[0], _given(node, 1)
    x = graph.add("Add", x, bias) if bias else x
    own = attributes_of(node).get("approximate", b"none").decode(errors="replace")
    rough = "tanh" if node.op_type == "FastGelu" else own
    _named(graph, node, "Gelu", x, approximate=rough)


def _quick_gelu(graph: Graph, node: onnx.NodeProto) -> None:
    alpha = float(attributes_of(node).get("alpha", 1.702))
    inner = graph.add("Mul", node.input[0], graph.constant(alpha))
    _named(graph, node, "Mul", node.input[0], graph.add("Sigmoid", inner))


def _layer_normalization(graph: Graph, node: onnx.NodeProto) -> None:
    at = attributes_of(node)
    how = {"axis": int(at.get("axis", -1)), "epsilon": float(at.get("epsilon", 1e-5))}
    _named(graph, node, "LayerNormalization", *(name for name in node.input if name), **how)


def _skip_layer_normalization(graph: Graph, node: onnx.NodeProto) -> None:
    """Of a sum, which it gives too, as its fourth output."""
    total = graph.add("Add", node.input[0], node.input[1])
    if _given(node, 4):
        total = graph.add("Add", total, _given(node, 4))
    if len(node.output) > 3 and node.output[3]:
        graph.append(onnx.helper.make_node("Identity", [total], [node.output[3]]))
    rest = [name for name in node.input[2:4] if name]
    epsilon = float(attributes_of(node).get("epsilon", 1e-12))
    _named(graph, node, "LayerNormalization", total, *rest, axis=-1, epsilon=epsilon)


FUSED: Mapping[str, Callable[[Graph, onnx.NodeProto], None]] = {
    "LRN": _lrn,
    "GroupNormalization": _group_normalization,
    "LayerNormalization": _layer_normalization,
    "SkipLayerNormalization": _skip_layer_normalization,
    "FusedConv": _convolution,
    "FusedMatMul": _product,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "QuickGelu": _quick_gelu,
}
"""What writes each operator; those of one name in ONNX and in ONNX Runtime mean the same."""


def append_fused(graph: Graph, node: onnx.NodeProto) -> None:
    """Append what a node of ``FUSED`` stands for.

    Raises:
        ModelError: it is not valid.
    """
    try:
        FUSED[node.op_type](graph, node)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"node '{node.name or node.output[0]}' ({node.op_type}) is not valid: its inputs or"
            " attributes are not what they must be"
        ) from error
