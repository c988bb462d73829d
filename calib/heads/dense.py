"""Fits a dense head: two linear layers in closed form, on all objects of the images and on their
background.

The maps of every image and of its mirror image are computed once with the engine and projected to
their principal components. Four ridge regressions follow (Hoerl & Kennard 1970): from a cell near
an object's middle to its sides; from a cell to the IoU of the box that it then gives; from a
proposal to the corrections of its sides; and from a proposal to the IoU of its corrected box.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.confidence import logistic
from calib.heads.dense_names import (
    Answer,
    Names,
    Sureness,
    best_iou,
    name_targets,
    with_finer,
)
from calib.heads.dense_scenes import (
    MAIN,
    Array32,
    Array64,
    Reader,
    Scene,
    SceneTable,
    cell_stride_px,
    fit_levels,
    layers_read,
)
from calib.heads.linear import FOLDS, Normal, Rows, group_numbers
from engines.boxes import distinct, iou
from engines.dense import SIZES, SMALLEST, DenseHead, Level
from engines.dense_names import Naming
from engines.errors import ModelError, SourceError
from engines.head import NO_HEAD, head_path, is_fitted_on, load_head, shipped_heads
from engines.maps import MapSpec
from engines.networks.preprocessing import LETTERBOX
from engines.networks.registry import NETWORKS, Classifier, class_count
from engines.options import EngineOptions

KIND = "dense"
"""What ``fit --kind`` calls it."""
SIZE_PX = 320
"""Side of the input, unless another is asked for."""
SIZE_RANGES = ((0.0, 0.25), (0.175, 0.53), (0.375, 9.0))
"""The root of an object's area, in sides of the square, for each of ``SIZES``."""
MIDDLE = 0.3
"""Cells so near to an object's middle are its own, in widths and heights."""
OBJECT_IOU = 0.3
"""A cell whose box overlaps an object so much is no background."""
CORRECTED_IOU = 0.4
"""A proposal that overlaps an object so much is corrected to it."""
MOST_OBJECT_CELLS, MOST_BACKGROUND_CELLS = 40, 25
"""Of one image, in the regression of the objectness."""
JITTERED, JITTER = 4, 0.25
"""Boxes for each image that are the true ones with edges moved by so much of the sides."""
FURTHER_WEIGHT = 0.3
"""Of boxes in images of other kinds, where edges are corrected."""
CELL_PENALTY = 5e-3
CORRECTION_PENALTY = 0.5
IOU_PENALTY = 0.1
"""Of standardized features, beside the mean of the squared errors; chosen on VOC 2007 train and
val.
"""
COMPARED = ("corloc", "recall_at_10")
"""What must not get worse."""
MANY_OBJECTS = 1000
"""With fewer, the penalties are the larger the fewer there are."""
FEW_IMAGES = 200
"""So few are measured in all folds, more in one."""
FEWEST_OBJECTS = 5


@dataclass(frozen=True)
class DenseFit:
    """A fitted dense head, and what it does in images that it was not fitted on.

    Attributes:
        head: the head, ready to save.
        held_out: of images by heads that were not fitted on them, see ``figures_of``; of all in
            turns where they are few, else of a fifth.
        before: of the same images, by the head that it started from.
    """

    head: DenseHead
    held_out: dict[str, float]
    before: dict[str, float] | None = None

    @property
    def is_worse(self) -> bool:
        """Whether it is worse than the head that it started from, by more than a point."""
        if self.before is None:
            return False
        return any(self.held_out[name] < self.before[name] - 0.01 for name in COMPARED)


