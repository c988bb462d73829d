"""Fits a dense head: two linear layers in closed form, on all objects of the images and on their
background.

The maps of every image and of its mirror image are computed once with the engine and projected to
their principal components. The layers are fitted to them (``calib.heads.dense_layers``), first
without a part of the images, which tell how good the head is, how sure its boxes are, and what they
are called.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from calib.data.datasets import Sample
from calib.evaluation.metrics import CORLOC_IOU, constant_boxes
from calib.heads.confidence import logistic
from calib.heads.curve import Forecast
from calib.heads.dense_few import FEW_OBJECTS, SMALL_FOLDS, FewFit, Smaller, fit_few
from calib.heads.dense_layers import Layers, Look, Sums, fit_layers
from calib.heads.dense_names import Answer, Names, Sureness, best_iou, with_finer
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
from calib.heads.linear import FOLDS, Rows, group_numbers
from engines.boxes import distinct
from engines.dense import SMALLEST, DenseHead, Level
from engines.dense_names import Naming
from engines.errors import ModelError, SourceError
from engines.head import (
    NO_HEAD,
    head_path,
    is_fitted_on,
    load_head,
    shipped_heads,
    with_classes_of,
)
from engines.maps import MapSpec
from engines.networks.preprocessing import LETTERBOX
from engines.networks.registry import NETWORKS, Classifier, class_count
from engines.options import EngineOptions

KIND = "dense"
"""What ``fit --kind`` calls it."""
SIZE_PX = 320
"""Side of the input, unless another is asked for."""
COMPARED = ("corloc", "recall_at_10")
"""What must not get worse."""
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
        forecast: what more boxes would bring; None where that is not known.
    """

    head: DenseHead
    held_out: dict[str, float]
    before: dict[str, float] | None = None
    forecast: Forecast | None = None

    @property
    def is_worse(self) -> bool:
        """Whether it is worse than the head that it started from, by more than a point."""
        if self.before is None:
            return False
        return any(self.held_out[name] < self.before[name] - 0.01 for name in COMPARED)


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
        dense = [head for head in shipped if isinstance(head, DenseHead)]
        return with_classes_of(dense[0], classifier) if dense else None
    head = load_head(head_path(name))
    if not isinstance(head, DenseHead) or not is_fitted_on(head, classifier):
        raise ModelError(f"{name} is no dense head of this network", option="from_head")
    return with_classes_of(head, classifier)


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
    if fitted.forecast is not None:
        lines.append(fitted.forecast.words)
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
    move_boxes: bool = False,
) -> DenseFit:
    """Fit a dense head on all objects of the images, first on a part of them to measure it.

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
        move_boxes: fit the boxes of few images, too, and not only what is said of them.

    Raises:
        SourceError: there are fewer than ``FEWEST_OBJECTS`` objects.
        ModelError: the network has no layers that a dense head can read.
    """
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
        kinds = {MAIN: samples, **(further or {})}
        table = SceneTable.of(kinds, names.names, classifier, levels, Path(folder), console)
        if start:
            reader = Reader.of(start)
        else:
            stride_px = cell_stride_px(classifier.size_px, table.sides)
            reader = Reader(levels, classifier.size_px, stride_px)
        smaller: Smaller | None
        trials = FOLDS if len(samples) <= FEW_IMAGES else 1
        before = Layers.of(start, names) if start else None
        fitting = _Fitting(table, reader, names, before, trials)
        if start and before and not move_boxes and max(objects, len(table)) <= FEW_OBJECTS:
            few = fitting.few(console)
            found, started, layers, smaller = few.found, few.started, few.layers, few.smaller
        else:
            found, started, layers, smaller = fitting.run(console)
    names = names.sharpened(found)
    sure = _sureness(names, start, found, reader)
    naming, said = names.layer(layers.names, start.naming if start else None, found)
    if len(layers.means):
        naming = replace(naming, means=halved(layers.means[:, :-1].astype(np.float32)))
    if finer and not start:
        naming = with_finer(naming, finer, class_count(classifier))
    held_out = {**figures_of(_main(found), sure), **said}
    measured = None
    if start:
        measured = figures_of(_main(started), replace(sure, trust=start.trust, names=names.before))
    forecast = _forecast(objects, measured, held_out, smaller, sure)
    boxes = table.single_boxes
    card = {
        "kind": "dense",
        "data": name,
        "images": len(samples),
        "objects": objects,
        "classes": classes,
        "input": classifier.preprocessing.stored(),
        "held_out": held_out,
        **({"constant_boxes": asdict(constant_boxes(np.array(boxes)))} if boxes else {}),
        **({"start": start.card.get("data"), "before": measured} if start else {}),
        **({"forecast": asdict(forecast)} if forecast else {}),
    }
    head = _head_of(layers, levels, reader, classifier, spec, sure, naming, card)
    head = replace(head, shown_from=start.shown_from if start else sure.shown_from(found))
    return DenseFit(head, held_out, measured, forecast)


