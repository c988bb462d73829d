"""The names of a dense head's boxes, and its confidence: two small layers of the graph.

Names come of a linear layer on what the box layer reads, with classes of its own: those of the
labels that the head was fitted on. The confidence is a logistic model of a few cues. Both are in
the graph, and ``calib.heads.dense_names`` fits them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.confidence import FURTHEST, ConfidenceModel
from engines.files import number, text
from engines.graph import Graph
from engines.maps import Array32

CUES = ("expected", "objectness", "area", "aspect", "evidence", "best_expected", "alike")
"""What the confidence is read of, see ``append_cues``."""
MOST_NAMES = 2000


@dataclass(frozen=True)
class Naming:
    """The layer that names boxes.

    Attributes:
        names: of C classes.
        weight: float32 ``[C + 1, D]``, of the D numbers that the box layer reads: to the scores of
            the classes, and of the background.
        bias: float32 ``[C + 1]``.
        shown_from: a name is shown where it is at least so probable.
        finer: int64 ``[classes of the network]``: which of the names each is a kind of, -1 for
            none; empty where nothing is known of them.
        finer_from: the name that the network gives is shown, too, where it is at least so probable
            and of that kind.
        means: float32 ``[C + 1, D]``: of what the box layer reads, over boxes of each class, and of
            the background. Classes that are added later are told from them. Empty where they are
            not known.
    """

    names: tuple[str, ...]
    weight: Array32
    bias: Array32
    shown_from: float
    finer: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    finer_from: float = 1.0
    means: Array32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def arrays(self) -> dict[str, Array32]:
        """What a head's file holds of it besides the description."""
        found = {"name_weight": self.weight, "name_bias": self.bias}
        return {**found, "name_mean": self.means} if self.means.size else found

    def described(self) -> dict[str, Any]:
        """What a graph's or a file's description holds of it."""
        return {
            "names": list(self.names),
            "shown_from": self.shown_from,
            "finer_from": self.finer_from,
            "finer": self.finer.tolist(),
        }


def naming_of(
    described: Mapping[str, Any] | None, arrays: Mapping[str, Array32], width: int
) -> Naming | None:
    """Read a naming layer from what a head's file holds; None where it has none.

    Args:
        described: as ``Naming.described`` gives it.
        arrays: with ``name_weight`` and ``name_bias``.
        width: how many numbers the box layer reads.

    Raises:
        KeyError, TypeError, ValueError: something is missing, or is not what it should be.
    """
    if described is None:
        return None
    names = tuple(text(each, "a name of its classes") for each in described["names"])
    if not 0 < len(names) <= MOST_NAMES:
        raise ValueError(f"it names {len(names)} classes")
    weight, bias = arrays["name_weight"], arrays["name_bias"]
    if weight.shape != (len(names) + 1, width) or bias.shape != (len(names) + 1,):
        raise ValueError(f"it is damaged: name_weight is {weight.shape}, for {len(names)} names")
    means = arrays.get("name_mean", np.zeros((0, 0), np.float32))
    if means.size and means.shape != weight.shape:
        raise ValueError(f"it is damaged: name_mean is {means.shape}, not {weight.shape}")
    finer = np.array([number(v, "a kind", -1, len(names) - 1) for v in described["finer"]])
    limits = [number(described[key], f"its {key}", 0, 1) for key in ("shown_from", "finer_from")]
    return Naming(names, weight, bias, limits[0], finer.astype(np.int64), limits[1], means)


@dataclass(frozen=True)
class BoxName:
    """The name of a box.

    Attributes:
        label: the name that people would use; ``object`` where none is sure enough.
        finer: the network's own name, where it is sure, of that kind, and says more; else empty.
        probability: of the label; 0 where it is ``object``.
    """

    label: str
    finer: str
    probability: float


OBJECT = "object"
"""What a box is called where no name is sure enough."""


class Labeler:
    """Names the boxes of a dense head.

    Args:
        described: as ``Naming.described`` gives it.
        class_names: of the network.
    """

    def __init__(self, described: Mapping[str, Any], class_names: Sequence[str]) -> None:
        self.names = tuple(described["names"])
        self._shown_from = float(described["shown_from"])
        self._finer_from = float(described["finer_from"])
        self._finer = list(described["finer"])
        self._class_names = class_names

    def kind_of(self, class_index: int | None) -> int | None:
        """The place of the name that a class of the network is a kind of; None where it is of
        none.
        """
        if class_index is None or class_index >= len(self._finer):
            return None
        place = int(self._finer[class_index])
        return place if place >= 0 else None

    def are_called(self, rows: NDArray[np.float64], place: int) -> NDArray[np.bool_]:
        """Which boxes ``name_of`` gives a name, and this one.

        Args:
            rows: of the candidates, see ``name_of``.
            place: of the name.
        """
        return np.asarray((rows[:, 7] == place) & (rows[:, 8] >= self._shown_from))

    def name_of(self, row: NDArray[np.float64]) -> BoxName:
        """The name of a box.

        Args:
            row: of the candidates, see ``engines.dense.append_candidates``.
        """
        index, probability, name, sure = int(row[5]), float(row[6]), int(row[7]), float(row[8])
        if sure < self._shown_from:
            return BoxName(OBJECT, "", 0.0)
        label, finer = self.names[name], ""
        of_kind = index < len(self._finer) and self._finer[index] == name
        if of_kind and probability >= self._finer_from and self._class_names[index] != label:
            finer = self._class_names[index]
        return BoxName(label, finer, sure)


