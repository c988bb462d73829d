"""Fits a box head to a labelled set: which features and images it uses, and what the head file says
of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from calib.data.datasets import Sample
from calib.evaluation.metrics import constant_boxes, corloc
from calib.heads.confidence import head_confidence_model
from calib.heads.linear import (
    FOLDS,
    Array64,
    FeatureTable,
    Fitter,
    Ridge,
    Rows,
    choose_strength,
    feature_table,
    folds,
    held_out_boxes,
    mirrored_pairs,
    predict,
    solve,
)
from calib.papers.linear import Dual, descended
from engines.errors import ModelError, SourceError
from engines.head import Head
from engines.maps import METHODS, PIXELS, Feature, MapSpec, method_of
from engines.networks.registry import Classifier, class_count

FEWEST_IMAGES = 20
FEWEST_ROUTED = 3
STRENGTHS = (1e2, 1e3, 1e4, 1e5, 1e6)


@dataclass(frozen=True)
class Kinds:
    """One linear layer for each of K kinds of objects. The first layer is for all other objects.

    Attributes:
        names: of the kinds; the first is ``any``.
        weight: ``[K, 4, D]``.
        bias: ``[K, 4]``.
        routes: the layer of each class of the network, see ``engines.head.Head``.
    """

    names: tuple[str, ...]
    weight: Array64
    bias: Array64
    routes: NDArray[np.int64]

    def boxes(self, values: NDArray[np.float32], class_indices: NDArray[np.int64]) -> Array64:
        """The boxes ``[N, 4]`` as the graph gives them.

        Args:
            values: the features, ``[N, D]``.
            class_indices: the network's class of each image, ``[N]``.
        """
        found = np.empty((len(values), 4))
        kinds = self.routes[class_indices]
        for kind in np.unique(kinds):
            found[kinds == kind] = predict(
                values[kinds == kind], self.weight[kind], self.bias[kind]
            )
        return found


def shared_kind(weight: Array64, bias: Array64) -> Kinds:
    """One layer, weight ``[4, D]`` and bias ``[4]``, for all objects. It needs no routes."""
    return Kinds(("any",), weight[None], bias[None], np.zeros(0, np.int64))


def fit_kinds(
    table: FeatureTable, rows: Rows, strength: float, classes: int
) -> tuple[Kinds, Array64]:
    """Fit a layer for each class of the data set: the shared layer and a correction.

    Cross-validation chooses the penalty on the corrections.

    Args:
        table: features, boxes and classes.
        rows: of the table, to fit on.
        strength: the ridge penalty of the shared layer.
        classes: how many classes the network knows.

    Returns:
        The layers, and the box of each row by layers that were fitted without it, ``[N, 4]``.
    """
    boxes = np.zeros((len(STRENGTHS), len(table.values), 4))
    for kept, held in folds(table, rows):
        for found, kinds in zip(
            boxes, _solutions(table, kept, strength, STRENGTHS, classes), strict=True
        ):
            found[held] = kinds.boxes(table.values[held], table.class_indices[held])
    boxes = boxes[:, rows]
    best = int(np.argmax(table.ious(boxes, rows).mean(axis=1)))
    return _solutions(table, rows, strength, STRENGTHS[best : best + 1], classes)[0], boxes[best]


def _solutions(
    table: FeatureTable, rows: Rows, strength: float, corrections: Sequence[float], classes: int
) -> list[Kinds]:
    """The layers for each penalty on the corrections."""
    shared_weight, shared_bias = solve(table, rows, strength)
    names_of = np.array(table.class_names)[rows]
    counts = Counter(names_of.tolist())
    names = sorted(name for name, count in counts.items() if count >= FEWEST_IMAGES)
    routes = _routes(table.class_indices[rows], names_of, names, classes)
    layers: list[list[tuple[Array64, Array64]]] = [
        [(shared_weight, shared_bias)] for _ in corrections
    ]
    for name in names:
        values, boxes = mirrored_pairs(table, rows[names_of == name])
        ridge = Ridge(values, boxes - values @ shared_weight.T - shared_bias)
        for place, correction in enumerate(corrections):
            weight, bias = ridge.solve(correction)
            layers[place].append((shared_weight + weight, shared_bias + bias))
    return [
        Kinds(
            ("any", *names), np.stack([w for w, _ in each]), np.stack([b for _, b in each]), routes
        )
        for each in layers
    ]


def _routes(
    indices: NDArray[np.int64], names_of: NDArray[np.str_], names: Sequence[str], classes: int
) -> NDArray[np.int64]:
    """The layer of each class of the network.

    It is that of the class of the data set to which more than half of the images with the network's
    class belong; 0, the shared layer, where there is no such class.
    """
    routes = np.zeros(classes, np.int64)
    for index in np.unique(indices):
        (name, count), *_ = Counter(names_of[indices == index].tolist()).most_common(1)
        total = int((indices == index).sum())
        if name in names and total >= FEWEST_ROUTED and count > total / 2:
            routes[index] = 1 + names.index(name)
    return routes


BATCH = 2048
RATE = 0.1
FALLS_EVERY = 10_000


def fit_by_sgd(
    values: Array64, boxes: Array64, iterations: int = 30_000, seed: int = 0
) -> tuple[Array64, Array64]:
    """Fit a layer by plain stochastic gradient descent that starts from zero, on equation 4 of
    Ebrahimpour & Noelle ("Fast Object Localization via Sensitivity Analysis"), but on maps whose
    mean squared length is 1. The equation averages over the four coordinates: a step is half of the
    error times the map.

    Every step adds a combination of training maps to the weights, so that the weights are always
    one: ``W = A^T X``. The steps are taken on ``A`` (``[N, 4]``) with the inner products of the
    maps. This is the same descent, and much cheaper where D exceeds N.

    Args:
        values: the maps, ``[N, D]``.
        boxes: the true boxes, ``[N, 4]``.
        iterations: the number of steps, with a batch each.
        seed: decides the batches.

    Returns:
        The weight ``[4, D]`` and the bias ``[4]``.
    """
    rng = np.random.default_rng(seed)
    scale = np.sqrt((values**2).sum(axis=1).mean())
    products = ((values / scale) @ (values / scale).T).astype(np.float32)
    combination, bias = np.zeros((len(values), 4), np.float32), boxes.mean(axis=0)
    size = min(BATCH, len(values))
    for step in range(iterations):
        rate = RATE * 0.1 ** (step // FALLS_EVERY) * 2 / 4
        rows: NDArray[np.int64] = rng.choice(len(values), size, replace=False)
        residual = (products @ combination)[rows] + bias - boxes[rows]
        combination[rows] -= (rate / size) * residual
        bias = bias - rate * residual.mean(axis=0)
    weight = (combination.T.astype(np.float64) @ values) / scale**2
    return weight, bias


@dataclass(frozen=True)
class Fit:
    """A fitted head, and how it was chosen.

    Attributes:
        head: the head, ready to save.
        strength: the ridge penalty that cross-validation chose.
        cv_mean_iou, cv_corloc: of the training images, each by a head that was fitted without it.
    """

    head: Head
    strength: float
    cv_mean_iou: float
    cv_corloc: float


LINEAR = "linear"
KINDS = (LINEAR, "paper", "paper-sgd")
"""The kinds of heads of one box that ``fit`` makes: the best one at the cost of one backward pass,
and a linear layer on the whole map as the papers have it, in closed form or by gradient descent;
exactly as they have it with ``as_published``, see ``default_features``. The dense head is
fitted apart, see ``calib.heads.dense``.
"""
STORED_KINDS = {LINEAR: "best"}
"""What cards of heads call a kind, where that is another name."""


def default_features(
    classifier: Classifier,
    method: str,
    kind: str = LINEAR,
    layer: str | None = None,
    aggregation: str = "max",
    as_published: bool = False,
) -> tuple[MapSpec, tuple[Feature, ...]]:
    """The map and the features that a kind of head reads.

    The linear head reads quantiles and coarse grids at several depths, the papers' the whole map.

    Args:
        classifier: the network.
        method: its objective is differentiated.
        kind: see ``KINDS``.
        layer: where the backward pass stops and the map is taken. The head then reads no layer
            nearer to the image.
        aggregation: of the gradient's channels.
        as_published: the papers' heads read the map as it is, not divided by its mean, and of the
            objective that they name.

    Raises:
        ModelError: the method, kind or layer is unknown, or the method reads boxes without a fitted
            head.
    """
    if kind not in KINDS:
        raise ModelError(
            f"unknown kind of head '{kind}': use {', '.join((*KINDS, 'dense'))}", option="kind"
        )
    known = method_of(method, classifier.network.classless)
    if not known.fitted:
        fitted = [each.name for each in METHODS.values() if each.fitted]
        raise ModelError(
            f"method {method} reads boxes without a fitted head: fit with {' or '.join(fitted)}",
            option="method",
        )
    objective, layer = known.objective, layer or PIXELS
    if as_published:
        if kind == LINEAR or known.published_map is None:
            raise ModelError(
                "the papers' heads are of the kinds paper and paper-sgd",
                option=("kind", "as_published"),
            )
        if not classifier.network.classless:
            objective = known.published_map.objective
    spec = MapSpec(objective, aggregation, layer)
    if kind != LINEAR:
        return spec, (Feature("raw" if as_published else "grid", layer, classifier.size_px),)
    layers = classifier.network.head_layers
    cam_layers = classifier.network.head_cam_layers
    depths = (PIXELS, *layers)
    if layer not in depths:
        raise ModelError(
            f"heads for {classifier.name} are read at {', '.join(depths)}, not at '{layer}'"
        )
    depths = depths[depths.index(layer) :]
    powers = (0.5, 1.0, 2.0)
    features = [Feature("quantiles", each, 15, power) for each in depths for power in powers]
    features += [Feature("grid", each, 8, 0.5) for each in depths]
    features += [
        Feature("quantiles", each, 15, 1.0, "activation") for each in layers[-2:] if each in depths
    ]
    features += [Feature("grid", each, 8, 1.0, "activation") for each in layers[-1:]]
    deep = [each for each in cam_layers if each in depths or each not in layers]
    features += [
        Feature("quantiles", each, 15, power, "layercam") for each in deep for power in powers
    ]
    return spec, tuple(features)


def fit_head(
    samples: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
    name: str,
    kind: str = LINEAR,
    per_class: bool = False,
) -> Fit:
    """Fit a head on every image that has exactly one box, and on its mirror image.

    Args:
        samples: the training set.
        classifier: the network that the head will be tied to.
        spec: the map that the head reads.
        features: of that map and of others, in order.
        console: for progress.
        name: the name of the data set, for the card.
        kind: see ``KINDS``.
        per_class: also fit a layer for each class of the data set, see ``fit_kinds``.

    Raises:
        SourceError: fewer than 10 images have exactly one box.
    """
    if (singles := sum(sample.one_box for sample in samples)) < 2 * FOLDS:
        raise SourceError(
            f"{name}: {singles} images have exactly one box, a head needs at least {2 * FOLDS}:"
            " label more, or keep only some kinds of objects",
            option="classes",
        )
    table = feature_table(samples, classifier, spec, features, console)
    rows = np.arange(len(table.values))
    published = features[0].kind == "raw"
    strength = (
        0.0
        if published and kind != "paper"
        else _dual(table, rows).strength(_right(table, rows))
        if published
        else choose_strength(table, rows, refine=kind == LINEAR)
    )
    if per_class:
        if kind != LINEAR:
            raise ModelError(
                f"layers per class correct the linear head, not the {kind} one: drop either",
                option=("per_class", "kind"),
            )
        kinds, found = fit_kinds(table, rows, strength, class_count(classifier))
    else:
        fitter = (PUBLISHED_FITTERS if published else FITTERS)[kind]
        kinds = shared_kind(*fitter(table, rows, strength))
        found = held_out_boxes(table, rows, strength, fitter)
    ious = table.ious(found, rows)
    measured = {"cv_mean_iou": round(float(ious.mean()), 4), "cv_corloc": round(corloc(ious), 4)}
    fitted = {"kind": STORED_KINDS.get(kind, kind), "layers": kinds.names, "strength": strength}
    card = {
        **_card_of_data(table, name, classifier),
        **fitted,
        **measured,
        "constant_boxes": asdict(constant_boxes(table.boxes_xyxy)),
    }
    head = Head(
        spec,
        tuple(features),
        kinds.weight.astype(np.float32),
        kinds.bias.astype(np.float32),
        classifier.digest,
        classifier.size_px,
        card,
        kinds.routes,
        head_confidence_model(table, found),
    )
    return Fit(head, strength, float(ious.mean()), corloc(ious))


def _card_of_data(table: FeatureTable, name: str, classifier: Classifier) -> dict[str, Any]:
    """What the card of a head says of the data set, and of the network's input."""
    return {
        "data": name,
        "images": len(table.boxes_xyxy),
        "classes": sorted(set(table.class_names)),
        "input": classifier.preprocessing.stored(),
    }


