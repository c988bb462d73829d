"""Fits the model that scores crops for ``--method beam``:
``python -m calib.research.crops --data DATA --out FILE``.

Labelled photos show one object each. Two of them, side by side or one pasted into the other, make a
photo with two objects whose boxes are known. The fitted head reads crops of such pairs and of
single photos. In each crop it finds a right box (IoU over 0.5) or not. The model is a ridge
regression of that on the head's features (``engines.search.crops.CropScorer``).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample, load_dataset
from calib.research.command_line import run
from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou
from engines.choose import choose_head
from engines.errors import ModelError, SourceError
from engines.head import Head
from engines.networks.registry import load_classifier
from engines.options import EngineOptions, Option
from engines.resizing import resized
from engines.search.crops import (
    ENLARGED,
    CropScorer,
    CropsEngine,
    CropSettings,
    crop_cues,
    first_crops,
    widened,
)
from engines.text import Terminal

PAIRS = 500
SINGLES = 250
CROPS = 16
CHILDREN = 10
RIDGE = 1.0
SEAM_PX = 200
Rows = NDArray[np.float64]
Image = NDArray[np.uint8]
Labelled = tuple[Image, Rows]
"""An image and its K boxes in pixels, ``[K, 4]``."""


def crops(
    data: Annotated[
        Path, Option("Labels of photos with one object each: a CSV beside its images.")
    ],
    out: Annotated[Path, Option("The file to write (.safetensors).")],
    pairs_count: Annotated[int, Option("Pairs to put together.", names=("pairs",), min=1)] = PAIRS,
    singles_count: Annotated[
        int, Option("Photos to use as they are.", names=("singles",), min=1)
    ] = SINGLES,
) -> None:
    """Fit the crop scorer of the shipped network and head, and write it."""
    crop_scorer = fit_crop_scorer(
        [s for s in load_dataset(data) if s.single],
        pairs_count,
        singles_count,
        Terminal(stderr=True),
    )
    crop_scorer.save(out)


def fit_crop_scorer(
    samples: Sequence[Sample], pairs_count: int, singles_count: int, console: Console
) -> CropScorer:
    """Fit the crop scorer of the shipped network and head.

    Args:
        samples: photos with one object each.
        pairs_count: how many pairs to make of them.
        singles_count: how many of them to use as they are.
        console: for progress.

    Raises:
        SourceError: there are fewer than two photos.
    """
    if len(samples) < 2:
        raise SourceError("pairs are put together from at least two photos with one object each")
    rng, classifier = np.random.default_rng(5), load_classifier("compact")
    head = choose_head(EngineOptions("compact"), classifier)
    if not isinstance(head, Head):
        raise ModelError("a crop scorer belongs to a fitted head")
    blank = CropScorer(
        np.zeros(sum(f.width for f in head.features) + 11), 0.0, classifier.digest, head.digest
    )
    engine = CropsEngine(
        classifier, head, blank, CropSettings(), lambda graph: OpenVinoEngine(graph, "auto")
    )
    chosen = [samples[i] for i in rng.permutation(len(samples))[:singles_count]]
    shown = [
        *pairs(samples, pairs_count, rng),
        *((s.read(), np.array([s.truths[0].box_xyxy_px])) for s in chosen),
    ]
    values, right = list[Rows](), list[Rows]()
    for image, boxes_px in track(shown, "reading crops", console=console):
        for x, y in examples(engine, image, boxes_px, rng):
            values.append(x)
            right.append(y)
    return CropScorer(
        *ridge(np.concatenate(values), np.concatenate(right)), classifier.digest, head.digest
    )


def examples(
    engine: CropsEngine, image: Image, boxes_px: Rows, rng: np.random.Generator
) -> Iterator[tuple[Rows, Rows]]:
    """What the crop scorer reads of crops, and whether their boxes are right.

    Args:
        engine: reads crops.
        image: the photo.
        boxes_px: of its K objects, ``[K, 4]``.
        rng: chooses the crops.

    Yields:
        ``[N, D + 11]`` and ``[N]``, first of N first crops, and then of crops around their boxes.
    """
    height, width = image.shape[:2]
    truths = boxes_px / [width, height, width, height]
    square = resized(image, ENLARGED * engine.side_px)
    now = first_crops()[rng.permutation(len(first_crops()))[:CROPS]]
    for _ in range(2):
        read = engine.read(square, now)
        best = iou(read.boxes[:, None], truths[None]).max(axis=1)
        yield (
            np.concatenate([read.features, crop_cues(now, read)], axis=1),
            (best > 0.5).astype(np.float64),
        )
        now = widened(read.boxes, CropSettings().margin)[:CHILDREN]


def ridge(values: Rows, right: Rows) -> tuple[Rows, float]:
    """Ridge regression on standardized values.

    Args:
        values: ``[N, D]``.
        right: ``[N]``.

    Returns:
        The weight ``[D]`` and the bias, for values that are not standardized.
    """
    mean = values.mean(axis=0)
    scale = values.std(axis=0) + 1e-6
    z = (values - mean) / scale
    middle = float(right.mean())
    weight = (
        np.linalg.solve(z.T @ z + RIDGE * len(z) * np.eye(z.shape[1]), z.T @ (right - middle))
        / scale
    )
    return weight, middle - float(weight @ mean)


def pairs(samples: Sequence[Sample], count: int, rng: np.random.Generator) -> Iterator[Labelled]:
    """Make photos with two objects, mostly of one class, of photos with one object.

    They are side by side and pasted in turns.

    Args:
        samples: photos with one object each.
        count: the number of pairs.
        rng: chooses the photos.
    """
    by_class: dict[str, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.truths[0].class_name, []).append(sample)
    made = 0
    tried = 0
    while made < count and tried < 50 * count:
        tried += 1
        first = samples[int(rng.integers(len(samples)))]
        pool = by_class[first.truths[0].class_name] if rng.random() < 0.85 else samples
        second = pool[int(rng.integers(len(pool)))]
        if second is first:
            continue
        one, other = (
            (each.read(), np.array(each.truths[0].box_xyxy_px)) for each in (first, second)
        )
        pair = side_by_side(one, other, rng) if made % 2 == 0 else pasted(one, other, rng)
        if pair is not None:
            made += 1
            yield pair


def side_by_side(
    first: tuple[Image, Rows], second: tuple[Image, Rows], rng: np.random.Generator
) -> Labelled | None:
    """Put two objects with some of their surroundings beside or (one in four) below each other.

    Returns:
        The photo and both boxes; None where an object is very small.
    """
    axis = 0 if rng.random() < 0.25 else 1
    parts = []
    boxes = []
    for image, box in (first, second):
        height, width = image.shape[:2]
        margin = rng.uniform(0, 0.35, 4) * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
        x0, y0, x1, y1 = np.rint(np.clip(box + margin, 0, [width, height, width, height])).astype(
            int
        )
        if min(x1 - x0, y1 - y0) < 24:
            return None
        scale = SEAM_PX / (x1 - x0 if axis == 0 else y1 - y0)
        size = max(8, round((x1 - x0) * scale)), max(8, round((y1 - y0) * scale))
        parts.append(cv2.resize(image[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA))
        boxes.append((box - [x0, y0, x0, y0]) * scale)
    boxes[1] = boxes[1] + np.roll([0, parts[0].shape[axis]] * 2, axis)
    image = np.concatenate(parts, axis=axis)
    return (
        None
        if max(image.shape[:2]) > 2.6 * min(image.shape[:2])
        else (np.asarray(image, np.uint8), np.array(boxes))
    )


def pasted(
    first: tuple[Image, Rows], second: tuple[Image, Rows], rng: np.random.Generator
) -> Labelled | None:
    """Paste the second object into the photo of the first, about as large, with soft edges.

    Returns:
        The photo and both boxes; None where the second object hides much of the first.
    """
    image = first[0].copy()
    box = first[1]
    x0, y0, x1, y1 = np.clip(np.rint(second[1]), 0, None).astype(int)
    part = second[0][y0:y1, x0:x1]
    if min(part.shape[:2]) < 24:
        return None
    scale = np.sqrt(np.prod(box[2:] - box[:2]) / (part.shape[0] * part.shape[1])) * rng.uniform(
        0.7, 1.3
    )
    width, height = round(part.shape[1] * scale), round(part.shape[0] * scale)
    if width >= 0.8 * image.shape[1] or height >= 0.9 * image.shape[0] or min(width, height) < 20:
        return None
    x = int(rng.integers(image.shape[1] - width + 1))
    y = int(rng.integers(image.shape[0] - height + 1))
    there = np.array([x, y, x + width, y + height], np.float64)
    hidden = np.clip(np.minimum(there[2:], box[2:]) - np.maximum(there[:2], box[:2]), 0, None)
    if np.prod(hidden) > 0.3 * np.prod(box[2:] - box[:2]):
        return None
    across, down = ((2 * (np.arange(length) + 0.5) / length - 1) ** 4 for length in (width, height))
    opaque = np.clip((1 - np.maximum(across[None], down[:, None])) / 0.15, 0, 1)[..., None]
    under = image[y : y + height, x : x + width]
    resampled = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    under[:] = np.rint(opaque * resampled + (1 - opaque) * under)
    return image, np.array([box, there])


if __name__ == "__main__":
    run(crops)
