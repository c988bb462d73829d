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

import onnx

from engines.errors import ModelError
from engines.graph import FLOAT, OPSET, Graph, needed
from engines.networks.network import Network
from engines.networks.onnx_ends import Ends
from engines.networks.onnx_file import OnnxFile, read_onnx
from engines.networks.onnx_replay import Layout, replay, replay_simplified
from engines.networks.preprocessing import GivenInput, Preprocessing

IMAGENET_CLASSES = 1000
IMAGENET_NAMES = "nothing names its classes: as there are 1,000, ImageNet's names are assumed"
ONE_LOGIT = "one score, taken as that of a class against its opposite"
NAMELESS = "nothing names its {count} outputs: they are taken as scores of classes"
STAGES_OF_TOKENS = 4
"""A network of one resolution has its stages at so many even depths."""
EXTRA_TOKENS = (0, 1, 2, 5)
"""Tokens that are no cells: none, a class token, one for distillation beside it, four registers."""


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
        if node.op_type == "Pad":  # is no map of its own: it goes into the convolution behind it
            continue
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
    image = graph.input("image", FLOAT, (found.images, 3, side, side))
    try:
        written = replay(graph, found, image)
    except ModelError as error:
        if size_px in (None, ends.side_px) or not ends.side_px:
            raise
        raise ModelError(
            f"{path.name} was exported for images of {ends.side_px} px and does not take"
            f" {size_px} px: {error}",
            option="size_px",
        ) from error
    plain = written.forward
    names = _checked_names(path, ends, graph.shape(plain.scores)[1])
    count = graph.shape(plain.scores)[1]
    nameless = IMAGENET_NAMES if count == IMAGENET_CLASSES else NAMELESS.format(count=count)
    assumed = [] if names or written.is_one_logit else [nameless]
    one = [ONE_LOGIT] if written.is_one_logit else []
    stages = stages_of(graph, image, plain.scores, plain.layers)
    name = name or path.name
    network = Network(
        name,
        lambda graph, x_nchw, _: replay_simplified(
            graph, found, x_nchw, stages.layouts, stages.last, written.shapes
        ),
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
        notes=tuple(
            f"{name}: {note}" for note in (said, *ends.notes, *found.notes, *one, *assumed)
        ),
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
