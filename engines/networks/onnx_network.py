"""A foreign classifier as a network: its forward graph, and its stages, found by looking at it.

A stage's map is the last tensor of its resolution that all later ones depend on: nothing goes past
it. Networks that keep channels last, or cells as a row of tokens, hold such maps in another layout.
They are turned to ``[N, C, h, w]`` and back at that place.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import FLOAT, OPSET, Graph, attributes_of, needed
from engines.networks.network import Forward, Network
from engines.networks.onnx_batch import Images
from engines.networks.onnx_ends import Ends
from engines.networks.onnx_file import OnnxFile, read_onnx
from engines.networks.preprocessing import GivenInput, Preprocessing

MOST_VALUES, MOST_VALUES_A_PIXEL = 1 << 26, 512
"""Of one activation, for each image: whichever is more. VGG16 has 64 a pixel."""
MOST_TOGETHER, MOST_TOGETHER_A_PIXEL = 1 << 30, 20_000
"""Of all activations; EfficientNet-B7 has 2,000 a pixel, DenseNet-161 12,000."""
IMAGENET_CLASSES = 1000
IMAGENET_NAMES = "nothing names its classes: as there are 1,000, ImageNet's names are assumed"
STAGES_OF_TOKENS = 4
"""A network of one resolution has its stages at so many even depths."""
EXTRA_TOKENS = (0, 1, 2, 5)
"""Tokens that are no cells: none, a class token, one for distillation beside it, four registers."""


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


@dataclass(frozen=True)
class Stages:
    """Where maps are taken.

    Attributes:
        layers: names of the tensors in the file, one a stage, from the image to the scores.
        layouts: of each.
    """

    layers: tuple[str, ...]
    layouts: Mapping[str, Layout]

    @property
    def last(self) -> str:
        """The layer with the last map."""
        return self.layers[-1]


def stages_of(graph: Graph, image: str, scores: str, layers: Mapping[str, str]) -> Stages:
    """Look for the stages.

    Args:
        graph: the forward graph as the file has it.
        image: its input ``[N, 3, S, S]``.
        scores: its class scores.
        layers: the tensor of each name in the file.

    Raises:
        ModelError: the network has no map of 2 x 2 cells or more.
    """
    nodes = needed(graph.nodes, [scores])
    names = {tensor: name for name, tensor in layers.items()}
    seen, found = set[int](), list[tuple[int, str, Layout]]()
    cuts = set(_cuts(nodes, image))
    for place, node in enumerate(nodes):
        tensor = node.output[0]
        layout = _layout(graph.shape(tensor), seen)
        if layout is None:
            continue
        if layout.extra_tokens is None:
            seen.add(layout.side)
        if tensor in cuts and tensor in names:
            found.append((place, names[tensor], layout))
    found = _before_last_attention(nodes, found)
    convolved = [names[n.output[0]] for n in nodes if n.op_type == "Conv" and n.output[0] in names]
    if not found and convolved:  # of one cell: the map at the pixels is all there is
        return Stages((convolved[-1],), {convolved[-1]: Layout(1)})
    if not found:
        raise ModelError(
            "the network has no map: no tensor between image and scores has 2 x 2 cells or more"
        )
    chosen = _one_a_stage(found, graph.shape(image)[2])
    return Stages(tuple(name for name, _ in chosen), dict(chosen))


def _cuts(nodes: Sequence[onnx.NodeProto], image: str) -> list[str]:
    """The tensors that all later ones depend on: at their place in the order, nothing else of the
    image is read later.
    """
    last_read: dict[str, int] = {}
    for place, node in enumerate(nodes):
        last_read.update(dict.fromkeys(node.input, place))
    live, found = {image}, []
    for place, node in enumerate(nodes):
        if live.intersection(node.input):
            live.update(name for name in node.output if last_read.get(name, -1) > place)
        live = {name for name in live if last_read.get(name, -1) > place}
        if live == {node.output[0]}:
            found.append(node.output[0])
    return found


def _layout(shape: Sequence[int], seen: set[int]) -> Layout | None:
    """How a tensor of this shape holds a map of 2 x 2 cells or more; None where it does not."""
    if len(shape) == 4 and shape[2] == shape[3] > 1:
        return Layout(shape[2])
    if len(shape) == 4 and shape[1] == shape[2] > 1:
        return Layout(shape[1], channels_last=True)
    if len(shape) == 3:
        for extra in EXTRA_TOKENS:
            side = math.isqrt(max(shape[1] - extra, 0))
            if side > 1 and side * side == shape[1] - extra and (side in seen or not extra):
                return Layout(side, extra_tokens=extra)
    return None


def _before_last_attention(
    nodes: Sequence[onnx.NodeProto], found: list[tuple[int, str, Layout]]
) -> list[tuple[int, str, Layout]]:
    """Without the maps behind the last attention, where the scores are read off a class token: they
    depend on no cell of those.
    """
    attention = [place for place, node in enumerate(nodes) if node.op_type == "Softmax"]
    if not attention or not found or not found[-1][2].extra_tokens:
        return found
    return [each for each in found if each[0] < attention[-1]]


def _one_a_stage(
    found: Sequence[tuple[int, str, Layout]], image_side: int
) -> list[tuple[str, Layout]]:
    """The last map of each resolution below the image's; of one resolution several.

    A map that is coarser than a later one is no stage: patches are cut out of an image by way of
    such tensors.
    """
    kept = list[tuple[str, Layout]]()
    for _, name, layout in reversed(found):
        if not kept or layout.side >= kept[-1][1].side:
            kept.append((name, layout))
    kept = [pair for pair in kept if pair[1].side < image_side][::-1] or kept[::-1]
    if len({layout.side for _, layout in kept}) == 1:
        count = min(STAGES_OF_TOKENS, len(kept))
        return [kept[round((i + 1) * len(kept) / count) - 1] for i in range(count)]
    return list({layout.side: (name, layout) for name, layout in kept}.values())


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


def network_of_file(
    path: Path,
    size_px: int | None = None,
    given: GivenInput = GivenInput(),
    name: str | None = None,
) -> tuple[Network, str]:
    """Read a classifier with one image input and class scores.

    Args:
        path: of the file.
        size_px: side of the input that it is used at; its own, or the usual one, when None.
        given: what the user says of its input and output.
        name: of the network; the file's when None.

    Returns:
        (its record; its digest, see ``OnnxFile``).

    Raises:
        ModelError: not an ONNX model, not one image in and one score vector out, or one that cannot
            be used.
        InputError: what the user says contradicts itself.
    """
    found = read_onnx(path, OPSET, given)
    ends = found.ends
    side = size_px or ends.side_px or Network.size_px
    given_side = {"side": "as given"} if size_px not in (None, ends.side_px) else {}
    origins = {**ends.origins, **given_side}
    said = f"its input: {ends.preprocessing.describe(side, origins)}"
    graph = Graph()
    image = graph.input("image", FLOAT, (1, 3, side, side))
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        plain = _replay(graph, found, image, shapes=shapes)
    except ModelError as error:
        if size_px in (None, ends.side_px) or not ends.side_px:
            raise
        raise ModelError(
            f"{path.name} was exported for images of {ends.side_px} px and does not take"
            f" {size_px} px: {error}",
            option="size_px",
        ) from error
    names = _checked_names(path, ends, graph.shape(plain.scores)[1])
    assumed = [] if names or graph.shape(plain.scores)[1] != IMAGENET_CLASSES else [IMAGENET_NAMES]
    stages = stages_of(graph, image, plain.scores, plain.layers)
    name = name or path.name
    network = Network(
        name,
        lambda graph, x_nchw, _: _replay(graph, found, x_nchw, stages, shapes=shapes),
        dict,
        ends.preprocessing,
        ends.side_px or Network.size_px,
        last_layer=stages.last,
        box_layer=stages.layers[-2:][0],
        box_signal="layercam",
        dam_layer=stages.layers[-2:][0],
        beam_layer=stages.last,
        head_layers=stages.layers,
        head_cam_layers=stages.layers[-3:],
        class_names=names,
        notes=tuple(f"{name}: {note}" for note in (said, *ends.notes, *assumed)),
    )
    as_before = plain.layers[stages.last] == _last_convolution(graph)
    return network, _digest(found, as_before)


def _checked_names(path: Path, ends: Ends, classes: int) -> tuple[str, ...]:
    """The names of the classes; of one logit with one name, that and its opposite.

    Raises:
        ModelError: there are more or fewer of them than classes.
    """
    names = ends.class_names
    if len(names) == 1 and classes == 2:
        return f"not {names[0]}", names[0]
    if names and len(names) != classes:
        raise ModelError(
            f"{path} scores {classes:,} classes, and {ends.names_from} names {len(names):,}: give a"
            " file of labels with as many",
            option="labels",
        )
    return names


def _digest(file: OnnxFile, as_before: bool) -> str:
    """Of the file; and of its preprocessing, its output and its last map, where an older version
    took others: what was fitted then is refused.
    """
    ends = file.ends
    if as_before and ends.preprocessing == Preprocessing() and ends.output_is_usual:
        return file.digest
    parts = [file.digest, ends.preprocessing.stored(), as_before]
    said = json.dumps(parts if ends.output_is_usual else [*parts, ends.output_name])
    return hashlib.sha256(said.encode()).hexdigest()


def _last_convolution(graph: Graph) -> str | None:
    """What an older version took for the last map: the last convolution, behind its ReLU."""
    convolutions = [node.output[0] for node in graph.nodes if node.op_type == "Conv"]
    readers = [node for node in graph.nodes if convolutions and convolutions[-1] in node.input]
    if len(readers) == 1 and readers[0].op_type == "Relu":
        return str(readers[0].output[0])
    return convolutions[-1] if convolutions else None


def _replay(
    graph: Graph,
    file: OnnxFile,
    x_nchw: str,
    stages: Stages | None = None,
    *,
    shapes: dict[str, tuple[int, ...]],
) -> Forward:
    """Append the file's nodes under names of our own, so that they cannot clash with ours; the maps
    of its stages are turned to ``[N, C, h, w]`` where they are not.

    Args:
        graph: appended to.
        file: the network.
        x_nchw: its input.
        stages: where maps are taken.
        shapes: of the file's tensors for one image: noted where the images are one, and else read.
    """
    layouts = stages.layouts if stages else {}
    images = Images(graph, x_nchw, shapes) if graph.shape(x_nchw)[0] > 1 else None
    names = {"": "", file.ends.input_name: x_nchw}
    if file.ends.channels_last:
        last = graph.add("Transpose", x_nchw, perm=[0, 2, 3, 1], hint="x_nhwc")
        names[file.ends.input_name] = last
        if images:
            images.add(last, 0)
    names.update(
        {
            name: graph.constant(value, value.dtype, hint=name)
            for name, value in file.constants.items()
        }
    )
    layers: dict[str, str] = {}
    together = 0
    for original in file.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for i, name in enumerate(original.input):
            node.input[i] = names.get(name, name)
        for i, name in enumerate(original.output):
            names[name] = node.output[i] = graph.fresh(name) if name else ""
        if (
            node.op_type == "Cast"
            and _is_float(graph, node.input[0])
            and attributes_of(node)["to"] == onnx.TensorProto.FLOAT
        ):
            node.op_type = (  # a network in float16 casts to and fro; here all of it is float32
                "Identity"
            )
            del node.attribute[:]
        if _takes_all(graph, node, original, shapes):  # what lies in another order is written so
            shape = graph.constant(graph.shape(node.input[1]), np.int64)
            node.CopyFrom(onnx.helper.make_node("Reshape", [node.input[0], shape], node.output))
        if images:
            images.prepare(node, original)
        if node.op_type == "LRN":
            _append_lrn(graph, node)
        elif _turns_back(graph, node):
            names[original.output[0]] = graph.producer(node.input[0]).input[0]  # type: ignore[union-attr]
            continue
        else:
            graph.append(node)
        if images:
            images.follow(node, original)
        else:
            pairs = zip(original.output, node.output, strict=True)
            shapes.update({theirs: graph.shape(ours) for theirs, ours in pairs if ours})
        together += _checked_size(graph, x_nchw, node, together)
        layers[original.output[0]] = node.output[0]
        layout = layouts.get(original.output[0])
        if layout is not None and layout.is_turned:
            turned, back = append_turned(graph, node.output[0], layout, node.output[0])
            layers[original.output[0]], names[original.output[0]] = turned, back
            if images:
                images.add(back, 0)
    scores, independent = _before_activation(graph, names[file.ends.output_name])
    scores = _checked_scores(graph, scores, x_nchw)
    if graph.shape(scores)[1] == 1:
        scores = _two_classes(graph, scores)
        independent = False
    last = layers[stages.last] if stages else scores
    return Forward(scores, last, layers, independent)


def _turns_back(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node turns channels-last values, which were just made of channels-first, back."""
    if node.op_type != "Transpose" or attributes_of(node).get("perm") != [0, 3, 1, 2]:
        return False
    before = graph.producer(node.input[0])
    return (
        before is not None
        and before.op_type == "Transpose"
        and attributes_of(before).get("perm") == [0, 2, 3, 1]
    )


def _takes_all(
    graph: Graph,
    node: onnx.NodeProto,
    original: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether a Gather takes every value of a vector in its order, and so is a Reshape."""
    if node.op_type != "Gather" or node.input[1] not in graph.constants:
        return False
    shape = shapes.get(original.input[0], ())
    places = graph.constants[node.input[1]].ravel()
    return len(shape) == 1 and np.array_equal(places, np.arange(shape[0]))


def _two_classes(graph: Graph, logit: str) -> str:
    """Of one logit two scores, whose softmax is the sigmoid of it: "no" and "yes"."""
    zero = graph.add("Mul", logit, graph.constant(0.0), hint="score_no")
    return graph.add("Concat", zero, logit, axis=1, hint="scores_two")


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


def _append_lrn(graph: Graph, node: onnx.NodeProto) -> None:
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
    factor = graph.constant(bias**-beta)
    graph.append(onnx.helper.make_node("Mul", [scaled, factor], list(node.output), name=node.name))


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
