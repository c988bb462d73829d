"""Beam search as it was published: the class's best sub-grids of the pooled maps, level by level.

Bency, Kwon, Lee, Karthikeyan & Manjunath, "Weakly Supervised Localization using Deep Feature Maps"
(ECCV 2016), section 3. ``--method beam --as-published`` runs it; ``engines.search.beam`` is the
product's way.

1. Section 3.3: the maps are those behind the last convolution's pool, ``L x L x T``: 7 x 7 x 512 in
   VGG16, 6 x 6 x 256 in AlexNet. A candidate is a sub-grid of them. It is stretched to ``L x L`` by
   bilinear interpolation, each map by itself, and the fully connected layers give its softmax
   scores.
2. Section 3.4, equation 6: the children of a node are a cell narrower or a cell lower, not both. Of
   a level's children the best ``beam`` go on; there are ``levels``.
3. What a node's own maps are can be read in two ways, and both are here (``Reading``). Section 3.3,
   equation 5: the image is cut at the node's box and goes through the convolutions again. Section
   3.4: a node is a sub-grid of the image's own grid. Equation 6 counts that grid's cells, and only
   then has the tree leaves.
4. Section 3.4: the boxes that were kept at all levels are summed with their scores, which is the
   heat map of the class. It is cut at a threshold, which is the class's own; the rectangles around
   its blobs are the detections, and the mean heat in a rectangle is its score. The paper does not
   say what the threshold is of; here it is a share of the heat map's maximum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from engines.boxes import blobs, box_of
from engines.build import IMAGE, WANTED_CLASS, append_preprocessing
from engines.engine import Array, Compile, CompoundEngine, Engine, Found, TensorSpec
from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.networks.registry import Classifier, known_layer
from engines.options import EngineOptions
from engines.resizing import resized
from engines.search.beam import (
    FEATURES,
    BeamSettings,
    Edges,
    append_tail,
    beam_settings,
    build_features_graph,
    stretch,
    summed,
    wanted_classes,
)
from engines.search.crops import ENLARGED, cropped

WHOLE: Edges = (0.0, 0.0, 1.0, 1.0)
Scores = NDArray[np.float32]
Classify = Callable[[Array], Scores]
"""From maps ``[n, C, L, L]`` to the probabilities of classes, ``[n, classes]``."""


class Reading(StrEnum):
    """What the maps of a node are, see the module."""

    CROPS = "crops"
    GRID = "grid"


@dataclass(frozen=True)
class PublishedBeamSettings:
    """The algorithm's, with the values of section 3.4.

    Attributes:
        layer: the pooled maps; None for the network's own.
        reading: what a node's maps are.
        beam: candidates that go on from each level, the paper's M.
        levels: of the tree, the paper's H.
        threshold: share of a heat map's maximum from which on a place belongs to an object.
        thresholds: the same for some classes, by index.
        objects: at most so many.
        classes: of the image's likeliest classes, how many are searched for where none is named.
    """

    layer: str | None = None
    reading: Reading = Reading.CROPS
    beam: int = 8
    levels: int = 10
    threshold: float = 0.5
    thresholds: Mapping[int, float] = field(default_factory=dict)
    objects: int = 1
    classes: int = 1

    def __post_init__(self) -> None:
        shares = (self.threshold, *self.thresholds.values())
        if min(self.beam, self.levels, self.objects, self.classes) < 1 or not all(
            0 < share <= 1 for share in shares
        ):
            raise ModelError(
                "beam search takes at least one candidate, level, object and class, and shares,"
                f" not {self}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        where = self.layer or "the last pool"
        return (
            f"beam as published: M {self.beam}, H {self.levels}, {self.reading} at {where}, heat"
            f" over {self.threshold:g} of the top"
        )


class Grid:
    """The tree of sub-grids of one image's maps (section 3.4).

    Args:
        maps: of the image, ``[C, L, L]``.
        classify: scores stretched sub-grids.

    A sub-grid is scored once, for all classes and parents.
    """

    def __init__(self, maps: Array, classify: Classify) -> None:
        self._maps, self._classify = np.asarray(maps, np.float32), classify
        self._known: dict[Edges, Scores] = {}
        side = self._maps.shape[-1]
        spans = [(start, stop) for start in range(side) for stop in range(start + 1, side + 1)]
        self._cells: dict[tuple[int, ...], Edges] = {
            (x0, y0, x1, y1): (x0 / side, y0 / side, x1 / side, y1 / side)
            for x0, x1 in spans
            for y0, y1 in spans
        }

    def children(self, nodes: Sequence[Edges]) -> dict[Edges, Scores]:
        """The children of nodes, with their scores."""
        side = self._maps.shape[-1]
        found = [
            self._cells[tuple(round(edge * side) for edge in each)]
            for node in nodes
            for each in children_of(node, 1 / side, 1 / side)
        ]
        self._score([each for each in dict.fromkeys(found) if each not in self._known])
        return {each: self._known[each] for each in found}

    def score_all(self) -> None:
        """Score every sub-grid at once, where several classes are searched for: they share most."""
        self._score(list(self._cells.values()))

    def _score(self, new: Sequence[Edges]) -> None:
        if new:
            scores = self._classify(sub_grids(self._maps, new))
            self._known |= dict(zip(new, scores, strict=True))


class Crops:
    """The tree whose nodes are cut out of the image (section 3.3, equation 5).

    Args:
        maps_of: from boxes to the maps ``[n, C, L, L]`` of what lies in them.
        classify: scores stretched sub-grids.

    Where two parents share a child, the better of its two scores counts.
    """

    def __init__(self, maps_of: Callable[[Sequence[Edges]], Array], classify: Classify) -> None:
        self._maps_of, self._classify = maps_of, classify
        self._known: dict[Edges, dict[Edges, Scores]] = {}

    def children(self, nodes: Sequence[Edges]) -> dict[Edges, list[Scores]]:
        """The children of nodes, with the scores that each parent gives them."""
        new = [node for node in nodes if node not in self._known]
        if new:
            self._score(new, self._maps_of(new))
        found: dict[Edges, list[Scores]] = {}
        for node in nodes:
            for edges, scores in self._known[node].items():
                found.setdefault(edges, []).append(scores)
        return found

    def _score(self, nodes: Sequence[Edges], maps: Array) -> None:
        side = maps.shape[-1]
        relative = children_of(WHOLE, 1 / side, 1 / side)
        cut = np.concatenate([sub_grids(each, relative) for each in maps])
        scores = self._classify(cut).reshape(len(nodes), len(relative), -1)
        for node, of_node in zip(nodes, scores, strict=True):
            width, height = node[2] - node[0], node[3] - node[1]
            edges = children_of(node, width / side, height / side)
            self._known[node] = dict(zip(edges, of_node, strict=True))


def children_of(node: Edges, step_x: float, step_y: float) -> list[Edges]:
    """A cell less at the left, right, top or bottom (section 3.4, equation 6); none is empty."""
    x0, y0, x1, y1 = node
    found = []
    if x1 - x0 > 1.5 * step_x:
        found += [(x0 + step_x, y0, x1, y1), (x0, y0, x1 - step_x, y1)]
    if y1 - y0 > 1.5 * step_y:
        found += [(x0, y0 + step_y, x1, y1), (x0, y0, x1, y1 - step_y)]
    return [(round(a, 9), round(b, 9), round(c, 9), round(d, 9)) for a, b, c, d in found]


def sub_grids(maps: Array, each_edges: Sequence[Edges]) -> Array:
    """Cells of maps ``[C, L, L]``, stretched to the entire grid (section 3.3): ``[n, C, L, L]``.
    Those of the same columns are stretched in one product.
    """
    channels, side, _ = maps.shape
    found = np.empty((len(each_edges), channels, side, side), np.float32)
    places: dict[tuple[int, int], list[int]] = {}
    for place, (x0, _, x1, _) in enumerate(each_edges):
        places.setdefault((round(x0 * side), round(x1 * side)), []).append(place)
    for (x0, x1), some in places.items():
        across = maps.reshape(-1, side) @ stretch(side, x0, x1 - x0).T
        by_row = across.reshape(channels, side, side).transpose(1, 0, 2).reshape(side, -1)
        edges = [(round(each_edges[i][1] * side), round(each_edges[i][3] * side)) for i in some]
        rows = np.concatenate([stretch(side, y0, y1 - y0) for y0, y1 in edges])
        tall = (rows @ by_row).reshape(len(some), side, channels, side)
        found[some] = tall.transpose(0, 2, 1, 3)
    return found


Tree = Grid | Crops


def searched(tree: Tree, index: int, beam: int, levels: int) -> list[tuple[Edges, float]]:
    """What each level keeps for a class, with its scores, the first level first (section 3.4)."""
    kept: list[tuple[Edges, float]] = []
    nodes: list[Edges] = [WHOLE]
    for _ in range(levels):
        scores = {
            edges: float(np.max(np.asarray(found)[..., index]))
            for edges, found in tree.children(nodes).items()
        }
        nodes = sorted(scores, key=lambda edges: -scores[edges])[:beam]
        kept += [(edges, scores[edges]) for edges in nodes]
        if not nodes:
            break
    return kept


def detections(heat: NDArray[np.float64], index: int, threshold: float) -> list[Found]:
    """The rectangles around the blobs of what is at or over ``threshold`` of the maximum, each
    scored by the mean heat in it, best first (section 3.4).
    """
    side, found = len(heat), list[Found]()
    for blob in blobs(heat >= threshold * heat.max()):
        box = box_of(blob)
        x0, y0, x1, y1 = np.rint(box * side).astype(int)
        found.append(Found(tuple(box), index, float(heat[y0:y1, x0:x1].mean())))
    return sorted(found, key=lambda each: -each.score)


def heat_side(side: int) -> int:
    """Of a heat map, so that the cells of maps ``L x L`` are whole places of it."""
    return side * round(64 / side)


class PublishedBeamEngine(CompoundEngine):
    """See ``CompoundEngine``; it takes images of ``ENLARGED`` times the network's side, which crops
    are cut from.

    Args:
        classifier: the network.
        settings: the algorithm's.
        compiled: compiles a graph.

    Raises:
        EngineError: the network has no such layer.
        ModelError: a graph cannot be built, or the maps are not square.
    """

    def __init__(
        self, classifier: Classifier, settings: PublishedBeamSettings, compiled: Compile
    ) -> None:
        layer = settings.layer or classifier.network.pooled_layer
        self._settings = settings
        self._tail: Engine = compiled(build_stretched_graph(classifier, layer, 4 * settings.beam))
        features = build_features_graph(classifier, replace(settings, layer=layer))
        self._convolutions: Engine | None = None
        if settings.reading == Reading.CROPS and settings.levels > 1:
            self._convolutions = compiled(build_maps_graph(classifier, layer, settings.beam))
        first = compiled(features)
        side = next(spec.shape[2] for spec in first.outputs if spec.name == FEATURES)
        others = [self._tail, *([self._convolutions] if self._convolutions else [])]
        metadata = {p.key: p.value for p in features.metadata_props}
        shape = heat_side(side), heat_side(side)
        super().__init__(first, others, shape, settings.objects, metadata)
        self.side_px = classifier.size_px
        large = (1, ENLARGED * self.side_px, ENLARGED * self.side_px, 3)
        self.inputs = (TensorSpec(IMAGE, np.dtype(np.uint8), large), first.inputs[1])

    def first_feeds(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The whole image, at the network's side."""
        return {**feeds, IMAGE: resized(feeds[IMAGE][0], self.side_px)[None]}

    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """See ``CompoundEngine.search``; the map is the heat map of the first class."""
        settings, maps = self._settings, outputs[FEATURES][0]
        classes = [int(outputs["class_index"][0])]
        if int(feeds[WANTED_CLASS][0]) < 0:
            as_beam = BeamSettings(classes=settings.classes)
            classes = wanted_classes(outputs["probabilities"][0], as_beam)
        tree: Tree = Grid(maps, self.classify)
        if settings.reading == Reading.CROPS:
            tree = Crops(lambda boxes: self.maps_of(feeds[IMAGE][0], boxes, maps), self.classify)
        found, heats = list[Found](), list[NDArray[np.float64]]()
        for index in classes:
            kept = searched(tree, index, settings.beam, settings.levels)
            heats.append(summed(kept, heat_side(maps.shape[-1])))
            threshold = settings.thresholds.get(index, settings.threshold)
            found += detections(heats[-1], index, threshold)
        found = sorted(found, key=lambda each: -each.score)
        return found, heats[classes.index(found[0].class_index)].astype(np.float32)

    def classify(self, maps: Array) -> Scores:
        """The probabilities of stretched sub-grids; the call's batch is filled up with the last."""
        batch = self._tail.inputs[0].shape[0]
        parts = []
        for start in range(0, len(maps), batch):
            some = maps[start : start + batch]
            padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some), axis=0)])
            parts.append(self.ask(self._tail, {FEATURES: padded})["scores"][: len(some)])
        return np.concatenate(parts)

    def maps_of(self, image_hwc: NDArray[np.uint8], boxes: Sequence[Edges], whole: Array) -> Array:
        """The maps of what lies in boxes of an image; of the whole they are known."""
        if list(boxes) == [WHOLE] or self._convolutions is None:
            return whole[None]
        crops = [resized(cropped(image_hwc, np.array(box)), self.side_px) for box in boxes]
        crops += [crops[-1]] * (self._settings.beam - len(crops))
        found = self.ask(self._convolutions, {IMAGE: np.stack(crops)})[FEATURES]
        return np.asarray(found[: len(boxes)])


