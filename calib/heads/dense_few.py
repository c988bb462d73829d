"""Fits the box layer of a dense head to few images, and only as far as that helps.

The cells and the first corrections stay, so that the proposals do, and what the box layer reads of
them is computed once. Ridge regressions add to the corrections, to the expected IoU, and to names
of new classes. How far they may go is chosen by images that they were not fitted on, in turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calib.heads.dense_layers import (
    CORRECTED_AGAIN_IOU,
    CORRECTED_IOU,
    CORRECTION_AGAIN_PENALTY,
    CORRECTION_PENALTY,
    IOU_PENALTY,
    Layers,
    Look,
    edges_left,
    overlaps_and_names,
)
from calib.heads.dense_names import Answer, Names, Sureness, best_iou
from calib.heads.dense_scenes import Array32, Array64, Reader
from calib.heads.linear import FREE

FEW_OBJECTS = 30
"""With so many or fewer, the box layer alone is fitted."""
MOST_ROWS = 1500
"""Boxes that are fitted to, about; where there are more, they are drawn by lot."""
STRENGTHS = (1000.0, 300.0)
"""Factors of the penalties to choose from, besides no change at all. They and the rule were chosen
on photos of VOC 2007 train of six classes, see ``calib.research.few_boxes``: weaker penalties help
as much on average, and more often do harm.
"""
EVERY = -1
"""The image of rows that are never left out."""
NAME_STRENGTH = 100.0
"""The factor for names of new classes, which are always learned."""


@dataclass(frozen=True)
class FewFit:
    """What was fitted to few images.

    Attributes:
        layers: fitted to all of them.
        found: what layers say of images that they were not fitted on.
        started: what the layers that they started from say of the same images.
        strength: the factor of the penalties that was chosen; None where only names were added.
    """

    layers: Layers
    found: list[Answer]
    started: list[Answer]
    strength: float | None


def fit_few(
    looks: Sequence[Sequence[Look]],
    fold: NDArray[np.int64],
    reader: Reader,
    names: Names,
    start: Layers,
    sure: Sureness,
) -> FewFit:
    """Fit the box layer.

    Args:
        looks: what the layers to start from read of each of N images, and of its mirror image.
        fold: of each image, ``[N]``; images of one fold are left out together.
        reader: computes boxes.
        names: that boxes are given.
        start: the layers to start from.
        sure: tells which box of an image comes first.
    """
    fitting = _Fitting(looks, reader, names, start)
    started = [start.answer_of(reader, each[0]) for each in looks]
    answers: dict[float | None, list[Answer]] = {}
    for strength in (None, *STRENGTHS):
        answers[strength] = found = list(started)
        for number in np.unique(fold):
            layers = fitting.layers(fold != number, strength)
            for image in np.flatnonzero(fold == number).tolist():
                found[image] = layers.answer_of(reader, looks[image][0])
    best = chosen({each: first_ious(found, names, sure) for each, found in answers.items()})
    return FewFit(fitting.layers(fold >= 0, best), answers[best], started, best)


def chosen(ious: dict[float | None, Array64]) -> float | None:
    """The strength with the highest mean IoU of first boxes, or None where none is above that of
    no change.

    Args:
        ious: by strength, of images that were not fitted on.
    """
    means = {strength: float(each.mean()) if len(each) else 0.0 for strength, each in ious.items()}
    return max(means, key=lambda strength: (means[strength], strength is None))


def first_ious(answers: Sequence[Answer], names: Names, sure: Sureness) -> Array64:
    """The IoU of the first box of each image that holds an object with the nearest one."""
    sure = replace(sure, names=names.sharpened(answers))
    return np.array([each.overlaps[sure(each).argmax()] for each in answers if len(each.true)])


class _Fitting:
    """Two regressions on all images, of which parts can be solved."""

    def __init__(
        self, looks: Sequence[Sequence[Look]], reader: Reader, names: Names, start: Layers
    ) -> None:
        self._start, self._names = start, names
        count = sum(map(len, looks))
        most, rng = max(4, MOST_ROWS // count), np.random.default_rng(0)
        least = CORRECTED_IOU if start.first is None else CORRECTED_AGAIN_IOU
        self._before = np.zeros((len(start.expected), 1 + int(names.learned.sum())))
        self._before[:, :1] = start.expected
        corrections, expected = _Rows(), _Rows()
        for image, look in [(image, look) for image, some in enumerate(looks) for look in some]:
            true, features = look.scene.boxes_px, look.features
            drawn = np.sort(rng.permutation(len(features))[:most])
            if len(true):
                used, edges = edges_left(look.boxes, true, least, reader)
                kept = np.isin(used, drawn)
                x = features[used[kept]]
                weights = np.full(len(x), 1 / np.sqrt(max(1, len(x))))
                corrections.add(image, x, edges[kept] - x @ start.corrections, weights)
            moved = reader.moved(look.boxes, features @ start.corrections)
            known = look.scene.is_known(moved, best_iou(moved, true))[drawn]
            if known.any():
                some = drawn[known]
                targets, weights = overlaps_and_names(moved[some], look.scene, names)
                expected.add(
                    image, features[some], targets - features[some] @ self._before, weights
                )
        if len(start.means):  # classes that the head knows do not get the new name
            kept_means = start.means.astype(np.float32)
            nothing = np.zeros((len(kept_means), self._before.shape[1]))
            share = np.full(len(kept_means), count / len(kept_means))
            expected.add(EVERY, kept_means, nothing, share)
        self._corrections, self._expected = corrections, expected

    def layers(self, images: NDArray[np.bool_], strength: float | None) -> Layers:
        """The layers, fitted to some of the images; see ``FewFit.strength``."""
        start, names = self._start, self._names
        said = self._expected.solved(images, IOU_PENALTY * (strength or NAME_STRENGTH))
        changed = replace(start, names=start.names.copy(), means=self.means())
        changed.names[:, names.learned] = said[:, 1:]
        if strength is not None:
            penalty = CORRECTION_PENALTY if start.first is None else CORRECTION_AGAIN_PENALTY
            moved = self._corrections.solved(images, penalty * strength)
            changed.corrections = start.corrections + moved
            changed.expected = start.expected + said[:, :1]
        return changed

    def means(self) -> Array64:
        """Those of the head with those of the new names before the background's; see
        ``Layers.means``.
        """
        kept = self._start.means
        if not len(kept):
            return kept
        return np.concatenate([kept[:-1], self._expected.means()[1:], kept[-1:]])


class _Rows:
    """Rows of a ridge regression, each of an image, of which some can be left out.

    The weights come of a system of the size of the rows, as ``calib.heads.linear.Normal`` has it
    where they are few. Its products are computed once.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], Array32, Array32]] = []
        self._products: tuple[NDArray[np.int64], Array32, Array32, Array64, Array64] | None = None

    def add(self, image: int, features: Array32, targets: Array64, weights: Array64) -> None:
        """Add rows: features ``[L, D]``, the last of which is 1, targets ``[L, T]``, weights
        ``[L]``.
        """
        root = np.sqrt(weights).astype(np.float32)[:, None]
        images = np.full(len(features), image)
        self._parts.append((images, features * root, (targets * root).astype(np.float32)))

    def means(self) -> Array64:
        """The mean features of the images' rows, weighted by each target: ``[T, D]``."""
        parts = [(x, y) for images, x, y in self._parts if (images != EVERY).all()]
        x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
        moment = np.asarray(y.T @ x, np.float64)
        return moment / np.maximum(moment[:, -1:], FREE)

    def solved(self, images: NDArray[np.bool_], penalty: float) -> Array64:
        """The weights ``[D, T]``, fitted to the rows of some of the images."""
        if self._products is None:
            images_of, x, y = (np.concatenate(each) for each in zip(*self._parts, strict=True))
            if not len(x):  # no proposal is near an object: nothing is to be added
                return np.zeros((x.shape[1], y.shape[1]))
            total = float((x[:, -1] ** 2).sum())
            squares = (x.astype(np.float64) ** 2).sum(axis=0)
            spread = 1 / (np.sqrt(squares / total) + 1e-6) ** 2
            spread[-1] = 0  # the constant is not held back, see below
            products = (x * spread.astype(np.float32)) @ x.T
            self._products = images_of, x, y, spread, products.astype(np.float64)
        images_of, x, y, spread, products = self._products
        used = np.flatnonzero((images_of == EVERY) | images[images_of])
        x, constant = x[used], x[used, -1:].astype(np.float64)
        free, total = penalty / FREE, float((constant**2).sum())
        system = products[np.ix_(used, used)] + free * constant @ constant.T
        system += penalty * total * np.eye(len(used))
        found = np.linalg.solve(system, y[used].astype(np.float64))
        weights = spread[:, None] * (x.T @ found.astype(np.float32))
        weights[-1] = free * (constant.T @ found)[0]
        return np.asarray(weights)
