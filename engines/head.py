"""The box head: a linear layer on cheap features of the maps, as graph nodes and as a small file.

The papers' head reads the box off the whole map: ``box = W m + b`` (Ebrahimpour & Noelle, section 3.2). The features that
it reads here (``engines.features``) stay functions of the same backward pass.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.base import ModelError
from engines.features import Array32, Feature
from engines.files import whole_file
from engines.graph import Graph
from engines.maps import MapSpec
from engines.trust import Trust, trust_of


@dataclass(frozen=True)
class Head:
    """A fitted linear layer from map features to the box, or one for each of K kinds, tied to the network it was fitted on.

    Attributes:
        spec: the maps it reads.
        features: its inputs, in order.
        weight: float32 ``[K, 4, D]``, to x0, y0, x1, y1 as fractions of width and height.
        bias: float32 ``[K, 4]``.
        network: sha256 of the classifier (``Classifier.digest``).
        size_px: input side at which it was fitted.
        card: what it was fitted on, and the constant boxes of that data (the honest baselines).
        routes: int64 ``[classes]``: which of the K layers serves each class of the network; empty where there is one.
        trust: says how sure its boxes are; None in files from before there was one.
    """

    spec: MapSpec
    features: tuple[Feature, ...]
    weight: Array32
    bias: Array32
    network: str
    size_px: int
    card: Mapping[str, object] = field(default_factory=dict)
    routes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    trust: Trust | None = None

    @property
    def digest(self) -> str:
        """sha256 of everything that decides its boxes."""
        parts = json.dumps([asdict(self.spec), [asdict(f) for f in self.features], self.network, self.size_px])
        return hashlib.sha256(parts.encode() + self.weight.tobytes() + self.bias.tobytes() + self.routes.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        description = {
            "spec": asdict(self.spec), "features": [asdict(f) for f in self.features],
            "network": self.network, "size_px": self.size_px, "card": dict(self.card),
            "trust": asdict(self.trust) if self.trust else None,
        }  # fmt: skip
        arrays = {"weight": self.weight, "bias": self.bias, "routes": self.routes}
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
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
            weight, bias, routes = (file.get_tensor(name) for name in ("weight", "bias", "routes"))
        features = tuple(Feature(**f) for f in description["features"])
        head = Head(
            MapSpec(**description["spec"]), features, weight, bias,
            description["network"], description["size_px"], description["card"], routes,
            trust_of(description.get("trust")),
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read head {path}: {error or type(error).__name__}; fit one with 'fit'") from error
    kinds, width = len(weight), sum(f.width for f in features)
    routed = routes.max(initial=0) < kinds and routes.min(initial=0) >= 0 and (len(routes) > 0 or kinds == 1)
    if weight.shape != (kinds, 4, width) or bias.shape != (kinds, 4) or not routed:
        raise ModelError(f"head {path} is damaged: weight {list(weight.shape)} does not fit its features")
    return head


def append_box(graph: Graph, features: str, class_index: str, head: Head) -> str:
    """Append the linear layer: ``[N, 4]``, corners in order and inside 0..1.

    Where the head has several, ``class_index`` (int64 ``[N]``) decides which.

    Written as a product and a sum, not as a matrix product: engines that compute matrix products in bf16 keep what follows
    the last of them in fp32, and the box deserves it. The bias is the weight of a feature that is 1: OpenVINO 2026.4 adds a
    ``[1, 4]`` behind the sum wrongly where there are several images (the other images' boxes came out of place).
    """
    one = graph.constant(np.ones((graph.shape(features)[0], 1)), hint="one")
    rows = graph.add("Concat", features, one, axis=1, hint="features_and_one")
    rows = graph.add("Unsqueeze", rows, graph.constant([1], np.int64), hint="features_rows")
    weight = graph.constant(np.concatenate([head.weight, head.bias[:, :, None]], axis=2), hint="head_weight")
    if len(head.weight) > 1:
        kind = graph.add("Gather", graph.constant(head.routes, np.int64, hint="routes"), class_index, hint="kind")
        weight = graph.add("Gather", weight, kind, hint="routed")
    products = graph.add("Mul", rows, weight, hint="box_products")
    linear = graph.add("ReduceSum", products, graph.constant([2], np.int64), keepdims=0, hint="box_linear")
    inside = graph.add("Clip", linear, graph.constant(0.0), graph.constant(1.0), hint="box_inside")
    swapped = graph.add("Gather", inside, graph.constant([2, 3, 0, 1], np.int64), axis=1, hint="box_swapped")
    first = graph.constant([[True, True, False, False]], np.bool_)
    ordered = [graph.add(op, inside, swapped, hint=f"box_{op.lower()}") for op in ("Min", "Max")]
    return graph.add("Where", first, *ordered, hint="box")
