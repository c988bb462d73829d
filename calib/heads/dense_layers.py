"""The two linear layers of a dense head, fitted in closed form to the objects of images and to
their background.

Five ridge regressions follow each other (Hoerl & Kennard 1970): from a cell near an object's middle
to its sides; from a cell to the IoU of the box that it then gives; from a proposal to the
corrections of its sides; from a corrected proposal to what is left to be corrected; and from it to
the IoU of the box that it then becomes, and to its name.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from calib.heads.dense_names import Answer, Names, best_iou, name_targets
from calib.heads.dense_scenes import MAIN, Array32, Array64, Reader, Scene, SceneTable
from calib.heads.linear import Normal, Rows
from engines.boxes import iou
from engines.dense import SIZES, SMALLEST, DenseHead

SIZE_RANGES = ((0.0, 0.25), (0.175, 0.53), (0.375, 9.0))
"""The root of an object's area, in sides of the square, for each of ``SIZES``."""
MIDDLE = 0.3
"""Cells so near to an object's middle are its own, in widths and heights."""
OBJECT_IOU = 0.3
"""A cell whose box overlaps an object so much is no background."""
CORRECTED_IOU, CORRECTED_AGAIN_IOU = 0.4, 0.5
"""A proposal that overlaps an object so much is corrected to it, at first and the second time."""
MOST_BOXES = 16
"""Of one image, drawn by lot, in the regressions of boxes where there are ``MANY_OBJECTS``."""
MOST_OBJECT_CELLS, MOST_BACKGROUND_CELLS = 40, 25
"""Of one image, in the regression of the objectness."""
JITTERED, JITTER = 4, 0.25
"""Boxes for each image that are the true ones with edges moved by so much of the sides."""
FURTHER_WEIGHT = 0.3
"""Of boxes in images of other kinds, where edges are corrected."""
CELL_PENALTY = 5e-3
CORRECTION_PENALTY, CORRECTION_AGAIN_PENALTY = 0.5, 1.0
IOU_PENALTY = 0.2
"""Of standardized features, beside the mean of the squared errors; chosen on VOC 2007 train and
val.
"""
MANY_OBJECTS = 1000
"""With fewer, the penalties are the larger the fewer there are."""

Part = tuple[Array32, Array64, Array64]
"""Rows of a regression: features ``[L, D]``, targets ``[L, T]``, weights ``[L]``."""
Scenes = Callable[[str, Rows], Iterator[Scene]]
"""Gives the scenes of rows of a table; the text says what is fitted to them."""


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
    first: Array64 | None = None
    """Corrections of the proposals before the others read them; None where they read proposals."""

    @classmethod
    def of(cls, head: DenseHead, names: Names) -> "Layers":
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
        first = None
        if head.first_weight is not None and head.first_bias is not None:
            both = np.concatenate([head.first_weight, head.first_bias[:, None]], axis=1)
            first = both.T.astype(np.float64)
        sides, scores = cells[:, : 4 * SIZES], cells[:, 4 * SIZES :]
        return cls(sides, scores, boxes[:, :4], boxes[:, 4:], said, means, first)

    def proposals(self, reader: Reader, scene: Scene) -> tuple[Array64, Array64]:
        """The proposals of an image, after their first corrections, and their objectness."""
        features = reader.cell_features(scene.maps)
        boxes = reader.cell_boxes(features @ self.distances)
        scores = (features @ self.objectness).T.reshape(-1)
        boxes, scores = reader.proposals(boxes.reshape(-1, 4), scores, reader.candidates)
        if self.first is not None:
            features = reader.box_features(scene.maps, boxes, scores)
            boxes = reader.moved(boxes, features @ self.first)
        return boxes, scores

    def look(self, reader: Reader, scene: Scene) -> "Look":
        """What the box layer reads of an image."""
        boxes, scores = self.proposals(reader, scene)
        return Look(scene, boxes, scores, reader.box_features(scene.maps, boxes, scores))

    def answer(self, reader: Reader, scene: Scene) -> Answer:
        """The corrected boxes of an image, and what is known of them; without those of objects to
        be ignored.
        """
        return self.answer_of(reader, self.look(reader, scene))

    def answer_of(self, reader: Reader, look: "Look") -> Answer:
        """See ``answer``; of what the box layer reads."""
        scene, boxes, scores, features = look.scene, look.boxes, look.objectness, look.features
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


