"""Measures what a fit to few boxes of a class gives that the head was not fitted on:
``python -m calib.research.few_boxes --data DATA --work FOLDER --out docs/few_boxes.md``.

VOC's classes are left out one by one. A head for each class is fitted to the photos of VOC 2007
train in which nothing of the class is: that class's rows are taken off the sums of all photos. It
is then fitted, as ``fit`` does it, to photos of VOC 2007 train that hold so many boxes of the
class, drawn by lot, and measured on photos of VOC 2007 val in which an object of the class is the
only one. The shipped head itself is fitted to raccoons and to a bag in a video. What is in the work
folder is not computed again.
"""

import csv
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.bench.machine import machine
from calib.data.datasets import Sample, load_dataset
from calib.data.labels import Truth
from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.dense_few import fit_few
from calib.heads.dense_layers import (
    CELL_PENALTY,
    CORRECTION_PENALTY,
    IOU_PENALTY,
    Layers,
    Look,
    Part,
    correction_rows,
    expected_rows,
    objectness_rows,
    side_rows,
)
from calib.heads.dense_names import Answer, Names, Sureness
from calib.heads.dense_scenes import MAIN, Array64, Reader, Scene, SceneTable
from calib.heads.linear import FOLDS
from calib.research.command_line import run
from calib.research.dense import PEOPLE_SAY
from engines.dense import SIZES, SMALLEST, DenseHead
from engines.files import whole_file
from engines.head import head_path, load_head
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier
from engines.options import Option

