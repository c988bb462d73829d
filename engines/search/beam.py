"""Beam search over the last feature map: finds the crops that the classifier's last layers score
highest for a class.

After Bency, Kwon, Lee, Karthikeyan & Manjunath, "Weakly Supervised Localization using Deep Feature
Maps" (ECCV 2016), with one pass through the convolutions, maps from before the last pool, and
stretched maps that are cut again. The paper's own steps are ``engines.search.beam_published``.
The image goes through the convolutions once. A candidate is a rectangle of the L x L
map, stretched back to L x L by bilinear interpolation and classified; its children are a cell
narrower or a cell lower, and are stretched in turn; the best ``beam`` of a level go on. Where the
best candidates lie is a heat map, and its blobs are the objects.

Stretching is linear and separable, so that a candidate is two ``[L, L]`` matrices, a child their
product with a step's, and a
level one engine call: ``rows @ map @ columns^T`` for all candidates, then the classifier layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from engines.boxes import blobs, box_of, iou
from engines.build import (
    WANTED_CLASS,
    append_chosen_class,
    append_preprocessing,
    append_probabilities,
    stamp,
)
from engines.engine import Array, Compile, CompoundEngine, Engine, Found
from engines.errors import ModelError
from engines.graph import FLOAT, INT64, Graph, needed
from engines.maps import MapSpec
from engines.networks.network import Forward
from engines.networks.registry import Classifier, known_layer

FEATURES, ROWS, COLUMNS = "features", "rows", "columns"
BESIDE = "beside_"
HEAT_SIDE = 64
CLASSES_OF_SEVERAL = 2
"""Of the likeliest classes, how many are searched for where several objects are wanted."""
Edges = tuple[float, float, float, float]


@dataclass(frozen=True)
class BeamSettings:
    """What the paper leaves open was chosen on training splits, see ``docs/methods.md``.

    Attributes:
        layer: the feature map; None for the network's own.
        beam: candidates that go on from each level, the paper's M.
        levels: how often candidates are cut, the paper's H.
        threshold: share of the heat map's maximum from which on a place belongs to an object.
        objects: at most so many.
        classes: of the image's likeliest classes, how many are searched for where none is named.
        least_share: of the likeliest class's probability that another must have to be searched for;
            of the first heat map's maximum that a repeated search must reach.
        overlap: IoU from which on the weaker of two boxes is dropped.
    """

    layer: str | None = None
    beam: int = 8
    levels: int = 10
    threshold: float = 0.3
    objects: int = 1
    classes: int = 1
    least_share: float = 0.2
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if (
            min(self.beam, self.levels, self.objects, self.classes) < 1
            or not 0 < self.threshold <= 1
        ):
            raise ModelError(
                "beam search takes at least one candidate, level, object and class, and a share,"
                f" not {self}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        where = self.layer or "the last layer"
        return (
            f"beam: M {self.beam}, H {self.levels}, at {where}, heat over {self.threshold:g} of"
            " the top"
        )


def beam_settings(objects: int = 1, layer: str | None = None) -> BeamSettings:
    """The usual settings for so many objects, at the network's usual layer or at another."""
    classes = 1 if objects == 1 else CLASSES_OF_SEVERAL
    return BeamSettings(objects=objects, classes=classes, layer=layer)


@dataclass(frozen=True)
class Candidate:
    """A rectangle of the feature map.

    Attributes:
        rows, columns: ``[L, L]`` each: the candidate is ``rows @ map @ columns^T``.
        edges: x0, y0, x1, y1 in 0..1 of the map.
    """

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    edges: Edges = (0.0, 0.0, 1.0, 1.0)