@dataclass(frozen=True)
class Look:
    """What the box layer reads of an image.

    Attributes:
        scene: the image.
        boxes: proposals, after their first corrections, ``[K, 4]``.
        objectness: of each, ``[K]``.
        features: of each, ``[K, D2 + 1]``.
    """

    scene: Scene
    boxes: Array64
    objectness: Array64
    features: Array32


class Sums:
    """The normal equations of all regressions, of the images that were added up to now.

    Attributes:
        objects: how many they have.
    """

    def __init__(self) -> None:
        self.objects = 0
        self.sides = [Normal() for _ in range(SIZES)]
        self.objectness, self.first = Normal(), Normal()
        self.corrections, self.expected = Normal(), Normal()

    @property
    def strength(self) -> float:
        """A factor of all penalties."""
        return max(1.0, MANY_OBJECTS / max(1, self.objects))


def fit_layers(
    table: SceneTable,
    reader: Reader,
    rows: Rows,
    scenes: Scenes,
    names: Names,
    start: Layers | None = None,
    sums: Sums | None = None,
) -> Layers:
    """Fit all layers on some of the images.

    Args:
        table: of the scenes.
        reader: computes their features.
        rows: of the table.
        scenes: gives its scenes.
        names: that boxes are given.
        start: fitted layers to stay near to.
        sums: of other images, which the layers are to be fitted to as well: these images are added
            to them.
    """
    layers, sums = Layers(*[np.zeros((0, 0))] * 5), sums or Sums()
    sums.objects += table.objects(rows)
    strength, main = sums.strength, table.main(rows)
    most = MOST_BOXES if sums.objects >= MANY_OBJECTS else None
    for scene in scenes("sides", main):
        for normal, part in zip(sums.sides, side_rows(scene, reader), strict=False):
            normal.add(*part)
    layers.distances = _solved_sides(sums.sides, start.distances if start else None, strength)
    rng = np.random.default_rng(0)
    for scene in scenes("objectness", main):
        for part in objectness_rows(scene, reader, layers, rng):
            sums.objectness.add(*part)
    before = start.objectness if start else None
    layers.objectness = sums.objectness.solve(CELL_PENALTY * strength, before)
    if start is None or start.first is not None:
        for part in _corrections(scenes("first corrections", rows), reader, layers, most):
            sums.first.add(*part)
        before = start.first if start else None
        layers.first = sums.first.solve(CORRECTION_PENALTY * strength, before)
    for part in _corrections(scenes("corrections", rows), reader, layers, most):
        sums.corrections.add(*part)
    penalty = CORRECTION_PENALTY if layers.first is None else CORRECTION_AGAIN_PENALTY
    before = start.corrections if start else None
    layers.corrections = sums.corrections.solve(penalty * strength, before)
    rng, known = np.random.default_rng(0), sums.expected.rows
    for scene in scenes("names", rows):
        for part in expected_rows(scene, reader, layers, names, rng, most):
            sums.expected.add(*part)
    images = (sums.expected.rows - known) / (most or reader.candidates)
    _solve_expected(sums.expected, layers, names, start, images, strength)
    return layers


def _corrections(
    scenes: Iterator[Scene], reader: Reader, layers: Layers, most: int | None
) -> Iterator[Part]:
    rng = np.random.default_rng(0)
    for scene in scenes:
        yield from correction_rows(scene, reader, layers, rng, most)


