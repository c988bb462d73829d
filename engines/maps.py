"""Appends maps to the graph: an objective, differentiated by a layer, reduced over channels to a
signal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import ModelError
from engines.gradient import attach_gradient
from engines.graph import Graph, attributes_of
from engines.networks.network import Forward

PIXELS = "pixels"
OBJECTIVES = ("class", "gestalt")
AGGREGATIONS = ("max", "mean")


@dataclass(frozen=True)
class MapSpec:
    """A sensitivity map (Ebrahimpour & Noelle, section 3).

    Attributes:
        objective: ``class``, the score of the class that is asked for (or the best one), or
            ``gestalt``, the mean of the last feature maps, which needs no class.
        aggregation: ``max`` or ``mean`` of the absolute gradient over channels.
        layer: ``pixels``, or an inner layer, where the backward pass stops and is cheaper for it.
        relu_rule: ``plain``, or ``guided`` for guided backpropagation.
        signal: what is shown of that layer: its ``gradient``, or one of ``SIGNALS``.
    """

    objective: str = "class"
    aggregation: str = "max"
    layer: str = PIXELS
    relu_rule: str = "plain"
    signal: str = "gradient"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.objective, OBJECTIVES, "objective"),
            (self.aggregation, AGGREGATIONS, "aggregation"),
            (self.signal, ("gradient", *SIGNALS), "signal"),
        ):
            if value not in known:
                raise ModelError(f"unknown {what} '{value}': use {' or '.join(known)}")


def append_maps(
    graph: Graph,
    forward: Forward,
    pixels: str,
    class_index: str,
    spec: MapSpec,
    wanted: Sequence[tuple[str, str]],
) -> dict[tuple[str, str], str]:
    """Append the backward pass, as deep as it is needed, and the maps.

    Args:
        graph: appended to.
        forward: the forward graph's landmarks.
        pixels: the tensor that is called ``pixels``.
        class_index: int64 ``[N]``, the class whose score is the objective (unused by ``gestalt``).
        spec: objective, aggregation and ReLU rule.
        wanted: (signal, layer) of each map, see ``SIGNALS``; one backward pass serves them all.

    Returns:
        For each of them its map, float32 ``[N, h, w]``, not normalised.

    Raises:
        ModelError: a layer does not exist or the graph cannot be differentiated.
    """
    known = {**forward.layers, PIXELS: pixels}
    for signal, layer in wanted:
        if signal not in ("gradient", *SIGNALS):
            raise ModelError(f"unknown signal '{signal}': use gradient or {' or '.join(SIGNALS)}")
        if layer not in known:
            raise ModelError(
                f"the network has no layer '{layer}': choose one of {', '.join(known)}"
            )
    differentiated = list(
        dict.fromkeys(known[layer] for signal, layer in wanted if signal != "activation")
    )
    gradients = {}
    if differentiated:
        if spec.objective == "gestalt":
            cotangents = {forward.last: gestalt_cotangent(graph, forward.last)}
        else:
            cotangents = class_score_cotangent(graph, forward.scores, class_index)
        gradients = attach_gradient(graph, cotangents, differentiated, spec.relu_rule)
    maps = {}
    for signal, layer in dict.fromkeys(wanted):
        gradient = gradients.get(known[layer], "")
        if signal == "gradient":
            maps[signal, layer] = aggregated(graph, gradient, spec.aggregation, layer)
        else:
            maps[signal, layer] = SIGNALS[signal](graph, known[layer], gradient, layer)
    return maps


def aggregated(graph: Graph, gradient_nchw: str, aggregation: str, layer: str) -> str:
    """Max or mean over channels of the absolute gradient: ``[N, C, h, w]`` to ``[N, h, w]``."""
    absolute = graph.add("Abs", gradient_nchw, hint=f"sensitivity_{layer}")
    op = {"max": "ReduceMax", "mean": "ReduceMean"}[aggregation]
    return graph.add(op, absolute, graph.constant([1], np.int64), keepdims=0, hint=f"map_{layer}")


def _channel_mean(graph: Graph, x_nchw: str, hint: str) -> str:
    return graph.add("ReduceMean", x_nchw, graph.constant([1], np.int64), keepdims=0, hint=hint)


def _activation(graph: Graph, x_nchw: str, _: str, layer: str) -> str:
    """Mean activation over channels: what the network saw, with no backward pass."""
    return _channel_mean(graph, x_nchw, f"activation_{layer}")


def _gradcam(graph: Graph, x_nchw: str, gradient_nchw: str, layer: str) -> str:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2), with a mean over channels for their sum.

    Where global average pooling follows, this is CAM (Zhou et al. 2016) without its negative part.
    """
    weights = graph.add(
        "ReduceMean",
        gradient_nchw,
        graph.constant([2, 3], np.int64),
        keepdims=1,
        hint="channel_weights",
    )
    weighted = _channel_mean(
        graph, graph.add("Mul", weights, x_nchw, hint="weighted"), f"weighted_mean_{layer}"
    )
    return graph.add("Relu", weighted, hint=f"gradcam_{layer}")


