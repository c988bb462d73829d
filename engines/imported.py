"""Any classifier from an ONNX file, as long as it is made of operators that the gradient table knows."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from engines.base import Array, ModelError
from engines.graph import OPSET, Graph, attributes_of
from engines.networks import Forward


def forward_of_file(path: Path) -> tuple[Callable[[Graph, str], Forward], int | None, str]:
    """Read a classifier with one image input ``[N, 3, H, W]`` and one output of class scores.

    Returns:
        (how to append it to a graph, its own input side in pixels if fixed, sha256 of the file).

    Raises:
        ModelError: not an ONNX model, or not one image in and one score vector out.
    """
    try:
        content = path.read_bytes()
        model = onnx.load_from_string(content)
        model = onnx.version_converter.convert_version(model, OPSET)
    except OSError as error:
        raise ModelError(f"cannot read model {path}: {error.strerror}") from error
    except (DecodeError, onnx.version_converter.ConvertError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path} is not an ONNX model of opset 7 to {OPSET}: {_first_line(error)}") from error
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; a classifier has one of each")
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) != 4 or dims[1].dim_value not in (0, 3):
        raise ModelError(f"{path}: input '{inputs[0].name}' is not an image [N, 3, H, W]")

    def append(graph: Graph, x_nchw: str) -> Forward:
        return _replay(graph, model, constants, inputs[0].name, x_nchw)

    return append, dims[2].dim_value or None, hashlib.sha256(content).hexdigest()


def _replay(graph: Graph, model: onnx.ModelProto, constants: dict[str, Array], input_name: str, x_nchw: str) -> Forward:
    """Append the file's nodes under names of our own, so that they cannot clash with ours."""
    names = {"": "", input_name: x_nchw}
    names.update({name: graph.constant(value, value.dtype, hint=name) for name, value in constants.items()})
    layers: dict[str, str] = {}
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for i, name in enumerate(original.input):
            node.input[i] = names.get(name, name)
        for i, name in enumerate(original.output):
            names[name] = node.output[i] = graph.fresh(name) if name else ""
        if node.op_type == "LRN":
            _append_lrn(graph, node)
        else:
            graph.append(node)
        layers[original.output[0]] = node.output[0]
    scores = _before_softmax(graph, names[model.graph.output[0].name])
    shape = graph.shape(scores)
    if len(shape) != 2:
        flat = [shape[0], -1]
        scores = graph.add("Reshape", scores, graph.constant(flat, "int64"), hint="scores_flat")
    return Forward(scores, _last_activations(graph, scores), layers)


def _append_lrn(graph: Graph, node: onnx.NodeProto) -> None:
    """LRN with a bias of 1 and a factor: ``(b + a s)^-beta = b^-beta (1 + a/b s)^-beta``.

    OpenVINO's CPU plugin computes with bias 1 whatever the node says (2026.4; ONNX Runtime and float64 agree with each other).
    """
    at = attributes_of(node)
    size, bias, beta = int(at["size"]), float(at.get("bias", 1.0)), float(at.get("beta", 0.75))
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


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "its bytes cannot be parsed" if "Assertion" in text else text[:200]
