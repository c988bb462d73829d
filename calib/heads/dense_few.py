"""Fits to few images what a dense head says of its boxes: how sure they are, and their names.

The boxes stay, so that what the box layer reads of them is computed once. A ridge regression adds
to the expected IoU and to the names of new classes, held back so much that it seldom does harm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calib.heads.dense_layers import IOU_PENALTY, Layers, Look, overlaps_and_names
from calib.heads.dense_names import Answer, Names, best_iou
from calib.heads.dense_scenes import Array32, Array64, Reader
from calib.heads.linear import FREE

FEW_OBJECTS = 30
"""With so many or fewer, nothing else is fitted."""
MOST_ROWS = 1500
"""Boxes that are fitted to, about; where there are more, they are drawn by lot."""
STRENGTH = 300.0
"""A factor of the penalty. It was chosen on photos of VOC 2007 train of six classes, see
``calib.research.few_boxes``. Where the corrections of the boxes moved, too, more first boxes were
right on average, and more draws of ten boxes did harm.
"""
EVERY = -1
"""The image of rows that are never left out."""


SMALL_FOLDS = (0, 1)
"""Of five. One more head is fitted to these alone, so that a learning curve has a point there."""


@dataclass(frozen=True)
class Smaller:
    """What layers that were fitted to ``SMALL_FOLDS`` say of the other images.

    Attributes:
        found: see there.
        same: what layers that were fitted to four fifths of the images say of the same ones, in the
            same order.
    """

    found: list[Answer]
    same: list[Answer]


@dataclass(frozen=True)
class FewFit:
    """What was fitted to few images.

    Attributes:
        layers: fitted to all of them.
        found: what layers say of images that they were not fitted on.
        started: what the layers that they started from say of the same images.
        smaller: see there.
    """

    layers: Layers
    found: list[Answer]
    started: list[Answer]
    smaller: Smaller


def fit_few(
    looks: Sequence[Sequence[Look]],
    fold: NDArray[np.int64],
    reader: Reader,
    names: Names,
    start: Layers,
) -> FewFit:
    """Fit what is said of boxes.

    Args:
        looks: what the layers to start from read of each of N images, and of its mirror image.
        fold: of each image, ``[N]``; images of one fold are left out together.
        reader: computes boxes.
        names: that boxes are given.
        start: the layers to start from.
    """
    fitting = _Fitting(looks, reader, names, start)
    started = [start.answer_of(reader, each[0]) for each in looks]
    found = list(started)
    for number in np.unique(fold):
        layers = fitting.layers(fold != number)
        for image in np.flatnonzero(fold == number).tolist():
            found[image] = layers.answer_of(reader, looks[image][0])
    few, others = np.isin(fold, SMALL_FOLDS), np.flatnonzero(~np.isin(fold, SMALL_FOLDS))
    layers = fitting.layers(few) if few.any() else start
    small = [layers.answer_of(reader, looks[image][0]) for image in others.tolist()]
    smaller = Smaller(small, [found[image] for image in others.tolist()])
    return FewFit(fitting.layers(fold >= 0), found, started, smaller)


class _Fitting:
    """A regression on all images, of which parts can be solved."""

    def __init__(
        self, looks: Sequence[Sequence[Look]], reader: Reader, names: Names, start: Layers
    ) -> None:
        self._start, self._names, self._rows = start, names, _Rows()
        count = sum(map(len, looks))
        most, rng = max(4, MOST_ROWS // count), np.random.default_rng(0)
        before = np.zeros((len(start.expected), 1 + int(names.learned.sum())))
        before[:, :1] = start.expected
        for image, look in [(image, look) for image, some in enumerate(looks) for look in some]:
            features = look.features
            moved = reader.moved(look.boxes, features @ start.corrections)
            known = look.scene.is_known(moved, best_iou(moved, look.scene.boxes_px))
            drawn = np.flatnonzero(known)
            drawn = np.sort(rng.permutation(drawn)[:most])
            if len(drawn):
                targets, weights = overlaps_and_names(moved[drawn], look.scene, names)
                left = targets - features[drawn] @ before
                self._rows.add(image, features[drawn], left, weights)
        if len(start.means):  # classes that the head knows do not get the new name
            kept = start.means.astype(np.float32)
            share = np.full(len(kept), count / len(kept))
            self._rows.add(EVERY, kept, np.zeros((len(kept), before.shape[1])), share)

    def layers(self, images: NDArray[np.bool_]) -> Layers:
        """The layers, fitted to some of the images."""
        start, learned = self._start, self._names.learned
        added = self._rows.solved(images, IOU_PENALTY * STRENGTH)
        said = start.names.copy()
        said[:, learned] = added[:, 1:]
        return replace(
            start, expected=start.expected + added[:, :1], names=said, means=self.means()
        )

    def means(self) -> Array64:
        """Those of the head with those of the new names before the background's; see
        ``Layers.means``.
        """
        kept = self._start.means
        if not len(kept):
            return kept
        return np.concatenate([kept[:-1], self._rows.means()[1:], kept[-1:]])


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
