"""The linear layer from features to boxes: ridge regression, then refinement on the overlap.

The features of a labelled set are computed once with the engine, and cached by their content
(``feature_table``). Cross-validation chooses the penalty of the ridge regression.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.data.labels import SizePx
from calib.evaluation.metrics import CORLOC_IOU, relative_boxes
from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou
from engines.build import build_graph
from engines.confidence import averaged, cues_of
from engines.downloads import cache_dir
from engines.errors import SourceError
from engines.files import whole_file
from engines.localizer import Localizer
from engines.maps import Feature, MapSpec
from engines.networks.preprocessing import SQUASH
from engines.networks.registry import Classifier
from engines.resizing import Resizing

Array64 = NDArray[np.float64]
Rows = NDArray[np.int64]
TABLE_FORMAT = 3
FOLDS = 5
STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)
MANY = 2000
FREE = 1e-6
"""The penalty of a weight that is to have none, where a system must be regular."""


@dataclass(frozen=True)
class Answers:
    """What the cues of a box are computed from, for N images, see ``engines.confidence``.

    Attributes:
        maps: the averaged maps, float32 ``[N, SIDE, SIDE]``.
        scores, logits: of the class with the highest score, float32 ``[N]``.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]

    def take(self, rows: NDArray[np.int64]) -> "Answers":
        """The answers for some of the images."""
        return Answers(self.maps[rows], self.scores[rows], self.logits[rows])

    def cues(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """The S cues of one box in each image: of boxes ``[N, 4]``, ``[N, S]``."""
        each = zip(boxes_xyxy, self.maps, self.scores, self.logits, strict=True)
        return np.array(
            [cues_of(box, map_hw, float(score), float(logit)) for box, map_hw, score, logit in each]
        )


@dataclass(frozen=True)
class FeatureTable:
    """The features and boxes of N images with one box each.

    Attributes:
        values: the features, float32 ``[N, D]``.
        mirrored: the features of the mirrored images.
        boxes_xyxy: the true boxes, float64 ``[N, 4]``, in fractions of width and height.
        class_names: the class of each object.
        class_indices: the network's class with the highest score in each image, int64 ``[N]``.
        groups: the group of each image, see ``calib.data.datasets.Sample.group``.
        answers: what the cues of boxes are computed from; None where no confidence is needed.
        seen_xyxy: what the network's square shows of each image, in fractions of it, ``[N, 4]``,
            see ``engines.resizing``; None where it is all of it. What is fitted and found are boxes
            in fractions of the square.
    """

    values: NDArray[np.float32]
    mirrored: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float64]
    class_names: tuple[str, ...]
    class_indices: NDArray[np.int64]
    groups: tuple[str, ...]
    answers: Answers | None = None
    seen_xyxy: Array64 | None = None

    def take(self, rows: NDArray[np.int64]) -> "FeatureTable":
        """The table of some of the images."""
        return FeatureTable(
            self.values[rows],
            self.mirrored[rows],
            self.boxes_xyxy[rows],
            tuple(self.class_names[row] for row in rows),
            self.class_indices[rows],
            tuple(self.groups[row] for row in rows),
            self.answers.take(rows) if self.answers else None,
            None if self.seen_xyxy is None else self.seen_xyxy[rows],
        )

    def targets(self, rows: Rows) -> Array64:
        """The true boxes of some of the images in fractions of the square, clipped to it."""
        if self.seen_xyxy is None:
            return self.boxes_xyxy[rows]
        origin, sides = _rectangles(self.seen_xyxy[rows])
        return np.asarray(np.clip((self.boxes_xyxy[rows] - origin) / sides, 0, 1))

    def ious(self, found_xyxy: Array64, rows: Rows) -> Array64:
        """The IoU with the true box of each image of what was found in the square, clipped to the
        image: of ``[..., N, 4]``, ``[..., N]``.
        """
        if self.seen_xyxy is not None:
            origin, sides = _rectangles(self.seen_xyxy[rows])
            found_xyxy = np.clip(origin + found_xyxy * sides, 0, 1)
        return iou(found_xyxy, self.boxes_xyxy[rows])


def _rectangles(seen_xyxy: Array64) -> tuple[Array64, Array64]:
    """(corner, sides) of rectangles, each twice along the last axis, as boxes have them."""
    return np.tile(seen_xyxy[:, :2], 2), np.tile(seen_xyxy[:, 2:] - seen_xyxy[:, :2], 2)


