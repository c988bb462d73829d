"""Writes 8-bit integers into the graph as pairs of QuantizeLinear and DequantizeLinear, which
OpenVINO and TensorRT read.

The integers are symmetric (no zero point) and span -127..127. Weights are quantized per output
channel; an activation or a cotangent has one scale, measured on real images by
``calib.precision.calibrate``. Biases stay in floating point.

Where the pairs stand decides whether the map survives: **one pair right behind the tensor's
producer, and every reader on its output**. A pooling window's gradient goes where the input equals
the output; were only one of the two rounded, they would never be equal: the scores stay right, and
the map is zero, or (in the form of ``engines.gradient.windows``) smeared over the window.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import onnx

from engines.engine import Array
from engines.errors import ModelError
from engines.files import Kind, number, read_json_object, shown, text, whole_file, whole_number
from engines.graph import Graph, attributes_of

FORMAT = 1
CALIBRATION_FILE = Kind("calibration", (), rb'\{\s*"sightline_int8":')
STEPS = 127
SMALLEST_RANGE, LARGEST_RANGE = 1e-30, 1e30
"""Of a tensor that is zero on every image the smallest is noted: a scale must be positive. Beyond
the largest is no float32.
"""
QUANTIZED = ("Conv", "Gemm")
PASSED_THROUGH = ("MaxPool", "Reshape", "Flatten", "Identity", "Dropout")
"""Operators whose output has the values, and so the scale, of what they read: the pair stands
before them.
"""


@dataclass(frozen=True)
class Quantization:
    """What a calibration decides.

    Attributes:
        ranges: largest magnitude that is told apart, for each tensor that gets a pair, by name.
        kept: names of the Conv and Gemm nodes that stay in floating point.
        network: sha256 of the classifier (``Classifier.digest``).
        size_px: input side.
        objective: ``class`` or ``gestalt``: they send other values backwards.
        layer: where the map was taken that was held against fp32; deeper ones were not.
        card: how it was made and what it was found to change.
    """

    ranges: Mapping[str, float]
    kept: tuple[str, ...]
    network: str
    size_px: int
    objective: str
    layer: str
    card: Mapping[str, object] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of everything that decides its integers."""
        parts = [dict(self.ranges), list(self.kept), self.network, self.size_px, self.objective]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        with whole_file(path) as part:
            part.write_text(
                json.dumps({"sightline_int8": FORMAT, **asdict(self)}, indent=1) + "\n",
                encoding="utf-8",
            )