@dataclass
class Layers:
    """The weights that are fitted one after the other, each ``[features, outputs]``."""

    distances: Array64
    objectness: Array64
    corrections: Array64
    expected: Array64
    names: Array64
    means: Array64 = field(default_factory=lambda: np.zeros((0, 0)))
    """See ``engines.dense_names.Naming``, ``[C + 1, D + 1]``; empty where they are not known."""

    def proposals(self, reader: Reader, scene: Scene, count: int) -> tuple[Array64, Array64]:
        """The proposals of an image, and their objectness."""
        features = reader.cell_features(scene.maps)
        boxes = reader.cell_boxes(features @ self.distances)
        scores = features @ self.objectness
        return reader.proposals(boxes.reshape(-1, 4), scores.T.reshape(-1), count)

    def answer(self, reader: Reader, scene: Scene) -> Answer:
        """The corrected boxes of an image, and what is known of them; without those of objects to
        be ignored.
        """
        boxes, scores = self.proposals(reader, scene, reader.candidates)
        features = reader.box_features(scene.maps, boxes, scores)
        moved = reader.moved(boxes, features @ self.corrections)
        known = scene.is_known(moved, best_iou(moved, scene.boxes_px))
        if known.any():
            features, moved, scores = features[known], moved[known], scores[known]
        return Answer(
            boxes=moved,
            expected=(features @ self.expected)[:, 0],
            objectness=scores,
            scores=features @ self.names,
            true=scene.boxes_px,
            classes=scene.classes,
            kind=scene.kind,
        )


def fit_layers(
    table: SceneTable,
    reader: Reader,
    rows: Rows,
    console: Console,
    names: Names,
    start: Layers | None = None,
) -> Layers:
    """Fit all layers on some of the images.

    Args:
        table: the scenes.
        reader: computes their features.
        rows: of the table.
        console: for progress.
        names: that boxes are given.
        start: fitted layers to stay near to.
    """
    layers = Layers(*[np.zeros((0, 0))] * 5)
    strength = max(1.0, MANY_OBJECTS / max(1, table.objects(rows)))
    main = table.main(rows)

    def scenes(what: str, some: Rows = main) -> Iterator[Scene]:
        total = len(some) + len(table.main(some))
        return iter(track(table.scenes(some), what, total=total, console=console))

    layers.distances = _fit_distances(
        scenes("fitting sides"), reader, start.distances if start else None, strength
    )
    layers.objectness = _fit_objectness(
        scenes("fitting objectness"), reader, layers, start.objectness if start else None, strength
    )
    layers.corrections = _fit_corrections(
        scenes("fitting corrections", rows),
        reader,
        layers,
        start.corrections if start else None,
        strength,
    )
    layers.expected, layers.names, layers.means = _fit_expected(
        scenes("fitting names", rows), reader, layers, names, start, strength
    )
    return layers


def _fit_distances(
    scenes: Iterator[Scene], reader: Reader, start: Array64 | None, strength: float
) -> Array64:
    """From the cells near an object's middle to the distances of its sides, for each size; of
    several objects a cell is the smallest one's. ``[D1 + 1, 4 * SIZES]``.
    """
    normals = [Normal(strength) for _ in range(SIZES)]
    for scene in scenes:
        boxes = scene.boxes_px
        if not len(boxes):
            continue
        middles, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        reach = np.maximum(MIDDLE * sizes, 0.51 * reader.stride_px)
        inside = np.all(np.abs(reader.centres[:, None] - middles) < reach, axis=2)
        areas = np.where(inside, sizes.prod(axis=1), np.inf)
        owner, owned = areas.argmin(axis=1), inside.any(axis=1)
        features = reader.cell_features(scene.maps)
        roots = np.sqrt(sizes.prod(axis=1)) / reader.size_px
        for normal, (low, high) in zip(normals, SIZE_RANGES, strict=True):
            used = owned & (roots[owner] >= low) & (roots[owner] < high)
            if not used.any():
                continue
            mine, centres = boxes[owner[used]], reader.centres[used]
            sides = np.concatenate([centres - mine[:, :2], mine[:, 2:] - centres], axis=1)
            targets = np.log(np.maximum(sides / reader.stride_px, 0.125))
            counts = np.bincount(owner[used], minlength=len(boxes))
            normal.add(features[used], targets, 1 / counts[owner[used]])
    found = []
    for place, normal in enumerate(normals):
        part = None if start is None else start[:, 4 * place : 4 * place + 4]
        found.append(_solved(normal, CELL_PENALTY, part, normals))
    return np.concatenate(found, axis=1)