def _layercam(graph: Graph, x_nchw: str, gradient_nchw: str, layer: str) -> str:
    """LayerCAM (Jiang et al. 2021, equations 5 and 6), with a mean over channels for their sum."""
    positive = graph.add("Relu", gradient_nchw, hint="positive_gradient")
    weighted = _channel_mean(
        graph, graph.add("Mul", positive, x_nchw, hint="weighted"), f"weighted_mean_{layer}"
    )
    return graph.add("Relu", weighted, hint=f"layercam_{layer}")


Signal = Callable[[Graph, str, str, str], str]
"""Appends a map ``[N, h, w]``, from (graph, activations, gradient, layer name); the first two are
``[N, C, h, w]``.
"""
SIGNALS: dict[str, Signal] = {
    "activation": _activation,
    "gradcam": _gradcam,
    "layercam": _layercam,
}
"""What a map may show besides the ``gradient``."""


@dataclass(frozen=True)
class Method:
    """The record of a method: what is differentiated, which map that gives, and what reads the box.

    Attributes:
        name: what ``--method`` takes.
        help: what it is, in a few words for ``--help``.
        objective: one of ``OBJECTIVES``.
        signal: what its map shows, ``gradient`` or one of ``SIGNALS``; at the last feature maps
            unless another layer is named. None: what suits the network best, see ``Network``.
        aggregation: one of ``AGGREGATIONS``, for gradients.
        fitted: whether a fitted head reads its box, where there is one; else the training-free box
            is read off the map.
        search: for a method that takes several engine calls an image, ``module:function`` that
            makes its engine from (classifier, compiler of graphs, ``EngineOptions``), or that
            function.
        published: of a search, whether ``--head none`` asks for it exactly as it was published.
    """

    name: str
    help: str
    objective: str = "class"
    signal: str | None = None
    aggregation: str = "max"
    fitted: bool = False
    search: str | Callable[..., Any] = ""
    published: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sensitivity", "gradient of the class score", fitted=True),
        Method("gestalt", "of the last feature maps", "gestalt", fitted=True),
        Method("heuristic", "no fitted head"),
        Method("gradcam", "Grad-CAM, no fitted head", signal="gradcam"),
        Method("layercam", "LayerCAM, no fitted head", signal="layercam"),
        Method(
            "dam",
            "the neurons behind the class, traced back",
            search="engines.search.dam:open_dam",
        ),
        Method(
            "beam",
            "search over the last feature map",
            search="engines.search.crops:open_beam",
            published=True,
        ),
    )
}
"""The record of each method by its name. ``register_method`` adds one from outside."""


def register_method(method: Method, signal: Signal | None = None) -> None:
    """Make a method known to every command under its name.

    Args:
        method: its record.
        signal: computes ``method.signal``, where that is a new one.

    Raises:
        ModelError: there is a method or a signal of that name, or its signal is unknown.
    """
    if method.name in METHODS:
        raise ModelError(f"there is a method '{method.name}': choose another name")
    if signal is not None:
        if method.signal is None or method.signal in ("gradient", *SIGNALS):
            raise ModelError(f"there is a signal '{method.signal}': choose another name")
        SIGNALS[method.signal] = signal
    if method.signal not in (None, "gradient", *SIGNALS):
        raise ModelError(f"nothing computes the signal '{method.signal}': register it too")
    METHODS[method.name] = method


def method_of(name: str) -> Method:
    """The method that ``--method`` names.

    Raises:
        ModelError: there is no such method.
    """
    if name not in METHODS:
        raise ModelError(f"unknown method '{name}': use {', '.join(METHODS)}", option="method")
    return METHODS[name]


def names_of_searches() -> list[str]:
    """The methods that take several engine calls an image, see ``engines.search``."""
    return [method.name for method in METHODS.values() if method.search]


def class_score_cotangent(graph: Graph, scores: str, class_index: str) -> dict[str, str]:
    """A tensor, and the gradient with respect to it of the score of class ``class_index`` (int64
    ``[N]``).

    Where the scores (``[N, classes]``) are a linear layer's, that is a row of its weight for its
    input, and no product at all.
    """
    last = graph.producer(scores)
    if last is not None and last.op_type == "Gemm" and last.input[1] in graph.constants:
        at = attributes_of(last)
        if at.get("transB", 0) and at.get("alpha", 1.0) == 1 and not at.get("transA", 0):
            return {
                last.input[0]: graph.add(
                    "Gather", last.input[1], class_index, axis=0, hint="class_weights"
                )
            }
    depth = graph.constant(graph.shape(scores)[1], np.int64)
    values = graph.constant([0.0, 1.0])
    return {scores: graph.add("OneHot", class_index, depth, values, axis=1, hint="one_hot")}


def gestalt_cotangent(graph: Graph, activations: str) -> str:
    """Gradient of the Gestalt Total, the mean of the last feature maps, with respect to those maps.

    ``GT = mean(A_last)`` (Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity
    Analysis", section 3), per image.
    """
    shape = graph.shape(activations)
    return graph.constant(np.full(shape, 1.0 / np.prod(shape[1:])), hint="gestalt_cotangent")
