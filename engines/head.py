"""What reads a box off a map: the fitted head, a linear layer on features of the maps, and the
training-free box.

A fitted head is graph nodes and a small file; some are shipped. The training-free box is the
heuristic of Ebrahimpour & Noelle ("Fast Object Localization via Sensitivity Analysis", section 3,
at table 2: Gaussian blur, top 20 % of the pixels, the box around those), read off the map that
suits the network best; theirs is of the Gestalt Total by the pixels. It needs no labelled box, so
it is what a network without a fitted head falls back on.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from engines.confidence import ConfidenceModel, confidence_model_of
from engines.dense import COMPARED, GEOMETRY, SAME, SIZES, DenseHead, Level
from engines.dense import FORMAT as DENSE_FORMAT
from engines.dense import METADATA as DENSE
from engines.dense_names import CUES, naming_of
from engines.errors import ModelError
from engines.files import (
    Kind,
    json_object,
    number,
    read_safetensors,
    read_safetensors_metadata,
    shown,
    text,
    whole_file,
    whole_number,
)
from engines.graph import Graph
from engines.maps import KINDS, PIXELS, SIGNALS, Array32, Feature, MapSpec, Method
from engines.networks.registry import Classifier
from engines.networks.weights import ASSETS

LARGEST_SIDE = 4096
"""Pixels of an input, or cells and quantiles of a feature, along a side."""
MOST_COMPARED = 1024
"""See ``engines.dense.DenseHead.compared``."""
HEAD_FILE = Kind("head", (".safetensors",), rb'.{8}\{"__metadata__":\{"sightline_(dense_)?head":')
PUBLISHED_SIGMA_PX = 20
"""Of the blurs of the heuristic's paper the one with the most boxes right."""


@dataclass(frozen=True)
class Head:
    """A fitted linear layer from map features to the box, or one for each of K kinds, tied to the
    network it was fitted on.

    Attributes:
        spec: the maps it reads.
        features: its inputs, in order.
        weight: float32 ``[K, 4, D]``, to x0, y0, x1, y1 as fractions of width and height.
        bias: float32 ``[K, 4]``.
        network: sha256 of the classifier (``Classifier.digest``).
        size_px: input side at which it was fitted.
        card: what it was fitted on, and the constant boxes of that data (the honest baselines).
        routes: int64 ``[classes]``: which of the K layers serves each class of the network; empty
            where there is one.
        confidence_model: says how sure its boxes are; None in files from before there was one.
    """

    spec: MapSpec
    features: tuple[Feature, ...]
    weight: Array32
    bias: Array32
    network: str
    size_px: int
    card: Mapping[str, object] = field(default_factory=dict)
    routes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    confidence_model: ConfidenceModel | None = None

    @property
    def digest(self) -> str:
        """sha256 of everything that decides its boxes."""
        parts = json.dumps(
            [asdict(self.spec), [asdict(f) for f in self.features], self.network, self.size_px]
        )
        return hashlib.sha256(
            parts.encode() + self.weight.tobytes() + self.bias.tobytes() + self.routes.tobytes()
        ).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        description = {
            "spec": asdict(self.spec),
            "features": [asdict(f) for f in self.features],
            "network": self.network,
            "size_px": self.size_px,
            "card": dict(self.card),
            "trust": self.confidence_model.stored() if self.confidence_model else None,
        }
        arrays = {"weight": self.weight, "bias": self.bias, "routes": self.routes}
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        with whole_file(path) as part:
            part.write_bytes(save(tensors, {"sightline_head": json.dumps(description)}))


def load_head(path: Path) -> Head | DenseHead:
    """Read a head of either kind.

    Raises:
        ModelError: it is missing, damaged, not a head, or holds numbers that no box can be read
            with.
    """
    try:
        tensors, metadata = read_safetensors(path, "head")
        if DENSE in metadata:
            return _dense_head_of(tensors, json_object(metadata[DENSE]))
        if "sightline_head" not in metadata:
            raise ValueError(
                "its metadata have no 'sightline_head', so that it is another kind of file"
            )
        head = _head_of(tensors, json_object(metadata["sightline_head"]))
    except (AttributeError, KeyError, TypeError, ValueError, ModelError) as error:
        reason = f"it has no {error}" if type(error) is KeyError else str(error)
        raise ModelError(f"cannot read head {path}: {reason}; fit one with 'fit'") from error
    return head