def _solved(
    normal: Normal, penalty: float, start: Array64 | None, others: Sequence[Normal]
) -> Array64:
    """The solution; where no object is of this size, what the fitted head had, or else that of the
    size with the most objects.
    """
    if not normal.rows:
        if start is not None:
            return start
        normal = max(others, key=lambda each: each.rows)
    return normal.solve(penalty, start)


def _fit_objectness(
    scenes: Iterator[Scene], reader: Reader, layers: Layers, start: Array64 | None, strength: float
) -> Array64:
    """From a cell to the IoU of each of its boxes with the nearest object, ``[D1 + 1, SIZES]``.

    The cells of an image with objects, and those of its background, count as much as each other.
    """
    rng, normal = np.random.default_rng(0), Normal(strength)
    for scene in scenes:
        features = reader.cell_features(scene.maps)
        boxes = reader.cell_boxes(features @ layers.distances)
        each = boxes.reshape(-1, 4)
        overlaps = best_iou(each, scene.boxes_px)
        known = scene.is_known(each, overlaps).reshape(SIZES, -1).all(axis=0)
        overlaps = overlaps.reshape(SIZES, -1)
        near = overlaps.max(axis=0) > OBJECT_IOU
        objects, background = np.flatnonzero(near), np.flatnonzero(~near & known)
        if len(objects) > MOST_OBJECT_CELLS:
            objects = rng.choice(objects, MOST_OBJECT_CELLS, replace=False)
        count = min(MOST_BACKGROUND_CELLS, len(background))
        background = rng.choice(background, count, replace=False)
        several = np.sqrt(max(1, len(scene.boxes_px)))
        for cells, weight in ((objects, several), (background, 1.0)):
            if len(cells):
                normal.add(features[cells], overlaps[:, cells].T, weight / len(cells))
    return normal.solve(CELL_PENALTY, start)


def _fit_corrections(
    scenes: Iterator[Scene], reader: Reader, layers: Layers, start: Array64 | None, strength: float
) -> Array64:
    """From a proposal to how far each edge of its object is, in its sides."""
    rng, normal = np.random.default_rng(0), Normal(strength)
    for scene in scenes:
        true = scene.boxes_px
        if not len(true):
            continue
        boxes, scores = layers.proposals(reader, scene, reader.candidates)
        moved = _jittered(true, rng, reader.size_px)
        boxes = np.concatenate([boxes, moved])
        scores = np.concatenate([scores, np.full(len(moved), scores.mean())])
        overlaps = iou(boxes[:, None], true[None])
        used = (overlaps.max(axis=1) > CORRECTED_IOU) & (
            boxes[:, 2:] - boxes[:, :2] > SMALLEST * reader.stride_px
        ).all(axis=1)
        if not used.any():
            continue
        boxes, mine = boxes[used], true[overlaps[used].argmax(axis=1)]
        sizes = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        features = reader.box_features(scene.maps, boxes, scores[used])
        weight = (1.0 if scene.kind == MAIN else FURTHER_WEIGHT) / np.sqrt(used.sum())
        normal.add(features, (mine - boxes) / sizes, weight)
    return normal.solve(CORRECTION_PENALTY, start)


def _jittered(true: Array64, rng: np.random.Generator, side_px: int) -> Array64:
    """True boxes with moved edges, ``[JITTERED, 4]``."""
    mine = true[rng.integers(len(true), size=JITTERED)]
    shifts = rng.uniform(-JITTER, JITTER, (JITTERED, 4))
    return np.clip(mine + shifts * np.tile(mine[:, 2:] - mine[:, :2], 2), 0, side_px)


