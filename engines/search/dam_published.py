"""DAM as it was published: algorithms 1 and 2, step by step.

Dwaraknath, Menghani & Mongia, "Fast Unsupervised Object Localization" (Stanford). Where the text
leaves a step open, it is what the authors' own code does (their repository FastObjectLocalization,
read in a public copy): these steps are marked with "code". ``docs/papers.md`` says where text and
code differ. ``--method dam --as-published`` runs it; ``engines.search.dam`` is the product's way.

1. Section 3.1: the network gives scores of classes and activations. Algorithm 2, line 2: the
   classes with similarly high scores.
2. Section 3.2, equations 1 to 3: of the 11th convolution, the ``kmax`` neurons with the largest
   product of activation and effect, for each class. Code: at most one neuron of a filter, and the
   effect is walked back by guided backpropagation, too.
3. Section 3.3, equation 5: guided backpropagation from each neuron to the pixels.
4. Section 3.4: the pixels over the 80th percentile. Code: of the positive values of the mean over
   channels, which is not made absolute. Erosion and dilation. Code: four openings, a square of 4,
   20 dilations, 15 erosions.
5. Section 3.5: each region is scored by the network. Code: all pixels outside the region are the
   network's mean, and the score is that before the softmax. The best ``k`` are united, and the box
   is the least that holds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

from engines.boxes import Mask, box_of
from engines.build import IMAGE, WANTED_CLASS, append_preprocessing, append_probabilities
from engines.engine import Array, Compile, CompoundEngine, Engine, Found
from engines.errors import ModelError
from engines.graph import FLOAT, Graph
from engines.networks.registry import Classifier
from engines.options import EngineOptions
from engines.search.dam import DamSettings, append_walks

AT_PX = 224
"""The side at which the authors count their erosions and dilations."""
OPENINGS = 4
SQUARE = 4
DILATIONS = 20
EROSIONS = 15
REGIONS = "regions"
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PublishedDamSettings:
    """The algorithm's, with the values of sections 3.4, 4 and 5.

    Attributes:
        layer: whose neurons are looked at; None for the network's own, the 11th convolution of
            VGG16.
        kmax: neurons that are walked back from, for each class.
        k: best-scoring regions that are united.
        percentile: of the positive pixels of a walk; those over it are its region.
        classes: at most so many are looked for where none is named; 1 is algorithm 1, more is
            algorithm 2.
        similar: share of the best class's probability that another must have, to be "similarly
            high". The paper does not say what that is.
    """

    layer: str | None = None
    kmax: int = 10
    k: int = 5
    percentile: float = 80.0
    classes: int = 1
    similar: float = 0.5

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.kmax and 0 <= self.percentile < 100 and self.classes >= 1):
            raise ModelError(
                "DAM takes 1 <= k <= kmax, a percentile from 0 to below 100 and at least one class,"
                f" not {self}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        return (
            f"dam as published: {self.kmax} neurons of {self.layer or 'the usual layer'}, one a"
            f" filter, percentile {self.percentile:g}, best {self.k} united"
        )


class PublishedDamEngine(CompoundEngine):
    """See ``CompoundEngine``. There is one detection for each class; its score is the class's
    probability, as the paper has none for a box.

    Args:
        classifier: the network.
        settings: the algorithm's.
        compiled: compiles a graph.

    Raises:
        EngineError: the network has no such layer.
        ModelError: a graph cannot be built.
    """

    def __init__(
        self, classifier: Classifier, settings: PublishedDamSettings, compiled: Compile
    ) -> None:
        self._settings = settings
        walks = build_published_walks(classifier, settings)
        self._scorer = compiled(build_region_scores(classifier, settings.kmax))
        self._walker: Engine | None = compiled(walks) if settings.classes > 1 else None
        metadata = {p.key: p.value for p in walks.metadata_props}
        side = classifier.size_px
        others = [self._scorer, *([self._walker] if self._walker else [])]
        super().__init__(compiled(walks), others, (side, side), settings.classes, metadata)

    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """See ``CompoundEngine.search``; the map is the sum of the positive walks of the first
        class whose regions are united, each scaled to a maximum of 1.
        """
        probabilities = outputs["probabilities"][0]
        classes = [int(outputs["class_index"][0])]
        if int(feeds[WANTED_CLASS][0]) < 0:
            classes = similar_classes(probabilities, self._settings)
        found, shown = list[Found](), None
        for index in classes:
            walks = outputs["walks"]
            if self._walker is not None and index != classes[0]:
                wanted = {**feeds, WANTED_CLASS: np.array([index], np.int64)}
                walks = self.ask(self._walker, wanted)["walks"]
            regions = regions_of(walks, self._settings.percentile)
            scores = self._region_scores(feeds[IMAGE], regions)[:, index]
            united = best_regions(regions, scores, self._settings.k)
            box = box_of(np.any(regions[united], axis=0))
            found.append(Found(tuple(box), index, float(probabilities[index])))
            if shown is None:
                positive = np.maximum(walks[united], 0)
                peaks = np.maximum(positive.max(axis=(1, 2), keepdims=True), 1e-30)
                shown = np.asarray((positive / peaks).sum(axis=0), np.float32)
        assert shown is not None  # there is at least one class
        return found, shown

    def _region_scores(self, image_nhwc: Array, regions: NDArray[np.bool_]) -> Array:
        """Scores before the softmax, ``[kmax, classes]``."""
        feeds = {IMAGE: image_nhwc, REGIONS: regions[:, None].astype(np.float32)}
        return self.ask(self._scorer, feeds)["scores"]


def open_published_dam(
    classifier: Classifier, compiled: Compile, options: EngineOptions
) -> PublishedDamEngine:
    """The engine of ``--method dam --as-published``. Raises what ``PublishedDamEngine`` raises."""
    layer = options.layer or classifier.network.dam_layer
    settings = PublishedDamSettings(layer=layer, classes=options.objects)
    return PublishedDamEngine(classifier, settings, compiled)


def build_published_walks(
    classifier: Classifier, settings: PublishedDamSettings
) -> onnx.ModelProto:
    """See ``engines.search.dam.build_walks_graph``; the walks are the means over channels, with
    their signs, and ``probabilities`` ``[1, classes]`` are given besides.
    """
    as_dam = DamSettings(layer=settings.layer, kmax=settings.kmax, k=settings.k)
    walks = append_walks(classifier, as_dam, published=True)
    graph, axis = walks.graph, walks.graph.constant([1], np.int64)
    mean = graph.add("ReduceMean", walks.walked, axis, keepdims=0, hint="walks_mean")
    probabilities = append_probabilities(graph, walks.forward, "image_probabilities")
    more: dict[str, Any] = {"walks": mean, "probabilities": probabilities}
    return walks.model(classifier, more, settings.digest)


def build_region_scores(classifier: Classifier, batch: int) -> onnx.ModelProto:
    """One image and ``regions`` float32 ``[batch, 1, S, S]``, 1 or 0, in; ``scores`` float32
    ``[batch, classes]`` out, before any softmax: the normalised image times each region (section
    3.5; code).
    """
    graph = Graph()
    _, x = append_preprocessing(graph, 1, classifier.shape, classifier.preprocessing)
    regions = graph.input(REGIONS, FLOAT, (batch, 1, *classifier.shape))
    masked = graph.add("Mul", x, regions, hint="masked")
    graph.output(classifier.append(graph, masked).scores, "scores")
    return graph.model()


def similar_classes(
    probabilities: NDArray[np.float32], settings: PublishedDamSettings
) -> list[int]:
    """The classes with similarly high scores, the best first (algorithm 2, line 2)."""
    order = np.argsort(-probabilities, kind="stable")[: settings.classes]
    least = settings.similar * probabilities[order[0]]
    return [int(index) for index in order if probabilities[index] >= least]


def regions_of(walks: NDArray[np.float32], percentile: float) -> NDArray[np.bool_]:
    """The region of each walk: ``[K, S, S]`` to ``[K, S, S]`` (section 3.4)."""
    return np.stack([_processed(over_percentile(walk, percentile)) for walk in walks])


def over_percentile(walk: NDArray[np.float32], percentile: float) -> Mask:
    """The pixels over the percentile of the positive ones; none where no pixel is positive."""
    positive = walk[walk > 0]
    if not positive.size:
        return np.zeros(walk.shape, np.bool_)
    return np.asarray(walk > np.percentile(positive, percentile))


def _processed(mask: Mask) -> Mask:
    """Erosions and dilations (section 3.4), in the order and number of the authors' code at 224 px.
    At another side the closing is as much smaller or larger.

    Beyond the image's edge nothing is bright: erosion eats in from there.
    """
    side, cross = mask.shape[0], cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))

    def eroded(values: Bytes, times: int) -> Bytes:
        beyond = cv2.BORDER_CONSTANT
        found = cv2.erode(values, cross, iterations=times, borderType=beyond, borderValue=0.0)
        return np.asarray(found, np.uint8)

    def dilated(values: Bytes, times: int) -> Bytes:
        return np.asarray(cv2.dilate(values, cross, iterations=times), np.uint8)

    values = mask.astype(np.uint8)
    for _ in range(OPENINGS):
        values = dilated(eroded(values, 1), 1)
    square = np.ones((SQUARE, SQUARE), np.uint8)
    values = np.asarray(cv2.dilate(values, square, anchor=(1, 1)), np.uint8)
    dilations, erosions = (max(1, round(n * side / AT_PX)) for n in (DILATIONS, EROSIONS))
    return eroded(dilated(values, dilations), erosions) > 0


def best_regions(regions: NDArray[np.bool_], scores: NDArray[np.float32], k: int) -> list[int]:
    """Places of the ``k`` best-scoring regions, the best first; empty ones do not count (code).
    All places where all are empty.
    """
    order = [int(i) for i in np.argsort(-scores, kind="stable") if regions[i].any()]
    return order[:k] or list(range(len(regions)))
