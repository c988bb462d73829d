"""The box head: a linear layer on cheap features of the maps, as graph nodes and as a small file.

The papers' head reads the box off the whole map: ``box = W m + b`` (Ebrahimpour & Noelle, section 3.2). The features here
stay functions of the same backward pass: coarse grids of one or several maps, and the quantiles of each map's two
marginals, which move linearly with the object.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.base import ModelError
from engines.files import whole_file
from engines.graph import Graph
from engines.maps import MapSpec

Array32 = NDArray[np.float32]


@dataclass(frozen=True)
class Feature:
    """One group of the head's inputs, computed from one map.

    Attributes:
        kind: ``grid`` (the map averaged to ``size`` x ``size`` cells; the papers' head is the grid of full size) or
            ``quantiles`` (positions, 0..1, of ``size`` evenly spaced quantiles of the marginals along x, then y).
        layer: where the map is taken: ``pixels`` or an inner layer.
        size: cells per side, or number of quantiles per axis.
        power: exponent on the map before it is normalised to a mean of 1; below 1 it tames single hot pixels.
        signal: ``gradient`` (the sensitivity map), ``activation`` (the layer's mean activation: no backward pass),
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


@dataclass(frozen=True)
class Head:
    """A fitted linear layer from map features to the box, tied to the network it was fitted on.

    Attributes:
        spec: the maps it reads.
        features: its inputs, in order.
        weight: float32 ``[4, D]``, to x0, y0, x1, y1 as fractions of width and height.
        bias: float32 ``[4]``.
        network: sha256 of the classifier (``Classifier.digest``).
        size_px: input side at which it was fitted.
        card: what it was fitted on, and the constant boxes of that data (the honest baselines).
    """

    spec: MapSpec
    features: tuple[Feature, ...]
    weight: Array32
    bias: Array32
    network: str
    size_px: int
    card: Mapping[str, object] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of everything that decides its boxes."""
        parts = json.dumps([asdict(self.spec), [asdict(f) for f in self.features], self.network, self.size_px])
        return hashlib.sha256(parts.encode() + self.weight.tobytes() + self.bias.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        description = {
            "spec": asdict(self.spec), "features": [asdict(f) for f in self.features],
            "network": self.network, "size_px": self.size_px, "card": dict(self.card),
        }  # fmt: skip
        tensors = {"weight": np.ascontiguousarray(self.weight), "bias": np.ascontiguousarray(self.bias)}
        with whole_file(path) as part:
            part.write_bytes(save(tensors, {"sightline_head": json.dumps(description)}))


def load_head(path: Path) -> Head:
    """Read a head.

    Raises:
        ModelError: it is missing, damaged, or not a head.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads((file.metadata() or {})["sightline_head"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        features = tuple(Feature(**f) for f in description["features"])
        head = Head(
            MapSpec(**description["spec"]), features, weight, bias,
            description["network"], description["size_px"], description["card"],
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read head {path}: {error or type(error).__name__}; fit one with 'fit'") from error
    if weight.shape != (4, sum(f.width for f in features)) or bias.shape != (4,):
        raise ModelError(f"head {path} is damaged: weight {list(weight.shape)} does not fit its features")
    return head


def append_features(graph: Graph, maps: Mapping[tuple[str, str], str], features: Sequence[Feature]) -> str:
    """Append the head's inputs.

    Args:
        graph: appended to.
        maps: (signal, layer) to a map ``[N, h, w]``, not normalised.
        features: which, in order.

    Returns:
        float32 ``[N, D]``.
    """
    parts = []
    for feature in features:
        tensor = _normalised(graph, maps[feature.signal, feature.layer], feature.power)
        parts.append(_grid(graph, tensor, feature.size) if feature.kind == "grid" else _quantiles(graph, tensor, feature.size))
    return parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=1, hint="features_joined")


def append_box(graph: Graph, features: str, head: Head) -> str:
    """Append the linear layer: ``[N, 4]``, corners in order and inside 0..1.

    Written as a product and a sum, not as a matrix product: engines that compute matrix products in bf16 keep what follows
    the last of them in fp32, and the box deserves it.
    """
    rows = graph.add("Unsqueeze", features, graph.constant([1], np.int64), hint="features_rows")
    products = graph.add("Mul", rows, graph.constant(head.weight[None], hint="head_weight"), hint="box_products")
    summed = graph.add("ReduceSum", products, graph.constant([2], np.int64), keepdims=0, hint="box_sum")
    linear = graph.add("Add", summed, graph.constant(head.bias[None]), hint="box_linear")
    inside = graph.add("Clip", linear, graph.constant(0.0), graph.constant(1.0), hint="box_inside")
    swapped = graph.add("Gather", inside, graph.constant([2, 3, 0, 1], np.int64), axis=1, hint="box_swapped")
    first = graph.constant([[True, True, False, False]], np.bool_)
    ordered = [graph.add(op, inside, swapped, hint=f"box_{op.lower()}") for op in ("Min", "Max")]
    return graph.add("Where", first, *ordered, hint="box")


def _normalised(graph: Graph, tensor: str, power: float) -> str:
    """``map^power`` scaled to a mean of 1 per image; an all-zero map stays zero."""
    if power != 1:
        tensor = graph.add("Pow", tensor, graph.constant(power), hint="map_power")
    mean = graph.add("ReduceMean", tensor, graph.constant([1, 2], np.int64), keepdims=1, hint="map_mean")
    return graph.add("Div", tensor, graph.add("Max", mean, graph.constant(1e-30)), hint="map_normalised")


def _grid(graph: Graph, tensor: str, size: int) -> str:
    """Mean of each cell; cells need not align with pixels."""
    n, height, width = graph.shape(tensor)
    flat = graph.constant([n, size * size], np.int64)
    if height % size == 0 and width % size == 0:
        image = graph.add("Unsqueeze", tensor, graph.constant([1], np.int64), hint="map_image")
        cell = [height // size, width // size]
        pooled = graph.add("AveragePool", image, kernel_shape=cell, strides=cell, hint="grid")
        return graph.add("Reshape", pooled, flat, hint="grid_flat")
    rows = _weighted_mean(graph, tensor, area_matrix(height, size), axis=1)
    return graph.add("Reshape", _weighted_mean(graph, rows, area_matrix(width, size), axis=2), flat, hint="grid_flat")


def _weighted_mean(graph: Graph, tensor: str, matrix: Array32, axis: int) -> str:
    """Multiply one axis of ``[N, h, w]`` by a matrix ``[cells, length]``, in products and sums (see ``append_box``)."""
    shape = [1, *matrix.shape, 1] if axis == 1 else [1, 1, *matrix.shape]
    spread = graph.add("Unsqueeze", tensor, graph.constant([axis], np.int64), hint="map_spread")
    products = graph.add("Mul", spread, graph.constant(matrix.reshape(shape)), hint="cell_products")
    return graph.add("ReduceSum", products, graph.constant([axis + 1], np.int64), keepdims=0, hint="cells")


def area_matrix(length: int, cells: int) -> Array32:
    """``[cells, length]``: row i averages the i-th of ``cells`` equal stretches, parts of pixels counted in part."""
    edges = np.linspace(0, length, cells + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    matrix: Array32 = (overlap / (high - low)).astype(np.float32)
    return matrix


def _quantiles(graph: Graph, tensor: str, count: int) -> str:
    """Positions of the quantiles (i + 1/2) / count of the marginals along x, then along y.

    A position is the share of the axis below the quantile: bin j, of mass p_j between C_j and C_j + p_j, counts by the
    part of it that lies below q, ``clip((q - C_j) / p_j, 0, 1)``.
    """
    levels = graph.constant(((np.arange(count) + 0.5) / count).reshape(1, count, 1))
    parts = []
    for axis in (1, 2):  # summing over rows leaves the marginal along x
        length = graph.shape(tensor)[3 - axis]
        mean = graph.add("ReduceMean", tensor, graph.constant([axis], np.int64), keepdims=0, hint="marginal")
        mass = graph.add("Mul", mean, graph.constant(1 / length), hint="marginal_mass")
        mass = graph.add("Unsqueeze", mass, graph.constant([1], np.int64), hint="mass")
        below = graph.add("CumSum", mass, graph.constant(2, np.int64), exclusive=1, hint="mass_below")
        part = graph.add("Div", graph.add("Sub", levels, below), graph.add("Max", mass, graph.constant(1e-12)))
        part = graph.add("Clip", part, graph.constant(0.0), graph.constant(1.0), hint="bins_below")
        parts.append(graph.add("ReduceMean", part, graph.constant([2], np.int64), keepdims=0, hint="quantiles"))
    return graph.add("Concat", *parts, axis=1, hint="quantiles_xy")