def _fit_expected(
    scenes: Iterator[Scene],
    reader: Reader,
    layers: Layers,
    names: Names,
    start: Layers | None,
    strength: float,
) -> tuple[Array64, Array64, Array64]:
    """From a proposal to the IoU of its corrected box with the nearest object, and to its name.

    Classes that are added to those of a head are told from these by their means, which count as
    much as the images: else all that looks alike would get the new name.
    """
    normal = Normal(strength)
    for scene in scenes:
        boxes, scores = layers.proposals(reader, scene, reader.candidates)
        features = reader.box_features(scene.maps, boxes, scores)
        moved = reader.moved(boxes, features @ layers.corrections)
        known = scene.is_known(moved, best_iou(moved, scene.boxes_px))
        if not known.any():
            continue
        features, moved = features[known], moved[known]
        several = np.sqrt(max(1, len(scene.boxes_px)))
        overlaps = best_iou(moved, scene.boxes_px)[:, None]
        named = name_targets(moved, scene.boxes_px, scene.classes, len(names.names))
        targets = np.concatenate([overlaps, named[:, names.learned]], axis=1)
        normal.add(features, targets, several / len(moved))
    before, means = None, normal.means()[1:]
    if start is not None:
        if len(start.means):
            kept = start.means.astype(np.float32)
            targets = np.zeros((len(kept), 1 + len(means)))
            targets[:, :1] = kept @ start.expected
            normal.add(kept, targets, normal.rows / reader.candidates / len(kept))
            means = np.concatenate([kept[:-1], means, kept[-1:]])
        else:
            means = start.means
        new = np.zeros((len(start.expected), int(names.learned.sum())))
        before = np.concatenate([start.expected, new], axis=1)
    found = normal.solve(IOU_PENALTY, before)
    said = np.zeros((len(found), len(names.learned))) if start is None else start.names.copy()
    said[:, names.learned] = found[:, 1:]
    return found[:, :1], said, np.asarray(means, np.float64)


def with_input(choice: EngineOptions) -> EngineOptions:
    """The options with the input that dense heads are fitted at, where none is asked for: the whole
    image, letterboxed, in a larger square than classifiers usually see.
    """
    known = choice.model in NETWORKS
    return replace(
        choice,
        head=None,
        size_px=choice.size_px or (SIZE_PX if known else None),
        resize=choice.resize or LETTERBOX,
    )


def start_of(name: str | None, classifier: Classifier) -> DenseHead | None:
    """The head to start from: the named one, or else a shipped one of this network.

    Raises:
        ModelError: the named one is no dense head, or belongs to another network.
    """
    if name == NO_HEAD:
        return None
    if name is None:
        shipped = shipped_heads(classifier).values()
        return next((head for head in shipped if isinstance(head, DenseHead)), None)
    head = load_head(head_path(name))
    if not isinstance(head, DenseHead) or not is_fitted_on(head, classifier):
        raise ModelError(f"{name} is no dense head of this network", option="from_head")
    return head


def told(fitted: DenseFit) -> str:
    """What a fit reaches on images that it was not fitted on, in words."""
    found = fitted.held_out
    lines = [
        f"{found['images_with_one_object']} images with one object,"
        f" {found['images_with_several']} with several, {found['images_without']} with none"
    ]
    for name, figures in (("before", fitted.before), ("after", found)):
        if figures is not None:
            lines.append(
                f"{name}: the best box is right in {100 * figures['corloc']:.1f} % of the images"
                f" with one object (mean IoU {figures['mean_iou']:.3f}), and"
                f" {100 * figures['recall_at_10']:.1f} % of all objects are among 10 boxes"
            )
    if found["names_right"]:
        lines.append(
            f"{100 * found['named']:.0f} % of the right boxes have a name, and"
            f" {100 * found['names_right']:.0f} % of these names are right"
        )
    return "Measured on images that the head was not fitted on:\n  " + "\n  ".join(lines)


def default_spec(classifier: Classifier, layer: str | None = None) -> MapSpec:
    """The map that is shown beside the boxes: LayerCAM, at the last stage unless a layer is named.
    There it costs next to nothing.
    """
    return MapSpec(layer=layer or layers_read(classifier)[-2:][0], signal="layercam")


