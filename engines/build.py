"""Builds one checked ONNX graph from a classifier: pixels in; box, class, score and map out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx

from engines.dense import DenseHead, append_candidates
from engines.errors import ModelError
from engines.files import json_object
from engines.graph import FLOAT, INT64, UINT8, Graph
from engines.head import (
    Head,
    Heuristic,
    append_box,
    append_heuristic_box,
    is_fitted_on,
    with_classes_of,
)
from engines.int8 import Quantization, quantize
from engines.maps import Feature, MapSpec, append_features, append_maps
from engines.networks.network import Forward, Shape
from engines.networks.preprocessing import SQUASH, Preprocessing
from engines.networks.registry import Classifier, class_names
from engines.resizing import Resizing

WANTED_CLASS = "wanted_class"
FORMAT = 1
CANDIDATES = "candidates"
"""The output of a dense head, see ``engines.dense.append_candidates``."""
AnyHead = Head | Heuristic | DenseHead
"""What reads boxes: a fitted head of one box, the training-free one, or a fitted head of many."""


def build_graph(
    classifier: Classifier,
    spec: MapSpec | None = None,
    head: AnyHead | None = None,
    *,
    batch: int = 1,
    features: Sequence[Feature] = (),
    expose: Sequence[str] = (),
    quantization: Quantization | None = None,
) -> onnx.ModelProto:
    """Assemble the localization graph.

    Inputs: ``image_nhwc_bgr`` uint8 ``[N, R, S, 3]``; ``wanted_class`` int64 ``[N]``, -1 for the
        best-scoring class.
    Outputs: ``class_index`` int64 ``[N]``; ``score`` float32 ``[N]`` (softmax probability of that
        class); ``map`` float32
    ``[N, h, w]`` at ``spec.layer``; ``logit`` float32 ``[N]`` (the class's score before the
    softmax); with a head of one box ``box_xyxy`` float32 ``[N, 4]`` in 0..1 of width and height;
    with a dense head ``candidates``, see ``engines.dense.append_candidates``; with ``features``
    their values ``[N, D]``.

    Args:
        classifier: the network.
        spec: which map; the head's own when None, which is also the only one a head takes.
        head: fitted or training-free, reads the box; None for the map alone.
        batch: images per call.
        features: head inputs to publish, for fitting.
        expose: tensors to publish too, as ``NAME_out``: ``scores``, a layer's activations, any
            tensor of the graph.
        quantization: run in 8 bits what it says, see ``engines.int8``.

    Raises:
        ModelError: the head or the quantization belongs to another network, size or objective, or
            the graph cannot be built.
    """
    spec = spec or (head.spec if head else MapSpec())
    if head is not None:
        check_head(head, classifier, spec)
    assembled = assemble(classifier, spec, head, batch=batch, features=features, expose=expose)
    graph = assembled.graph
    if quantization is not None:
        check_quantization(quantization, classifier, spec)
        quantize(graph, quantization, assembled.exact)
    for name, tensor in assembled.outputs.items():
        graph.output(tensor, name)
    return graph.model(stamp(classifier, spec, head, quantization, assembled.classes))


@dataclass(frozen=True)
class Assembled:
    """A graph whose outputs are not declared yet.

    Attributes:
        graph: the nodes.
        outputs: tensor by the name it is to be published under.
        classes: how many the network has.
        exact: names of the nodes that always compute in floating point: those of a dense head,
            which are a few percent of the work, and measure lengths.
    """

    graph: Graph
    outputs: dict[str, str]
    classes: int
    exact: tuple[str, ...] = ()


def assemble(
    classifier: Classifier,
    spec: MapSpec,
    head: AnyHead | None = None,
    *,
    batch: int = 1,
    features: Sequence[Feature] = (),
    expose: Sequence[str] = (),
) -> Assembled:
    """Preprocessing, forward pass, backward pass, maps and head, in fp32; the arguments are those
    of ``build_graph``.
    """
    graph = Graph()
    pixels, normalised = append_preprocessing(
        graph, batch, classifier.shape, classifier.preprocessing
    )
    wanted = graph.input(WANTED_CLASS, INT64, (batch,))
    forward = classifier.append(graph, normalised)
    read_boxes, scored = dict[str, str](), forward
    exact: tuple[str, ...] = ()
    if isinstance(head, DenseHead):
        before = len(graph.nodes)
        read_boxes[CANDIDATES], image_scores = append_candidates(
            graph, forward, wanted, head, classifier.shape
        )
        exact = tuple(node.name for node in graph.nodes[before:])
        scored = replace(forward, scores=image_scores)
    if classifier.network.classless:
        class_index, score = append_no_class(graph, wanted)
        logit = score
    else:
        class_index, score = append_chosen_class(graph, scored, wanted)
        logit = append_picked(graph, scored.scores, class_index)
    head_features = head.features if isinstance(head, Head) else ()
    read = [(f.signal, f.layer) for f in (*head_features, *features)]
    maps = append_maps(
        graph, forward, pixels, class_index, spec, [(spec.signal, spec.layer), *read]
    )
    outputs = {
        "class_index": class_index,
        "score": score,
        "map": maps[spec.signal, spec.layer],
        "logit": logit,
        **read_boxes,
    }
    if isinstance(head, Head):
        outputs["box_xyxy"] = append_box(
            graph, append_features(graph, maps, head.features), class_index, head
        )
    elif isinstance(head, Heuristic):
        outputs["box_xyxy"] = append_heuristic_box(graph, maps[spec.signal, spec.layer], head)
    if features:
        outputs["features"] = append_features(graph, maps, features)
    for name in expose:
        outputs[f"{name}_out"] = {**forward.layers, "scores": forward.scores}.get(name, name)
    return Assembled(graph, outputs, graph.shape(forward.scores)[1], exact)


def check_head(head: AnyHead, classifier: Classifier, spec: MapSpec) -> None:
    """Raise ModelError unless the head was fitted on exactly this network, size and map; a dense
    head reads cells, of which there are more or fewer at another size.
    """
    remedy = "fit one for it with 'fit', or use head none"
    if isinstance(head, Head | DenseHead) and not is_fitted_on(head, classifier):
        changed, options = _other_input(head.card, classifier)
        raise ModelError(
            f"the head was fitted on another network than these '{classifier.name}' weights"
            f"{changed}; {remedy}",
            option=("head", *options),
        )
    if isinstance(head, Head) and head.size_px != classifier.size_px:
        raise ModelError(
            f"the head was fitted at {head.size_px} px, not {classifier.size_px}; {remedy}",
            option="head",
        )
    if head.spec != spec:
        raise ModelError(f"the head reads the map {head.spec}, not {spec}; {remedy}", option="head")


def check_quantization(quantization: Quantization, classifier: Classifier, spec: MapSpec) -> None:
    """Raise ModelError unless the ranges were measured on exactly this network, size and
    objective.
    """
    have = (quantization.network, quantization.size_px, quantization.objective)
    if have != (classifier.digest, classifier.size_px, spec.objective):
        raise ModelError(
            f"the int8 calibration is of another network, size or objective ({quantization.size_px}"
            f" px, {quantization.objective}) than this ({classifier.size_px} px, {spec.objective})"
            f"{_other_input(quantization.card, classifier)[0]}: run 'calibrate' for it"
        )


def _other_input(card: Mapping[str, object], classifier: Classifier) -> tuple[str, tuple[str, ...]]:
    """How the input of a head or calibration differs, in words, and the options of what differs;
    empty where it does not, or where its card does not say it.
    """
    before, now = Preprocessing.of_stored(card.get("input")), classifier.preprocessing
    if before is None or before == now:
        return "", ()
    parts = ("order", "mean", "std", "resize")
    options = tuple(name for name in parts if getattr(before, name) != getattr(now, name))
    return f", or on another input: it was {before.words}, and now is {now.words}", options


def stamp(
    classifier: Classifier,
    spec: MapSpec,
    head: AnyHead | None,
    quantization: Quantization | None,
    classes: int,
    search: str | None = None,
) -> dict[str, str]:
    """Metadata that lets an engine be trusted and its results be read; ``search`` says what finds
    boxes in place of a head.
    """
    names = classifier.class_names or class_names(classes)
    if len(names) != classes:
        raise ModelError(
            f"'{classifier.name}' scores {classes:,} classes, and there are names for"
            f" {len(names):,}: give a file of labels with as many",
            option="labels",
        )
    description: dict[str, Any] = {
        "format": FORMAT,
        "model": classifier.name,
        "network": classifier.digest,
        "size_px": classifier.size_px,
        "spec": asdict(spec),
        "head": head.digest if head else search,
        "quantization": quantization.digest if quantization else None,
        "constant_boxes": (
            head.card.get("constant_boxes") if isinstance(head, Head | DenseHead) else None
        ),
        "trust": (
            head.confidence_model.stored()
            if isinstance(head, Head) and head.confidence_model
            else None
        ),
    }
    if isinstance(head, DenseHead):
        head = with_classes_of(head, classifier)
        description["naming"] = head.naming.described() if head.naming else None
        description["shown_from"] = head.shown_from
    resizing = Resizing.of(classifier.preprocessing)
    if resizing.kind != SQUASH:
        description["resizing"] = asdict(resizing)
    return {"sightline": json.dumps(description), "class_names": json.dumps(names)}


def stamped(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description that ``stamp`` wrote.

    Raises:
        ModelError: the file is not one of ours, or of another format.
    """
    try:
        description = json_object(metadata["sightline"])
    except (KeyError, ValueError) as error:
        raise ModelError(
            "this ONNX file was not built by Sightline: build it with 'build'"
        ) from error
    if description.get("format") != FORMAT:
        raise ModelError(
            "this graph was built by another version of Sightline: build it again with 'build'"
        )
    return description