def side_rows(scene: Scene, reader: Reader) -> Iterator[Part]:
    """From the cells near an object's middle to the distances of its sides, for each of ``SIZES``;
    of several objects a cell is the smallest one's. Features ``[L, D1 + 1]``, targets ``[L, 4]``.
    Nothing where there is no object.
    """
    boxes = scene.boxes_px
    if not len(boxes):
        return
    middles, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    reach = np.maximum(MIDDLE * sizes, 0.51 * reader.stride_px)
    inside = np.all(np.abs(reader.centres[:, None] - middles) < reach, axis=2)
    owned = np.flatnonzero(inside.any(axis=1))
    features = reader.cell_features(scene.maps)[owned]
    owner = np.where(inside, sizes.prod(axis=1), np.inf)[owned].argmin(axis=1)
    mine, centres = boxes[owner], reader.centres[owned]
    sides = np.concatenate([centres - mine[:, :2], mine[:, 2:] - centres], axis=1)
    targets = np.log(np.maximum(sides / reader.stride_px, 0.125))
    roots = np.sqrt(sizes[owner].prod(axis=1)) / reader.size_px
    for low, high in SIZE_RANGES:
        used = (roots >= low) & (roots < high)
        counts = np.bincount(owner[used], minlength=len(boxes))
        yield features[used], targets[used], 1 / counts[owner[used]]


def _solved_sides(normals: Sequence[Normal], start: Array64 | None, strength: float) -> Array64:
    """The distances of each size. Where no object is of a size, they are what the fitted head had,
    or else those of the size with the most objects. ``[D1 + 1, 4 * SIZES]``.
    """
    found = []
    for place, normal in enumerate(normals):
        part = None if start is None else start[:, 4 * place : 4 * place + 4]
        if part is not None and not normal.rows:
            found.append(part)
            continue
        used = normal if normal.rows else max(normals, key=lambda each: each.rows)
        found.append(used.solve(CELL_PENALTY * strength, part))
    return np.concatenate(found, axis=1)


def objectness_rows(
    scene: Scene, reader: Reader, layers: Layers, rng: np.random.Generator
) -> Iterator[Part]:
    """From a cell to the IoU of each of its boxes with the nearest object, targets ``[L, SIZES]``.

    The cells of an image with objects, and those of its background, count as much as each other.
    """
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
            weights = np.full(len(cells), weight / len(cells))
            yield features[cells], overlaps[:, cells].T, weights


def correction_rows(
    scene: Scene,
    reader: Reader,
    layers: Layers,
    rng: np.random.Generator,
    most: int | None = None,
) -> Iterator[Part]:
    """From a proposal, or from a corrected one, to how far each edge of its object is, in its
    sides. Features ``[L, D2 + 1]``, targets ``[L, 4]``; L is at most ``most``.
    """
    true = scene.boxes_px
    if not len(true):
        return
    boxes, scores = layers.proposals(reader, scene)
    least = CORRECTED_AGAIN_IOU
    if layers.first is None:
        least, moved = CORRECTED_IOU, _jittered(true, rng, reader.size_px)
        boxes = np.concatenate([boxes, moved])
        scores = np.concatenate([scores, np.full(len(moved), scores.mean())])
    used, targets = edges_left(boxes, true, least, reader)
    some = _some(np.arange(len(used)), rng, most)
    used, targets = used[some], targets[some]
    if not len(used):
        return
    features = reader.box_features(scene.maps, boxes[used], scores[used])
    weight = (1.0 if scene.kind == MAIN else FURTHER_WEIGHT) / np.sqrt(len(used))
    yield features, targets, np.full(len(used), weight)