class BeamEngine(CompoundEngine):
    """See ``CompoundEngine``.

    Args:
        classifier: the network.
        settings: the algorithm's.
        compiled: compiles a graph.

    Raises:
        EngineError: the network has no such layer.
        ModelError: a graph cannot be built, or the feature map is not square.
    """

    def __init__(self, classifier: Classifier, settings: BeamSettings, compiled: Compile) -> None:
        self._settings = settings
        features = build_features_graph(classifier, settings)
        self._tail: Engine = compiled(build_tail_graph(classifier, settings))
        metadata = {p.key: p.value for p in features.metadata_props}
        super().__init__(
            compiled(features), [self._tail], (HEAT_SIDE, HEAT_SIDE), settings.objects, metadata
        )

    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """See ``CompoundEngine.search``; the map is the first heat map of the class that was found
        first.

        Objects that touch share a blob. So where more are wanted, the search is repeated with the
        cells of those found set to zero, as often as it takes (not in the paper).
        """
        index, settings = int(outputs["class_index"][0]), self._settings
        classes = (
            [index]
            if int(feeds[WANTED_CLASS][0]) >= 0
            else wanted_classes(outputs["probabilities"][0], settings)
        )
        features, found = np.array(outputs[FEATURES]), list[Found]()
        beside = {name: value for name, value in outputs.items() if name.startswith(BESIDE)}
        heat: dict[int, NDArray[np.float64]] = {}
        least = dict.fromkeys(classes, -1.0)  # the first search always counts
        while classes and len(found) < settings.objects:
            before = len(found)
            for each, ranked in self._beams({FEATURES: features, **beside}, classes).items():
                now = heat_map(ranked)
                if now.max() > least[each]:
                    heat.setdefault(each, now)
                    least[each] = max(least[each], settings.least_share * float(now.max()))
                    found = without_overlaps(
                        [*found, *objects_in(now, each, settings.threshold)], settings.overlap
                    )
            if len(found) == before:
                break
            features = without_cells(features, found)
        return found, heat[found[0].class_index].astype(np.float32)

    def _beams(
        self, image: Mapping[str, Array], classes: Sequence[int]
    ) -> dict[int, list[tuple[Candidate, float]]]:
        """For each class every candidate that was kept at some level, with its score; all classes
        in one call a level.
        """
        side, most = image[FEATURES].shape[2], self._settings.beam
        ranked: dict[int, list[tuple[Candidate, float]]] = {each: [] for each in classes}
        waiting = {each: first_candidates(side) for each in classes}
        for level in range(self._settings.levels):
            together = [candidate for each in classes for candidate in waiting[each]]
            scores, place = self._scores(image, together), 0
            for each in classes:
                mine = scores[place : place + len(waiting[each]), each]
                order = np.argsort(-mine, kind="stable")[:most]
                best = [(waiting[each][i], float(mine[i])) for i in order]
                place += len(waiting[each])
                ranked[each] += best
                if level + 1 < self._settings.levels:
                    waiting[each] = distinct(
                        child for candidate, _ in best for child in children(candidate)
                    )
        return ranked

    def _scores(
        self, image: Mapping[str, Array], candidates: Sequence[Candidate]
    ) -> NDArray[np.float32]:
        """Probabilities ``[candidates, classes]``; the call's batch is filled up with the last
        candidate.
        """
        batch = next(spec.shape[0] for spec in self._tail.inputs if spec.name == ROWS)
        padded = [*candidates, *[candidates[-1]] * (batch - len(candidates))]
        rows, columns = (
            np.stack([c.rows for c in padded])[:, None],
            np.stack([c.columns for c in padded])[:, None],
        )
        found = self.ask(self._tail, {**image, ROWS: rows, COLUMNS: columns})["scores"]
        return np.asarray(found[: len(candidates)])


class Where(Protocol):
    """What a graph of features takes of a search's settings."""

    @property
    def layer(self) -> str | None:
        """The feature map; None for the network's own."""

    @property
    def digest(self) -> str:
        """What decides the boxes, in words."""


def build_features_graph(classifier: Classifier, settings: Where) -> onnx.ModelProto:
    """Image, wanted class in; ``class_index``, ``score``, ``probabilities`` ``[1, classes]``,
    ``features`` ``[1, C, L, L]``; and as ``beside_0`` ... what the layers behind read besides, such
    as a class token.
    """
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    wanted = graph.input(WANTED_CLASS, INT64, (1,))
    forward = classifier.append(graph, x)
    class_index, score = append_chosen_class(graph, forward, wanted)
    layer = known_layer(classifier, forward, classifier.network.beam_layer, settings.layer)
    features = forward.layers[layer]
    if graph.shape(features)[2] != graph.shape(features)[3] or graph.shape(features)[2] < 2:
        raise ModelError(
            f"beam search cuts a square map of at least 2 x 2, not {layer},"
            f" {list(graph.shape(features))}"
        )
    probabilities = append_probabilities(graph, forward, "image_probabilities")
    named = {
        "class_index": class_index,
        "score": score,
        "probabilities": probabilities,
        FEATURES: features,
        **dict(_behind(graph, features, forward.scores)[1]),
    }
    for name, tensor in named.items():
        graph.output(tensor, name)
    return graph.model(
        stamp(classifier, MapSpec(), None, None, graph.shape(forward.scores)[1], settings.digest)
    )