ASSETS = Path(__file__).parent / "assets"
CHUNK = 100
"""Photos whose rows are in one file."""
MOST_ROWS = {"corrections": 8, "expected": 16}
"""Of one photo, drawn by lot."""
PENALTIES = {
    **{f"sides{place}": CELL_PENALTY for place in range(SIZES)},
    "objectness": CELL_PENALTY,
    "corrections": CORRECTION_PENALTY,
    "expected": IOU_PENALTY,
}
"""Of the regressions of a head with one correction, by their names."""
TUNED_ON = ("boat", "car", "cat", "cow", "dog", "person")
"""Drawn by lot of the classes with the most photos. Choices were made on their photos of train."""
BOXES, DRAWS = (10,), 5
USUAL = 10
TRAIN_PHOTOS, VAL_PHOTOS = 32, 40
"""Of each class, at most, drawn by lot: to draw from, and to measure on."""
NAME_FACTOR = 15.5
"""From scores of names to logits, as the fit of the shipped head found it."""
LEFT = 1e-3
"""The regressions without a class are solved to such a share of their right side."""


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    work: Annotated[Path, Option("Folder for maps, sums and heads (7 GB); goes on where it was.")],
    out: Annotated[str, Option("The page to write, FILE.md.")] = "",
) -> None:
    """Fit and measure, and print the page."""
    console = Console(stderr=True)
    work.mkdir(parents=True, exist_ok=True)
    study = Study(data, work, console)
    study.write_rows()
    for kind in PENALTIES:
        study.solve(kind)
    left_out = {name: study.left_out(name) for name in track(study.voc.names, console=console)}
    shipped = {name: study.of_shipped(name, *parts) for name, parts in further_sets(data).items()}
    page = rendered(left_out, shipped)
    print(page)
    if out:
        with whole_file(Path(out)) as part:
            part.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Voc:
    """The photos of VOC 2007 trainval.

    Attributes:
        table: their scenes.
        names: of the classes.
        holds: which classes each photo holds, difficult objects too, bool ``[N, C]``.
        is_train: which photos are of its train part, bool ``[N]``.
        held: those of the train part that no head is fitted on, bool ``[N]``.
    """

    table: SceneTable
    names: tuple[str, ...]
    holds: NDArray[np.bool_]
    is_train: NDArray[np.bool_]
    held: NDArray[np.bool_]

    def photos(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Photos of a class, in which nothing else is but difficult objects: of train, and those
        with one object of val.
        """
        classes, rng = self.table.classes, np.random.default_rng(place)
        only = np.array([len(each) > 0 and bool((each == place).all()) for each in classes])
        single = np.array([len(each) == 1 for each in classes])
        train = rng.permutation(np.flatnonzero(only & self.is_train))[:TRAIN_PHOTOS]
        return train, rng.permutation(np.flatnonzero(only & single & ~self.is_train))[:VAL_PHOTOS]


class Study:
    """The steps, each of which leaves its files in the work folder.

    Args:
        data: folder of the data sets.
        work: the work folder.
        console: for progress.
    """

    def __init__(self, data: Path, work: Path, console: Console) -> None:
        self._work, self._console = work, console
        shipped = load_head(head_path("lite0_dense"))
        assert isinstance(shipped, DenseHead)
        self._shipped = shipped
        self._trust, self._certainty = shipped.trust, shipped.certainty
        self._reader = Reader.of(shipped)
        layers = Layers.of(shipped, Names.of((), shipped.naming))
        if layers.first is not None:
            layers = replace(layers, corrections=layers.first, first=None)
        self._reference = layers
        self.voc = voc_2007(data, work, shipped.levels, console)

    def write_rows(self) -> None:
        """Write the rows of the regressions, ``CHUNK`` photos a file.

        Which boxes a row is of, and what it is to give, is told by the shipped head's layers: the
        IoU of a box that they corrected, say. The regressions do not know them.
        """
        names = Names(self.voc.names, np.ones(len(self.voc.names) + 1, np.bool_))
        used = np.flatnonzero(self.voc.is_train & ~self.voc.held)
        for start in track(range(0, len(used), CHUNK), "rows", console=self._console):
            path = self._work / f"rows-{start}.npz"
            if path.exists():
                continue
            found: dict[str, list[Any]] = {}
            for row in used[start : start + CHUNK].tolist():
                (scene,) = self.voc.table.scenes(np.array([row]), mirrored=False)
                for kind, parts in self._rows(scene, names, np.random.default_rng(row)).items():
                    for x, y, w in parts:
                        found.setdefault(f"{kind} x", []).append(x.astype(np.float16))
                        found.setdefault(f"{kind} y", []).append(y)
                        found.setdefault(f"{kind} w", []).append(w)
                        found.setdefault(f"{kind} photo", []).append(np.full(len(x), row))
            arrays: dict[str, Any] = {name: np.concatenate(each) for name, each in found.items()}
            with whole_file(path) as part, part.open("wb") as file:
                np.savez(file, **arrays)

    def _rows(
        self, scene: Scene, names: Names, rng: np.random.Generator
    ) -> Mapping[str, Sequence[Part]]:
        reader, layers = self._reader, self._reference
        return {
            **{f"sides{place}": [part] for place, part in enumerate(side_rows(scene, reader))},
            "objectness": list(objectness_rows(scene, reader, layers, rng)),
            "corrections": list(correction_rows(scene, reader, layers, rng)),
            "expected": list(expected_rows(scene, reader, layers, names, rng)),
        }

    def solve(self, kind: str) -> None:
        """Solve a regression once for each class that is left out.

        Conjugate gradients (Hestenes & Stiefel 1952) begin at the solution with all classes, whose
        factorization they go on using: a class takes a few steps.
        """
        path = self._work / f"head-{kind}.pkl"
        if path.exists():
            return
        from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]

        x, y, photos = self._read(kind)
        penalty, width = PENALTIES[kind], x[0].shape[1]
        gram, moment = np.zeros((width, width), np.float32), np.zeros((width, y[0].shape[1]))
        for features, targets in zip(x, y, strict=True):
            gram += features.T @ features
            moment += features.T @ targets
        total = gram[-1, -1]
        scale = np.sqrt(np.diag(gram) / total) + np.float32(1e-6)
        system = gram / total / scale[:, None] / scale
        free = np.arange(width - 1)  # the constant's weight is not held back
        system[free, free] += penalty
        factor = cho_factor(system, check_finite=False)
        found: dict[str, tuple[Array64, Array64]] = {}
        for place, name in track(
            enumerate(self.voc.names), kind, total=len(self.voc.names), console=self._console
        ):
            drop = self.voc.holds[:, place]
            gone = np.concatenate([a[drop[p]] for a, p in zip(x, photos, strict=True)])
            of_gone = np.concatenate([a[drop[p]] for a, p in zip(y, photos, strict=True)])
            left = moment - gone.T @ of_gone
            less = penalty * (gone[:, -1] ** 2).sum() / total
            gone = gone / scale

            def product(v: Any, gone: Any = gone, less: Any = less) -> Any:
                result = system @ v - gone.T @ (gone @ v) / total
                result[:-1] -= np.float32(less) * v[:-1]
                return result

            right = (left / total / scale[:, None]).astype(np.float32)
            weights = conjugate_gradients(
                product, lambda v: cho_solve(factor, v, check_finite=False), right
            )
            found[name] = (weights / scale[:, None]).astype(np.float64), left
        with whole_file(path) as part, part.open("wb") as file:
            pickle.dump(found, file)

    def _read(self, kind: str) -> tuple[list[Any], list[Any], list[Any]]:
        """Weighted features and targets of a regression, and the photo of each row, by file."""
        features, targets, photos = list[Any](), list[Any](), list[Any]()
        rng = np.random.default_rng(0)
        paths = self._work.glob("rows-*.npz")
        for path in sorted(paths, key=lambda each: int(each.stem.removeprefix("rows-"))):
            rows = np.load(path)
            photo, weights = rows[f"{kind} photo"], rows[f"{kind} w"]
            kept = np.arange(len(photo))
            if most := MOST_ROWS.get(kind):
                kept = np.sort(
                    np.concatenate(
                        [
                            rng.permutation(np.flatnonzero(photo == each))[:most]
                            for each in np.unique(photo)
                        ]
                    )
                )
                counts = np.bincount(photo)[photo[kept]]
                weights = weights[kept] * counts / np.minimum(counts, most)
            root = np.sqrt(weights).astype(np.float32)[:, None]
            features.append(rows[f"{kind} x"][kept].astype(np.float32) * root)
            targets.append(rows[f"{kind} y"][kept].astype(np.float32) * root)
            photos.append(photo[kept])
        return features, targets, photos

    def layers_without(self, place: int) -> Layers:
        """The layers of a head that was fitted without a class; its names have logits."""
        name = self.voc.names[place]
        stored = {
            kind: pickle.loads((self._work / f"head-{kind}.pkl").read_bytes())[name]
            for kind in PENALTIES
        }
        weights = {kind: each[0] for kind, each in stored.items()}
        others = [1 + k for k in range(len(self.voc.names) + 1) if k != place]
        moment = stored["expected"][1][:, others]
        means = (moment / moment[-1]).T
        sides = np.concatenate([weights[f"sides{k}"] for k in range(SIZES)], axis=1)
        expected = weights["expected"]
        said = NAME_FACTOR * expected[:, others]
        said = np.insert(said, len(others) - 1, 0, axis=1)
        return Layers(
            sides, weights["objectness"], weights["corrections"], expected[:, :1], said, means
        )

    def left_out(self, name: str) -> dict[str, Any]:
        """What fits to few boxes of a class give to a head that was fitted without it: ``photos``,
        and ``corloc``, ``mean_iou`` and ``named`` of them ``before``, and ``after`` a fit to so
        many boxes, for each draw.
        """
        place = self.voc.names.index(name)
        known = [each for each in self.voc.names if each != name]
        learned = np.arange(len(known) + 2) == len(known)
        names = Names((*known, name), learned)
        parts = self.voc.photos(place)
        return self._kept(
            name, lambda: self._fits(self.voc.table, *parts, self.layers_without(place), names)
        )

    def of_shipped(
        self, name: str, train: Sequence[Sample], test: Sequence[Sample]
    ) -> dict[str, Any]:
        """The same of the shipped head, for a class that it does not know."""

        def found() -> dict[str, Any]:
            folder = self._work / name
            folder.mkdir(exist_ok=True)
            classifier = load_classifier("lite0", None, 320, GivenInput(resize="letterbox"))
            samples = {MAIN: [*train, *test]}
            levels = self._shipped.levels
            table = SceneTable.of(samples, (), classifier, levels, folder, self._console)
            names, places = Names.of([name], self._shipped.naming), np.arange(len(table))
            parts = places[: len(train)], places[len(train) :]
            return self._fits(table, *parts, Layers.of(self._shipped, names), names)

        return self._kept(name, found)

    def _kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in the work folder, or is computed and put there."""
        path = self._work / f"fits-{name}.json"
        if not path.exists():
            found = compute()
            with whole_file(path) as part:
                part.write_text(json.dumps(found), encoding="utf-8")
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read

    def _fits(
        self,
        table: SceneTable,
        train: NDArray[np.int64],
        test: NDArray[np.int64],
        start: Layers,
        names: Names,
    ) -> dict[str, Any]:
        """See ``left_out``."""
        new = len(names.names) - 1
        drawn = [self._looks(table, row, start, new, True) for row in train.tolist()]
        measured = [self._looks(table, row, start, new, False)[0] for row in test.tolist()]
        sure = Sureness(
            names,
            self._trust,
            self._certainty,
            self._reader.size_px,
            SMALLEST * self._reader.stride_px,
        )
        answers = [start.answer_of(self._reader, look) for look in measured]
        return {
            "photos": len(test),
            "before": first_boxes(answers, replace(sure, names=names.before)),
            "after": {
                str(count): [
                    self._fit(draw, count, drawn, measured, start, names, sure)
                    for draw in range(DRAWS)
                ]
                for count in BOXES
            },
        }

    def _looks(
        self, table: SceneTable, row: int, start: Layers, new: int, mirrored: bool
    ) -> list[Look]:
        scenes = table.scenes(np.array([row]), mirrored)
        looks = [start.look(self._reader, scene) for scene in scenes]
        called = np.full(len(table.boxes_px[row]), new)
        return [replace(look, scene=replace(look.scene, maps=(), classes=called)) for look in looks]

    def _fit(
        self,
        draw: int,
        count: int,
        drawn: Sequence[Sequence[Look]],
        measured: Sequence[Look],
        start: Layers,
        names: Names,
        sure: Sureness,
    ) -> dict[str, Any]:
        """A fit to photos that hold so many boxes, and what it gives."""
        some, boxes = list[Sequence[Look]](), 0
        for place in np.random.default_rng(draw).permutation(len(drawn)).tolist():
            if boxes >= count:
                break
            some.append(drawn[place])
            boxes += len(drawn[place][0].scene.boxes_px)
        fold = np.random.default_rng(0).permutation(len(some)) % FOLDS
        fitted = fit_few(some, fold, self._reader, names, start)
        sure = replace(sure, names=names.sharpened(fitted.found))
        answers = [fitted.layers.answer_of(self._reader, look) for look in measured]
        return {
            "boxes": boxes,
            "photos": len(some),
            **first_boxes(answers, sure),
        }


def first_boxes(answers: Sequence[Answer], sure: Sureness) -> dict[str, float]:
    """``corloc`` and ``mean_iou`` of the first box of images with one object, and the share
    ``named`` of the right ones that is called by the last of the names.
    """
    first = [int(sure(each).argmax()) for each in answers]
    ious = np.array([each.overlaps[place] for each, place in zip(answers, first, strict=True)])
    best = [
        int(sure.names.logits(each.scores[place])[:-1].argmax())
        for each, place in zip(answers, first, strict=True)
    ]
    right = ious > CORLOC_IOU
    called = np.array(best) == len(sure.names.names) - 1
    return {
        "corloc": float(right.mean()),
        "mean_iou": float(ious.mean()),
        "named": float(called[right].mean()) if right.any() else 0.0,
    }


def conjugate_gradients(product: Any, precondition: Any, right: Any) -> Any:
    """The solution of a symmetric system with several right sides ``[D, T]``."""
    found = precondition(right)
    left = right - product(found)
    direction = precondition(left)
    size = (left * direction).sum(axis=0)
    for _ in range(100):
        if (np.linalg.norm(left, axis=0) <= LEFT * np.linalg.norm(right, axis=0)).all():
            break
        moved = product(direction)
        step = size / np.maximum((direction * moved).sum(axis=0), 1e-30)
        found, left = found + step * direction, left - step * moved
        steepest = precondition(left)
        now = (left * steepest).sum(axis=0)
        direction, size = steepest + now / np.maximum(size, 1e-30) * direction, now
    return found


def voc_2007(data: Path, work: Path, levels: Any, console: Console) -> Voc:
    """The photos of VOC 2007 trainval with their maps, which are computed once."""
    labels = data / "voc2007" / "trainval.csv"
    samples = [_spoken(sample) for sample in load_dataset(labels)]
    with labels.open(encoding="utf-8") as file:
        split = {row["file"]: row["split"] for row in csv.DictReader(file)}
    every = [{each.class_name for each in (*s.truths, *s.ignored)} for s in samples]
    names = tuple(sorted(set.union(*every)))
    path = work / "table.pkl"
    if not path.exists():
        classifier = load_classifier("lite0", None, 320, GivenInput(resize="letterbox"))
        made = SceneTable.of({MAIN: samples}, names, classifier, levels, work, console)
        with whole_file(path) as part, part.open("wb") as file:
            pickle.dump(replace(made, maps=[]), file)
    table: SceneTable = pickle.loads(path.read_bytes())
    maps = [np.load(work / f"{place}.npy", mmap_mode="r") for place in range(len(levels))]
    is_train = np.array([split[sample.name] == "train" for sample in samples])
    return Voc(
        replace(table, maps=maps),
        names,
        np.array([[name in some for name in names] for some in every]),
        is_train,
        is_train & (np.random.default_rng(0).permutation(len(samples)) % FOLDS == 0),
    )


def further_sets(data: Path) -> dict[str, tuple[list[Sample], list[Sample]]]:
    """Photos or frames to draw from and to measure on, by class: raccoons, all of the training
    photos, and a bag in a video, which is drawn in the first half and measured in the second.
    """
    folder = data / "raccoon"
    files = folder / "annotations.tar", folder / "images.tar", folder / "train.txt"
    raccoons = [sample for sample in load_dataset(*files) if sample.single]
    order = np.random.default_rng(0).permutation(len(raccoons)).tolist()
    raccoons = [raccoons[place] for place in order]
    frames = load_dataset(data / "videos" / "bag_groundtruth.txt", data / "videos" / "bag.avi")
    half = len(frames) // 2
    return {
        "raccoon": (raccoons[:TRAIN_PHOTOS], raccoons[TRAIN_PHOTOS:]),
        "bag": (frames[:half:4], frames[half::4]),
    }


def _spoken(sample: Sample) -> Sample:
    """The sample with names that people say."""

    def said(truth: Truth) -> Truth:
        return replace(truth, class_name=PEOPLE_SAY.get(truth.class_name, truth.class_name))

    truths, ignored = (tuple(map(said, some)) for some in (sample.truths, sample.ignored))
    return replace(sample, truths=truths, ignored=ignored)


def rendered(left_out: Mapping[str, Any], shipped: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, no markup from users
    template = (ASSETS / "few_boxes.md").read_text(encoding="utf-8")
    others = {name: each for name, each in left_out.items() if name not in TUNED_ON}
    sums = {
        f"the {len(others)} other classes": summed(others),
        f"the {len(TUNED_ON)} classes": summed({name: left_out[name] for name in TUNED_ON}),
        **{name: summed({name: each}) for name, each in shipped.items()},
    }
    return environment.from_string(template).render(
        machine=machine(),
        boxes=BOXES,
        usual=USUAL,
        draws=DRAWS,
        tuned_on=TUNED_ON,
        sums=sums,
        classes={name: summed({name: each}) for name, each in left_out.items()},
    )


def summed(classes: Mapping[str, Any]) -> dict[Any, Any]:
    """The figures over all photos of some classes, in per cent: ``before``, and by the number of
    boxes ``median``, ``worst`` and ``best`` CorLoc of the draws, and their mean IoU. A draw is one
    of each class.
    """
    photos = np.array([each["photos"] for each in classes.values()], np.float64)

    def mean(figures: Sequence[Mapping[str, float]], key: str) -> float:
        return float(np.dot([each[key] for each in figures], photos) / photos.sum())

    before = [each["before"] for each in classes.values()]
    found: dict[Any, Any] = {
        "photos": int(photos.sum()),
        "before": 100 * mean(before, "corloc"),
        "iou_before": mean(before, "mean_iou"),
    }
    for count in BOXES:
        draws = [[each["after"][str(count)][k] for each in classes.values()] for k in range(DRAWS)]
        corlocs = [100 * mean(fits, "corloc") for fits in draws]
        found[count] = {
            "median": float(np.median(corlocs)),
            "worst": min(corlocs),
            "best": max(corlocs),
            "iou": float(np.median([mean(fits, "mean_iou") for fits in draws])),
            "named": float(np.median([100 * mean(fits, "named") for fits in draws])),
        }
    return found


if __name__ == "__main__":
    run(main)
