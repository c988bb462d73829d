"""How much work a graph is, and how far from this machine's bound it runs.

The roofline (Williams, Waterman & Patterson, "Roofline: an insightful visual performance model", CACM 2009): a graph takes at
least its FLOP at the machine's peak, and at least its bytes at the memory's bandwidth; whichever is longer bounds it.
"""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import onnx
from onnx import helper, shape_inference

from engines.graph import attributes_of

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of one element."""
MOVING = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "AveragePool", "GlobalAveragePool", "LRN",
    "ReduceMax", "ReduceMean", "ReduceSum", "CumSum", "TopK",
}  # fmt: skip
"""Nodes that read their inputs and write their outputs; an engine fuses the others with their neighbours."""


@dataclass(frozen=True)
class Work:
    """What one call of a graph must do, whoever runs it.

    Attributes:
        flop: two for each multiply-add of convolutions and matrix products; all else is nothing beside them.
        values: elements of weights and activations that the nodes in ``MOVING`` read and write.
    """

    flop: int
    values: int


@dataclass(frozen=True)
class Peaks:
    """What this machine reached at its best.

    Attributes:
        gflop_per_s: by precision, of a large convolution or matrix product, whichever is faster.
        gbyte_per_s: read and written, copying an array that no cache holds.
    """

    gflop_per_s: dict[str, float]
    gbyte_per_s: float

    def best(self, other: "Peaks") -> "Peaks":
        """The higher of each of two measurements: what slowed one down was not the machine's limit."""
        peaks = {name: max(peak, other.gflop_per_s[name]) for name, peak in self.gflop_per_s.items()}
        return Peaks(peaks, max(self.gbyte_per_s, other.gbyte_per_s))

    def report(self) -> dict[str, Any]:
        """For the JSON."""
        return asdict(self)


def count_work(model: onnx.ModelProto) -> Work:
    """FLOP and elements moved, from the nodes and their static shapes. Constants count as read at every call."""
    shapes = tensor_shapes(model)
    flop = values = 0
    for node in model.graph.node:
        flop += 2 * multiply_adds(node, shapes)
        if node.op_type in MOVING:
            values += sum(prod(shapes[name]) for name in (*node.input, *node.output) if name in shapes)
    return Work(flop, values)


def multiply_adds(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of a convolution or matrix product, from ONNX's definitions; 0 for any other node."""
    if node.op_type == "Conv":  # each output element: one for every weight of its filter, [M, C / group, kh, kw]
        return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":  # each input element: one for every weight it is spread by, [C, M / group, kh, kw]
        return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])
    if node.op_type == "Gemm":
        summed = shapes[node.input[0]][0 if attributes_of(node).get("transA") else 1]
        return prod(shapes[node.output[0]]) * summed
    if node.op_type == "MatMul":
        return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return 0


def tensor_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Name to static shape of every tensor. Large weights are left out of the inference, which would copy them."""
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    large = [tensor for tensor in model.graph.initializer if prod(tensor.dims) > 4096]
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.output.extend(model.graph.output)
    light.graph.input.extend(model.graph.input)
    light.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large)
    light.graph.initializer.extend(t for t in model.graph.initializer if prod(t.dims) <= 4096)
    inferred = shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        known[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return known


def roofline_point(work: Work, precision: str, peaks: Peaks, achieved_ms: float) -> dict[str, Any]:
    """The bounds of a graph on this machine and how far from them it ran.

    Returns:
        ``compute_ms`` and ``memory_ms`` (the two bounds), ``roofline_ms`` (the longer), ``bound`` (its name), ``achieved_ms``,
        ``gap`` (achieved over roofline), ``flop``, ``bytes``, ``flop_per_byte``, ``gflop_per_s`` (achieved).
    """
    moved = work.values * BYTES[precision]
    compute_ms = work.flop / peaks.gflop_per_s[precision] / 1e6
    memory_ms = moved / peaks.gbyte_per_s / 1e6
    return {
        "precision": precision, "flop": work.flop, "bytes": moved, "flop_per_byte": round(work.flop / max(moved, 1), 3),
        "compute_ms": round(compute_ms, 4), "memory_ms": round(memory_ms, 4),
        "roofline_ms": round(max(compute_ms, memory_ms), 4), "bound": "compute" if compute_ms >= memory_ms else "memory",
        "achieved_ms": achieved_ms, "gap": round(achieved_ms / max(compute_ms, memory_ms), 3),
        "gflop_per_s": round(work.flop / achieved_ms / 1e6, 2),
    }  # fmt: skip