def build_tail_graph(classifier: Classifier, settings: BeamSettings) -> onnx.ModelProto:
    """``features`` ``[1, C, L, L]``, what lies ``beside`` them, and ``rows`` and ``columns``
    ``[B, 1, L, L]`` in; ``scores`` ``[B, classes]`` out.

    B is what a level takes at most: four children of each candidate of the beam, of each class; or
        the nine of the first.
    """
    batch = settings.classes * max(9, 4 * settings.beam)
    whole = Graph()
    forward = classifier.append(
        whole, whole.input("x", FLOAT, (batch, 3, classifier.size_px, classifier.size_px))
    )
    layer = known_layer(classifier, forward, classifier.network.beam_layer, settings.layer)
    cut = forward.layers[layer]
    _, channels, side, _ = whole.shape(cut)
    graph = Graph()
    features = graph.input(FEATURES, FLOAT, (1, channels, side, side))
    rows, columns = (graph.input(name, FLOAT, (batch, 1, side, side)) for name in (ROWS, COLUMNS))
    tall = graph.add("MatMul", rows, features, hint="stretched_rows")
    across = graph.add("Transpose", columns, perm=[0, 1, 3, 2], hint="columns_transposed")
    graph.append(helper.make_node("MatMul", [tall, across], [cut], name=cut))
    append_tail(graph, whole, forward, cut, batch)
    return graph.model()


