"""Appends maps to the graph, and the features that heads read of them; and the table of methods.

A map is an objective, differentiated by a layer, reduced over channels to a signal. Features are
coarse grids, and quantiles of the marginals, which move with the object. The features of all maps
of one size are worked on together, as channels of one tensor: the head of a small network would
else be hundreds of tiny nodes, whose overhead costs as much as the backward pass (measured:
1.3 ms of 5 on two cores).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.errors import ModelError
from engines.gradient import attach_gradient
from engines.graph import Graph, attributes_of
from engines.networks.network import Forward
from engines.objectives import OBJECTIVES, objective_cotangents

PIXELS = "pixels"
AGGREGATIONS = ("max", "mean")


@dataclass(frozen=True)
class MapSpec:
    """A sensitivity map (Ebrahimpour & Noelle, "Fast Object Localization via Sensitivity Analysis",
    section 2).

    Attributes:
        objective: ``class``, the score before the softmax (logit) of the class that is asked for,
            or of the best one; ``probability``, the same behind the softmax, as the paper has it
            (equation 2: the sensitivity of an output unit is g'(eta), its own derivative); or
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
        cotangents = objective_cotangents(graph, forward, class_index, spec.objective)
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
    op = {"max": "ReduceMax", "mean": "ReduceMean"}[aggregation]
    found = _phases_behind(graph, gradient_nchw)
    if found is not None:
        return _aggregated_phases(graph, found, op, layer)
    absolute = graph.add("Abs", gradient_nchw, hint=f"sensitivity_{layer}")
    return graph.add(op, absolute, graph.constant([1], np.int64), keepdims=0, hint=f"map_{layer}")


@dataclass(frozen=True)
class _Phases:
    """A gradient before its values are put in place, see ``engines.gradient.windows``.

    Attributes:
        tensor: ``[N, C * side * side, h, w]``.
        side: of a block of phases.
        factor: of each channel, ``[C]``.
        moves: the Slice and Pad nodes behind, along the two image axes.
    """

    tensor: str
    side: int
    factor: NDArray[Any]
    moves: Sequence[onnx.NodeProto]


def _phases_behind(graph: Graph, gradient_nchw: str) -> _Phases | None:
    """What a gradient is made of, if that is DepthToSpace of it, cut or padded, and a factor for
    each channel.
    """
    channels = graph.shape(gradient_nchw)[1]
    factor, moves = np.ones(channels), list[onnx.NodeProto]()
    node = graph.producer(gradient_nchw)
    if node is not None and node.op_type == "Mul" and node.input[1] in graph.constants:
        value = graph.constants[node.input[1]]
        if value.size not in (1, channels) or (
            value.size > 1 and value.shape[-3:-2] != (channels,)
        ):
            return None
        factor, node = factor * value.ravel(), graph.producer(node.input[0])
    while node is not None and node.op_type in ("Slice", "Pad"):
        along = graph.constants[node.input[3]] if node.op_type == "Slice" else None
        pads = graph.constants[node.input[1]]
        if len(node.input) == 5 or (along is None and (pads[[0, 1, 4, 5]] != 0).any()):
            return None
        if along is not None and (along < 2).any():
            return None
        moves.append(node)
        node = graph.producer(node.input[0])
    if node is None or node.op_type != "DepthToSpace":
        return None
    at = attributes_of(node)
    if at.get("mode") != b"CRD":
        return None
    return _Phases(str(node.input[0]), int(at["blocksize"]), factor, moves[::-1])


def _aggregated_phases(graph: Graph, found: _Phases, op: str, layer: str) -> str:
    """The same values, with as many times fewer to put in place as there are channels: what is
    largest over channels does not depend on the place.
    """
    n, deep, height, width = graph.shape(found.tensor)
    side, channels = found.side, len(found.factor)
    factor = np.repeat(found.factor, side * side).reshape(1, deep, 1, 1)
    scaled = graph.add("Mul", found.tensor, graph.constant(factor), hint=f"phases_{layer}")
    absolute = graph.add("Abs", scaled, hint=f"sensitivity_{layer}")

    def shaped(tensor: str, *shape: int) -> str:
        return graph.add("Reshape", tensor, graph.constant(shape, np.int64), hint=f"map_{layer}")

    apart = shaped(absolute, n, channels, side * side, height, width)
    axis = graph.constant([1], np.int64)
    result = graph.add(op, apart, axis, keepdims=0, hint=f"map_{layer}")
    result = graph.add("DepthToSpace", result, blocksize=side, mode="CRD", hint=f"map_{layer}")
    result = shaped(result, n, height * side, width * side)
    for node in found.moves:
        values = [graph.constants[name] for name in node.input[1:]]
        if node.op_type == "Slice":
            values[2] = values[2] - 1
        else:
            values[0] = np.delete(values[0], [1, 5])
        inputs = [graph.constant(value, value.dtype) for value in values]
        result = graph.add(node.op_type, result, *inputs, hint=f"map_{layer}")
    return result


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
        search: for several engine calls an image: what makes the engine of (classifier, compiler
            of graphs, ``EngineOptions``), as ``module:function`` or as that function.
        headless: of a search, whether ``--head none`` asks for the form that no fitted head reads.
        published: as ``search``, for ``--as-published``: each step as its paper has it, if any.
        published_map: of a method that does not search, the map that its paper has, if any.
    """

    name: str
    help: str
    objective: str = "class"
    signal: str | None = None
    aggregation: str = "max"
    fitted: bool = False
    search: str | Callable[..., Any] = ""
    headless: bool = False
    published: str | Callable[..., Any] = ""
    published_map: MapSpec | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "sensitivity",
            "gradient of the class score",
            fitted=True,
            published_map=MapSpec("probability"),
        ),
        Method(
            "gestalt",
            "of the last feature maps",
            "gestalt",
            fitted=True,
            published_map=MapSpec("gestalt"),
        ),
        Method("heuristic", "no fitted head", published_map=MapSpec("gestalt")),
        Method("gradcam", "Grad-CAM, no fitted head", signal="gradcam"),
        Method("layercam", "LayerCAM, no fitted head", signal="layercam"),
        Method(
            "dam",
            "the neurons behind the class, traced back",
            search="engines.search.dam:open_dam",
            published="engines.search.dam_published:open_published_dam",
        ),
        Method(
            "beam",
            "search over the last feature map",
            search="engines.search.crops:open_beam",
            headless=True,
            published="engines.search.beam_published:open_published_beam",
        ),
    )
}
"""The record of each method by its name. ``register_method`` adds one from outside."""
DEFAULT_METHOD = "sensitivity"


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


def method_of(name: str, classless: bool = False) -> Method:
    """The method that ``--method`` names.

    Args:
        name: of the method.
        classless: the network scores no classes; Gestalt Total is then the objective of every
            method, see ``Network.classless``.

    Raises:
        ModelError: there is no such method, or it searches by class scores where there are none.
    """
    if name not in METHODS:
        raise ModelError(f"unknown method '{name}': use {', '.join(METHODS)}", option="method")
    if classless and METHODS[name].search:
        raise ModelError(
            f"method {name} ranks what it finds by class scores, and these weights have none: give"
            " a class layer, or use method gestalt, which needs none",
            option=("method", "class_layer"),
        )
    return replace(METHODS[name], objective="gestalt") if classless else METHODS[name]


def names_of_searches() -> list[str]:
    """The methods that take several engine calls an image, see ``engines.search``."""
    return [method.name for method in METHODS.values() if method.search]


Array32 = NDArray[np.float32]
Source = tuple[str, str]
"""(signal, layer) of a map."""


@dataclass(frozen=True)
class Feature:
    """One group of the head's inputs, computed from one map.

    Attributes:
        kind: ``grid`` (the map averaged to ``size`` x ``size`` cells; the papers' head is the grid
            of full size), ``quantiles`` (positions, 0..1, of ``size`` evenly spaced quantiles of
            the marginals along x, then y), or ``raw`` (each pixel as it is, not normalised, of a
            map of ``size`` x ``size``: Ebrahimpour & Noelle, equation 4).
        layer: where the map is taken: ``pixels`` or an inner layer.
        size: cells per side, or number of quantiles per axis.
        power: exponent on the map before it is normalised to a mean of 1; below 1 it tames single
            hot pixels.
        signal: ``gradient`` (the sensitivity map), ``activation`` (the layer's mean activation: no
            backward pass),
            ``gradcam`` or ``layercam``: see ``engines.maps.SIGNALS``.
    """

    kind: str
    layer: str
    size: int
    power: float = 1.0
    signal: str = "gradient"

    @property
    def width(self) -> int:
        """How many numbers it gives."""
        return 2 * self.size if self.kind == "quantiles" else self.size * self.size


def append_features(graph: Graph, maps: Mapping[Source, str], features: Sequence[Feature]) -> str:
    """Append the head's inputs.

    Args:
        graph: appended to.
        maps: (signal, layer) to a map ``[N, h, w]``, not normalised.
        features: which, in order.

    Returns:
        float32 ``[N, D]``.
    """
    blocks: list[str] = []
    places: dict[Feature, int] = {}
    width = 0
    for shape in dict.fromkeys(graph.shape(maps[f.signal, f.layer]) for f in features):
        mine = [f for f in features if graph.shape(maps[f.signal, f.layer]) == shape]
        sources = list(dict.fromkeys((f.signal, f.layer) for f in mine))
        powers = list(dict.fromkeys(f.power for f in mine))
        stack = _stacked(graph, [maps[source] for source in sources], powers)
        for kind, size in dict.fromkeys((f.kind, f.size) for f in mine):
            blocks.append(KINDS[kind](graph, stack, size))
            for f in mine:
                channel = powers.index(f.power) * len(sources) + sources.index((f.signal, f.layer))
                if (f.kind, f.size) == (kind, size):
                    places[f] = width + channel * f.width
            width += graph.shape(blocks[-1])[1]
    joined = (
        blocks[0]
        if len(blocks) == 1
        else graph.add("Concat", *blocks, axis=1, hint="blocks_joined")
    )
    columns = np.concatenate([np.arange(places[f], places[f] + f.width) for f in features])
    if np.array_equal(columns, np.arange(width)):
        return joined
    return graph.add(
        "Gather", joined, graph.constant(columns, np.int64), axis=1, hint="features_joined"
    )


def _stacked(graph: Graph, maps_nhw: Sequence[str], powers: Sequence[float]) -> str:
    """Every map to every power, as channels: ``[N, len(powers) * len(maps), h, w]``, the maps
    running fastest.
    """
    axis = graph.constant([1], np.int64)
    images = [graph.add("Unsqueeze", each, axis, hint="map_image") for each in maps_nhw]
    base = (
        images[0] if len(images) == 1 else graph.add("Concat", *images, axis=1, hint="maps_stacked")
    )
    raised = [base if power == 1 else _power(graph, base, power) for power in powers]
    return (
        raised[0]
        if len(raised) == 1
        else graph.add("Concat", *raised, axis=1, hint="powers_stacked")
    )


def _power(graph: Graph, tensor: str, power: float) -> str:
    """Square and root have operators of their own, which are many times cheaper than a general
    power.
    """
    if power == 0.5:
        return graph.add("Sqrt", tensor, hint="map_root")
    if power == 2:
        return graph.add("Mul", tensor, tensor, hint="map_square")
    return graph.add("Pow", tensor, graph.constant(power), hint="map_power")


def _share(graph: Graph, tensor: str, axes: Sequence[int]) -> str:
    """Divided by its mean over ``axes``; what is zero throughout stays zero."""
    mean = graph.add(
        "ReduceMean", tensor, graph.constant(list(axes), np.int64), keepdims=1, hint="map_mean"
    )
    return graph.add(
        "Div", tensor, graph.add("Max", mean, graph.constant(1e-30)), hint="map_normalised"
    )


def _grids(graph: Graph, stack: str, size: int) -> str:
    """Mean of each cell of maps ``[N, M, h, w]`` with a mean of 1: ``[N, M * size * size]``; cells
    need not align with pixels.

    Cells have equal areas, so the mean over the cells is the mean over the map.
    """
    n, count, height, width = graph.shape(stack)
    if height % size == 0 and width % size == 0:
        cells = _cell_means(graph, stack, size) if (height, width) != (size, size) else stack
    else:
        rows = _weighted_mean(graph, stack, area_matrix(height, size), axis=2)
        cells = _weighted_mean(graph, rows, area_matrix(width, size), axis=3)
    flat = graph.constant([n, count * size * size], np.int64)
    return graph.add("Reshape", _share(graph, cells, (2, 3)), flat, hint="grid_flat")


def _cell_means(graph: Graph, stack: str, size: int) -> str:
    """Of cells of whole pixels, first along rows, then along columns.

    OpenVINO's pooling would turn the maps to another layout first, which takes twice as long as
    the means (measured).
    """
    n, count, height, width = graph.shape(stack)

    def means(tensor: str, shape: list[int], axis: int) -> str:
        apart = graph.add("Reshape", tensor, graph.constant(shape, np.int64), hint="grid_cells")
        return graph.add(
            "ReduceMean", apart, graph.constant([axis], np.int64), keepdims=0, hint="grid"
        )

    rows = means(stack, [n, count, height, size, width // size], 4)
    return means(rows, [n, count, size, height // size, size], 3)


def _weighted_mean(graph: Graph, tensor: str, matrix: Array32, axis: int) -> str:
    """Multiply one axis of ``[N, M, h, w]`` by a matrix ``[cells, length]``.

    Written as products and a sum, not as a matrix product: engines that compute matrix products in
    bf16 keep what follows the last of them in fp32, and the box deserves it.
    """
    shape = [1, 1, *matrix.shape, 1] if axis == 2 else [1, 1, 1, *matrix.shape]
    spread = graph.add("Unsqueeze", tensor, graph.constant([axis], np.int64), hint="map_spread")
    products = graph.add("Mul", spread, graph.constant(matrix.reshape(shape)), hint="cell_products")
    return graph.add(
        "ReduceSum", products, graph.constant([axis + 1], np.int64), keepdims=0, hint="cells"
    )


def area_matrix(length: int, cells: int) -> Array32:
    """``[cells, length]``: row i averages the i-th of ``cells`` equal stretches, parts of pixels
    counted in part.
    """
    edges = np.linspace(0, length, cells + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    matrix: Array32 = (overlap / (high - low)).astype(np.float32)
    return matrix


def _quantiles(graph: Graph, stack: str, count: int) -> str:
    """``[N, M, h, w]`` to ``[N, M * 2 * count]``: positions of the quantiles (i + 1/2) / count of
    both marginals, x then y.

    A position is the share of the axis below the quantile: bin j, of mass p_j between C_j and C_j +
    p_j, counts by the part of it that lies below q, ``clip((q - C_j) / p_j, 0, 1)``.
    """
    n, maps, height, width = graph.shape(stack)
    marginals = [
        graph.add("ReduceMean", stack, graph.constant([a], np.int64), keepdims=0, hint="marginal")
        for a in (2, 3)
    ]
    if height == width:  # both axes at once: [N, M, 2, side]
        both = [
            graph.add("Unsqueeze", each, graph.constant([2], np.int64), hint="marginal_row")
            for each in marginals
        ]
        found = _positions(graph, graph.add("Concat", *both, axis=2, hint="marginals"), count)
    else:
        rows = [
            graph.add("Unsqueeze", each, graph.constant([2], np.int64), hint="marginal_row")
            for each in marginals
        ]
        found = graph.add(
            "Concat", *(_positions(graph, row, count) for row in rows), axis=2, hint="quantiles_xy"
        )
    return graph.add(
        "Reshape", found, graph.constant([n, maps * 2 * count], np.int64), hint="quantiles_flat"
    )


def _positions(graph: Graph, marginals: str, count: int) -> str:
    """``[N, M, K, length]`` to the quantiles' positions ``[N, M, K, count]``."""
    length = graph.shape(marginals)[3]
    levels = graph.constant(((np.arange(count) + 0.5) / count).reshape(1, 1, 1, count, 1))
    mass = graph.add(
        "Mul", _share(graph, marginals, (3,)), graph.constant(1 / length), hint="marginal_mass"
    )
    mass = graph.add("Unsqueeze", mass, graph.constant([3], np.int64), hint="mass")
    below = graph.add("CumSum", mass, graph.constant(4, np.int64), exclusive=1, hint="mass_below")
    part = graph.add(
        "Div", graph.add("Sub", levels, below), graph.add("Max", mass, graph.constant(1e-12))
    )
    part = graph.add("Clip", part, graph.constant(0.0), graph.constant(1.0), hint="bins_below")
    return graph.add(
        "ReduceMean", part, graph.constant([4], np.int64), keepdims=0, hint="quantiles"
    )


def _raw(graph: Graph, stack: str, size: int) -> str:
    """The pixels of maps ``[N, M, size, size]``: ``[N, M * size * size]``."""
    n, count, height, width = graph.shape(stack)
    if (height, width) != (size, size):
        raise ModelError(f"a head reads {size} x {size} pixels of a map of {height} x {width}")
    flat = graph.constant([n, count * size * size], np.int64)
    return graph.add("Reshape", stack, flat, hint="raw_flat")


KINDS = {"grid": _grids, "quantiles": _quantiles, "raw": _raw}
