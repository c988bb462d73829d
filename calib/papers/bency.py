"""The tables of Bency et al.: classification, localization and detection on VOC 2007 and COCO.

``sightline reproduce beam-voc`` and ``beam-coco``. Pooled maps, heat maps and trained layers are
kept on disk, so that a run that was stopped goes on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.evaluation.metrics import (
    CORLOC_IOU,
    DETECTION_IOU,
    Predicted,
    Truths,
    best_iou,
    detection_ap,
    is_ignored,
    is_ignored_point,
    is_inside,
    localization_ap,
    mean_ap,
    peak_xy,
)
from calib.evaluation.report import Picture
from calib.heads.finetune import image_ap
from calib.papers.adaptation import Schedule, adapt, held_out, labels_of, save_adapted, store_of
from calib.papers.defaults import default_ap
from calib.papers.pooled import PooledStore
from calib.papers.reproduce import Figures, Findings, Request, percent
from calib.papers.scenes import EXAMPLES, MOST_SHOWN, photo_of
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE
from engines.downloads import cache_dir
from engines.errors import SourceError
from engines.files import whole_file
from engines.localizer import ImageBgr
from engines.networks.registry import Classifier, load_classifier
from engines.options import MOST_OBJECTS
from engines.resizing import resized
from engines.search.beam import FEATURES, Edges, summed
from engines.search.beam_published import (
    Crops,
    Grid,
    PublishedBeamSettings,
    Reading,
    Tree,
    build_maps_graph,
    build_stretched_graph,
    detections,
    searched,
)
from engines.search.crops import ENLARGED, cropped

SHORT = Schedule(hidden=256, batches=400, rate=0.01, drop_every=200, copies=1)
"""What is trained where no trained layers are given: minutes on a processor, not days on a GPU."""
SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(2, 10))
ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
BATCH = 32
READ_BOTH = 8
"""Images on which both readings of section 3 are tried: one search in crops is 73 passes."""
SIDE_OF_CROPS = 63
PAPER_LOCALIZATION = {
    **{"aeroplane": 90.1, "bicycle": 86.4, "bird": 86.4, "boat": 77.6, "bottle": 56.8},
    **{"bus": 90.3, "car": 68.3, "cat": 89.9, "chair": 54.7, "cow": 86.8, "diningtable": 66.4},
    **{"dog": 88.5, "horse": 89.0, "motorbike": 88.1, "person": 78.5, "pottedplant": 64.1},
    **{"sheep": 90.0, "sofa": 67.0, "train": 89.9, "tvmonitor": 82.6},
}
"""AP in percent of VGG-16, VOC 2012 validation, table 1."""
PAPER_VOC = {
    "classification": "86.5 (VOC 2012 val)",
    "in_context": "+1.2",
    "localization": "79.7 (VOC 2012 val)",
    "localization_by_class_score": "",
    "detection": "25.7 (VOC 2007 test)",
}
PAPER_COCO = {"classification": "54.1", "localization": "49.2"}
COCO_NAMES = {
    **{"aeroplane": "airplane", "motorbike": "motorcycle", "diningtable": "dining table"},
    **{"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"},
}
"""What COCO calls VOC's classes, where that differs."""
OVER_HALF = float(np.nextafter(DETECTION_IOU, 1))
"""Section 4.2: the IoU of a right box exceeds one half; VOC's own rule is at least one half."""
DEFAULT = "Sightline's default"
FAILURES = "failures: the heat's highest region lies in no object of the class"
Heats = NDArray[np.float32]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Searched:
    """What was found in the images of a set.

    Attributes:
        samples: the images.
        sizes_px: their (width, height).
        scores: the probabilities of K classes of each image, ``[N, K]``.
        heats: the heat map of each class, ``[N, K, L, L]``.
    """

    samples: tuple[Sample, ...]
    sizes_px: tuple[tuple[int, int], ...]
    scores: Scores
    heats: Heats

    def peak_px(self, row: int, index: int) -> tuple[float, float]:
        """The centre of the highest region of a class's heat in an image (section 4.2)."""
        x, y = peak_xy(self.heats[row, index])
        return x * self.sizes_px[row][0], y * self.sizes_px[row][1]