def append_tail(graph: Graph, whole: Graph, forward: Forward, cut: str, batch: int) -> None:
    """What leads from the tensor ``cut``, which ``graph`` has, to the output ``scores``
    ``[B, classes]``, which are probabilities.

    Args:
        graph: appended to; it gains an input for everything else that is read of the image.
        whole: the network's graph for ``batch`` images, which is copied from.
        forward: its landmarks.
        cut: the feature maps in both graphs.
        batch: B.
    """
    nodes, beside = _behind(whole, cut, forward.scores)
    for name, tensor in beside:
        shape = whole.shape(tensor)
        one = graph.input(name, whole.types[tensor].elem, (shape[0] // batch, *shape[1:]))
        graph.append(helper.make_node("Concat", [one] * batch, [tensor], name=tensor, axis=0))
    for node in nodes:
        for name in node.input:
            if name in whole.constants:
                graph.keep_constant(name, whole.constants[name])
        graph.append(node)
    graph.output(append_probabilities(graph, forward, "probabilities"), "scores")


def _behind(
    graph: Graph, start: str, end: str
) -> tuple[list[onnx.NodeProto], list[tuple[str, str]]]:
    """(the nodes that lead from ``start`` to ``end``, in their order; name and tensor of everything
    else that they read of the image).
    """
    reached, kept = {start}, []
    for node in needed(graph.nodes, [end]):
        if reached.intersection(node.input):
            kept.append(node)
            reached.update(node.output)
    read = dict.fromkeys(name for node in kept for name in node.input if name)
    beside = [name for name in read if name not in reached and name not in graph.constants]
    return kept, [(f"{BESIDE}{place}", name) for place, name in enumerate(beside)]


@cache
def stretch(side: int, start: int, length: int) -> NDArray[np.float32]:
    """``[side, side]``: bilinear interpolation of ``length`` cells from ``start`` on to ``side``
    cells.

    Cell i of the result is centred at (i + 1/2) * length / side of the stretch; beyond the
    outermost centres nothing changes.
    """
    centres = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, length - 1)
    matrix = np.zeros((side, side), np.float64)
    matrix[np.arange(side), start + low] += 1 - (centres - low)
    matrix[np.arange(side), start + high] += centres - low
    return matrix.astype(np.float32)


def cut(candidate: Candidate, x: tuple[int, int], y: tuple[int, int]) -> Candidate:
    """The part of a candidate of (start, length) cells along each axis, stretched again."""
    side = len(candidate.rows)
    x0, y0, x1, y1 = candidate.edges
    width, height = (x1 - x0) / side, (y1 - y0) / side
    edges = (x0 + x[0] * width, y0 + y[0] * height, x0 + sum(x) * width, y0 + sum(y) * height)
    rows, columns = stretch(side, *y) @ candidate.rows, stretch(side, *x) @ candidate.columns
    return Candidate(rows, columns, edges)


def first_candidates(side: int) -> list[Candidate]:
    """Width and height in {L - 1, L} at every place: the whole map first, nine in all."""
    whole = Candidate(np.eye(side, dtype=np.float32), np.eye(side, dtype=np.float32))
    places = ((0, side), (0, side - 1), (1, side - 1))
    return [cut(whole, x, y) for y in places for x in places]


def children(candidate: Candidate) -> list[Candidate]:
    """A cell less at the left, right, top or bottom: they differ from it in width or height, not in
    both.
    """
    side = len(candidate.rows)
    whole, cuts = (0, side), ((0, side - 1), (1, side - 1))
    return [cut(candidate, x, whole) for x in cuts] + [cut(candidate, whole, y) for y in cuts]


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """One of each rectangle: two parents may share a child, which would else take two places in the
    beam.
    """
    return list(
        {tuple(round(edge, 6) for edge in each.edges): each for each in candidates}.values()
    )


def wanted_classes(probabilities: NDArray[np.float32], settings: BeamSettings) -> list[int]:
    """The likeliest classes, as many as are searched for, those that are unlikely beside the first
    left out.
    """
    order = np.argsort(-probabilities, kind="stable")[: settings.classes]
    return [
        int(i) for i in order if probabilities[i] >= settings.least_share * probabilities[order[0]]
    ]


def heat_map(ranked: Sequence[tuple[Candidate, float]]) -> NDArray[np.float64]:
    """At each place of the image the summed scores of the candidates that cover it, over how many
    there are: ``[64, 64]``.
    """
    return summed([(candidate.edges, score) for candidate, score in ranked]) / len(ranked)


def summed(ranked: Sequence[tuple[Edges, float]], side: int = HEAT_SIDE) -> NDArray[np.float64]:
    """At each place of the image the sum of the scores of the rectangles that cover it:
    ``[side, side]``.
    """
    centres = (np.arange(side) + 0.5) / side
    heat = np.zeros((side, side))
    for (x0, y0, x1, y1), score in ranked:
        heat += score * np.outer((centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1))
    return heat


def objects_in(heat: NDArray[np.float64], class_index: int, threshold: float) -> list[Found]:
    """The blobs of what is at or over ``threshold`` of the maximum, each scored by its mean heat,
    best first.
    """
    hot = heat >= threshold * heat.max()
    found = [
        Found(tuple(box_of(blob)), class_index, float(heat[blob].mean())) for blob in blobs(hot)
    ]
    return sorted(found, key=lambda each: -each.score)


def without_cells(features: Array, found: Sequence[Found]) -> Array:
    """The feature map ``[1, C, L, L]`` with the cells whose centres lie in a found box set to
    zero.
    """
    centres = (np.arange(features.shape[2]) + 0.5) / features.shape[2]
    kept = np.ones(features.shape[2:], np.bool_)
    for x0, y0, x1, y1 in (each.box_xyxy for each in found):
        kept &= ~np.outer((centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1))
    return np.asarray(features * kept.astype(features.dtype))


def without_overlaps(found: Sequence[Found], overlap: float) -> list[Found]:
    """Best first, without those whose box is mostly that of a better one: two classes may name one
    object.
    """
    kept: list[Found] = []
    for each in sorted(found, key=lambda each: -each.score):
        if all(iou(each.box_xyxy, other.box_xyxy) < overlap for other in kept):
            kept.append(each)
    return kept