def feature_table(
    samples: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
) -> FeatureTable:
    """The features of every image with exactly one box: from the cache, or else computed in fp32.

    Args:
        samples: the labelled set.
        classifier: the network.
        spec: the maps that the features are read from.
        features: of those maps, in order.
        console: for progress.
    """
    singles = [sample for sample in samples if sample.one_box]
    key, sizes_px = _key(singles, classifier, spec, features)
    path = cache_dir() / "features" / f"{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            found: Mapping[str, NDArray[Any]] = dict(stored)
    else:
        found = _computed(singles, classifier, spec, features, console)
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **found)
    names = tuple(sample.truths[0].class_name for sample in singles)
    groups = tuple(sample.group for sample in singles)
    boxes = relative_boxes(singles, sizes_px)
    answers = Answers(found["maps"], found["scores"], found["logits"])
    seen = seen_of(classifier, sizes_px)
    values, mirrored, indices = (found[name] for name in ("values", "mirrored", "class_indices"))
    table = FeatureTable(values, mirrored, boxes, names, indices, groups, answers, seen)
    return _visible(table, console)


def seen_of(classifier: Classifier, sizes_px: Sequence[SizePx]) -> Array64 | None:
    """``FeatureTable.seen_xyxy`` of images of these sizes (width, height)."""
    resizing = Resizing.of(classifier.preprocessing)
    if resizing.kind == SQUASH:
        return None
    seen = np.array([resizing.seen(*size, classifier.shape) for size in sizes_px])
    return np.asarray(seen / np.tile(np.array(sizes_px, np.float64), 2))


def _visible(table: FeatureTable, console: Console) -> FeatureTable:
    """Without the images whose object lies beside what the network sees of them."""
    targets = table.targets(np.arange(len(table.values)))
    visible = np.all(targets[:, 2:] > targets[:, :2], axis=1)
    if visible.all():
        return table
    console.print(
        f"the objects of {np.count_nonzero(~visible):,} of {len(visible):,} images lie beside the"
        " crop that the network sees: nothing is fitted to them",
        style="yellow",
    )
    return table.take(np.flatnonzero(visible))


def _computed(
    singles: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
) -> dict[str, NDArray[Any]]:
    """Compute the fields of a table that are cached, by name: all but boxes and names."""
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, spec, features=features), "fp32"))
    found: dict[str, list[Any]] = {
        name: [] for name in ("values", "mirrored", "class_indices", "maps", "scores", "logits")
    }
    for sample in track(singles, "computing maps", console=console):
        prepared = localizer.prepare(sample.read())
        outputs = localizer.infer([prepared])
        found["values"].append(outputs["features"][0].copy())
        found["mirrored"].append(localizer.infer([prepared[:, ::-1]])["features"][0].copy())
        found["class_indices"].append(np.int64(outputs["class_index"][0]))
        found["maps"].append(averaged(outputs["map"][0]).copy())
        found["scores"].append(outputs["score"][0])
        found["logits"].append(outputs["logit"][0])
    return {name: np.array(values) for name, values in found.items()}


def _key(
    singles: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature]
) -> tuple[str, list[SizePx]]:
    """The key of a table in the cache, and the sizes of the images.

    The key is a digest, in 32 digits, of everything that the features depend on. Images are decoded
    one after the other, because thousands do not fit into memory.
    """
    settings = [classifier.digest, classifier.size_px, asdict(spec), [asdict(f) for f in features]]
    digest = hashlib.sha256(json.dumps([TABLE_FORMAT, *settings]).encode())
    sizes_px = []
    for sample in singles:
        image = sample.read()
        digest.update(repr(image.shape).encode() + image.tobytes())
        sizes_px.append(size_of(image))
    return digest.hexdigest()[:32], sizes_px


Fitter = Callable[[FeatureTable, Rows, float], tuple[Array64, Array64]]
"""Fits a layer: takes a table, the rows to fit on, and a ridge penalty; returns the weight
``[4, D]`` and the bias ``[4]``.
"""


@dataclass(frozen=True)
class Refinement:
    """The settings of the refinement.

    Attributes:
        softness: the width, in IoU, of the sigmoid that stands for "IoU > 0.5". With large values,
            the refinement increases the plain mean IoU.
        hold: the penalty on the squared distance from the weights of the ridge regression, of
            standardized features. With fewer than ``MANY`` boxes it is larger, the fewer they are,
            so that the layer does not fit a few boxes too closely.
        steps: of Adam on all boxes (Kingma & Ba 2015), with a rate that falls linearly to 0.
        rate: of the first step.
    """

    softness: float = 0.15
    hold: float = 1.0
    steps: int = 100
    rate: float = 1e-3