def _forecast(
    objects: int,
    before: Mapping[str, float] | None,
    held_out: Mapping[str, float],
    smaller: Smaller | None,
    sure: Sureness,
) -> Forecast | None:
    """How the mean IoU goes with the number of boxes; None where too little was measured.

    The heads of fewer boxes were measured on some of the images only. So their point lies as far
    below that of the others as it does on these images.
    """
    if before is None or smaller is None or not held_out["images_with_one_object"]:
        return None
    few, same = (figures_of(_main(each), sure) for each in (smaller.found, smaller.same))
    if not few["images_with_one_object"]:
        return None
    share = (FOLDS - 1) / FOLDS
    at_few = held_out["mean_iou"] + few["mean_iou"] - same["mean_iou"]
    points = [(0.0, before["mean_iou"])]
    points += [
        (objects * len(SMALL_FOLDS) / FOLDS, at_few),
        (objects * share, held_out["mean_iou"]),
    ]
    return Forecast.fitted(points, objects)


@dataclass(frozen=True)
class _Fitting:
    """Fits the layers to the images: ``trials`` times to four fifths, then to all.

    After a single trial, its sums go on with the images that were left out: the others are not
    read again.
    """

    table: SceneTable
    reader: Reader
    names: Names
    start: Layers | None
    trials: int

    def run(self, console: Console) -> tuple[list[Answer], list[Answer], Layers, Smaller | None]:
        """The answers for images that the layers were not fitted on, those of the start for the
        same images, the layers of all images, and what fewer images would have given.
        """
        table, everything = self.table, np.arange(len(self.table))
        fold = self._folds()
        found, started = list[Answer](), list[Answer]()
        sums, rest, smaller = Sums(), everything, None
        with Progress(console=console) as bar:
            for number in range(self.trials):
                if number == len(SMALL_FOLDS):
                    before = len(found)
                held = np.flatnonzero(fold == number)
                part = f"measuring, {number + 1} of {self.trials}"
                sums = Sums()
                trial = self._layers(bar, part, np.flatnonzero(fold != number), sums)
                for scene in table.scenes(held, mirrored=False):
                    if scene.says_nothing:
                        continue
                    found.append(trial.answer(self.reader, scene))
                    if self.start:
                        started.append(self.start.answer(self.reader, scene))
            if self.trials == 1:
                rest = held
            else:
                sums = Sums()
                if self.start:
                    smaller = Smaller(self._fewer(bar, fold), found[before:])
            layers = self._layers(bar, "fitting to all images", rest, sums)
            return found, started, layers, smaller

    def _fewer(self, bar: Progress, fold: Rows) -> list[Answer]:
        """The answers of layers that were fitted to ``SMALL_FOLDS``, for the other images."""
        few = np.isin(fold, SMALL_FOLDS)
        trial = self._layers(bar, "measuring fewer boxes", np.flatnonzero(few), Sums())
        others = [np.flatnonzero(fold == number) for number in range(len(SMALL_FOLDS), self.trials)]
        scenes = self.table.scenes(np.concatenate(others), mirrored=False)
        return [trial.answer(self.reader, each) for each in scenes if not each.says_nothing]

    def few(self, console: Console) -> FewFit:
        """What is said of boxes alone, fitted to few images; see ``calib.heads.dense_few``."""
        assert self.start is not None
        looks = list[list[Look]]()
        for row in track(range(len(self.table)), "reading boxes", console=console):
            scenes = self.table.scenes(np.array([row]))
            looks.append([self.start.look(self.reader, scene) for scene in scenes])
        return fit_few(looks, self._folds(), self.reader, self.names, self.start)

    def _folds(self) -> Rows:
        """The fold of each image."""
        numbers = group_numbers(self.table.groups, np.arange(len(self.table)))
        return (np.random.default_rng(0).permutation(numbers.max() + 1) % FOLDS)[numbers]

    def _layers(self, bar: Progress, part: str, rows: Rows, sums: Sums) -> Layers:
        """The layers of some of the images and those of the sums; one bar says what is fitted."""
        main = len(self.table.main(rows))  # all are seen in the steps of boxes, these mirrored, too
        of_boxes = 2 if self.start and self.start.first is None else 3
        total = 2 * (2 + of_boxes) * main + of_boxes * (len(rows) - main)
        task = bar.add_task(part, total=total)

        def scenes(what: str, some: Rows) -> Iterator[Scene]:
            bar.update(task, description=f"{part}: {what}")
            for scene in self.table.scenes(some):
                yield scene
                bar.advance(task)

        layers = fit_layers(self.table, self.reader, rows, scenes, self.names, self.start, sums)
        bar.update(task, description=part)
        return layers


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
    cell_weight, box_weight = (halved(each[:, :-1]) for each in (cells, boxes))
    first = None if layers.first is None else layers.first.T.astype(np.float32)
    return DenseHead(
        spec,
        tuple(replace(level, basis=halved(level.basis)) for level in levels),
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
        replace(naming, weight=halved(naming.weight)),
        sure.trust,
        body=classifier.body_digest,
        first_weight=None if first is None else halved(first[:, :-1]),
        first_bias=None if first is None else first[:, -1].copy(),
    )


def halved(values: Array32) -> Array32:
    """Values that float16 holds."""
    return np.ascontiguousarray(values.astype(np.float16), np.float32)