def edges_left(
    boxes: Array64, true: Array64, least_iou: float, reader: Reader
) -> tuple[Rows, Array64]:
    """Which of boxes ``[K, 4]`` are of an object ``[B, 4]``, B over 0, and how far each of their
    edges is from its, in their sides, ``[U, 4]``.
    """
    overlaps = iou(boxes[:, None], true[None])
    large = (boxes[:, 2:] - boxes[:, :2] > SMALLEST * reader.stride_px).all(axis=1)
    used = np.flatnonzero((overlaps.max(axis=1) > least_iou) & large)
    boxes, mine = boxes[used], true[overlaps[used].argmax(axis=1)]
    return used, (mine - boxes) / np.tile(boxes[:, 2:] - boxes[:, :2], 2)


def _some(places: Rows, rng: np.random.Generator, most: int | None) -> Rows:
    """So many of the places at most, drawn by lot, in their order."""
    if most is None or len(places) <= most:
        return places
    return np.sort(rng.choice(places, most, replace=False))


def _jittered(true: Array64, rng: np.random.Generator, side_px: int) -> Array64:
    """True boxes with moved edges, ``[JITTERED, 4]``."""
    mine = true[rng.integers(len(true), size=JITTERED)]
    shifts = rng.uniform(-JITTER, JITTER, (JITTERED, 4))
    return np.clip(mine + shifts * np.tile(mine[:, 2:] - mine[:, :2], 2), 0, side_px)


def expected_rows(
    scene: Scene,
    reader: Reader,
    layers: Layers,
    names: Names,
    rng: np.random.Generator,
    most: int | None = None,
) -> Iterator[Part]:
    """From a corrected proposal to the IoU of the box that it becomes with the nearest object, and
    to its learned names. Features ``[L, D2 + 1]``, targets ``[L, 1 + learned]``; L is at most
    ``most``.
    """
    boxes, scores = layers.proposals(reader, scene)
    some = _some(np.arange(len(boxes)), rng, most)
    boxes, scores = boxes[some], scores[some]
    features = reader.box_features(scene.maps, boxes, scores)
    moved = reader.moved(boxes, features @ layers.corrections)
    known = scene.is_known(moved, best_iou(moved, scene.boxes_px))
    if not known.any():
        return
    targets, weights = overlaps_and_names(moved[known], scene, names)
    yield features[known], targets, weights


def overlaps_and_names(moved: Array64, scene: Scene, names: Names) -> tuple[Array64, Array64]:
    """The IoU of corrected boxes with the nearest object, and what they are in the learned names,
    ``[K, 1 + learned]``; and their weights ``[K]``.
    """
    overlaps = best_iou(moved, scene.boxes_px)[:, None]
    named = name_targets(moved, scene.boxes_px, scene.classes, len(names.names))
    weight = np.sqrt(max(1, len(scene.boxes_px))) / len(moved)
    targets = np.concatenate([overlaps, named[:, names.learned]], axis=1)
    return targets, np.full(len(moved), weight)


def _solve_expected(
    normal: Normal,
    layers: Layers,
    names: Names,
    start: Layers | None,
    images: float,
    strength: float,
) -> None:
    """Set the expected IoU, the names and their means, of sums to which so many images were added.

    Classes that are added to those of a head are told from these by their means, which count as
    much as the images: else all that looks alike would get the new name.
    """
    before, means = None, normal.means()[1:]
    if start is not None:
        if len(start.means):
            kept = start.means.astype(np.float32)
            targets = np.zeros((len(kept), 1 + len(means)))
            targets[:, :1] = kept @ start.expected
            normal.add(kept, targets, images / len(kept))
            means = np.concatenate([kept[:-1], means, kept[-1:]])
        else:
            means = start.means
        new = np.zeros((len(start.expected), int(names.learned.sum())))
        before = np.concatenate([start.expected, new], axis=1)
    found = normal.solve(IOU_PENALTY * strength, before)
    said = np.zeros((len(found), len(names.learned))) if start is None else start.names.copy()
    said[:, names.learned] = found[:, 1:]
    layers.expected, layers.names = found[:, :1], said
    layers.means = np.asarray(means, np.float64)