def append_chosen_class(graph: Graph, forward: Forward, wanted: str) -> tuple[str, str]:
    """(class index, its probability): the wanted class, or the arg-max where it is negative."""
    best = graph.add("ArgMax", forward.scores, axis=1, keepdims=0, hint="best_class")
    automatic = graph.add("Less", wanted, graph.constant(0, np.int64), hint="automatic")
    chosen = graph.add("Where", automatic, best, wanted, hint="chosen_class")
    return chosen, append_picked(graph, append_probabilities(graph, forward), chosen)


def append_no_class(graph: Graph, wanted: str) -> tuple[str, str]:
    """(class index, its probability) of a network that scores no classes: 0 and 0."""
    index = graph.add("Mul", wanted, graph.constant(0, np.int64), hint="no_class")
    return index, graph.add("Cast", index, to=FLOAT, hint="no_score")


def append_probabilities(graph: Graph, forward: Forward, hint: str = "probability") -> str:
    """Of all classes, ``[N, classes]``: their softmax, or where several may be right at once the
    sigmoid of each.
    """
    if forward.independent:
        return graph.add("Sigmoid", forward.scores, hint=hint)
    return graph.add("Softmax", forward.scores, axis=1, hint=hint)


def append_picked(graph: Graph, values: str, class_index: str) -> str:
    """Of values ``[N, classes]`` those of a class each: ``[N]``."""
    column = graph.add(
        "Unsqueeze", class_index, graph.constant([1], np.int64), hint="chosen_column"
    )
    picked = graph.add("GatherElements", values, column, axis=1, hint="chosen_value")
    return graph.add("Squeeze", picked, graph.constant([1], np.int64), hint="chosen_values")