def voc(request: Request) -> Findings:
    """Tables 1 and 3: VOC 2007, trainval and test."""
    train, test = request.samples("trainval"), request.samples("test")
    classifier, note = with_layers(request, train)
    other = "The paper's tables 1 and 4 are of VOC 2012, which is not at hand."
    return _findings(request, classifier, train, test, PAPER_VOC, (note, other))


def coco(request: Request) -> Findings:
    """Table 2: COCO's validation images, or what is there of them."""
    test = request.samples("val")
    train: list[Sample] = []
    try:
        train = request.samples("trainval")
    except SourceError:
        request.say("no trainval images are there: thresholds are not chosen for each class")
    classifier, note = with_layers(request, train)
    return _findings(request, classifier, train, test, PAPER_COCO, (note,))


def with_layers(request: Request, train: Sequence[Sample]) -> tuple[Classifier, str]:
    """The network with layers for the classes, and how they came to be: those of the weights that
    were named, or trained here on nine training images of ten.

    Raises:
        SourceError: there is nothing to train on.
        ModelError: the network takes no layers of adaptation.
    """
    classifier = request.choice.classifier()
    if not classifier.network.classless:
        return classifier, "The layers behind the convolutions are those of the given weights."
    if not train:
        raise SourceError(
            "these weights have no classes, and there are no trainval images to train on: give"
            " weights with layers of adaptation, which 'finetune' writes",
            option=("weights", "class_layer", "data"),
        )
    names = [[sample.name, [t.class_name for t in sample.truths]] for sample in train]
    key = json.dumps([1, classifier.digest, classifier.size_px, repr(SHORT), names])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_dir() / "papers" / f"bency-{digest}.safetensors"
    if not path.exists():
        store = store_of(classifier, request.options.precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapted(adapt(train, SHORT, store, request.console), classifier, path)
    note = (
        f"Fa has {SHORT.hidden} units and reads the pooled maps, as fully connected layers were not"
        f" given; {SHORT.batches:,} batches of {SHORT.batch} in place of 400,000, a learning rate"
        f" of {SHORT.rate:g} that falls every {SHORT.drop_every}, on"
        f" {len(train) - len(train) // 10} images, without turned and noisy samples. The"
        " convolutions stay as they are."
    )
    return load_classifier(classifier.name, str(path), classifier.size_px), note


def _findings(
    request: Request,
    classifier: Classifier,
    train: Sequence[Sample],
    test: Sequence[Sample],
    paper: Mapping[str, str],
    notes: Sequence[str],
) -> Findings:
    classes = _names_in(classifier, test)
    searcher = Searcher.of(classifier, request)
    found = searcher.search(test, "the measured images", request)
    kept = [s for s, out in zip(train, held_out(len(train)), strict=True) if out]
    chosen = Choice({}, 0.5, 0.0, np.zeros((len(classes), len(classes))))
    if kept:
        held = searcher.search(kept, "the images for choosing", request)
        fitted = [s for s, out in zip(train, held_out(len(train)), strict=True) if not out]
        chosen = chosen_on(held, classes, fitted)
    numbers = measured(found, classes, chosen)
    both = searcher.both_readings(test, classes, request)
    default = default_ap(test, truths_of(test, classes), OVER_HALF, request)
    numbers |= {"readings": both, "images": len(test), "alpha": chosen.alpha, "default": default}
    protocol = (
        f"{len(test)} images, {len([c for c in classes if c])} classes; objects marked difficult"
        " are neither right nor wrong.",
        f"Every class is searched for in every image: M {_SETTINGS.beam}, H {_SETTINGS.levels}, on"
        " sub-grids of the image's own pooled maps (section 3.4, equation 6).",
        "Localization: the centre of the heat map's highest region, right if it lies in a box of"
        " its class; ranked by the heat's maximum (section 4.2), and by the class's score of the"
        " image (caption of table 1).",
        "Detection: IoU over 0.5. "
        + (
            f"On every tenth training image ({len(kept)}) were chosen: the threshold of each class"
            f" ({_spread(chosen)}) and alpha ({chosen.alpha:g})."
            if kept
            else f"Nothing was chosen: thresholds are {chosen.usual:g}, and alpha is 0."
        ),
        f"{DEFAULT}: up to {MOST_OBJECTS} boxes of an image, ranked by the confidence times the"
        " probability of the name; a box without a sure name is of no class; the point is the"
        " centre of the best box of a class.",
    )
    return Findings(
        (
            _summary(numbers, paper),
            _by_class(numbers, PAPER_LOCALIZATION if paper is PAPER_VOC else {}),
            _readings(both),
        ),
        protocol,
        tuple(notes),
        pictures_of(found, classes, chosen),
        numbers,
    )


_SETTINGS = PublishedBeamSettings()


def _names_in(classifier: Classifier, samples: Sequence[Sample]) -> tuple[str, ...]:
    """What a set calls each class of the network; empty where it has none such."""
    wanted = {truth.class_name for sample in samples for truth in sample.truths}
    names = (COCO_NAMES.get(n, n) if n not in wanted else n for n in classifier.class_names)
    return tuple(name if name in wanted else "" for name in names)


class Searcher:
    """Searches images for all classes at once.

    Args:
        classifier: the network with its classes.
        store: the pooled maps.
        precision: of the engines.
    """

    def __init__(self, classifier: Classifier, store: PooledStore, precision: str) -> None:
        self._classifier, self._store, self._precision = classifier, store, precision
        self._tail = OpenVinoEngine(build_stretched_graph(classifier, None, BATCH), precision)
        key = json.dumps([1, classifier.digest, classifier.size_px, _SETTINGS.digest, precision])
        digest = hashlib.sha256(key.encode()).hexdigest()[:24]
        self._folder = cache_dir() / "papers" / f"heat-{digest}"

    @classmethod
    def of(cls, classifier: Classifier, request: Request) -> "Searcher":
        """With the pooled maps in the user's cache."""
        layer = str(classifier.network.pooled_layer)
        store = PooledStore.of(classifier, layer, request.options.precision)
        return cls(classifier, store, request.options.precision)

    def search(self, samples: Sequence[Sample], title: str, request: Request) -> Searched:
        """The scores and heat maps of a set's images."""
        self._store.fill([sample.read for sample in samples], title, request.console)
        sizes_px, scores, heats = [], [], []
        for sample in track(samples, f"searching {title}", console=request.console):
            image = sample.read()
            sizes_px.append(size_of(image))
            path = self._folder / f"{self._store.path(image).stem}.npz"
            if not path.exists():
                found, heat = self._searched(np.load(self._store.path(image)))
                with whole_file(path) as part, part.open("wb") as file:
                    np.savez(file, scores=found, heats=heat)
            with np.load(path) as stored:
                scores.append(stored["scores"])
                heats.append(stored["heats"])
        return Searched(tuple(samples), tuple(sizes_px), np.array(scores), np.array(heats))

    def _searched(self, maps: NDArray[np.float16]) -> tuple[Heats, Heats]:
        """(the scores of an image, its heat maps)."""
        side = maps.shape[-1]
        scores = self.classify(maps[None].astype(np.float32))[0]
        tree = Grid(maps, self.classify)
        tree.score_all()
        heats = [self._heat(tree, index, side) for index in range(len(scores))]
        return scores, np.array(heats, np.float32)

    def _heat(self, tree: Tree, index: int, side: int) -> NDArray[np.float64]:
        return summed(searched(tree, index, _SETTINGS.beam, _SETTINGS.levels), side)

    def classify(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probabilities of stretched sub-grids."""
        parts = []
        for start in range(0, len(maps), BATCH):
            some = maps[start : start + BATCH]
            padded = np.concatenate([some, np.repeat(some[-1:], BATCH - len(some), axis=0)])
            parts.append(self._tail.infer({FEATURES: padded})["scores"][: len(some)])
        return np.concatenate(parts)

    def both_readings(
        self, samples: Sequence[Sample], classes: Sequence[str], request: Request
    ) -> dict[str, Any]:
        """Of a few images and the classes in them: how often the peak lies in an object, and the
        best box has an IoU over 0.5 with one, in each of the two readings of section 3.
        """
        rng = np.random.default_rng(0)
        rows = sorted(rng.choice(len(samples), min(READ_BOTH, len(samples)), replace=False))
        graph = build_maps_graph(self._classifier, None, _SETTINGS.beam)
        convolutions = OpenVinoEngine(graph, self._precision)
        right = {reading: list[tuple[bool, bool]]() for reading in Reading}
        for row in track(rows, "both readings", console=request.console):
            sample = samples[int(row)]
            image, names = sample.read(), {truth.class_name for truth in sample.truths}
            maps = np.load(self._store.path(image)).astype(np.float32)
            large = resized(image, ENLARGED * self._classifier.size_px)
            crops = Crops(partial(_maps_of, convolutions, large), self.classify)
            grid = Grid(maps, self.classify)
            for name in sorted(names & set(classes)):
                index = classes.index(name)
                heat = self._heat(grid, index, maps.shape[-1])
                right[Reading.GRID].append(_right(heat, sample, image, name))
                path = self._folder / f"{self._store.path(image).stem}-{index}-crops.npy"
                if not path.exists():
                    with whole_file(path) as part, part.open("wb") as file:
                        np.save(file, self._heat(crops, index, SIDE_OF_CROPS))
                right[Reading.CROPS].append(_right(np.load(path), sample, image, name))
        return {
            "images": len(rows),
            "cases": len(right[Reading.GRID]),
            **{
                str(reading): {"peak": _share(peaks), "box": _share(found)}
                for reading, of in right.items()
                for peaks, found in [zip(*of, strict=True) if of else ((), ())]
            },
        }


def _share(right: Sequence[bool]) -> float:
    return float(np.mean(right)) if right else 0.0


def _right(
    heat: NDArray[np.float64], sample: Sample, image: ImageBgr, name: str
) -> tuple[bool, bool]:
    """(whether the peak lies in an object of a class, whether the best box has an IoU over 0.5 with
    one).
    """
    boxes = [truth.box_xyxy_px for truth in sample.truths if truth.class_name == name]
    width, height = size_of(image)
    x, y = peak_xy(heat.astype(np.float32))
    peak = (x * width, y * height)
    best = np.array(detections(heat, 0, _SETTINGS.threshold)[0].box_xyxy)
    found = tuple((best * [width, height, width, height]).tolist())
    return any(is_inside(peak, box) for box in boxes), best_iou(found, boxes) > CORLOC_IOU


def _maps_of(
    convolutions: OpenVinoEngine, image: ImageBgr, boxes: Sequence[Edges]
) -> NDArray[np.float32]:
    """The pooled maps of what lies in boxes of an image."""
    batch, side = convolutions.inputs[0].shape[:2]
    crops = [resized(cropped(image, np.array(box)), side) for box in boxes]
    crops += [crops[-1]] * (batch - len(crops))
    found = convolutions.infer({IMAGE: np.stack(crops)})[FEATURES]
    return np.asarray(found[: len(boxes)], np.float32)


@dataclass(frozen=True)
class Choice:
    """What is chosen on images that were set aside.

    Attributes:
        thresholds: of each class, as shares of the heat map's maximum.
        usual: of the other classes.
        alpha: equation 2's.
        pairs: ``[K, K]``, p(i | j) in row j (equation 4).
    """

    thresholds: Mapping[str, float]
    usual: float
    alpha: float
    pairs: Scores


def chosen_on(held: Searched, classes: Sequence[str], fitted: Sequence[Sample]) -> Choice:
    """Thresholds by detection AP, alpha by classification mAP (sections 3.2 and 3.4)."""
    labels = labels_of(held.samples, classes)
    pairs = pair_probabilities(labels_of(fitted, classes))
    alpha = max(
        ALPHAS, key=lambda a: mean_ap(image_ap(in_context(held.scores, pairs, a), labels, classes))
    )
    by_share = {share: detection_of(held, classes, {}, share) for share in SHARES}
    usual = max(SHARES, key=lambda share: mean_ap(by_share[share]))
    thresholds = {
        name: max(SHARES, key=lambda share: (by_share[share][name], -abs(share - usual)))
        for name in by_share[usual]
    }
    return Choice(thresholds, usual, alpha, pairs)


def pair_probabilities(labels: Scores) -> Scores:
    """Equation 4: of training images ``[N, K]``, p(i | j) = |i and j| / |j| in row j, and 0 for
    i = j.
    """
    together = labels.T @ labels
    found = together / np.maximum(np.diag(together), 1)[:, None]
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def in_context(scores: Scores, pairs: Scores, alpha: float) -> Scores:
    """Equations 2 and 3: ``[N, K]``, s_i + alpha * the sum over the other classes j of p(i | j)
    s_j.
    """
    return np.asarray(scores + alpha * scores @ pairs)


def truths_of(samples: Sequence[Sample], classes: Sequence[str]) -> Truths:
    """The true boxes by class and image, of the classes that are known and there."""
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for sample in samples:
        for truth in sample.truths:
            if truth.class_name in classes:
                found.setdefault(truth.class_name, {}).setdefault(sample.name, []).append(
                    truth.box_xyxy_px
                )
    return found


def localization_of(found: Searched, classes: Sequence[str], by_score: bool) -> dict[str, float]:
    """The AP of the heat maps' peaks by class (section 4.2), ranked by the heat's maximum or by the
    class's score of the image.
    """
    points = []
    for row, sample in enumerate(found.samples):
        for index, name in enumerate(classes):
            point = found.peak_px(row, index)
            if name and not is_ignored_point(point, sample):
                score = (found.scores if by_score else found.heats.max(axis=(2, 3)))[row, index]
                points.append(Predicted(sample.name, name, float(score), point))
    return localization_ap(points, truths_of(found.samples, classes))


def detection_of(
    found: Searched, classes: Sequence[str], thresholds: Mapping[str, float], usual: float
) -> dict[str, float]:
    """The AP of the rectangles by class (section 4.2)."""
    boxes = []
    for row, sample in enumerate(found.samples):
        size = np.array([*found.sizes_px[row]] * 2, np.float64)
        for index, name in enumerate(classes):
            if not name:
                continue
            heat = found.heats[row, index].astype(np.float64)
            for each in detections(heat, index, thresholds.get(name, usual)):
                box = tuple((size * each.box_xyxy).tolist())
                if not is_ignored(box, sample):
                    boxes.append(Predicted(sample.name, name, each.score, box))
    return detection_ap(boxes, truths_of(found.samples, classes), OVER_HALF)


def measured(found: Searched, classes: Sequence[str], chosen: Choice) -> dict[str, Any]:
    """The APs of tables 1 to 3, by what is measured and then by class, with their means."""
    labels = labels_of(found.samples, classes)
    context = replace(found, scores=in_context(found.scores, chosen.pairs, chosen.alpha))
    known = [name for name in classes if name]
    aps = {
        "classification": image_ap(found.scores, labels, classes),
        "in_context": image_ap(context.scores, labels, classes),
        "localization": localization_of(found, classes, by_score=False),
        "localization_by_class_score": localization_of(found, classes, by_score=True),
        "localization_in_context": localization_of(context, classes, by_score=True),
        "detection": detection_of(found, classes, chosen.thresholds, chosen.usual),
    }
    aps = {kind: {n: ap for n, ap in each.items() if n in known} for kind, each in aps.items()}
    return {"ap": aps, "map": {kind: mean_ap(each) for kind, each in aps.items()}}


WORDS = {
    "classification": "classification",
    "in_context": "classification, scores in context (equation 2)",
    "localization": "localization, ranked by heat",
    "localization_by_class_score": "localization, ranked by the image's score",
    "localization_in_context": "localization, ranked by the score in context",
    "detection": "detection",
}


def pictures_of(
    found: Searched, classes: Sequence[str], chosen: Choice
) -> dict[str, tuple[Picture, ...]]:
    """Photos beside the heat map of a class, with its true boxes in green and the found ones in
    red: for each class the first ``EXAMPLES`` that have it, and the failures with the most heat.
    """
    groups: dict[str, list[tuple[int, int]]] = {name: [] for name in sorted(classes) if name}
    failures: list[tuple[int, int]] = []
    for row, sample in enumerate(found.samples):
        for index, name in enumerate(classes):
            boxes = [each.box_xyxy_px for each in sample.truths if each.class_name == name]
            if not boxes:
                continue
            if len(groups[name]) < EXAMPLES:
                groups[name].append((row, index))
            if not any(is_inside(found.peak_px(row, index), box) for box in boxes):
                failures.append((row, index))
    failures.sort(key=lambda each: -found.heats[each].max())
    groups[FAILURES] = failures[:MOST_SHOWN]

    def picture(row: int, index: int) -> Picture:
        sample, name = found.samples[row], classes[index]
        size = np.tile(found.sizes_px[row], 2)
        true = [each.box_xyxy_px / size for each in sample.truths if each.class_name == name]
        heat = found.heats[row, index].astype(np.float64)
        best = detections(heat, index, chosen.thresholds.get(name, chosen.usual))
        file = f"{name}_{row}.jpg".replace(" ", "_")
        boxes = np.array([each.box_xyxy for each in best])
        return photo_of(sample.read(), np.array(true), boxes, file, heat)

    return {name: tuple(picture(*each) for each in some) for name, some in groups.items() if some}


def _summary(numbers: Mapping[str, Any], paper: Mapping[str, str]) -> Figures:
    default = numbers["default"]
    rows = tuple(
        (
            words,
            percent(numbers["map"][kind]),
            percent(default["map"][kind]) if kind in default["map"] else "",
            paper.get(kind, ""),
        )
        for kind, words in WORDS.items()
    )
    note = f"{DEFAULT} takes {default['ms_per_image']:.0f} ms an image here, besides reading it."
    headings = ("", "here", DEFAULT, "the paper, in percent")
    return Figures("Mean AP over classes", headings, rows, note)


def _by_class(numbers: Mapping[str, Any], paper: Mapping[str, float]) -> Figures:
    aps, default = numbers["ap"], numbers["default"]["ap"]["detection"]
    kinds = ("classification", "localization_by_class_score", "detection")
    rows = tuple(
        (
            name,
            *(percent(aps[kind][name]) if name in aps[kind] else "" for kind in kinds),
            percent(default[name]) if name in default else "",
            str(paper.get(name, "")),
        )
        for name in sorted(aps["classification"])
    )
    ours = (*(WORDS[kind] for kind in kinds), f"detection, {DEFAULT}")
    headings = ("", *ours, "its localization in the paper")
    return Figures("By class", headings, rows)


def _readings(both: Mapping[str, Any]) -> Figures:
    words = {
        Reading.GRID: "sub-grids of one image's maps (equation 6)",
        Reading.CROPS: "the image cut and run again (equation 5)",
    }
    rows = tuple(
        (words[r], percent(both[str(r)]["peak"]), percent(both[str(r)]["box"])) for r in words
    )
    return Figures(
        f"The two readings, on {both['cases']} classes of {both['images']} images",
        ("", "peak in an object of the class", "best box with IoU over 0.5"),
        rows,
    )


def _spread(chosen: Choice) -> str:
    values = sorted(chosen.thresholds.values()) or [chosen.usual]
    return f"{values[0]:g} to {values[-1]:g}"
