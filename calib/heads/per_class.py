"""A head for each kind of object: the shared head, bent towards the images of one class, where that class is recognised.

The papers fit one linear layer per class of the data set. Few boxes per class do not carry that far, so each layer here is
the shared one plus a correction that ridge regression keeps small. At run time nobody says which kind is in the picture:
the network's own class does, by a route from each of its classes to the kind it most often turned out to be.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.heads.features import FeatureTable
from calib.heads.linear import Array64, Ridge, Rows, folds, mirrored_pairs, predict, solve
from engines.boxes import iou

FEWEST_IMAGES = 20
FEWEST_ROUTED = 3
STRENGTHS = (1e2, 1e3, 1e4, 1e5, 1e6)


@dataclass(frozen=True)
class Kinds:
    """Linear layers ``weight [K, 4, D]`` and ``bias [K, 4]``; the first is for everything. See ``engines.head.Head``."""

    names: tuple[str, ...]
    weight: Array64
    bias: Array64
    routes: NDArray[np.int64]

    def boxes(self, values: NDArray[np.float32], class_indices: NDArray[np.int64]) -> Array64:
        """Boxes ``[N, 4]`` as the graph gives them, from features ``[N, D]`` and the network's classes ``[N]``."""
        found = np.empty((len(values), 4))
        kinds = self.routes[class_indices]
        for kind in np.unique(kinds):
            found[kinds == kind] = predict(values[kinds == kind], self.weight[kind], self.bias[kind])
        return found


def shared_kind(weight: Array64, bias: Array64) -> Kinds:
    """One layer ``[4, D]``, ``[4]`` for everything, which needs no routes."""
    return Kinds(("any",), weight[None], bias[None], np.zeros(0, np.int64))


def fit_kinds(table: FeatureTable, rows: Rows, strength: float, classes: int) -> tuple[Kinds, Array64]:
    """(a head per class, out-of-fold boxes ``[N, 4]``), the size of the corrections chosen by cross-validation.

    Args:
        table: features, boxes, classes.
        rows: of it, to fit on.
        strength: ridge penalty of the shared head.
        classes: how many the network knows.
    """
    boxes = np.zeros((len(STRENGTHS), len(table.values), 4))
    for kept, held in folds(table, rows):
        for found, kinds in zip(boxes, _solutions(table, kept, strength, STRENGTHS, classes), strict=True):
            found[held] = kinds.boxes(table.values[held], table.class_indices[held])
    boxes = boxes[:, rows]
    best = int(np.argmax(iou(boxes, table.boxes_xyxy[rows]).mean(axis=1)))
    return _solutions(table, rows, strength, STRENGTHS[best : best + 1], classes)[0], boxes[best]


def _solutions(table: FeatureTable, rows: Rows, strength: float, corrections: Sequence[float], classes: int) -> list[Kinds]:
    """One set of layers for each penalty on the corrections."""
    shared_weight, shared_bias = solve(table, rows, strength)
    names_of = np.array(table.class_names)[rows]
    counts = Counter(names_of.tolist())
    names = sorted(name for name, count in counts.items() if count >= FEWEST_IMAGES)
    routes = _routes(table.class_indices[rows], names_of, names, classes)
    layers: list[list[tuple[Array64, Array64]]] = [[(shared_weight, shared_bias)] for _ in corrections]
    for name in names:
        values, boxes = mirrored_pairs(table, rows[names_of == name])
        ridge = Ridge(values, boxes - values @ shared_weight.T - shared_bias)
        for place, correction in enumerate(corrections):
            weight, bias = ridge.solve(correction)
            layers[place].append((shared_weight + weight, shared_bias + bias))
    return [Kinds(("any", *names), np.stack([w for w, _ in each]), np.stack([b for _, b in each]), routes) for each in layers]


def _routes(indices: NDArray[np.int64], names_of: NDArray[np.str_], names: Sequence[str], classes: int) -> NDArray[np.int64]:
    """For each class of the network the kind that more than half of its images were, or 0."""
    routes = np.zeros(classes, np.int64)
    for index in np.unique(indices):
        (name, count), *_ = Counter(names_of[indices == index].tolist()).most_common(1)
        total = int((indices == index).sum())
        if name in names and total >= FEWEST_ROUTED and count > total / 2:
            routes[index] = 1 + names.index(name)
    return routes