def refined(
    values: Array64, boxes: Array64, weight: Array64, bias: Array64, how: Refinement | None = None
) -> tuple[Array64, Array64]:
    """Refine a layer so that its boxes overlap better with the true ones of the training set.

    Args:
        values: the features, ``[N, D]``.
        boxes: the true boxes, ``[N, 4]``, in fractions of width and height.
        weight: ``[4, D]``, to start from.
        bias: ``[4]``, to start from.
        how: see ``Refinement``.

    Returns:
        The new weight and bias.
    """
    how = how or Refinement()
    hold = how.hold * max(1.0, MANY / len(boxes))
    centre, scale = values.mean(axis=0), values.std(axis=0) + 1e-6
    x = ((values - centre) / scale).astype(np.float32)
    start = np.concatenate(
        [weight * scale, (bias + weight @ centre)[:, None]], axis=1
    )  # [4, D + 1]
    now = start.copy()
    moment = np.zeros_like(start)
    power = np.zeros_like(start)
    for step in range(how.steps):
        found = x @ now[:, :-1].T.astype(np.float32) + now[:, -1]
        per_box = -_gradient(found, boxes, how.softness) / len(boxes)
        gradient = np.concatenate(
            [per_box.T.astype(np.float32) @ x, per_box.sum(axis=0)[:, None]], axis=1
        )
        gradient[:, :-1] += 2 * hold * (now - start)[:, :-1]
        moment = 0.9 * moment + 0.1 * gradient
        power = 0.999 * power + 0.001 * gradient**2
        unbiased = moment / (1 - 0.9 ** (step + 1)), power / (1 - 0.999 ** (step + 1))
        now -= how.rate * (1 - step / how.steps) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    final = now[:, :-1] / scale
    return final, now[:, -1] - final @ centre


def _gradient(found: Array64, true: Array64, softness: float) -> Array64:
    """The gradient ``[N, 4]`` of ``4 * softness * sigmoid((IoU - 0.5) / softness)``, whose slope at
    an IoU of 0.5 is that of the IoU.
    """
    overlap, slope = iou_and_gradient(found, true)
    share = 1 / (1 + np.exp(-(overlap - CORLOC_IOU) / softness))
    return np.asarray(4 * (share * (1 - share))[:, None] * slope)


def iou_and_gradient(found: Array64, true: Array64) -> tuple[Array64, Array64]:
    """The IoU ``[N]`` of boxes ``[N, 4]``, and its gradient ``[N, 4]`` with respect to ``found``.

    Let I be the intersection, A and B the areas, and U = A + B - I. Then
    ``dIoU = dI (U + I) / U^2 - dA I / U^2``. Boxes that do not meet have a gradient of 0.
    """
    low = np.maximum(found[:, :2], true[:, :2])
    high = np.minimum(found[:, 2:], true[:, 2:])
    sides = np.maximum(high - low, 0)
    own = found[:, 2:] - found[:, :2]
    other = true[:, 2:] - true[:, :2]
    shared = _area(sides)
    area = _area(np.maximum(own, 0))
    union = np.maximum(area + _area(other) - shared, 1e-12)
    across = sides[:, ::-1]  # d(w h) / dw = h
    d_shared = np.concatenate(
        [-across * (found[:, :2] > true[:, :2]), across * (found[:, 2:] < true[:, 2:])], axis=1
    )
    d_area = np.concatenate([-own[:, ::-1], own[:, ::-1]], axis=1)
    slope = (d_shared * (union + shared)[:, None] - d_area * shared[:, None]) / union[:, None] ** 2
    slope[(sides[:, 0] <= 0) | (sides[:, 1] <= 0)] = 0
    return shared / union, slope


def _area(sides: Array64) -> Array64:
    """The areas ``[N]`` of sides ``[N, 2]``. ``prod`` over such an axis is ten times slower."""
    return sides[:, 0] * sides[:, 1]


