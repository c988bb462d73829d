"""Fitting the box head: ridge regression on map features, its strength chosen by cross-validation, then refined."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from calib.datasets import Sample, load_dataset
from calib.features import FeatureTable, feature_table, relative_boxes
from calib.metrics import ConstantBoxes, constant_boxes, corloc
from calib.refine import refined
from engines.base import SourceError
from engines.boxes import iou
from engines.choose import Choice, choose_head, objective_of
from engines.classifiers import Classifier, load_classifier
from engines.head import Feature, Head
from engines.maps import PIXELS, MapSpec

Array64 = NDArray[np.float64]
Rows = NDArray[np.int64]
FOLDS = 5
STRENGTHS = tuple(float(10.0**e) for e in np.arange(-1, 5.01, 0.5))


@dataclass(frozen=True)
class Fit:
    """A fitted head and how it was chosen.

    Attributes:
        head: ready to save.
        strength: the ridge penalty that cross-validation chose.
        cv_mean_iou, cv_corloc: out-of-fold, on the training images.
    """

    head: Head
    strength: float
    cv_mean_iou: float
    cv_corloc: float


def default_features(classifier: Classifier, method: str) -> tuple[MapSpec, tuple[Feature, ...]]:
    """The maps and features that ``fit`` uses unless told otherwise: quantiles and coarse grids at several depths.

    Raises:
        ModelError: the method is unknown.
    """
    layers = LAYERS.get(classifier.name, ())
    features = [Feature("quantiles", layer, 15, power) for layer in (PIXELS, *layers) for power in (0.5, 1.0, 2.0)]
    features += [Feature("grid", layer, 8, 0.5) for layer in (PIXELS, *layers)]
    features += [Feature("quantiles", layer, 15, 1.0, "activation") for layer in layers[-2:]]
    features += [Feature("grid", layer, 8, 1.0, "activation") for layer in layers[-1:]]
    return MapSpec(objective_of(method)), tuple(features)


LAYERS = {
    "compact": ("conv2_2", "conv3_3", "conv4_3", "conv5_3"),
    "vgg16": ("conv2_2", "conv3_3", "conv4_3", "conv5_3"),
    "squeezenet": ("pool1", "fire3", "fire5", "fire7", "fire9"),
}
"""Inner layers whose maps heads read, from the image to the scores; an imported network is read at the pixels only."""


def baselines(choice: Choice, train: Path | None) -> ConstantBoxes | None:
    """Constant boxes of ``train`` where it is given, else those kept with the head that ``choice`` means.

    Raises:
        SightlineError: ``train`` cannot be read, or the head is damaged.
    """
    if train is not None:
        singles = [sample for sample in load_dataset(train) if sample.single]
        if not singles:
            raise SourceError(f"{train} has no image with exactly one object: constant boxes need some")
        return constant_boxes(relative_boxes(singles, [sample.read() for sample in singles]))
    head = choose_head(choice, load_classifier(choice.model, choice.weights, choice.size_px))
    kept = head.card.get("constant_boxes") if head else None
    return ConstantBoxes(**kept) if isinstance(kept, dict) else None


def fit_head(
    samples: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature], console: Console, name: str
) -> Fit:
    """Fit a class-agnostic head on every image that has exactly one object, and on its mirror image.

    Args:
        samples: the training set.
        classifier: the network that the head will be tied to.
        spec: the maps it reads.
        features: of those maps, in order.
        console: for progress.
        name: of the data set, for the card.

    Raises:
        SourceError: fewer than 10 images have exactly one object.
    """
    if (singles := sum(sample.single for sample in samples)) < 2 * FOLDS:
        raise SourceError(
            f"{name}: {singles} images have exactly one box, a head needs at least {2 * FOLDS}: label more, or keep only some "
            "kinds of objects with --classes"
        )
    table = feature_table(samples, classifier, spec, features, console)
    rows = np.arange(len(table.values))
    strength = choose_strength(table, rows)
    ious = held_out_ious(table, rows, strength)
    weight, bias = solve(table, rows, strength)
    card = {
        "data": name, "images": len(table.boxes_xyxy), "classes": sorted(set(table.class_names)),
        "strength": strength, "cv_mean_iou": round(float(ious.mean()), 4), "cv_corloc": round(corloc(ious), 4),
        "constant_boxes": asdict(constant_boxes(table.boxes_xyxy)),
    }  # fmt: skip
    head = Head(
        spec, tuple(features), weight.astype(np.float32), bias.astype(np.float32),
        classifier.digest, classifier.size_px, card,
    )  # fmt: skip
    return Fit(head, strength, float(ious.mean()), corloc(ious))


def fit_rows(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """(weight ``[4, D]``, bias ``[4]``) fitted on some rows of the table alone, strength included."""
    return solve(table, rows, choose_strength(table, rows))


def solve(table: FeatureTable, rows: Rows, strength: float) -> tuple[Array64, Array64]:
    """Ridge regression on some rows and their mirror images, then the refinement on their overlap."""
    values, boxes = mirrored_pairs(table, rows)
    return refined(values, boxes, *Ridge(values, boxes).solve(strength))


def mirrored_pairs(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """Features and boxes of the images and their mirror images: ``[2 N, D]`` and ``[2 N, 4]``."""
    boxes = table.boxes_xyxy[rows]
    flipped = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    values = np.concatenate([table.values[rows], table.mirrored[rows]]).astype(np.float64)
    return values, np.concatenate([boxes, flipped])


class Ridge:
    """Ridge regression of boxes on standardized features (Hoerl & Kennard 1970), in closed form for any penalty.

    Works in the smaller of the primal and the dual space.

    Args:
        values: ``[N, D]``.
        boxes: ``[N, 4]``.
    """

    def __init__(self, values: Array64, boxes: Array64) -> None:
        self._centre, self._scale = values.mean(axis=0), values.std(axis=0) + 1e-6
        self._mean_box = boxes.mean(axis=0)
        x = (values - self._centre) / self._scale
        self._back = None if x.shape[1] <= x.shape[0] else x.T
        self._gram = x.T @ x if self._back is None else x @ x.T
        self._target = x.T @ (boxes - self._mean_box) if self._back is None else boxes - self._mean_box

    def solve(self, strength: float) -> tuple[Array64, Array64]:
        """(weight ``[4, D]``, bias ``[4]``) for features as they come."""
        solution = np.linalg.solve(self._gram + strength * np.eye(len(self._gram)), self._target)
        if self._back is not None:
            solution = self._back @ solution
        weight = (solution / self._scale[:, None]).T
        return weight, self._mean_box - weight @ self._centre


def predict(values: NDArray[np.float32], weight: Array64, bias: Array64) -> Array64:
    """Boxes ``[N, 4]`` as the graph gives them: clipped to the image, corners in order."""
    raw = np.clip(values @ weight.T + bias, 0, 1)
    return np.concatenate([np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], axis=1)


def folds(rows: Rows) -> list[tuple[Rows, Rows]]:
    """(training rows, held-out rows) of each fold; an image and its mirror stay in one."""
    fold = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    return [(rows[fold != held], rows[fold == held]) for held in range(FOLDS)]


def choose_strength(table: FeatureTable, rows: Rows, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strongest ridge penalty whose out-of-fold mean IoU is within one standard error of the best.

    (Hastie et al. 2009, section 7.10.) The network may have seen the photos that heads are fitted on, and then a penalty
    that is best for them is too weak for others.
    """
    ious: list[Array64] = []
    for kept, held in folds(rows):
        model = Ridge(*mirrored_pairs(table, kept))
        found = [predict(table.values[held], *model.solve(strength)) for strength in strengths]
        ious.append(np.stack([iou(boxes, table.boxes_xyxy[held]) for boxes in found]))
    joined = np.concatenate(ious, axis=1)
    means = joined.mean(axis=1)
    best = int(np.argmax(means))
    close = means >= means[best] - joined[best].std() / np.sqrt(joined.shape[1])
    return max(strength for strength, near in zip(strengths, close, strict=True) if near)


def held_out_ious(table: FeatureTable, rows: Rows, strength: float) -> Array64:
    """IoU of each row's box by a head that did not see it, ``[N]``, fold after fold."""
    found = [
        iou(predict(table.values[held], *solve(table, kept, strength)), table.boxes_xyxy[held]) for kept, held in folds(rows)
    ]
    return np.concatenate(found)
