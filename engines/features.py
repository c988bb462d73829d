"""Computes a head's features from the maps: coarse grids, and quantiles of the marginals, which
move with the object.

All maps of one size are worked on together, as channels of one tensor: a small network's head would
otherwise be hundreds of tiny nodes, whose overhead costs as much as the backward pass (measured:
1.3 ms of 5 on two cores).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.graph import Graph

Array32 = NDArray[np.float32]
Source = tuple[str, str]
"""(signal, layer) of a map."""


@dataclass(frozen=True)
class Feature:
    """One group of the head's inputs, computed from one map.

    Attributes:
        kind: ``grid`` (the map averaged to ``size`` x ``size`` cells; the papers' head is the grid
            of full size) or ``quantiles`` (positions, 0..1, of ``size`` evenly spaced quantiles of
            the marginals along x, then y).
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
        return self.size * self.size if self.kind == "grid" else 2 * self.size


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
        cell = [height // size, width // size]
        cells = (
            graph.add("AveragePool", stack, kernel_shape=cell, strides=cell, hint="grid")
            if cell != [1, 1]
            else stack
        )
    else:
        rows = _weighted_mean(graph, stack, area_matrix(height, size), axis=2)
        cells = _weighted_mean(graph, rows, area_matrix(width, size), axis=3)
    flat = graph.constant([n, count * size * size], np.int64)
    return graph.add("Reshape", _share(graph, cells, (2, 3)), flat, hint="grid_flat")


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


KINDS = {"grid": _grids, "quantiles": _quantiles}