def _dense_head_of(tensors: Mapping[str, NDArray[Any]], described: Mapping[str, Any]) -> DenseHead:
    """A dense head of what its file holds.

    Raises:
        KeyError, TypeError, ValueError, ModelError: something is missing, or is not what it should
        be.
    """
    whole_number(described["format"], "its format", 1, DENSE_FORMAT)
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise ValueError(f"its {name} holds values that are not finite (NaN or infinity)")
    levels = tuple(
        _level_of(each, arrays[f"mean{place}"], arrays[f"basis{place}"])
        for place, each in enumerate(described["levels"])
    )
    cell_width = sum(level.cell_width for level in levels)
    whole = bool(described.get("whole", False))
    compared = whole_number(described.get("compared", COMPARED), "its compared", 1, MOST_COMPARED)
    box_width = 1 + sum(level.box_width for level in levels) + GEOMETRY
    if whole:
        box_width += levels[-1].basis.shape[1]
    shown_from = described.get("shown_from")
    has_first = described["format"] > 2
    shapes = {
        "cell_weight": (5 * SIZES, cell_width),
        "cell_bias": (5 * SIZES,),
        "box_weight": (5, box_width),
        "box_bias": (5,),
        **({"first_weight": (4, box_width), "first_bias": (4,)} if has_first else {}),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"it is damaged: {name} is {arrays[name].shape}, not {shape}")
    card = described["card"]
    if not isinstance(card, dict):
        raise ValueError("its card is no JSON object")
    _check_constant_boxes(card.get("constant_boxes"))
    slope, offset = (number(each, "its certainty", -1e3, 1e3) for each in described["certainty"])
    spec = {name: text(value, f"its {name}") for name, value in described["spec"].items()}
    return DenseHead(
        MapSpec(**spec),
        levels,
        whole_number(described["stride_px"], "its stride_px", 1, LARGEST_SIDE),
        arrays["cell_weight"],
        arrays["cell_bias"],
        arrays["box_weight"],
        arrays["box_bias"],
        (slope, offset),
        whole_number(described["candidates"], "its candidates", 1, compared),
        text(described["network"], "its network"),
        whole_number(described["size_px"], "its size_px", 1, LARGEST_SIDE),
        text(described["resize"], "its resize"),
        card,
        compared,
        number(described.get("same", SAME), "its same", 0, 1),
        whole,
        naming_of(described.get("naming"), arrays, box_width),
        confidence_model_of(described.get("trust"), CUES),
        None if shown_from is None else number(shown_from, "its shown_from", 0, 1),
        text(described.get("body", ""), "its body"),
        arrays["first_weight"] if has_first else None,
        arrays["first_bias"] if has_first else None,
    )


def _level_of(described: Mapping[str, Any], mean: Array32, basis: Array32) -> Level:
    if mean.ndim != 1 or basis.ndim != 2 or len(mean) != len(basis):
        raise ValueError(f"it is damaged: a basis {basis.shape} does not fit a mean {mean.shape}")
    kernel = whole_number(described["kernel"], "a level's kernel", 1, 64)
    channels = whole_number(described["box_channels"], "a level's channels", 1, basis.shape[1])
    bins = whole_number(described["box_bins"], "a level's bins", 1, 32)
    name = text(described["layer"], "a level's layer")
    return Level(name, bool(described["root"]), mean, basis, kernel, channels, bins)