def fit_rows(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """Fit a layer on some rows of a table, which also choose the penalty.

    Returns:
        The weight ``[4, D]`` and the bias ``[4]``.
    """
    return solve(table, rows, choose_strength(table, rows))


def solve(table: FeatureTable, rows: Rows, strength: float) -> tuple[Array64, Array64]:
    """Fit a layer on some rows of a table and their mirror images: ridge regression, then
    refinement.

    Returns:
        The weight ``[4, D]`` and the bias ``[4]``.
    """
    values, boxes = mirrored_pairs(table, rows)
    return refined(values, boxes, *Ridge(values, boxes).solve(strength))


def mirrored_pairs(table: FeatureTable, rows: Rows) -> tuple[Array64, Array64]:
    """The features ``[2 N, D]`` and boxes ``[2 N, 4]`` of N images and their mirror images."""
    boxes = table.targets(rows)
    flipped = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    values = np.concatenate([table.values[rows], table.mirrored[rows]]).astype(np.float64)
    return values, np.concatenate([boxes, flipped])


class Ridge:
    """Ridge regression of boxes on standardized features (Hoerl & Kennard 1970).

    It has a closed form for every penalty, and is solved in the smaller of the primal and the dual
    space.

    Args:
        values: ``[N, D]``.
        boxes: ``[N, 4]``.
    """

    def __init__(self, values: Array64, boxes: Array64) -> None:
        self._centre = values.mean(axis=0)
        self._scale = values.std(axis=0) + 1e-6
        self._mean_box = boxes.mean(axis=0)
        x = (values - self._centre) / self._scale
        self._back = None if x.shape[1] <= x.shape[0] else x.T
        self._gram = x.T @ x if self._back is None else x @ x.T
        self._target = (
            x.T @ (boxes - self._mean_box) if self._back is None else boxes - self._mean_box
        )

    def solve(self, strength: float) -> tuple[Array64, Array64]:
        """The weight ``[4, D]`` and bias ``[4]`` for features that are not standardized."""
        solution = np.linalg.solve(self._gram + strength * np.eye(len(self._gram)), self._target)
        if self._back is not None:
            solution = self._back @ solution
        weight = (solution / self._scale[:, None]).T
        return weight, self._mean_box - weight @ self._centre


def predict(values: NDArray[np.float32], weight: Array64, bias: Array64) -> Array64:
    """The boxes ``[N, 4]`` of features ``[N, D]``, as the graph gives them: clipped to the square,
    with ordered corners.
    """
    raw = np.clip(values @ weight.T + bias, 0, 1)
    return np.concatenate(
        [np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], axis=1
    )


def group_numbers(groups: Sequence[str], rows: Rows) -> Rows:
    """The number of the group of each row. Groups are numbered from 0 in their order.

    Where there are fewer groups than folds, as in a single sequence, ``FOLDS`` blocks of
    neighbouring rows are the groups. A split then separates only few neighbouring frames.
    """
    names = [groups[row] for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) < FOLDS:
        return np.argsort(np.argsort(rows)) * FOLDS // max(1, len(rows))
    return np.array([numbers[name] for name in names])


def folds(table: FeatureTable, rows: Rows) -> list[tuple[Rows, Rows]]:
    """The training rows and the held-out rows of each fold. A group is never split, and neither are
    an image and its mirror image.
    """
    numbers = group_numbers(table.groups, rows)
    fold = (np.random.default_rng(0).permutation(numbers.max() + 1) % FOLDS)[numbers]
    return [(rows[fold != held], rows[fold == held]) for held in range(FOLDS)]


def choose_strength(
    table: FeatureTable,
    rows: Rows,
    strengths: Sequence[float] = STRENGTHS,
    refine: bool = True,
    splits: int = FOLDS,
) -> float:
    """Choose the ridge penalty by cross-validation.

    It is the strongest one whose mean IoU on held-out images is within one standard error of the
    best (Hastie et al. 2009, section 7.10). The network may have been trained on the photos that
    heads are fitted on, and a penalty that is best for those is too weak for others.

    Args:
        table: features and boxes.
        rows: of the table, to fit on.
        strengths: the penalties to choose from.
        refine: whether the layer will be refined: IoUs are then those after the refinement.
        splits: use only the first so many folds.
    """
    ious: list[Array64] = []
    for kept, held in folds(table, rows)[:splits]:
        values, boxes = mirrored_pairs(table, kept)
        model = Ridge(values, boxes)
        heads = [model.solve(strength) for strength in strengths]
        if refine:
            heads = [refined(values, boxes, *head) for head in heads]
        found = [predict(table.values[held], *head) for head in heads]
        ious.append(np.stack([table.ious(each, held) for each in found]))
    joined = np.concatenate(ious, axis=1)
    means = joined.mean(axis=1)
    best = int(np.argmax(means))
    close = means >= means[best] - joined[best].std() / np.sqrt(joined.shape[1])
    return max(strength for strength, near in zip(strengths, close, strict=True) if near)


def held_out_boxes(
    table: FeatureTable, rows: Rows, strength: float, fitter: Fitter = solve
) -> Array64:
    """The box of each row, ``[N, 4]``, by a layer that was fitted without the row."""
    found = np.zeros((len(table.values), 4))
    for kept, held in folds(table, rows):
        found[held] = predict(table.values[held], *fitter(table, kept, strength))
    return found[rows]


BESIDE = ThreadPoolExecutor(1)
"""Multiplies large matrices while the next are made."""


class Normal:
    """The normal equations of a weighted ridge regression, built up of parts.

    The last feature is the constant 1, whose weight is not penalized.

    Args:
        strength: a factor of the penalty.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self._strength = strength
        self._gram: Any = 0.0
        self._moment: Any = 0.0
        self._waiting: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self._rows = 0
        self._adding: Future[None] | None = None

    def add(
        self, features: NDArray[np.float32], targets: NDArray[Any], weights: NDArray[Any] | float
    ) -> None:
        """Add rows: features ``[L, D]``, targets ``[L, T]``, weights ``[L]``."""
        root = np.sqrt(np.broadcast_to(np.asarray(weights, np.float32), len(features)))[:, None]
        self._waiting.append((features * root, targets.astype(np.float32) * root))
        self._rows += len(features)
        if sum(len(each[0]) for each in self._waiting) > 4000:
            self._sum()

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return self._rows

    def means(self) -> Array64:
        """The mean features of the rows, weighted by each target: ``[T, D]``."""
        self._wait()
        moment = self._moment + sum(x.T @ y for x, y in self._waiting)
        return np.asarray((moment / np.maximum(moment[-1], FREE)).T, np.float64)

    def _sum(self) -> None:
        """Multiply what waits, beside the thread that computes the next rows."""
        self._wait()
        if self._waiting:
            x, y = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            self._adding = BESIDE.submit(self._multiply, x, y)

    def _multiply(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        self._gram = self._gram + x.T @ x
        self._moment = self._moment + x.T @ y

    def _wait(self) -> None:
        if self._adding is not None:
            self._adding.result()
            self._adding = None

    def solve(self, penalty: float, start: Array64 | None = None) -> Array64:
        """The weights ``[D, T]``.

        Args:
            penalty: on their squares, of standardized features.
            start: weights to be penalized for leaving, in place of 0.

        Raises:
            SourceError: no row was added.
        """
        if not self._rows:
            raise SourceError("no object of the images can be used: their boxes are too small")
        penalty = penalty * self._strength
        if self._is_small and penalty > 0:
            return self._dual(penalty, start)
        self._sum()
        self._wait()
        gram, moment = (np.asarray(each, np.float64) for each in (self._gram, self._moment))
        total = gram[-1, -1]
        if start is not None:
            moment = moment - gram @ start
        scale = np.sqrt(np.diag(gram) / total) + 1e-6
        system = gram / total / scale[:, None] / scale
        system[np.arange(len(system) - 1), np.arange(len(system) - 1)] += penalty
        found = np.linalg.solve(system, moment / total / scale[:, None]) / scale[:, None]
        return np.asarray(found if start is None else start + found)

    @property
    def _is_small(self) -> bool:
        """Whether there are fewer rows than features, and all of them are kept."""
        self._wait()
        return isinstance(self._gram, float) and self._rows < self._waiting[0][0].shape[1]

    def _dual(self, penalty: float, start: Array64 | None) -> Array64:
        """The same solution from a system of the size of the rows: few boxes take seconds."""
        x, y = (
            np.concatenate(parts).astype(np.float64) for parts in zip(*self._waiting, strict=True)
        )
        total = (x[:, -1] ** 2).sum()
        spread = 1 / (np.sqrt((x**2).sum(axis=0) / total) + 1e-6) ** 2
        spread[-1] = penalty / FREE  # of the constant: next to no penalty
        before = np.zeros((x.shape[1], y.shape[1])) if start is None else start
        system = (x * spread) @ x.T + penalty * total * np.eye(len(x))
        step = x.T @ np.linalg.solve(system, y - x @ before)
        return np.asarray(before + spread[:, None] * step)
