"""The training-free box: blur a map, keep its brightest pixels, and take their bounding box.

The papers' baseline (Ebrahimpour & Noelle, section 4: Gaussian blur, top 20 % of the pixels,
bounding box). It needs no labelled box, so it is what a network without a fitted head falls back
on.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from engines.errors import ModelError
from engines.graph import Graph
from engines.maps import PIXELS, MapSpec, Method
from engines.networks.registry import Classifier


@dataclass(frozen=True)
class Heuristic:
    """The training-free head.

    Attributes:
        spec: the map it reads.
        sigma: of the Gaussian, as a share of the map's side.
        share: of the pixels that are kept, 0..1.
    """

    spec: MapSpec = field(default_factory=MapSpec)
    sigma: float = 0.02
    share: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.sigma <= 1 and 0 < self.share <= 1):
            raise ModelError(
                f"a heuristic head keeps a share in 0..1 after a blur in 0..1, not {self.share},"
                f" {self.sigma}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        what = f"{self.spec.signal} at {self.spec.layer}, {self.spec.aggregation}"
        return (
            f"heuristic: {what}, blur {self.sigma:g} of the side, top {100 * self.share:g} % of the"
            " pixels, bounding box"
        )


def append_heuristic_box(graph: Graph, map_nhw: str, heuristic: Heuristic) -> str:
    """Append the box of the brightest part of a map ``[N, h, w]``: ``[N, 4]``, fractions of width
    and height.
    """
    n, height, width = graph.shape(map_nhw)
    blurred = map_nhw
    if heuristic.sigma:
        rows, columns = (
            graph.constant(gaussian_matrix(side, heuristic.sigma * side))
            for side in (height, width)
        )
        blurred = graph.add("MatMul", rows, blurred, hint="blurred_rows")
        transposed = graph.add("Transpose", columns, perm=[1, 0], hint="blur_columns")
        blurred = graph.add("MatMul", blurred, transposed, hint="blurred")
    kept = max(1, round(heuristic.share * height * width))
    flat = graph.add(
        "Reshape", blurred, graph.constant([n, height * width], np.int64), hint="blurred_flat"
    )
    least = _kth_largest(graph, flat, kept)
    bright = graph.add(
        "GreaterOrEqual",
        blurred,
        graph.add("Unsqueeze", least, graph.constant([2], np.int64)),
        hint="bright",
    )
    bright = graph.add("Cast", bright, to=1, hint="bright_float")
    edges = [_extent(graph, bright, axis, length) for axis, length in ((1, width), (2, height))]
    order = [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]
    return graph.add("Concat", *order, axis=1, hint="box")


def _kth_largest(graph: Graph, flat: str, k: int) -> str:
    """The k-th largest value of each row, ``[N, L]`` to ``[N, 1]``."""
    values, places = graph.fresh("largest"), graph.fresh("largest_places")
    count = graph.constant([k], np.int64)
    graph.append(
        helper.make_node(
            "TopK", [flat, count], [values, places], name=values, axis=1, largest=1, sorted=1
        )
    )
    return graph.add("Gather", values, graph.constant([k - 1], np.int64), axis=1, hint="least_kept")


def _extent(graph: Graph, bright: str, across: int, length: int) -> tuple[str, str]:
    """(first, last) edge along one axis of what is 1 in ``[N, h, w]``, each ``[N, 1]`` in 0..1."""
    hit = graph.add("ReduceMax", bright, graph.constant([across], np.int64), keepdims=0, hint="hit")
    low = graph.constant(
        1 - np.arange(length)[None] / length
    )  # the larger, the nearer to the start
    high = graph.constant((np.arange(length)[None] + 1) / length)
    ends = [
        graph.add(
            "ReduceMax",
            graph.add("Mul", hit, scale),
            graph.constant([1], np.int64),
            keepdims=1,
            hint="edge",
        )
        for scale in (low, high)
    ]
    return graph.add("Sub", graph.constant(1.0), ends[0], hint="first_edge"), ends[1]


def gaussian_matrix(length: int, sigma_px: float) -> NDArray[np.float32]:
    """``[length, length]``: row i is a Gaussian around i, scaled to sum to 1 inside the image."""
    steps = np.arange(length)
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / sigma_px) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def default_heuristic(
    classifier: Classifier, method: Method, layer: str | None = None
) -> Heuristic:
    """The training-free head of a network for a method, at its usual layer or at another."""
    return Heuristic(usual_spec(classifier, method, layer))


def usual_spec(classifier: Classifier, method: Method, layer: str | None = None) -> MapSpec:
    """The map that a training-free box is read off: the method's own, or the one that suits the
    network best.
    """
    network = classifier.network
    if method.signal is None:
        where, signal = layer or network.box_layer or PIXELS, network.box_signal
    else:
        where, signal = layer or classifier.last_layer() or PIXELS, method.signal
    return MapSpec(method.objective, method.aggregation, where, signal=signal)
