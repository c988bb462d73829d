"""Writes the nodes of an ONNX file into a graph of ours, and checks what comes of them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from engines.errors import ModelError
from engines.files import shown
from engines.graph import Graph, attributes_of
from engines.networks.network import Forward
from engines.networks.onnx_batch import Images
from engines.networks.onnx_ends import Ends
from engines.networks.onnx_file import OnnxFile
from engines.networks.onnx_fused import FUSED, append_fused

MOST_VALUES, MOST_VALUES_A_PIXEL = 1 << 26, 512
"""Of one activation, for each image: whichever is more. VGG16 has 64 a pixel."""
MOST_TOGETHER, MOST_TOGETHER_A_PIXEL = 1 << 30, 20_000
"""Of all activations; EfficientNet-B7 has 2,000 a pixel, DenseNet-161 12,000."""
LOWEST = -1e30
"""What is below it cannot be the largest in any window."""


@dataclass(frozen=True)
class Layout:
    """How a tensor holds a map.

    Attributes:
        side: of the map, in cells.
        channels_last: it is ``[N, h, w, C]``.
        extra_tokens: it is ``[N, T, C]`` with so many tokens before those of the cells; None where
            it has four axes.
    """

    side: int
    channels_last: bool = False
    extra_tokens: int | None = None

    @property
    def is_turned(self) -> bool:
        """Whether it is not ``[N, C, h, w]``."""
        return self.channels_last or self.extra_tokens is not None


def append_turned(graph: Graph, tensor: str, layout: Layout, name: str) -> tuple[str, str]:
    """Turn a tensor to a map and back.

    Returns:
        (the map ``[N, C, h, w]``, and made of it the tensor in its own layout again).
    """
    shape, side = graph.shape(tensor), layout.side
    if layout.channels_last:
        turned = graph.add("Transpose", tensor, perm=[0, 3, 1, 2], hint=f"{name}_map")
        return turned, graph.add("Transpose", turned, perm=[0, 2, 3, 1], hint=f"{name}_back")
    extra = layout.extra_tokens or 0
    first, rest = "", tensor
    if extra:
        zero, middle, end, axis = (graph.constant([v], "int64") for v in (0, extra, shape[1], 1))
        first = graph.add("Slice", tensor, zero, middle, axis, hint=f"{name}_extra")
        rest = graph.add("Slice", tensor, middle, end, axis, hint=f"{name}_cells")
    columns = graph.add("Transpose", rest, perm=[0, 2, 1], hint=f"{name}_columns")
    square = graph.constant([shape[0], shape[2], side, side], "int64")
    turned = graph.add("Reshape", columns, square, hint=f"{name}_map")
    flat = graph.constant([shape[0], shape[2], side * side], "int64")
    row = graph.add("Reshape", turned, flat, hint=f"{name}_row")
    back = graph.add("Transpose", row, perm=[0, 2, 1], hint=f"{name}_back")
    if extra:
        back = graph.add("Concat", first, back, axis=1, hint=f"{name}_joined")
    return turned, back


@dataclass(frozen=True)
class Written:
    """A file's network in a graph.

    Attributes:
        forward: its landmarks.
        shapes: of all tensors that nodes write, by their names in the file.
        is_one_logit: of one score two were made.
    """

    forward: Forward
    shapes: Mapping[str, tuple[int, ...]]
    is_one_logit: bool


def replay(graph: Graph, file: OnnxFile, x_nchw: str) -> Written:
    """Append the file's nodes as they are, under names of our own, so that they cannot clash with
    ours.

    Args:
        graph: appended to.
        file: the classifier.
        x_nchw: its input ``[N, 3, S, S]``, of as many images as the file says.

    Raises:
        ModelError: it is not valid, or no classifier.
    """
    return _Replay(graph, file, x_nchw).written()


def replay_simplified(
    graph: Graph,
    file: OnnxFile,
    x_nchw: str,
    layouts: Mapping[str, Layout],
    last: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> Forward:
    """Append the file's nodes with fewer of them: padding and normalizations go into the
    convolutions beside them, and what does nothing is left out.

    Args:
        graph: appended to.
        file: the classifier.
        x_nchw: its input ``[N, 3, S, S]``, of any number of images.
        layouts: of the tensors with maps, by their names in the file; they are turned to
            ``[N, C, h, w]`` where they are not.
        last: the name of the last map.
        shapes: of all tensors, for as many images as the file says, see ``Written``.

    Raises:
        ModelError: the network cannot take so many images at once, see ``Images``.
    """
    forward = _Replay(graph, file, x_nchw, layouts, shapes).written().forward
    return replace(forward, last=forward.layers[last])


class _Replay:
    """One way through the nodes of a file.

    Args:
        graph: appended to.
        file: the classifier.
        x_nchw: its input.
        layouts: see ``replay_simplified``; None where nothing is simplified.
        shapes: see there.
    """

    def __init__(
        self,
        graph: Graph,
        file: OnnxFile,
        x_nchw: str,
        layouts: Mapping[str, Layout] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._graph, self._file, self._x_nchw = graph, file, x_nchw
        self._layouts, self._shapes = layouts, dict(shapes or {})
        others = shapes is not None and graph.shape(x_nchw)[0] != file.images
        self._other = Images(graph, x_nchw, self._shapes, file.images) if others else None
        self._readers = Counter(name for node in file.nodes for name in node.input)
        self._readers[file.ends.output_name] += 1
        self._names = {"": "", file.ends.input_name: x_nchw}  # of the file's tensors in the graph
        self._layers: dict[str, str] = {}

    def written(self) -> Written:
        """Append all of it."""
        graph, file, x_nchw = self._graph, self._file, self._x_nchw
        if file.ends.channels_last:
            turned = graph.add("Transpose", x_nchw, perm=[0, 2, 3, 1], hint="x_nhwc")
            self._names[file.ends.input_name] = turned
            if self._other:
                self._other.add(turned, 0)
        self._names.update(
            {
                name: graph.constant(value, value.dtype, hint=name)
                for name, value in file.constants.items()
            }
        )
        together = 0
        for original in file.nodes:
            node = self._appended(original)
            if node is not None:
                together += _checked_size(graph, x_nchw, node, together)
        scores, independent = _before_activation(graph, self._names[file.ends.output_name])
        check_classes(graph, self._names[file.ends.output_name], scores, file.ends)
        scores = _checked_scores(graph, scores, x_nchw)
        is_one = graph.shape(scores)[1] == 1
        if is_one:
            scores = _two_classes(graph, scores)
        forward = Forward(scores, scores, self._layers, independent and not is_one)
        return Written(forward, self._shapes, is_one)

    def _appended(self, original: onnx.NodeProto) -> onnx.NodeProto | None:
        """Append one node; None where another tensor stands for what it writes."""
        graph = self._graph
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for i, name in enumerate(original.input):
            node.input[i] = self._names.get(name, name)
        same = self._same(node, original)
        for i, name in enumerate(original.output):
            node.output[i] = graph.fresh(name) if name and same is None else ""
            self._names[name] = node.output[i]
        if same is None:
            self._write(node, original)
            if self._other:
                self._other.follow(node, original)
        if self._layouts is None:
            pairs = zip(original.output, [same] if same else node.output, strict=False)
            self._shapes.update({theirs: graph.shape(ours) for theirs, ours in pairs if ours})
        tensor = same if same is not None else node.output[0]
        name = original.output[0]
        self._names[name] = tensor
        if self._layouts is not None or same is None:
            self._layers[name] = tensor
        layout = (self._layouts or {}).get(name)
        if layout is not None and layout.is_turned:
            self._layers[name], self._names[name] = append_turned(graph, tensor, layout, tensor)
            if self._other:
                self._other.add(self._names[name], 0)
        return node if same is None else None

    def _same(self, node: onnx.NodeProto, original: onnx.NodeProto) -> str | None:
        """The tensor that holds already what a node would write."""
        graph, x = self._graph, node.input[0] if node.input else ""
        kind = node.op_type
        if _is_cast_of_float(graph, node):  # a network in float16 casts to and fro
            node.op_type = kind = "Identity"
            del node.attribute[:]
        if self._layouts is not None and (
            kind == "Identity" or (kind == "Dropout" and not self._is_read(original.output[1:]))
        ):
            return x
        before = graph.producer(x) if kind == "Transpose" else None
        if before is not None and before.op_type == "Transpose":
            first, then = _perm(graph, before), _perm(graph, node)
            turns_back = [first[i] for i in then] == list(range(len(first)))
            if turns_back and (self._layouts is not None or then == [0, 3, 1, 2]):
                return str(before.input[0])
        return None

    def _takes_all(self, node: onnx.NodeProto, original: onnx.NodeProto) -> bool:
        """Whether a Gather takes every value of a vector in its order, and so is a Reshape."""
        if node.op_type != "Gather" or node.input[1] not in self._graph.constants:
            return False
        shape = self._shapes.get(original.input[0], ())
        places = self._graph.constants[node.input[1]].ravel()
        return len(shape) == 1 and np.array_equal(places, np.arange(shape[0]))

    def _is_read(self, names: Iterable[str]) -> bool:
        return any(name and self._readers[name] for name in names)

    def _write(self, node: onnx.NodeProto, original: onnx.NodeProto) -> None:
        if self._takes_all(node, original):  # what lies in another order is written so
            shape = self._graph.constant(self._graph.shape(node.input[1]), np.int64)
            node.CopyFrom(helper.make_node("Reshape", [node.input[0], shape], node.output))
        if self._other:
            self._other.prepare(node, original)
        if self._layouts is not None:
            self._with_padding(node)
            if self._with_normalization(node, original):
                return
        if node.op_type in FUSED:
            append_fused(self._graph, node)
        else:
            self._graph.append(node)

    def _with_padding(self, node: onnx.NodeProto) -> None:
        """Let a convolution or pool pad, where a Pad does it before."""
        graph = self._graph
        if node.op_type not in ("Conv", "MaxPool", "AveragePool"):
            return
        before = graph.producer(node.input[0])
        if before is None or before.op_type != "Pad":
            return
        pads = padding_of(graph, before)
        own = pads_of(node)
        if pads is None or own is None or not _pads_alike(graph, node, before, own):
            return
        del_attributes(node, "pads", "auto_pad", "count_include_pad")
        together = [a + b for a, b in zip(pads, own, strict=True)]
        node.attribute.append(helper.make_attribute("pads", together))
        if node.op_type == "AveragePool":
            node.attribute.append(helper.make_attribute("count_include_pad", 1))
        node.input[0] = before.input[0]

    def _with_normalization(self, node: onnx.NodeProto, original: onnx.NodeProto) -> bool:
        """Write a normalization into the weights of the convolution before it, whose result nothing
        else reads.
        """
        graph = self._graph
        if node.op_type != "BatchNormalization":
            return False
        before, name = graph.producer(node.input[0]), original.input[0]
        parts = [graph.constants.get(each) for each in node.input[1:5]]
        if (
            before is None
            or before.op_type != "Conv"
            or self._readers[name] > 1
            or name in (self._layouts or {})
            or before.input[1] not in graph.constants
        ):
            return False
        bias = graph.constants.get(before.input[2]) if len(before.input) > 2 else np.zeros(1)
        if bias is None or any(part is None for part in parts):
            return False
        scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
        epsilon = float(attributes_of(node).get("epsilon", 1e-5))
        factor = scale / np.sqrt(variance + epsilon)
        weight = graph.constants[before.input[1]]
        wide = factor.reshape(-1, *[1] * (weight.ndim - 1))
        merged = onnx.NodeProto()
        merged.CopyFrom(before)
        tensors = [(weight * wide).astype(np.float32), (bias - mean) * factor + shift]
        del merged.input[1:], merged.output[:]
        merged.input.extend(graph.constant(tensor) for tensor in tensors)
        merged.output.append(node.output[0])
        merged.name = node.name
        self._layers.pop(name, None)
        graph.append(merged)
        return True


def padding_of(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """What a Pad adds to the image's axes, as ``pads`` of a convolution; None where it does
    something else.
    """
    mode = attributes_of(node).get("mode", b"constant")
    pads = graph.constants.get(node.input[1])
    rank = len(graph.shape(node.input[0]))
    if mode != b"constant" or pads is None or any(node.input[3:]) or pads.min() < 0:
        return None
    begin, end = pads[:rank].tolist(), pads[rank:].tolist()
    return None if any(begin[:2] + end[:2]) else [*begin[2:], *end[2:]]


def pads_of(node: onnx.NodeProto) -> list[int] | None:
    """What a convolution or pool pads by itself; None where that depends on the size."""
    at = attributes_of(node)
    if at.get("ceil_mode") or at.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    return list(at.get("pads", [0, 0, 0, 0]))


def _pads_alike(
    graph: Graph, node: onnx.NodeProto, pad: onnx.NodeProto, own: Sequence[int]
) -> bool:
    """Whether a Pad fills in what the operator would."""
    named = pad.input[2] if len(pad.input) > 2 else ""
    filled = graph.constants.get(named, None if named else np.zeros(1))
    if filled is None or len(own) != 4:
        return False
    value, at = float(np.ravel(filled)[0]), attributes_of(node)
    if node.op_type == "Conv":
        return value == 0
    extent = [int(k) for k in at["kernel_shape"]] * 2
    pads = padding_of(graph, pad) or []
    if any(a + b >= k for a, b, k in zip(pads, own, extent, strict=True)):
        return False
    if node.op_type == "MaxPool":
        before = graph.producer(pad.input[0])
        positive = before is not None and before.op_type in ("Relu", "Sigmoid")
        return len(node.output) == 1 and (value <= LOWEST or (value == 0 and positive))
    return value == 0 and (bool(at.get("count_include_pad")) or not any(own))


def del_attributes(node: onnx.NodeProto, *names: str) -> None:
    """Take attributes away."""
    for each in [each for each in node.attribute if each.name in names]:
        node.attribute.remove(each)


def _perm(graph: Graph, node: onnx.NodeProto) -> list[int]:
    return list(attributes_of(node).get("perm", range(len(graph.shape(node.input[0])))[::-1]))


def _is_cast_of_float(graph: Graph, node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Cast"
        and _is_float(graph, node.input[0])
        and attributes_of(node)["to"] == onnx.TensorProto.FLOAT
    )


def _two_classes(graph: Graph, logit: str) -> str:
    """Of one logit two scores, whose softmax is the sigmoid of it: "no" and "yes". Both depend on
    the image, so that either has a map.
    """
    halves = [
        graph.add("Mul", logit, graph.constant(half), hint="half_score") for half in (-0.5, 0.5)
    ]
    return graph.add("Concat", *halves, axis=1, hint="scores_two")


OTHER_OUTPUTS = {
    "boxes": "boxes",
    "bbox": "boxes",
    "bboxes": "boxes",
    "box": "boxes",
    "embedding": "an embedding",
    "embeddings": "an embedding",
    "landmarks": "landmarks",
    "keypoints": "keypoints",
}
"""What an output with such a name has in place of class scores."""
MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Dropout")


def check_classes(graph: Graph, output: str, scores: str, ends: Ends) -> None:
    """Refuse what is no vector of class scores, as far as its last operators show it.

    Args:
        graph: with all nodes.
        output: of the network.
        scores: the same before a last softmax or sigmoid.
        ends: of the file; an output that the user has chosen is taken whatever it is called. Where
            classes are named, a single number is a score, and so is what is normalized last.

    Raises:
        ModelError: it is something else; the text says what was seen.
    """
    name = ends.output_name
    found = OTHER_OUTPUTS.get(name.lower()) if ends.output_is_usual else None
    seen = f"its output is called {shown(name)}"
    node = _behind(graph, output)
    is_told = bool(ends.class_names) or not ends.output_is_usual
    if node is not None and found is None:
        one = math.prod(graph.shape(output)[1:]) == 1
        if node.op_type == "LpNormalization" or _divides_by_length(graph, node):
            found, seen = "an embedding", "its output is a vector of length 1"
        elif one and node.op_type in ("Relu", "Softplus", "Exp", "Tanh", "Clip"):
            found, seen = "a measured number", f"its output is one number behind {node.op_type}"
        elif node.op_type == "Tanh":
            found, seen = "measured numbers", "its output ends in Tanh"
        elif output == scores and _is_pooled_sum(graph, node):
            found, seen = "features", "no linear layer makes its output of its last map"
        elif node.op_type == "BatchNormalization" and not is_told:
            raise ModelError(
                "the model's output is normalized last, as that of an embedding is: if it scores"
                " classes, name these",
                option="labels",
            )
        elif one and output == scores and not is_told:
            raise ModelError(
                "the model gives one number without a sigmoid, which may be a measured one (an age,"
                " a distance) or the score of a class: if it is a score, name the class",
                option="labels",
            )
    if found is not None:
        raise ModelError(f"the model gives {found}, not class scores: {seen}. Give a classifier")


def _behind(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The node that made the values of a tensor, whatever moved them since."""
    node = graph.producer(tensor)
    while node is not None and node.op_type in MOVES:
        node = graph.producer(node.input[0])
    return node