def open_published_beam(
    classifier: Classifier, compiled: Compile, options: EngineOptions
) -> PublishedBeamEngine:
    """The engine of ``--method beam --as-published``. Raises what ``PublishedBeamEngine``
    raises.
    """
    settings = PublishedBeamSettings(
        layer=options.layer,
        objects=options.objects,
        classes=beam_settings(options.objects).classes,
    )
    return PublishedBeamEngine(classifier, settings, compiled)


def build_maps_graph(classifier: Classifier, layer: str | None, batch: int) -> onnx.ModelProto:
    """Images in; ``features`` ``[batch, C, L, L]`` of a layer out."""
    graph = Graph()
    _, x = append_preprocessing(graph, batch, classifier.shape, classifier.preprocessing)
    forward = classifier.append(graph, x)
    known = known_layer(classifier, forward, classifier.network.pooled_layer, layer)
    graph.output(forward.layers[known], FEATURES)
    return graph.model()


def build_stretched_graph(classifier: Classifier, layer: str | None, batch: int) -> onnx.ModelProto:
    """``features`` ``[batch, C, L, L]`` of a layer in; ``scores`` ``[batch, classes]``,
    probabilities, out.
    """
    whole = Graph()
    x = whole.input("x", FLOAT, (batch, 3, *classifier.shape))
    forward = classifier.append(whole, x)
    known = known_layer(classifier, forward, classifier.network.pooled_layer, layer)
    cut, graph = forward.layers[known], Graph()
    features = graph.input(FEATURES, FLOAT, whole.shape(cut))
    graph.append(helper.make_node("Identity", [features], [cut], name=cut))
    append_tail(graph, whole, forward, cut, batch)
    if len(graph.model().graph.input) > 1:
        raise ModelError(f"the layers behind {known} read more of the image than its maps")
    return graph.model()