def load_quantization(path: Path) -> Quantization:
    """Read a calibration.

    Raises:
        ModelError: it is missing, damaged, not a calibration, or holds ranges that nothing can be
            measured in.
    """
    try:
        content = read_json_object(path, "calibration")
        if content.pop("sightline_int8", None) != FORMAT:
            raise ValueError("it is no calibration, or was written by another version")
        missing = {field.name for field in fields(Quantization)} ^ content.keys() - {"card"}
        if missing - {"card"}:
            raise ValueError(f"it lacks, or should not have, {shown(sorted(missing))}")
        stored = {
            name: number(value, f"the range of tensor {shown(name)}", SMALLEST_RANGE, LARGEST_RANGE)
            for name, value in content["ranges"].items()
        }
        for name in ("network", "objective", "layer"):
            text(content[name], f"its {name}")
        whole_number(content["size_px"], "its size_px", 1, 1 << 16)
        kept = tuple(text(name, "a layer that is kept") for name in content["kept"])
        if not isinstance(content.get("card", {}), dict):
            raise ValueError("its card is no JSON object")
        return Quantization(**{**content, "ranges": stored, "kept": kept})
    except (KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
        what = f"cannot read calibration {path}: {error or type(error).__name__}"
        raise ModelError(f"{what}; make one with 'calibrate'") from error


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a graph has 8-bit pairs."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def layers(graph: Graph) -> list[onnx.NodeProto]:
    """The nodes that can be quantized, in order: convolutions and matrix products with constant
    weights, both ways.
    """
    return [
        node
        for node in graph.nodes
        if node.op_type in QUANTIZED and node.input[1] in graph.constants
    ]


def source_of(graph: Graph, tensor: str) -> str:
    """The tensor that needs a pair for a layer that reads ``tensor`` to run in 8 bits: that one, or
    what it was pooled from.
    """
    producer = graph.producer(tensor)
    while producer is not None and producer.op_type in PASSED_THROUGH:
        tensor = str(producer.input[0])
        producer = graph.producer(tensor)
    return tensor


def quantize(graph: Graph, quantization: Quantization, exact: Collection[str] = ()) -> None:
    """Rewrite the graph, whose outputs are not declared yet, so that every layer runs in 8 bits
    that is neither ``kept`` nor named in ``exact``.

    A layer that reads a pooled or joined tensor gets a second pair right before it. It changes no
    value, but without it OpenVINO (2026.4.1) computes wrong scores as soon as a Concat is anywhere
    in the graph; nor may the pairs stand before what is joined.

    Raises:
        ModelError: the calibration does not know one of the graph's tensors.
    """
    chosen = {
        n.name: source_of(graph, str(n.input[0]))
        for n in layers(graph)
        if n.name not in quantization.kept and n.name not in exact
    }
    for name in chosen.values():
        if name not in quantization.ranges:
            raise ModelError(
                f"the int8 calibration does not know tensor '{name}' of this graph: run 'calibrate'"
                " again for it"
            )
    nodes, graph.nodes, sources = graph.nodes, [], set(chosen.values())
    rounded: dict[str, str] = {}
    joined = {node.output[0] for node in nodes if node.op_type == "Concat"}
    for node in nodes:
        data, source = str(node.input[0]), chosen.get(node.name)
        for index, name in enumerate(node.input):
            node.input[index] = rounded.get(name, name)
        if source is not None:
            if data != source or data in joined:
                node.input[0] = _pair(graph, node.input[0], quantization.ranges[source])
            _quantize_weight(graph, node)
        graph.nodes.append(node)
        for output in node.output:
            if output in sources:
                rounded[output] = _pair(
                    graph, output, _with_limit(graph, node, quantization.ranges[output])
                )


def _with_limit(graph: Graph, node: onnx.NodeProto, largest: float) -> float:
    """The range of what a node writes. That of a Clip holds its upper limit, if values come near.

    The gradient passes where the output lies below the limit. Rounded, what lies at the limit must
    not lie below it.
    """
    limit = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if node.op_type != "Clip" or limit is None or limit.ravel()[0] > 2 * largest:
        return largest
    mantissa, exponent = math.frexp(float(limit.ravel()[0]) / STEPS)
    return max(largest, STEPS * math.ldexp(math.ceil(mantissa * 256), exponent - 8))


def _pair(graph: Graph, tensor: str, largest: float) -> str:
    scale, zero = (
        graph.constant(short_float(max(largest, 1e-20) / STEPS)),
        graph.constant(0, np.int8),
    )
    integers = graph.add("QuantizeLinear", tensor, scale, zero, hint=f"{tensor}_int8")
    return graph.add("DequantizeLinear", integers, scale, zero, hint=f"{tensor}_rounded")


def short_float(value: float) -> float:
    """The nearest number of 8 significant bits, so that its multiples up to 255 are exact.

    With other scales OpenVINO (2026.4.1) may find the range's ends not symmetric, by a rounding
    error, and turn zeros into tiny positive numbers, which open every ReLU's mask: the scores stay
    right and the map is wrong.
    """
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def _quantize_weight(graph: Graph, node: onnx.NodeProto) -> None:
    """Give a node its weight as int8 per output channel, which is axis 0 (a Gemm's is turned there:
    transB = 1).
    """
    weight = graph.constants[node.input[1]]
    if node.op_type == "Gemm" and not attributes_of(node).get("transB", 0):
        weight = np.ascontiguousarray(weight.T)
        kept = [a for a in node.attribute if a.name != "transB"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("transB", 1)])
    integers, scales = rounded_weight(weight)
    names = (
        graph.constant(integers, np.int8, f"{node.name}_weight"),
        graph.constant(scales, hint=f"{node.name}_scales"),
    )
    zeros = graph.constant(np.zeros(len(scales)), np.int8)
    node.input[1] = graph.add(
        "DequantizeLinear", *names, zeros, axis=0, hint=f"{node.name}_weight_rounded"
    )


def rounded_weight(weight: Array) -> tuple[Array, Array]:
    """(int8 ``[O, ...]``, float32 scales ``[O]``): each output channel spans -127..127."""
    rows = weight.reshape(len(weight), -1)
    scales = np.maximum(np.abs(rows).max(axis=1), 1e-20).astype(np.float32) / STEPS
    integers = np.clip(np.rint(rows / scales[:, None]), -STEPS, STEPS).astype(np.int8)
    return integers.reshape(weight.shape), scales