def _divides_by_length(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a vector is divided by its Euclidean length, or by that and a little."""
    if node.op_type != "Div":
        return False
    length = _behind(graph, node.input[1])
    while length is not None and length.op_type in ("Clip", "Max", "Add", "Expand", "Sqrt"):
        length = _behind(graph, length.input[0])
    made = length is not None and length.op_type in ("ReduceL2", "ReduceSumSquare", "ReduceSum")
    return made and _is_of(graph, str(length.input[0]), node.input[0])  # type: ignore[union-attr]


def _is_of(graph: Graph, tensor: str, vector: str) -> bool:
    """Whether a tensor is a vector or its square."""
    if tensor == vector:
        return True
    node = graph.producer(tensor)
    return node is not None and node.op_type in ("Mul", "Pow", "Abs") and node.input[0] == vector


def _is_pooled_sum(graph: Graph, node: onnx.NodeProto | None) -> bool:
    """Whether values are means over a map that a block with a shortcut made, or tokens that were
    normalised last.
    """
    if node is not None and node.op_type in ("LayerNormalization", "Gather", "Slice"):
        inner = node if node.op_type == "LayerNormalization" else _behind(graph, node.input[0])
        return inner is not None and inner.op_type == "LayerNormalization"
    if node is None or node.op_type not in ("GlobalAveragePool", "ReduceMean", "AveragePool"):
        return False
    inner = _behind(graph, node.input[0])
    if inner is not None and inner.op_type in ("Relu", "LayerNormalization"):
        if inner.op_type == "LayerNormalization":
            return True
        inner = _behind(graph, inner.input[0])
    tensors = () if inner is None or inner.op_type != "Add" else inner.input
    return bool(tensors) and all(graph.producer(name) is not None for name in tensors)


def _is_float(graph: Graph, tensor: str) -> bool:
    return tensor in graph.types and graph.types[tensor].elem == onnx.TensorProto.FLOAT


def _checked_size(graph: Graph, x_nchw: str, node: onnx.NodeProto, before: int) -> int:
    """How many values a node writes.

    Raises:
        ModelError: so many that no classifier of such images has them; nothing was allocated for
            them yet.
    """
    images, _, height, width = graph.shape(x_nchw)
    written = sum(math.prod(graph.shape(name)) for name in node.output if name)
    most = images * max(MOST_VALUES, MOST_VALUES_A_PIXEL * height * width)
    together = images * max(MOST_TOGETHER, MOST_TOGETHER_A_PIXEL * height * width)
    if written > most or before + written > together:
        raise ModelError(
            f"node '{node.name or node.output[0]}' ({node.op_type}) writes {written:,} values after"
            f" {before:,} before it: more than a classifier of such images needs"
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
        raise ModelError(
            "the model's output is no vector of class scores for each image: its shape is"
            f" {list(shape)}"
        )
    if len(shape) == 2:
        return scores
    if sum(length != 1 for length in shape[1:]) > 1:
        raise ModelError(
            f"the model's output has the shape {list(shape)}, which is no vector of class scores:"
            " is it a detector or a segmentation network? Give a classifier"
        )
    return graph.add(
        "Reshape", scores, graph.constant([shape[0], -1], np.int64), hint="scores_flat"
    )


def _before_activation(graph: Graph, scores: str) -> tuple[str, bool]:
    """(raw scores, whether the classes are independent of each other): a final softmax or sigmoid
    would flatten the gradient of a confident class.
    """
    node = graph.producer(scores)
    while node is not None and node.op_type in ("Reshape", "Flatten", "Squeeze", "Identity"):
        node = graph.producer(node.input[0])
    if node is not None and node.op_type in ("Softmax", "LogSoftmax", "Sigmoid"):
        return str(node.input[0]), node.op_type == "Sigmoid"
    return scores, False