def append_names(graph: Graph, scores: str) -> tuple[str, str, str]:
    """(place of the most probable name, its probability, its evidence), each ``[N, K, 1]``.

    Args:
        graph: appended to.
        scores: of the names and the background, ``[N, K, C + 1]``. The evidence is how far the
            name's is above the background's.
    """
    count = graph.shape(scores)[2]
    axis = graph.constant([2], np.int64)
    names, background = (
        graph.add("Slice", scores, *(graph.constant([v], np.int64) for v in part), axis)
        for part in ((0, count - 1), (count - 1, count))
    )
    probability = graph.add("Softmax", scores, axis=2, hint="name_probabilities")
    place = graph.add("ArgMax", names, axis=2, keepdims=1, hint="best_name")
    picked = graph.add("GatherElements", probability, place, axis=2, hint="name_probability")
    most = graph.add("ReduceMax", names, axis, keepdims=1, hint="name_score")
    evidence = graph.add("Sub", most, background, hint="name_evidence")
    return graph.add("Cast", place, to=1, hint="name_number"), picked, evidence


def append_classes(graph: Graph, scores: str, wanted: str, independent: bool) -> tuple[str, str]:
    """(the network's class, its probability) of each box, each ``[N, K, 1]``.

    Args:
        graph: appended to.
        scores: of the network's classes, ``[N, K, classes]``.
        wanted: int64 ``[N]``, the class that is looked for; negative for the most probable one.
        independent: see ``engines.networks.network.Forward``.
    """
    n, count, _ = graph.shape(scores)
    # OpenVINO searches columns side by side: turning included, a third of the time of rows
    turned = graph.add("Transpose", scores, perm=[0, 2, 1], hint="boxes_of_scores")
    best = graph.add("ArgMax", turned, axis=1, keepdims=1, hint="best_of_box")
    best = graph.add("Reshape", best, graph.constant([n, count, 1], np.int64))
    column = graph.add("Reshape", wanted, graph.constant([-1, 1, 1], np.int64))
    automatic = graph.add("Less", column, graph.constant(0, np.int64))
    chosen = graph.add("Where", automatic, best, column, hint="class_of_box")
    picked = graph.add("GatherElements", scores, chosen, axis=2, hint="score_of_box")
    number = graph.add("Cast", chosen, to=1, hint="class_number")
    if independent:
        return number, graph.add("Sigmoid", picked, hint="probability_of_box")
    axis = graph.constant([2], np.int64)  # the softmax of one class needs no quotient for each
    most = graph.add("ReduceMax", scores, axis, keepdims=1, hint="best_score_of_box")
    above = graph.add("Exp", graph.add("Sub", scores, most), hint="exponentials_of_box")
    total = graph.add("ReduceSum", above, axis, keepdims=1)
    share = graph.add("Exp", graph.add("Sub", picked, most))
    return number, graph.add("Div", share, total, hint="probability_of_box")


def append_cues(
    graph: Graph, sizes: str, expected: str, objectness: str, evidence: str, alike: str
) -> str:
    """What the confidence is read of, in the order of ``CUES``: ``[N, K, 7]``.

    Args:
        graph: appended to.
        sizes: width and height of each box in sides of the input that the head was fitted at,
            ``[N, K, 2]``, over 0.
        expected: IoU, ``[N, K, 1]``; the best of the image is a cue, too.
        objectness: ``[N, K, 1]``.
        evidence: of its name, ``[N, K, 1]``.
        alike: how many boxes of the image are near it, ``[N, K, 1]``.
    """
    logs = graph.add("Log", sizes, hint="box_logs")
    axis = graph.constant([2], np.int64)
    area = graph.add("ReduceSum", logs, axis, keepdims=1, hint="box_area")
    signed = graph.add("Mul", logs, graph.constant([[[1.0, -1.0]]]))
    aspect = graph.add("Abs", graph.add("ReduceSum", signed, axis, keepdims=1), hint="box_aspect")
    best = graph.add("ReduceMax", expected, graph.constant([1], np.int64), keepdims=1)
    best = graph.add("Add", graph.add("Mul", expected, graph.constant(0.0)), best, hint="best_iou")
    cues = (expected, objectness, area, aspect, evidence, best, alike)
    return graph.add("Concat", *cues, axis=2, hint="confidence_cues")


def append_logistic(graph: Graph, cues: str, model: ConfidenceModel) -> str:
    """The probability ``[N, K, 1]`` that ``engines.confidence.ConfidenceModel`` gives of cues
    ``[N, K, S]``.
    """
    shape = graph.shape(cues)
    count = shape[2]
    middle = graph.constant(np.reshape(model.mean, (1, 1, -1)))
    scale = graph.constant(1 / np.reshape(model.scale, (1, 1, -1)))
    held = graph.add("Mul", graph.add("Sub", cues, middle), scale)
    limits = (graph.constant(-FURTHEST), graph.constant(FURTHEST))
    held = graph.add("Clip", held, *limits, hint="cues_held")
    slopes = graph.constant(np.reshape(model.weight[:count], (1, 1, -1)))
    if len(model.weight) > count:
        products = np.zeros((count, count), np.float32)
        products[np.triu_indices(count)] = model.weight[count:]
        mixed = graph.add("MatMul", held, graph.constant(products), hint="cues_mixed")
        slopes = graph.add("Add", mixed, slopes, hint="slopes_of_cues")
    weighed = graph.add("Mul", held, slopes, hint="cues_weighed")
    logit = graph.add("ReduceSum", weighed, graph.constant([2], np.int64), keepdims=1)
    logit = graph.add("Add", logit, graph.constant(model.bias), hint="confidence_logit")
    return graph.add("Sigmoid", logit, hint="confidence")
