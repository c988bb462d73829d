"""Labelled images with their maps, how their boxes are scored, and pictures of them.

How many objects of an image count, and which, Ebrahimpour & Noelle do not say. So scores are given
by every reading of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.evaluation.metrics import CORLOC_IOU, WHOLE_IMAGE, constant_boxes
from calib.evaluation.report import PANEL_PX, Picture, outline
from calib.heads.linear import Array64
from calib.papers.maps import Images, MapStore
from calib.papers.reproduce import Request, percent
from engines.boxes import iou
from engines.localizer import ImageBgr
from realtime.annotate import PREDICTED_BGR, TRUTH_BGR, heat_map, jpeg_of

OBJECTS, CLASSES, IMAGES, SINGLE = PROTOCOLS = (
    "every object",
    "image and class",
    "image, any object",
    "images of one object",
)
MEAN = "mean over classes"
COLUMNS = (MEAN, "image and class, all", OBJECTS, IMAGES, SINGLE)
HOW = (
    "CorLoc: the share of cases whose box has an IoU over 0.5 with the true one (equation 5).",
    f"'{MEAN}': an image is a case of each class that it has, and right where its one box overlaps"
    " any object of that class; the shares of all classes are averaged. The paper does not say how"
    " it counts. The other columns are the same boxes, counted otherwise.",
    "Objects marked difficult neither count nor are learned from.",
)
MADE_SMALL = "The images are those that were given: where they were made smaller, maps are blurred."
GESTALT = (
    "Maps: the Gestalt Total of the last convolution (equation 3), differentiated by the pixels;"
    " absolute values, aggregated over the colours. Images are squashed to the network's square."
)
EXAMPLES = 3
Scores = dict[str, dict[str, float]]
"""CorLoc by protocol, and then by class, see ``scored``."""
MOST_SHOWN = 8
MOST_CLASSES = 20


@dataclass(frozen=True)
class Scenes:
    """Labelled images whose maps are stored.

    Attributes:
        samples: the images.
        images: their maps.
        boxes: of each image its true boxes that are not marked difficult, in fractions of width and
            height, ``[n, 4]``.
        names: the class of each box.
    """

    samples: tuple[Sample, ...]
    images: Images
    boxes: tuple[Array64, ...]
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls, samples: Sequence[Sample], store: MapStore, title: str, request: Request
    ) -> "Scenes":
        """Those of the images that have an object."""
        kept = tuple(sample for sample in samples if sample.truths)
        images = store.fill(kept, title, request.console)
        boxes, names = [], []
        for sample, size_px in zip(kept, images.sizes_px, strict=True):
            px = np.array([truth.box_xyxy_px for truth in sample.truths])
            boxes.append(np.clip(px / np.tile(np.array(size_px, np.float64), 2), 0, 1))
            names.append(tuple(truth.class_name for truth in sample.truths))
        return cls(kept, images, tuple(boxes), tuple(names))

    def take(self, rows: Sequence[int]) -> "Scenes":
        """Some of the images."""
        return Scenes(
            tuple(self.samples[row] for row in rows),
            self.images.take(rows),
            tuple(self.boxes[row] for row in rows),
            tuple(self.names[row] for row in rows),
        )

    @property
    def mean_boxes(self) -> Array64:
        """The mean of the boxes of each image, ``[N, 4]``."""
        return np.array([each.mean(axis=0) for each in self.boxes])

    @property
    def counts(self) -> Array64:
        """How many boxes each image has, ``[N]``."""
        return np.array([len(each) for each in self.boxes], np.float64)

    @property
    def of_largest(self) -> "Scenes":
        """The same with the largest object of each image alone."""
        largest = [
            int(np.argmax(np.prod(each[:, 2:] - each[:, :2], axis=1))) for each in self.boxes
        ]
        pairs = list(zip(largest, self.boxes, self.names, strict=True))
        return Scenes(
            self.samples,
            self.images,
            tuple(boxes[place][None] for place, boxes, _ in pairs),
            tuple((names[place],) for place, _, names in pairs),
        )

    @property
    def single(self) -> NDArray[np.int64]:
        """The rows of the images of one object, marked difficult or not."""
        return np.array(
            [row for row, s in enumerate(self.samples) if s.single and not s.ignored], np.int64
        )


def scored(found: Array64, scenes: Scenes) -> Scores:
    """CorLoc of one box an image, ``[N, 4]``, by class and by each of ``PROTOCOLS``.

    Returns:
        For each protocol the CorLoc of each class that has a case, of ``all`` cases, and the mean
        over classes.
    """
    right: dict[str, dict[str, list[bool]]] = {each: {"all": []} for each in PROTOCOLS}

    def count(protocol: str, name: str, is_right: bool) -> None:
        right[protocol].setdefault(name, []).append(is_right)
        right[protocol]["all"].append(is_right)

    alone = set(scenes.single.tolist())
    for row, (boxes, names) in enumerate(zip(scenes.boxes, scenes.names, strict=True)):
        hits = iou(found[row], boxes) > CORLOC_IOU
        for name, hit in zip(names, hits, strict=True):
            count(OBJECTS, name, bool(hit))
        for name in dict.fromkeys(names):
            count(CLASSES, name, any(h for h, n in zip(hits, names, strict=True) if n == name))
        right[IMAGES]["all"].append(bool(hits.any()))
        if row in alone:
            count(SINGLE, names[0], bool(hits[0]))
    result = {}
    for protocol, cases in right.items():
        shares = {name: float(np.mean(each)) if each else 0.0 for name, each in cases.items()}
        classes = [share for name, share in shares.items() if name != "all"]
        result[protocol] = {**shares, MEAN: float(np.mean(classes)) if classes else shares["all"]}
    return result


def columns(scores: Scores) -> tuple[str, ...]:
    """What stands in ``COLUMNS``."""
    shares = [scores[CLASSES][MEAN], scores[CLASSES]["all"]]
    shares += [scores[each]["all"] for each in (OBJECTS, IMAGES, SINGLE)]
    return tuple(percent(share) for share in shares)


def constants(training: Sequence[Array64]) -> dict[str, Array64]:
    """Boxes that need no image, by their names, from the true boxes of training images."""
    every = constant_boxes(np.concatenate(training))
    boxes = {
        "constant centre box of average size": every.centre_box,
        "mean box": every.mean_box,
        "best constant box": every.best_constant,
        "the whole image": WHOLE_IMAGE,
    }
    return {name: np.array(box) for name, box in boxes.items() if box is not None}


def constant_scores(training: Sequence[Array64], scenes: Scenes) -> dict[str, Scores]:
    """Their scores."""
    count = len(scenes.boxes)
    return {
        name: scored(np.tile(box, (count, 1)), scenes) for name, box in constants(training).items()
    }


def pictures_of(scenes: Scenes, found: Array64) -> dict[str, tuple[Picture, ...]]:
    """Photos beside their maps, with true boxes in green and the found one in red: for each class
    the first ``EXAMPLES``, as the papers' figures have them, and the largest failures.
    """
    overlaps = np.array(
        [iou(box, true).max() for box, true in zip(found, scenes.boxes, strict=True)]
    )
    groups: dict[str, list[int]] = {}
    for row, names in enumerate(scenes.names):
        if len(groups.setdefault(names[0], [])) < EXAMPLES:
            groups[names[0]].append(row)
    result = {name: groups[name] for name in sorted(groups)[:MOST_CLASSES]}
    result["failures"] = np.argsort(overlaps)[:MOST_SHOWN].tolist()
    return {
        name: tuple(_picture(scenes, row, found[row], f"{name}_{row}.jpg") for row in rows)
        for name, rows in result.items()
    }


def _picture(scenes: Scenes, row: int, box: Array64, name: str) -> Picture:
    side = scenes.images.store.classifier.size_px
    heat = scenes.images.maps("max", [row])[0].reshape(side, side)
    return photo_of(scenes.samples[row].read(), scenes.boxes[row], box[None], name, heat)


def photo_of(
    image: ImageBgr, true: Array64, found: Array64, name: str, heat: NDArray[Any] | None = None
) -> Picture:
    """A photo with true boxes in green and found ones in red; beside it its map, where given.

    Args:
        image: the photo.
        true: boxes in fractions of width and height, ``[n, 4]``.
        found: the same.
        name: of the picture's file.
        heat: the map, stretched over the photo.
    """
    width, height = size_of(image)
    scale = min(PANEL_PX[0] / width, PANEL_PX[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    photo = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    for boxes, colour in ((true, TRUTH_BGR), (found, PREDICTED_BGR)):
        for each in boxes:
            outline(photo, (each * np.tile(size, 2)).tolist(), colour)
    if heat is not None:
        photo = np.hstack([photo, heat_map(heat, *size)])
    return Picture(name, jpeg_of(photo, 85))