def fit_dense(
    samples: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    console: Console,
    name: str,
    start: DenseHead | None = None,
    further: Mapping[str, Sequence[Sample]] | None = None,
    finer: Mapping[str, Sequence[int]] | None = None,
) -> DenseFit:
    """Fit a dense head on all objects of the images, first on four fifths of them to measure it.

    Args:
        samples: the training set; images may hold several objects, or none.
        classifier: the network that the head will be tied to.
        spec: the map that is shown beside the boxes.
        console: for progress.
        name: the name of the data set, for the card.
        start: a head of this network to stay near to, so that few boxes do no harm.
        further: images of other kinds by the name of the kind; they serve the box layer, the
            names and the confidence.
        finer: classes of the network by the name that they are a kind of.

    Raises:
        SourceError: there are fewer than ``FEWEST_OBJECTS`` objects.
        ModelError: the network has no layers that a dense head can read.
    """
    kinds = {MAIN: samples, **(further or {})}
    objects = sum(len(sample.truths) for sample in samples)
    if objects < FEWEST_OBJECTS:
        raise SourceError(
            f"{name}: it has {objects} boxes, a dense head needs at least {FEWEST_OBJECTS}: label"
            " more"
        )
    classes = sorted({truth.class_name for sample in samples for truth in sample.truths})
    names = Names.of([each for each in classes if each], start.naming if start else None)
    levels = start.levels if start else fit_levels(samples, classifier, console)
    with TemporaryDirectory(prefix="sightline-dense-") as folder:
        table = SceneTable(kinds, names.names, classifier, levels, Path(folder), console)
        reader = Reader(levels, classifier.size_px, cell_stride_px(classifier.size_px, table.sides))
        if start:
            reader = Reader.of(start)
        before = layers_of(start, names) if start else None
        numbers = group_numbers(table.groups, np.arange(len(table)))
        fold = (np.random.default_rng(0).permutation(numbers.max() + 1) % FOLDS)[numbers]
        found, started = list[Answer](), list[Answer]()
        for number in range(FOLDS if len(samples) <= FEW_IMAGES else 1):
            kept, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            trial = fit_layers(table, reader, kept, console, names, before)
            found += [trial.answer(reader, each) for each in table.scenes(held, mirrored=False)]
            if before:
                scenes = table.scenes(held, mirrored=False)
                started += [before.answer(reader, each) for each in scenes]
        layers = fit_layers(table, reader, np.arange(len(table)), console, names, before)
    names = names.sharpened(found)
    sure = _sureness(names, start, found, reader)
    naming, said = names.layer(layers.names, start.naming if start else None, found)
    if len(layers.means):
        naming = replace(naming, means=_halved(layers.means[:, :-1].astype(np.float32)))
    if finer and not start:
        naming = with_finer(naming, finer, class_count(classifier))
    held_out = {**figures_of(_main(found), sure), **said}
    card = {
        "kind": "dense",
        "data": name,
        "images": len(samples),
        "objects": objects,
        "classes": classes,
        "input": classifier.preprocessing.stored(),
        "held_out": held_out,
        **({"start": start.card.get("data")} if start else {}),
    }
    head = _head_of(layers, levels, reader, classifier, spec, sure, naming, card)
    shown_from = start.shown_from if start else sure.shown_from(found)
    head = replace(head, shown_from=shown_from)
    figures = None
    if start:
        figures = figures_of(_main(started), replace(sure, trust=start.trust))
    return DenseFit(head, held_out, figures)


def _sureness(
    names: Names, start: DenseHead | None, found: Sequence[Answer], reader: Reader
) -> Sureness:
    """How sure boxes are. What a head says that was fitted to more kinds of images stays."""
    least = SMALLEST * reader.stride_px
    certainty = start.certainty if start else (1.0, 0.0)
    sure = Sureness(names, start.trust if start else None, certainty, reader.size_px, least)
    if start is None:
        return sure.fitted(found)
    if start.trust is None and len(found) > FEW_IMAGES:
        return replace(sure, certainty=_certainty(found))
    return sure


