"""What a method asks of the graph: which objective, differentiated by which layer, folded over channels how."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import ModelError
from engines.gradient import attach_gradient
from engines.graph import Graph
from engines.networks import Forward

PIXELS = "pixels"
OBJECTIVES = ("class", "gestalt")
AGGREGATIONS = ("max", "mean")


@dataclass(frozen=True)
class MapSpec:
    """A sensitivity map (Ebrahimpour & Noelle, section 3).

    Attributes:
        objective: ``class``, the score of the class that is asked for (or the best one), or ``gestalt``, the mean of the
            last feature maps, which needs no class.
        aggregation: ``max`` or ``mean`` of the absolute gradient over channels.
        layer: ``pixels``, or an inner layer, where the backward pass stops and is cheaper for it.
        relu_rule: ``plain``, or ``guided`` for guided backpropagation.
    """

    objective: str = "class"
    aggregation: str = "max"
    layer: str = PIXELS
    relu_rule: str = "plain"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.objective, OBJECTIVES, "objective"),
            (self.aggregation, AGGREGATIONS, "aggregation"),
        ):
            if value not in known:
                raise ModelError(f"unknown {what} '{value}': use {' or '.join(known)}")


def append_maps(
    graph: Graph, forward: Forward, pixels: str, class_index: str, spec: MapSpec, layers: Sequence[str]
) -> dict[str, str]:
    """Append the backward pass and one map per layer.

    Args:
        graph: appended to.
        forward: the forward graph's landmarks.
        pixels: the tensor that ``layers`` calls ``pixels``.
        class_index: int64 ``[N]``, the class whose score is the objective (unused by ``gestalt``).
        spec: objective, aggregation and ReLU rule.
        layers: where maps are wanted; one backward pass serves them all.

    Returns:
        For each layer its map, float32 ``[N, h, w]``, not normalised.

    Raises:
        ModelError: a layer does not exist or the graph cannot be differentiated.
    """
    known = {**forward.layers, PIXELS: pixels}
    for layer in layers:
        if layer not in known:
            raise ModelError(f"the network has no layer '{layer}': choose one of {', '.join(known)}")
    if spec.objective == "gestalt":
        cotangents = {forward.last: gestalt_cotangent(graph, forward.last)}
    else:
        cotangents = {forward.scores: class_score_cotangent(graph, forward.scores, class_index)}
    gradients = attach_gradient(graph, cotangents, [known[layer] for layer in layers], spec.relu_rule)
    return {layer: aggregated(graph, gradients[known[layer]], spec.aggregation, layer) for layer in layers}


def aggregated(graph: Graph, gradient_nchw: str, aggregation: str, layer: str) -> str:
    """Max or mean over channels of the absolute gradient: ``[N, C, h, w]`` to ``[N, h, w]``."""
    absolute = graph.add("Abs", gradient_nchw, hint=f"sensitivity_{layer}")
    op = {"max": "ReduceMax", "mean": "ReduceMean"}[aggregation]
    return graph.add(op, absolute, graph.constant([1], np.int64), keepdims=0, hint=f"map_{layer}")


def class_score_cotangent(graph: Graph, scores: str, class_index: str) -> str:
    """Gradient of the score of class ``class_index`` (int64 ``[N]``) with respect to ``scores`` (``[N, classes]``)."""
    depth = graph.constant(graph.shape(scores)[1], np.int64)
    return graph.add("OneHot", class_index, depth, graph.constant([0.0, 1.0]), axis=1, hint="one_hot")


def gestalt_cotangent(graph: Graph, activations: str) -> str:
    """Gradient of the Gestalt Total, the mean of the last feature maps, with respect to those maps.

    ``GT = mean(A_last)`` (Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity Analysis", section 3), per image.
    """
    shape = graph.shape(activations)
    return graph.constant(np.full(shape, 1.0 / np.prod(shape[1:])), hint="gestalt_cotangent")