IMAGE = "image_nhwc_bgr"


def append_preprocessing(
    graph: Graph, batch: int, shape: Shape, preprocessing: Preprocessing
) -> tuple[str, str]:
    """Declare the image input and append its normalisation.

    Args:
        graph: appended to.
        batch: images per call.
        shape: of the image, R rows and S columns.
        preprocessing: channel order, mean and standard deviation.

    Returns:
        (pixels, normalised): float32 ``[N, 3, R, S]`` in 0..255 and the network's channel order,
        which gradients "to the pixels" are taken by, and the network's input.
    """
    image = graph.input(IMAGE, UINT8, (batch, *shape, 3))
    pixels = graph.add(
        "Transpose", graph.add("Cast", image, to=FLOAT), perm=[0, 3, 1, 2], hint="pixels"
    )
    if preprocessing.order == "rgb":
        pixels = graph.add(
            "Gather", pixels, graph.constant([2, 1, 0], np.int64), axis=1, hint="pixels_rgb"
        )
    return pixels, append_normalised(graph, pixels, preprocessing)


def append_normalised(graph: Graph, pixels: str, preprocessing: Preprocessing) -> str:
    """Of pixels ``[N, 3, R, S]`` in the network's channel order, the network's input."""
    x = graph.add("Sub", pixels, _per_channel(graph, preprocessing.mean), hint="centred")
    if all(value == 1 for value in preprocessing.std):
        return x
    factors = _per_channel(graph, [1 / value for value in preprocessing.std])
    return graph.add("Mul", x, factors, hint="normalised")


def _per_channel(graph: Graph, values: tuple[float, ...] | list[float]) -> str:
    return graph.constant(np.reshape(values, (1, 3, 1, 1)))