def _head_of(tensors: Mapping[str, NDArray[Any]], description: Mapping[str, Any]) -> Head:
    """A head of what its file holds.

    Raises:
        KeyError, TypeError, ValueError, ModelError: something is missing, or is not what it should
        be.
    """
    for name, dtype in (("weight", np.float32), ("bias", np.float32), ("routes", np.int64)):
        if tensors[name].dtype != dtype:
            raise ValueError(f"its {name} holds {tensors[name].dtype}, not {np.dtype(dtype)}")
    weight, bias, routes = (tensors[name] for name in ("weight", "bias", "routes"))
    features = tuple(_feature_of(each) for each in description["features"])
    kinds, width = bias.shape[0] if bias.ndim else 0, sum(feature.width for feature in features)
    if not features or weight.shape != (kinds, 4, width) or bias.shape != (kinds, 4) or kinds < 1:
        raise ValueError(
            f"it is damaged: weight {list(weight.shape)} and bias {list(bias.shape)} do not fit its"
            " features"
        )
    if (
        routes.ndim != 1
        or not (len(routes) or kinds == 1)
        or routes.max(initial=0) >= kinds
        or routes.min(initial=0) < 0
    ):
        raise ValueError("it is damaged: its routes lead to layers that it does not have")
    for name, values in (("weight", weight), ("bias", bias)):
        if not np.isfinite(values).all():
            raise ValueError(f"its {name} holds values that are not finite (NaN or infinity)")
    spec = {name: text(value, f"its {name}") for name, value in description["spec"].items()}
    network, card = text(description["network"], "its network"), description["card"]
    if not re.fullmatch("[0-9a-f]{64}", network) or not isinstance(card, dict):
        raise ValueError("its network is no sha256, or its card no JSON object")
    _check_constant_boxes(card.get("constant_boxes"))
    size_px = whole_number(description["size_px"], "its size_px", 1, LARGEST_SIDE)
    return Head(
        MapSpec(**spec),
        features,
        weight,
        bias,
        network,
        size_px,
        card,
        routes,
        confidence_model_of(description.get("trust")),
    )


def _feature_of(stored: Mapping[str, Any]) -> Feature:
    """See ``Feature``; TypeError, ValueError where it is none."""
    feature = Feature(**stored)
    whole_number(feature.size, "a feature's size", 1, LARGEST_SIDE)
    number(feature.power, "a feature's power", 0.01, 100)
    text(feature.layer, "a feature's layer")
    if feature.kind not in KINDS or feature.signal not in ("gradient", *SIGNALS):
        raise ValueError(
            f"a feature is {shown(feature.kind)} of {shown(feature.signal)}, which this version"
            " does not know"
        )
    return feature


def _check_constant_boxes(boxes: object) -> None:
    """They are stamped on every graph: names, and four fractions each."""
    if boxes is None:
        return
    if not isinstance(boxes, dict):
        raise ValueError("its constant boxes are no JSON object")
    for name, box in boxes.items():
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"its constant box {shown(name)} has not four edges")
        for edge in box:
            number(edge, f"an edge of its constant box {shown(name)}", -1, 2)


def append_box(graph: Graph, features: str, class_index: str, head: Head) -> str:
    """Append the linear layer: ``[N, 4]``, corners in order and inside 0..1.

    Where the head has several, ``class_index`` (int64 ``[N]``) decides which.

    Written as a product and a sum, not as a matrix product: engines that compute matrix products in
    bf16 keep what follows the last of them in fp32, and the box deserves it. The bias is the weight
    of a feature that is 1: OpenVINO 2026.4 adds a ``[1, 4]`` behind the sum wrongly where there are
        several images (the other images' boxes came out of place).
    """
    one = graph.constant(np.ones((graph.shape(features)[0], 1)), hint="one")
    rows = graph.add("Concat", features, one, axis=1, hint="features_and_one")
    rows = graph.add("Unsqueeze", rows, graph.constant([1], np.int64), hint="features_rows")
    weight = graph.constant(
        np.concatenate([head.weight, head.bias[:, :, None]], axis=2), hint="head_weight"
    )
    if len(head.weight) > 1:
        kind = graph.add(
            "Gather", graph.constant(head.routes, np.int64, hint="routes"), class_index, hint="kind"
        )
        weight = graph.add("Gather", weight, kind, hint="routed")
    products = graph.add("Mul", rows, weight, hint="box_products")
    linear = graph.add(
        "ReduceSum", products, graph.constant([2], np.int64), keepdims=0, hint="box_linear"
    )
    inside = graph.add("Clip", linear, graph.constant(0.0), graph.constant(1.0), hint="box_inside")
    swapped = graph.add(
        "Gather", inside, graph.constant([2, 3, 0, 1], np.int64), axis=1, hint="box_swapped"
    )
    first = graph.constant([[True, True, False, False]], np.bool_)
    ordered = [graph.add(op, inside, swapped, hint=f"box_{op.lower()}") for op in ("Min", "Max")]
    return graph.add("Where", first, *ordered, hint="box")