def _main(answers: Sequence[Answer]) -> list[Answer]:
    return [each for each in answers if each.kind == MAIN]


def figures_of(answers: Sequence[Answer], sure: Sureness) -> dict[str, float]:
    """How good boxes are: of images with one object, the share whose best box is right and its mean
    IoU; of all objects, the share that is among ten boxes.
    """
    best, reached = list[float](), list[Array64]()
    for each in answers:
        kept = distinct(each.boxes, sure(each))[:10]
        reached.append(best_iou(each.true, each.boxes[kept]))
        if len(each.true) == 1:
            best.append(float(each.overlaps[kept[0]]))
    counts = np.array([len(each.true) for each in answers])
    ious, all_objects = np.array(best or [0.0]), np.concatenate(reached)
    recall = float((all_objects > CORLOC_IOU).mean()) if len(all_objects) else 0.0
    return {
        "images_with_one_object": len(best),
        "images_with_several": int((counts > 1).sum()),
        "images_without": int((counts == 0).sum()),
        "corloc": round(float((ious > CORLOC_IOU).mean()), 4),
        "mean_iou": round(float(ious.mean()), 4),
        "recall_at_10": round(recall, 4),
    }


def _certainty(answers: Sequence[Answer]) -> tuple[float, float]:
    """See ``DenseHead.certainty``: logistic regression of whether boxes are right on the IoU that
    was expected of them.
    """
    kept = [distinct(each.boxes, each.expected)[:10] for each in answers]
    pairs = list(zip(answers, kept, strict=True))
    expected = np.concatenate([each.expected[some] for each, some in pairs])
    right = np.concatenate([each.overlaps[some] for each, some in pairs]) > CORLOC_IOU
    weight, bias = logistic(expected[:, None], right.astype(np.float64), np.ones(len(right)), 1e-3)
    return float(weight[0]), float(bias)


def layers_of(head: DenseHead, names: Names) -> Layers:
    """The layers of a head, with the bias as the last row. Names that it does not know have
    weights of 0.
    """
    cells, boxes = (
        np.concatenate([weight, bias[:, None]], axis=1).T.astype(np.float64)
        for weight, bias in (
            (head.cell_weight, head.cell_bias),
            (head.box_weight, head.box_bias),
        )
    )
    said = np.zeros((len(boxes), len(names.learned)))
    if head.naming:
        known = np.concatenate([head.naming.weight, head.naming.bias[:, None]], axis=1).T
        said[:, ~names.learned] = known
    found = head.naming.means if head.naming else np.zeros((0, 0))
    means = np.pad(found.astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0)
    split = 4 * SIZES
    return Layers(cells[:, :split], cells[:, split:], boxes[:, :4], boxes[:, 4:], said, means)


def _head_of(
    layers: Layers,
    levels: tuple[Level, ...],
    reader: Reader,
    classifier: Classifier,
    spec: MapSpec,
    sure: Sureness,
    naming: Naming,
    card: dict[str, Any],
) -> DenseHead:
    """The head that computes what the layers do. Large weights are rounded as its file has them."""
    cells = np.concatenate([layers.distances, layers.objectness], axis=1).T.astype(np.float32)
    boxes = np.concatenate([layers.corrections, layers.expected], axis=1).T.astype(np.float32)
    cell_weight, box_weight = (_halved(each[:, :-1]) for each in (cells, boxes))
    return DenseHead(
        spec,
        tuple(replace(level, basis=_halved(level.basis)) for level in levels),
        reader.stride_px,
        cell_weight,
        cells[:, -1].copy(),
        box_weight,
        boxes[:, -1].copy(),
        sure.certainty,
        reader.candidates,
        classifier.digest,
        classifier.size_px,
        classifier.preprocessing.resize,
        card,
        reader.compared,
        reader.same,
        reader.whole,
        replace(naming, weight=_halved(naming.weight)),
        sure.trust,
    )


def _halved(values: Array32) -> Array32:
    """Values that float16 holds."""
    return np.ascontiguousarray(values.astype(np.float16), np.float32)