def _by_ridge(table: FeatureTable, rows: Rows, strength: float) -> tuple[Array64, Array64]:
    """Fit a layer by ridge regression alone, see ``calib.heads.linear.Fitter``."""
    return Ridge(*mirrored_pairs(table, rows)).solve(strength)


def _by_sgd(table: FeatureTable, rows: Rows, _: float) -> tuple[Array64, Array64]:
    """Fit a layer by gradient descent, see ``calib.heads.linear.Fitter``."""
    return fit_by_sgd(*mirrored_pairs(table, rows))


def _dual(table: FeatureTable, rows: Rows) -> Dual:
    """Equation 4 on maps as they are, without mirror images."""
    values = table.values[rows]
    return Dual(values @ values.T, table.targets(rows), np.ones(len(rows)))


def _right(table: FeatureTable, rows: Rows) -> Callable[[Array64, Rows], float]:
    """The CorLoc of boxes of some of the rows."""
    return lambda found, held: corloc(table.ious(found, rows[held]))


def _published(table: FeatureTable, rows: Rows, strength: float) -> tuple[Array64, Array64]:
    """Equation 4 in closed form, see ``calib.heads.linear.Fitter``."""
    alpha, bias = _dual(table, rows).solve(strength, np.arange(len(rows)))
    return alpha.T @ table.values[rows], bias


def _published_sgd(table: FeatureTable, rows: Rows, _: float) -> tuple[Array64, Array64]:
    """Equation 4 by gradient descent as it was published, see ``calib.heads.linear.Fitter``."""
    values = table.values[rows]
    alpha, bias = descended(values @ values.T, np.arange(len(rows)), table.targets(rows))
    if not np.isfinite(alpha).all():
        raise SourceError("gradient descent at the papers' rate diverges on these maps")
    return alpha.T @ values, bias


PUBLISHED_FITTERS: dict[str, Fitter] = {"paper": _published, "paper-sgd": _published_sgd}
FITTERS: dict[str, Fitter] = {LINEAR: solve, "paper": _by_ridge, "paper-sgd": _by_sgd}
