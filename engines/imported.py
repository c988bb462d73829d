"""Any classifier from an ONNX file, as long as it is made of operators that the gradient table knows."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from engines.base import ModelError
from engines.graph import OPSET, Graph, attributes_of
from engines.networks import Forward
from engines.onnx_file import OnnxFile, read_onnx

MOST_VALUES, MOST_VALUES_A_PIXEL = 1 << 26, 512
"""Of one activation, for each image: whichever is more. VGG16 has 64 a pixel."""
MOST_TOGETHER, MOST_TOGETHER_A_PIXEL = 1 << 30, 20_000
"""Of all activations; EfficientNet-B7 has 2,000 a pixel, DenseNet-161 12,000."""


def forward_of_file(path: Path) -> tuple[Callable[[Graph, str], Forward], int | None, str]:
    """Read a classifier with one image input ``[N, 3, H, W]`` and one output of class scores.

    Returns:
        (how to append it to a graph, its own input side in pixels if fixed, its digest: see ``OnnxFile``).

    Raises:
        ModelError: not an ONNX model, not one image in and one score vector out, or one that cannot be used.
    """
    found = read_onnx(path, OPSET)

    def append(graph: Graph, x_nchw: str) -> Forward:
        return _replay(graph, found, x_nchw)

    return append, found.side_px, found.digest


def _replay(graph: Graph, file: OnnxFile, x_nchw: str) -> Forward:
    """Append the file's nodes under names of our own, so that they cannot clash with ours."""
    names = {"": "", file.input_name: x_nchw}
    names.update({name: graph.constant(value, value.dtype, hint=name) for name, value in file.constants.items()})
    layers: dict[str, str] = {}
    together = 0
    for original in file.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for i, name in enumerate(original.input):
            node.input[i] = names.get(name, name)
        for i, name in enumerate(original.output):
            names[name] = node.output[i] = graph.fresh(name) if name else ""
        if node.op_type == "Cast" and _is_float(graph, node.input[0]) and attributes_of(node)["to"] == onnx.TensorProto.FLOAT:
            node.op_type = "Identity"  # a network in float16 casts to and fro; here all of it is float32
            del node.attribute[:]
        if node.op_type == "LRN":
            _append_lrn(graph, node)
        else:
            graph.append(node)
        together += _checked_size(graph, x_nchw, node, together)
        layers[original.output[0]] = node.output[0]
    scores = _before_softmax(graph, names[file.output_name])
    scores = _checked_scores(graph, scores, x_nchw)
    return Forward(scores, _last_activations(graph, scores), layers)


def _is_float(graph: Graph, tensor: str) -> bool:
    return tensor in graph.types and graph.types[tensor].elem == onnx.TensorProto.FLOAT


def _checked_size(graph: Graph, x_nchw: str, node: onnx.NodeProto, before: int) -> int:
    """How many values a node writes.

    Raises:
        ModelError: so many that no classifier of such images has them; nothing was allocated for them yet.
    """
    images, _, height, width = graph.shape(x_nchw)
    written = sum(math.prod(graph.shape(name)) for name in node.output if name)
    most = images * max(MOST_VALUES, MOST_VALUES_A_PIXEL * height * width)
    together = images * max(MOST_TOGETHER, MOST_TOGETHER_A_PIXEL * height * width)
    if written > most or before + written > together:
        raise ModelError(
            f"node '{node.name or node.output[0]}' ({node.op_type}) writes {written:,} values after {before:,} before it: more "
            "than a classifier of such images needs"
        )
    return written


def _checked_scores(graph: Graph, scores: str, x_nchw: str) -> str:
    """Class scores as ``[N, classes]``.

    Raises:
        ModelError: they do not depend on the image, or are not one vector of floats for each image.
    """
    images = graph.shape(x_nchw)[0]
    shape = graph.shape(scores)
    if graph.producer(scores) is None:
        raise ModelError("the model's output does not depend on its input")
    if graph.types[scores].elem != onnx.TensorProto.FLOAT or not shape or shape[0] != images:
        raise ModelError(f"the model's output is no vector of class scores for each image: its shape is {list(shape)}")
    if len(shape) == 2:
        return scores
    return graph.add("Reshape", scores, graph.constant([shape[0], -1], np.int64), hint="scores_flat")


def _append_lrn(graph: Graph, node: onnx.NodeProto) -> None:
    """LRN with a bias of 1 and a factor: ``(b + a s)^-beta = b^-beta (1 + a/b s)^-beta``.

    OpenVINO's CPU plugin computes with bias 1 whatever the node says (2026.4; ONNX Runtime and float64 agree with each other).
    """
    at = attributes_of(node)
    size, bias, beta = int(at["size"]), float(at.get("bias", 1.0)), float(at.get("beta", 0.75))
    if not (bias > 0 and np.isfinite([bias, beta, at.get("alpha", 1e-4)]).all()):
        raise ModelError(f"node '{node.name or node.output[0]}' (LRN): its bias must be positive, and its numbers finite")
    if size % 2 == 0:
        raise ModelError(f"node '{node.name or node.output[0]}' (LRN): an even window of {size} channels is not supported")
    alpha = float(at.get("alpha", 1e-4)) / bias
    scaled = graph.add("LRN", node.input[0], size=size, alpha=alpha, beta=beta, bias=1.0, hint="lrn_scaled")
    factor = graph.constant(bias**-beta)
    graph.append(onnx.helper.make_node("Mul", [scaled, factor], list(node.output), name=node.name))


def _before_softmax(graph: Graph, scores: str) -> str:
    """The raw scores: a final softmax would flatten the gradient of a confident class."""
    node = graph.producer(scores)
    while node is not None and node.op_type in ("Reshape", "Flatten", "Squeeze", "Identity"):
        node = graph.producer(node.input[0])
    return str(node.input[0]) if node is not None and node.op_type in ("Softmax", "LogSoftmax") else scores


def _last_activations(graph: Graph, scores: str) -> str:
    """Output of the last convolution, after its ReLU where it has one."""
    convolutions = [node for node in graph.nodes if node.op_type == "Conv"]
    if not convolutions:
        raise ModelError("the model has no convolution: a sensitivity map needs one")
    last = convolutions[-1].output[0]
    readers = [node for node in graph.nodes if last in node.input]
    return str(readers[0].output[0] if len(readers) == 1 and readers[0].op_type == "Relu" else last)