ENDING = "_head.safetensors"
NO_HEAD = "none"
"""What ``--head`` takes for the map alone, by the network as it is without a head of its own."""


def shipped_head_names() -> list[str]:
    """The usual ones first: a longer name says what is unusual."""
    names = (path.name.removesuffix(ENDING) for path in ASSETS.glob(f"*{ENDING}"))
    return sorted(names, key=lambda name: (len(name), name))


def shipped_head_path(name: str) -> Path:
    """Where the head of that name is, if there is one."""
    return ASSETS / f"{name}{ENDING}"


def head_path(name: str) -> Path:
    """The file of the head that ``--head`` names: that file, the one that 'fit' writes for such a
    name, or a shipped one.
    """
    path, named = Path(name), Path(f"{name}.safetensors")
    if path.exists():
        return path
    if named.exists():
        return named
    return shipped_head_path(name) if name in shipped_head_names() else path


def dense_input(name: str | None) -> tuple[int, str] | None:
    """The input side and the way of resizing that a dense head was fitted with.

    Args:
        name: as ``--head`` names a head.

    Returns:
        None where it is no dense head, or cannot be read: that is said where it is read whole.
    """
    if name is None:
        return None
    try:
        described = json_object(read_safetensors_metadata(head_path(name), "head")[DENSE])
        size_px = whole_number(described["size_px"], "its size_px", 1, LARGEST_SIDE)
        return size_px, text(described["resize"], "its resize")
    except (KeyError, TypeError, ValueError, ModelError):
        return None


def with_classes_of(head: DenseHead, classifier: Classifier) -> DenseHead:
    """The head for a classifier: it no longer says which classes are kinds of its names where these
    are of another last layer.
    """
    if classifier.digest == head.network or head.naming is None:
        return head
    return replace(head, naming=replace(head.naming, finer=np.zeros(0, np.int64)))


def head_of_weights(weights: str) -> str:
    """Name of the shipped head that still fits, which ``finetune`` writes into a file of weights;
    empty where it says none.
    """
    if not weights.endswith(".safetensors") or not Path(weights).exists():
        return ""
    with suppress(ModelError):  # that is said where it is read whole
        return read_safetensors_metadata(Path(weights), "weights").get("head", "")
    return ""


def shipped_heads(classifier: Classifier) -> dict[str, Head | DenseHead]:
    """Name to head, of all that were fitted on the network, at any size, the usual ones first."""
    heads = {name: load_head(shipped_head_path(name)) for name in shipped_head_names()}
    return {name: head for name, head in heads.items() if is_fitted_on(head, classifier)}


def is_fitted_on(head: Head | DenseHead, classifier: Classifier) -> bool:
    """Whether a head was fitted on this network; or on one with another last layer, where it reads
    nothing of that.
    """
    if isinstance(head, DenseHead):
        return head.network == classifier.digest or head.body == classifier.body_digest != ""
    reads_scores = head.spec.objective != "gestalt" or len(head.routes) > 0
    body = "" if reads_scores else classifier.body_digest
    return head.network in {classifier.digest, body} - {""}


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
    values, _ = graph.top(flat, k)
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
