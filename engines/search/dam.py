"""DAM: traces the neurons that a class rests on back to the pixels by guided backpropagation.

After Dwaraknath, Menghani & Mongia, "Fast Unsupervised Object Localization" (Stanford), algorithm
1: of one layer (their 11th convolution), the ``kmax`` neurons with the largest activation times
gradient of the class score; of each, the pixels that it depends on, as a region; the regions that
the network itself finds most like the class, united. Details differ from the paper's, and several
objects are regions of one class that lie apart, which is not its algorithm 2. The paper's own
steps are ``engines.search.dam_published``.

The first graph makes all walks at once: the forward pass is that of one image, the backward pass
that of ``kmax`` of them. Where a network's operators do not allow that, as those of attention, the
walks go back through as many copies of the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from engines.boxes import Mask, box_of, bright_mask, opened, shared
from engines.build import (
    IMAGE,
    WANTED_CLASS,
    append_chosen_class,
    append_normalised,
    append_preprocessing,
    append_probabilities,
    stamp,
)
from engines.engine import Array, Compile, CompoundEngine, Found
from engines.errors import ModelError
from engines.gradient import attach_gradient, elementwise
from engines.graph import INT64, Graph, needed
from engines.maps import MapSpec, aggregated
from engines.networks.network import Forward, Network
from engines.networks.registry import Classifier, known_layer
from engines.objectives import class_score_cotangent
from engines.options import EngineOptions

WALKED_AT_ONCE = elementwise.RULES.keys() | {
    *("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Concat", "LRN")
}
"""Operators that a batch of cotangents can be walked back through over one image's activations, as
long as these have four axes.
"""


@dataclass(frozen=True)
class DamSettings:
    """What the paper leaves open was chosen on the training split of animal_pose_voc.

    Attributes:
        layer: whose neurons are looked at; None for the network's own.
        kmax: neurons that are walked back from.
        k: best-scoring regions that are united.
        percentile: of a walk's positive pixels, from which on they belong to its region.
        erode, dilate: sides of the squares, as shares of the image's side.
        objects: at most so many.
        same_object: share of the smaller of two boxes that lies in the other, from which on they
            are one object's.
    """

    layer: str | None = None
    kmax: int = 10
    k: int = 5
    percentile: float = 80.0
    erode: float = 0.015
    dilate: float = 0.03
    objects: int = 1
    same_object: float = 0.3

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.kmax and 0 <= self.percentile <= 100 and self.objects >= 1):
            raise ModelError(
                "DAM takes 1 <= k <= kmax, a percentile in 0..100 and at least one object, not"
                f" {self}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        return (
            f"dam: {self.kmax} neurons of {self.layer or 'the usual layer'}, percentile"
            f" {self.percentile:g}, erosion {self.erode:g} and dilation {self.dilate:g} of the"
            f" side, best {self.k} united"
        )


def dam_settings(network: Network, objects: int = 1, layer: str | None = None) -> DamSettings:
    """The usual settings of a network, for so many objects, at its usual layer or at another."""
    own = network.dam_settings
    return DamSettings(layer=layer or network.dam_layer, objects=objects, **own)


class DamEngine(CompoundEngine):
    """See ``CompoundEngine``.

    Args:
        classifier: the network.
        settings: the algorithm's.
        compiled: compiles a graph.

    Raises:
        EngineError: the network has no such layer.
        ModelError: a graph cannot be built.
    """

    def __init__(self, classifier: Classifier, settings: DamSettings, compiled: Compile) -> None:
        self._settings, self._mean = settings, np.array(classifier.preprocessing.mean_bgr, np.uint8)
        self._scorer = compiled(build_scores_graph(classifier, settings.kmax))
        walks = build_walks_graph(classifier, settings)
        metadata = {p.key: p.value for p in walks.metadata_props}
        side = classifier.size_px
        super().__init__(compiled(walks), [self._scorer], (side, side), settings.objects, metadata)

    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """See ``CompoundEngine.search``; the map is the sum of the united walks, each scaled to a
        maximum of 1.
        """
        settings, walks, index = self._settings, outputs["walks"], int(outputs["class_index"][0])
        masks = regions_of(walks, settings)
        images = masked_images(feeds[IMAGE][0], masks, self._mean)
        scores = self.ask(self._scorer, {IMAGE: images})["scores"][:, index]
        groups = grouped(masks, scores, settings)
        found = [
            Found(tuple(box_of(np.any(masks[g], axis=0))), index, float(scores[g].max()))
            for g in groups
        ]
        shown = walks[np.concatenate(groups)]
        peaks = np.maximum(shown.max(axis=(1, 2), keepdims=True), 1e-30)
        return found, np.asarray((shown / peaks).sum(axis=0), np.float32)


def open_dam(classifier: Classifier, compiled: Compile, options: EngineOptions) -> DamEngine:
    """The engine of ``--method dam``. Raises what ``DamEngine`` raises."""
    settings = dam_settings(classifier.network, options.objects, options.layer)
    return DamEngine(classifier, settings, compiled)


def build_walks_graph(classifier: Classifier, settings: DamSettings) -> onnx.ModelProto:
    """Image and wanted class in; out ``class_index``, ``score`` and, the most important one first,
    ``neurons`` int64 ``[kmax]`` (places in the flattened layer), ``importances`` ``[kmax]`` and
    ``walks`` float32 ``[kmax, S, S]``, which are absolute, the largest of the channels.
    """
    walks = append_walks(classifier, settings)
    maps = aggregated(walks.graph, walks.walked, "max", "walks")
    return walks.model(classifier, {"walks": maps}, settings.digest)


@dataclass(frozen=True)
class Walks:
    """A graph that walks back from neurons, by tensor name.

    Attributes:
        graph: the nodes.
        walked: the walks by each channel of the pixels, ``[kmax, 3, S, S]``.
        forward: the landmarks of the network.
        named: ``class_index``, ``score``, ``neurons`` and ``importances``.
    """

    graph: Graph
    walked: str
    forward: Forward
    named: Mapping[str, str]

    def model(
        self, classifier: Classifier, more: Mapping[str, str], digest: str
    ) -> onnx.ModelProto:
        """The graph, with ``named`` and more as its outputs; ``digest`` says what finds boxes."""
        classes, spec = self.graph.shape(self.forward.scores)[1], MapSpec(relu_rule="guided")
        for name, tensor in {**self.named, **more}.items():
            self.graph.output(tensor, name)
        return self.graph.model(stamp(classifier, spec, None, None, classes, digest))


def append_walks(classifier: Classifier, settings: DamSettings, published: bool = False) -> Walks:
    """The graph of ``build_walks_graph`` up to the pixels.

    Args:
        classifier: the network.
        settings: of the algorithm.
        published: neurons are chosen as the paper's authors do it, see
            ``engines.search.dam_published``.
    """
    graph = Graph()
    pixels, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    wanted = graph.input(WANTED_CLASS, INT64, (1,))
    forward = classifier.append(graph, x)
    class_index, score = append_chosen_class(graph, forward, wanted)
    layer = known_layer(classifier, forward, classifier.network.dam_layer, settings.layer)
    activations = forward.layers[layer]
    shape = graph.shape(activations)
    if np.prod(shape) < settings.kmax:
        raise ModelError(f"{layer} has fewer neurons than kmax, which is {settings.kmax}")
    cotangents = class_score_cotangent(graph, forward.scores, class_index)
    rule = "guided" if published else "plain"
    gradient = attach_gradient(graph, cotangents, [activations], rule)[activations]
    importance = graph.add("Mul", activations, gradient, hint="importance")
    values, places = _largest(graph, importance, settings.kmax, one_a_filter=published)
    one_hot = graph.add(
        "OneHot",
        places,
        graph.constant(np.prod(shape), np.int64),
        graph.constant([0.0, 1.0]),
        axis=1,
        hint="one_neuron",
    )
    seeds = graph.add(
        "Reshape", one_hot, graph.constant([settings.kmax, *shape[1:]], np.int64), hint="seeds"
    )
    if not _walked_at_once(graph, pixels, activations):
        copies = graph.constant([settings.kmax, *graph.shape(pixels)[1:]], np.int64)
        pixels = graph.add("Expand", pixels, copies, hint="pixels_each")
        x = append_normalised(graph, pixels, classifier.preprocessing)
        activations = classifier.append(graph, x).layers[layer]
    walked = attach_gradient(graph, {activations: seeds}, [pixels], "guided")[pixels]
    named = {"class_index": class_index, "score": score, "neurons": places, "importances": values}
    return Walks(graph, walked, forward, named)


def _largest(graph: Graph, importance: str, kmax: int, one_a_filter: bool) -> tuple[str, str]:
    """(the ``kmax`` largest values of ``[1, C, h, w]``, their places in it flattened), the largest
    first; at most one of each of the C filters where that is asked for.
    """
    _, filters, height, width = graph.shape(importance)
    shape = graph.constant([filters, height * width] if one_a_filter else [-1], np.int64)
    flat = graph.add("Reshape", importance, shape, hint="importance_flat")
    best = ""
    if one_a_filter:
        if filters < kmax:
            raise ModelError(f"the layer has fewer filters than kmax, which is {kmax}")
        best = graph.add("ArgMax", flat, axis=1, keepdims=0, hint="best_of_filter")
        axis = graph.constant([1], np.int64)
        flat = graph.add("ReduceMax", flat, axis, keepdims=0, hint="importance_of_filter")
    values, places = graph.fresh("importances_top"), graph.fresh("neurons_top")
    count = graph.constant([kmax], np.int64)
    graph.append(
        helper.make_node(
            "TopK", [flat, count], [values, places], name=values, axis=0, largest=1, sorted=1
        )
    )
    if one_a_filter:
        within = graph.add("Gather", best, places, axis=0, hint="place_in_filter")
        size = graph.constant(height * width, np.int64)
        before = graph.add("Mul", places, size, hint="place_of_filter")
        places = graph.add("Add", before, within, hint="neurons_of_filters")
    return values, places


def _walked_at_once(graph: Graph, pixels: str, activations: str) -> bool:
    """Whether the rules broadcast several walks over the activations of one image."""
    first = len(needed(graph.nodes, [pixels]))
    return all(
        node.op_type in WALKED_AT_ONCE and len(graph.shape(node.output[0])) == 4
        for node in needed(graph.nodes, [activations])[first:]
    )


def build_scores_graph(classifier: Classifier, batch: int) -> onnx.ModelProto:
    """Images in; ``scores`` float32 ``[batch, classes]`` out, as probabilities."""
    graph = Graph()
    _, x = append_preprocessing(graph, batch, classifier.shape, classifier.preprocessing)
    forward = classifier.append(graph, x)
    graph.output(append_probabilities(graph, forward, "probabilities"), "scores")
    return graph.model()


def regions_of(walks: NDArray[np.float32], settings: DamSettings) -> NDArray[np.bool_]:
    """The region of each walk: ``[K, S, S]`` to ``[K, S, S]``."""
    side = walks.shape[1]
    erode, dilate = (max(1, round(share * side)) for share in (settings.erode, settings.dilate))
    return np.stack(
        [opened(bright_mask(walk, settings.percentile), erode, dilate) for walk in walks]
    )


def masked_images(
    image_hwc: NDArray[np.uint8], masks: NDArray[np.bool_], mean_bgr: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The image once for each region, what lies outside the region's box in the network's mean
    colour: ``[K, S, S, 3]``.
    """
    images = np.empty((len(masks), *image_hwc.shape), np.uint8)
    images[:] = mean_bgr
    for image, mask in zip(images, masks, strict=True):
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        image[y : y + height, x : x + width] = image_hwc[y : y + height, x : x + width]
    return images


def grouped(
    masks: Sequence[Mask] | NDArray[np.bool_], scores: NDArray[np.float32], settings: DamSettings
) -> list[list[int]]:
    """Which regions make up each object: places of regions, the best object first.

    For one object, the ``k`` best. For several, in the order of their scores, a region joins the
    first object that its box overlaps, or begins one; objects end at ``k`` regions each.
    """
    order = sorted(range(len(scores)), key=lambda place: -float(scores[place]))
    if settings.objects == 1:
        return [order[: settings.k]]
    boxes = [box_of(mask) for mask in masks]
    groups: list[list[int]] = []
    for place in order:
        near = [
            g
            for g in groups
            if any(shared(boxes[place], boxes[other]) >= settings.same_object for other in g)
        ]
        if not near and len(groups) < settings.objects:
            groups.append([place])
        elif near and len(near[0]) < settings.k:
            near[0].append(place)
    return groups
