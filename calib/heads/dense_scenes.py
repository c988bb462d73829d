"""What a dense head is fitted to: the maps of all images, their true boxes, and the numbers that
its graph computes of them, in NumPy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.data.labels import Truth
from calib.evaluation.metrics import relative_boxes
from calib.heads.linear import Rows
from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou
from engines.build import build_graph
from engines.dense import (
    AROUND,
    LOG_LIMITS,
    MOST_CORRECTION,
    SAMPLES,
    SAMPLES_OF_CLASS,
    SIZES,
    SMALLEST,
    SUPPRESSED,
    DenseHead,
    Level,
)
from engines.errors import ModelError
from engines.localizer import Localizer
from engines.maps import MapSpec
from engines.networks.network import Shape
from engines.networks.registry import Classifier
from engines.resizing import Resizing, cell_centres, cell_window, interpolation

Array32 = NDArray[np.float32]
Array64 = NDArray[np.float64]

STRIDES_PX = (8, 16, 32)
"""Of the layers that are read."""
CELL_STRIDE_PX = 16
MOST_COMPONENTS, MOST_LAST_COMPONENTS = 96, 256
BOX_CHANNELS, BOX_LAST_CHANNELS = 48, 128
FINE_BINS, COARSE_BINS, LAST_BINS = 7, 5, 3
IMAGES_OF_BASIS = 500
CANDIDATES, COMPARED, SAME, WHOLE = 32, 512, 0.7, True
"""Of new heads, see ``engines.dense.DenseHead``. More boxes, and boxes that are nearer to each
other, find the second of two animals that touch.
"""
MAIN = ""
"""The kind of the images that the whole head is fitted to. Other kinds, named by the caller, serve
the box layer, the names and the confidence.
"""


IGNORED_IOU, MOSTLY = 0.3, 0.7
"""A box is of an object to be ignored that it overlaps so much, or in which such a share of it
lies.
"""


@dataclass(frozen=True)
class Scene:
    """The maps of one image or mirror image, and its objects.

    Attributes:
        maps: components of each level, float32 ``[P, h, w]``.
        boxes_px: true boxes in the network's square, ``[B, 4]``.
        classes: which of the names each object has, -1 for none of them, ``[B]``.
        kind: of image, see ``SceneTable``.
        ignored_px: boxes of objects to be ignored, ``[I, 4]``: no objects, and no background.
    """

    maps: tuple[Array32, ...]
    boxes_px: Array64
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    kind: str = ""
    ignored_px: Array64 = field(default_factory=lambda: np.zeros((0, 4)))

    @property
    def says_nothing(self) -> bool:
        """Whether all of its objects are to be ignored: then no box is known to be wrong or right
        for sure, and it is no image without objects.
        """
        return bool(len(self.ignored_px)) and not len(self.boxes_px)

    def is_known(self, boxes: Array64, overlaps: Array64) -> NDArray[np.bool_]:
        """Which of the boxes ``[K, 4]`` are of an object or of the background: all but those that
        are of an object to be ignored, and not of another one.

        Args:
            boxes: to be looked at.
            overlaps: the IoU of each with the nearest object.
        """
        if not len(self.ignored_px):
            return np.ones(len(boxes), bool)
        low = np.maximum(boxes[:, None, :2], self.ignored_px[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], self.ignored_px[None, :, 2:])
        common = np.maximum(high - low, 0).prod(axis=2)
        area = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)
        within = (common / area[:, None]).max(axis=1)
        alike = iou(boxes[:, None], self.ignored_px[None]).max(axis=1)
        return np.asarray(((within < MOSTLY) & (alike < IGNORED_IOU)) | (overlaps > IGNORED_IOU))


@dataclass(frozen=True)
class SceneTable:
    """The scenes of N images.

    Attributes:
        groups: of each image, see ``calib.data.datasets.Sample.group``.
        kinds: of each image; those of ``MAIN`` have mirror images.
        size_px: of the network's square.
        maps: components of each level, float16 ``[2 * N, P, h, w]``: of an image, then of its
            mirror image.
        boxes_px, ignored_px: true boxes and those to be ignored of each image, see ``Scene``.
        classes: which of the names each object of each image has, see ``Scene``.
        single_boxes: the true box of each image of ``MAIN`` with one object, in fractions of the
            image.
    """

    groups: tuple[str, ...]
    kinds: tuple[str, ...]
    size_px: int
    maps: Sequence[NDArray[np.float16]]
    boxes_px: list[Array64] = field(default_factory=list)
    ignored_px: list[Array64] = field(default_factory=list)
    classes: list[NDArray[np.int64]] = field(default_factory=list)
    single_boxes: list[Array64] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        samples: Mapping[str, Sequence[Sample]],
        names: Sequence[str],
        classifier: Classifier,
        levels: Sequence[Level],
        folder: Path,
        console: Console,
    ) -> "SceneTable":
        """Compute the maps of images.

        Args:
            samples: the labelled images by their kind, those of ``MAIN`` first.
            names: of the classes.
            classifier: the network.
            levels: what is read of it.
            folder: for the files of the maps.
            console: for progress.
        """
        pairs = [(kind, sample) for kind, some in samples.items() for sample in some]
        localizer = _localizer(classifier, levels)
        table = cls(
            tuple(sample.group for _, sample in pairs),
            tuple(kind for kind, _ in pairs),
            classifier.size_px,
            [
                np.lib.format.open_memmap(
                    folder / f"{place}.npy", "w+", np.float16, (2 * len(pairs), *shape)
                )
                for place, shape in enumerate(_shapes(localizer, levels))
            ],
        )
        places = {name: place for place, name in enumerate(names)}
        place = localizer.resizing, localizer.size_px
        for number, (kind, sample) in enumerate(track(pairs, "computing maps", console=console)):
            image = sample.read()
            prepared = localizer.prepare(image)
            size_px = image.shape[1], image.shape[0]
            boxes, kept = boxes_in_square(sample.truths, *size_px, *place)
            if kind == MAIN and sample.single:
                table.single_boxes.extend(relative_boxes([sample], [size_px]))
            table.ignored_px.append(boxes_in_square(sample.ignored, *size_px, *place)[0])
            known = [places.get(truth.class_name, -1) for truth in sample.truths]
            table.classes.append(np.array(known, np.int64)[kept])
            for side, square in enumerate((prepared, prepared[:, ::-1])[: 1 + (kind == MAIN)]):
                outputs = localizer.infer([square])
                for level, stored in zip(levels, table.maps, strict=True):
                    stored[2 * number + side] = components(outputs[f"{level.layer}_out"][0], level)
            table.boxes_px.append(boxes)
        localizer.close()
        return table

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def sides(self) -> list[int]:
        """How many rows of cells each level has."""
        return [each.shape[2] for each in self.maps]

    def objects(self, rows: Rows) -> int:
        """How many objects some of the images have."""
        return sum(len(self.boxes_px[row]) for row in rows)

    def main(self, rows: Rows) -> Rows:
        """Those of the images that are of the kind ``MAIN``."""
        return rows[[self.kinds[row] == MAIN for row in rows]]

    def scenes(self, rows: Rows, mirrored: bool = True) -> Iterator[Scene]:
        """The scenes of some of the images, each followed by its mirror image where it has one."""
        for row in rows:
            boxes, ignored, kind = self.boxes_px[row], self.ignored_px[row], self.kinds[row]
            for side in range(1 + (mirrored and kind == MAIN)):
                maps = tuple(np.asarray(each[2 * row + side], np.float32) for each in self.maps)
                seen = [
                    _mirrored(each, self.size_px) if side else each for each in (boxes, ignored)
                ]
                yield Scene(maps, seen[0], self.classes[row], kind, seen[1])


def _shapes(localizer: Localizer, levels: Sequence[Level]) -> list[tuple[int, int, int]]:
    """Of the components of each level."""
    return [(level.basis.shape[1], *_layer_shape(localizer, level)) for level in levels]


def _localizer(classifier: Classifier, levels: Sequence[Level]) -> Localizer:
    """An engine in fp32 that gives the activations of the levels."""
    spec = MapSpec(layer=levels[-1].layer, signal="activation")
    graph = build_graph(classifier, spec, expose=[level.layer for level in levels])
    return Localizer(OpenVinoEngine(graph, "fp32"))


def _layer_shape(localizer: Localizer, level: Level) -> tuple[int, int]:
    specs = {spec.name: spec.shape for spec in localizer.engine.outputs}
    height, width = specs[f"{level.layer}_out"][2:]
    return height, width


def activations_of(
    classifier: Classifier, levels: Sequence[Level]
) -> Callable[[NDArray[np.uint8]], list[Array32]]:
    """A function that gives the activations of the levels, each ``[C, h, w]``, for a square."""
    localizer = _localizer(classifier, levels)

    def computed(square_bgr: NDArray[np.uint8]) -> list[Array32]:
        outputs = localizer.infer([square_bgr])
        return [outputs[f"{level.layer}_out"][0] for level in levels]

    return computed


def boxes_in_square(
    truths: Sequence[Truth], width_px: int, height_px: int, resizing: Resizing, side_px: int
) -> tuple[Array64, NDArray[np.bool_]]:
    """The true boxes of an image in pixels of the network's square, ``[B, 4]``, and which of all
    they are: those that are wider and taller than a pixel.
    """
    left, top, right, bottom = resizing.seen(width_px, height_px, (side_px, side_px))
    boxes = np.array([truth.box_xyxy_px for truth in truths]).reshape(-1, 4)
    start = np.array([left, top, left, top])
    scale = side_px / np.array([right - left, bottom - top, right - left, bottom - top])
    found = np.clip((boxes - start) * scale, 0, side_px)
    kept = (found[:, 2:] - found[:, :2] > 1).all(axis=1)
    return np.asarray(found[kept]), np.asarray(kept)


def _mirrored(boxes_px: Array64, side_px: int) -> Array64:
    x0, y0, x1, y1 = boxes_px.T
    return np.stack([side_px - x1, y0, side_px - x0, y1], axis=1)


def components(activations: Array32, level: Level) -> Array32:
    """Activations ``[C, h, w]`` as components ``[P, h, w]``."""
    rows = activations.reshape(len(activations), -1).T
    if level.root:
        rows = np.sqrt(np.maximum(rows, 0))
    found = (rows - level.mean) @ level.basis
    return np.asarray(found.T.reshape(-1, *activations.shape[1:]), np.float32)


def fit_levels(
    samples: Sequence[Sample], classifier: Classifier, console: Console
) -> tuple[Level, ...]:
    """Choose the layers, and find the principal components of each on some of the images.

    Raises:
        ModelError: the network has no layer with cells of ``STRIDES_PX``.
    """
    chosen = layers_read(classifier)
    plain = [
        Level(name, False, np.zeros(1, np.float32), np.zeros((1, 1), np.float32), 1, 1, 1)
        for name in chosen
    ]
    localizer = _localizer(classifier, plain)
    some = np.random.default_rng(0).permutation(len(samples))[:IMAGES_OF_BASIS]
    rows: list[list[Array32]] = [[] for _ in plain]
    for number in track(some, "looking at the maps", console=console):
        outputs = localizer.infer([localizer.prepare(samples[number].read())])
        for level, kept in zip(plain, rows, strict=True):
            values = outputs[f"{level.layer}_out"][0]
            each = values.reshape(len(values), -1).T
            kept.append(each[:: max(1, len(each) // 100)].copy())
    sides = [_layer_shape(localizer, level)[0] for level in plain]
    localizer.close()
    cells = classifier.size_px // cell_stride_px(classifier.size_px, sides)
    last = classifier.network.last_layer
    return tuple(
        _level(level.layer, np.concatenate(kept), side, cells, level.layer == last)
        for level, kept, side in zip(plain, rows, sides, strict=True)
    )


def layers_read(classifier: Classifier) -> list[str]:
    """The stages whose cells are ``STRIDES_PX``, and the last maps, from fine to coarse."""
    network = classifier.network
    graph, forward = classifier.forward_graph()
    sides = {name: graph.shape(tensor)[2:] for name, tensor in forward.layers.items()}
    names = dict.fromkeys((*network.head_layers, network.last_layer))
    found = [
        name
        for name in names
        if name and any(sides[name] == (classifier.size_px // s,) * 2 for s in STRIDES_PX)
    ]
    if not found:
        raise ModelError(
            f"{classifier.name} at {classifier.size_px} px has no stage with cells of"
            f" {', '.join(map(str, STRIDES_PX))} px: fit a head of kind best, or use another size",
            option=("kind", "size_px"),
        )
    return found


def cell_stride_px(size_px: int, sides: Sequence[int]) -> int:
    """Of a dense head's cells: ``CELL_STRIDE_PX``, or else the nearest that a layer has."""
    strides = [size_px // side for side in sides]
    return min(strides, key=lambda stride: (abs(stride - CELL_STRIDE_PX), stride))


def _level(name: str, rows: Array32, side: int, cells: int, is_last: bool) -> Level:
    """A level whose basis is fitted to activations ``[L, C]``."""
    root = bool(rows.min() >= 0)
    values = np.sqrt(rows) if root else rows
    mean = values.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov((values - mean).T))
    most = MOST_LAST_COMPONENTS if is_last else MOST_COMPONENTS
    useful = int((variances > 1e-6 * variances[-1]).sum())
    count = max(1, min(most, useful, values.shape[1]))
    basis = vectors[:, ::-1][:, :count] / np.sqrt(np.maximum(variances[::-1][:count], 1e-12))
    kernel = side // cells if side > cells else (1 if is_last else 3)
    bins = FINE_BINS if side >= cells else (LAST_BINS if is_last else COARSE_BINS)
    channels = min(count, BOX_LAST_CHANNELS if is_last else BOX_CHANNELS)
    return Level(
        name, root, mean.astype(np.float32), basis.astype(np.float32), kernel, channels, bins
    )


class Reader:
    """What the graph of a dense head computes, in NumPy: its features, cells, and proposals.

    Args:
        levels: what is read.
        size_px: of the input, the longer side.
        stride_px: of the G x H cells.
        whole: whether the box layer reads the last level's mean, too.
        shape: of the input; a square when None.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        size_px: int,
        stride_px: int,
        candidates: int = CANDIDATES,
        compared: int = COMPARED,
        same: float = SAME,
        whole: bool = WHOLE,
        shape: Shape | None = None,
    ) -> None:
        self.levels, self.size_px, self.stride_px = levels, size_px, stride_px
        self.candidates, self.compared = candidates, compared
        self.same, self.whole = same, whole
        self.shape = shape or (size_px, size_px)
        self.cells = self.shape[0] // stride_px, self.shape[1] // stride_px
        self.centres = cell_centres(*self.cells, stride_px).astype(np.float64)

    @classmethod
    def of(cls, head: DenseHead, shape: Shape | None = None) -> "Reader":
        """Of a fitted head, for inputs of a shape."""
        return cls(
            head.levels,
            head.size_px,
            head.stride_px,
            head.candidates,
            head.compared,
            head.same,
            head.whole,
            shape,
        )

    def cell_features(self, maps: Sequence[Array32]) -> Array32:
        """``[G * H, D1 + 1]``: what the cell layer reads, and 1."""
        parts = [
            self._windows(x, level).reshape(-1, len(self.centres))
            for x, level in zip(maps, self.levels, strict=True)
        ]
        ones = np.ones((1, len(self.centres)), np.float32)
        return np.concatenate([*parts, ones]).T

    def _windows(self, x: Array32, level: Level) -> Array32:
        """``[P, kernel^2, G, H]`` of components ``[P, h, w]``."""
        (down, over), (across, beside) = (
            cell_window(have, cells, level.kernel)
            for have, cells in zip(x.shape[1:], self.cells, strict=True)
        )
        padded = np.pad(x, ((0, 0), (over, over), (beside, beside)))
        kernel = (level.kernel, level.kernel)
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (1, 2))
        windows = windows[:, ::down, ::across]
        found = windows.reshape(*windows.shape[:3], -1).transpose(0, 3, 1, 2)
        if found.shape[2:] != self.cells:
            rows, columns = (
                interpolation(have, cells)
                for have, cells in zip(found.shape[2:], self.cells, strict=True)
            )
            found = rows @ (found @ columns.T)
        return np.asarray(found, np.float32)

    def cell_boxes(self, cells: Array64) -> Array64:
        """``[SIZES, G * H, 4]`` of the logarithms of distances ``[G * H, 4 * SIZES]``."""
        sides = np.exp(np.clip(cells, *LOG_LIMITS)) * self.stride_px
        sides = sides.reshape(-1, SIZES, 4).transpose(1, 0, 2)
        low, high = self.centres - sides[..., :2], self.centres + sides[..., 2:]
        return self._inside(np.concatenate([low, high], axis=2))

    def _inside(self, boxes: Array64) -> Array64:
        return np.asarray(np.clip(boxes, 0, np.tile(self.shape[::-1], 2)))

    def proposals(self, boxes: Array64, objectness: Array64, count: int) -> tuple[Array64, Array64]:
        """The best of boxes ``[L, 4]`` by objectness ``[L]``, less duplicates."""
        order = np.argsort(-objectness, kind="stable")[: self.compared]
        boxes, objectness = boxes[order], objectness[order]
        near = np.triu(alike(boxes, self.same), 1).max(axis=0)
        order = np.argsort(-(objectness - SUPPRESSED * near), kind="stable")[:count]
        return boxes[order], objectness[order]

    def box_features(self, maps: Sequence[Array32], boxes: Array64, objectness: Array64) -> Array32:
        """``[K, 1 + D2 + GEOMETRY + 1]``: what the box layer reads, and 1; where it reads the last
        level's mean, too, with P numbers more before the last.
        """
        sizes = self._sizes(boxes)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        parts: list[NDArray[np.floating]] = [objectness[:, None]]
        for x, level in zip(maps, self.levels, strict=True):
            used, bins = x[: level.box_channels], level.box_bins
            parts.append(self._pooled(used, middle, sizes, bins, AROUND, SAMPLES))
        logs = np.log(sizes / self.size_px)
        product = logs[:, :1] * logs[:, 1:]
        parts += [logs, logs**2, product, sizes / self.size_px]
        if self.whole:
            parts.append(self._pooled(maps[-1], middle, sizes, 1, 1.0, SAMPLES_OF_CLASS))
        parts.append(np.ones((len(boxes), 1)))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _pooled(
        self, x: Array32, middle: Array64, sizes: Array64, bins: int, around: float, samples: int
    ) -> Array32:
        """``[K, bins * P * bins]`` of components ``[P, h, w]`` in K boxes."""
        count, height, width = len(middle), x.shape[1], x.shape[2]
        rows, columns = (
            self._bins(middle[:, axis], sizes[:, axis], axis, length, bins, around, samples)
            for axis, length in ((1, height), (0, width))
        )
        flat = x.transpose(1, 0, 2).reshape(height, -1)
        tall = (rows.reshape(-1, height) @ flat).reshape(count, -1, width)
        return np.asarray((tall @ columns.transpose(0, 2, 1)).reshape(count, -1))

    def _sizes(self, boxes: Array64) -> Array64:
        return np.maximum(boxes[:, 2:] - boxes[:, :2], SMALLEST * self.stride_px)

    def _bins(
        self,
        middle: Array64,
        size: Array64,
        axis: int,
        length: int,
        bins: int,
        around: float,
        samples: int,
    ) -> Array32:
        """How much each of ``length`` cells along x (0) or y (1) counts in each bin,
        ``[K, bins, length]``.
        """
        count = bins * samples
        offsets = ((np.arange(count) + 0.5) / count - 0.5) * around
        places = middle[:, None] + size[:, None] * offsets
        places = places * length / self.shape[1 - axis] - 0.5
        places = np.clip(places, 0, length - 1)
        near = np.maximum(1 - np.abs(places[:, :, None] - np.arange(length)), 0)
        bilinear = near.reshape(len(middle), bins, samples, length).mean(axis=2)
        return np.asarray(bilinear, np.float32)

    def moved(self, boxes: Array64, corrections: Array64) -> Array64:
        """Boxes ``[K, 4]`` with their edges moved."""
        sizes = np.tile(self._sizes(boxes), 2)
        limited = np.clip(corrections, -MOST_CORRECTION, MOST_CORRECTION)
        return self._inside(boxes + limited * sizes)


def alike(boxes: Array64, least_iou: float) -> NDArray[np.bool_]:
    """Which of boxes ``[M, 4]`` have a larger IoU than that with each other, ``[M, M]``: as the
    graph computes it, 25 times as fast as ``engines.boxes.iou``.
    """
    x0, y0, x1, y1 = boxes.astype(np.float32).T
    width = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
    height = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    common = np.maximum(width, 0) * np.maximum(height, 0)
    areas = (x1 - x0) * (y1 - y0)
    return np.asarray(common > least_iou / (1 + least_iou) * (areas[:, None] + areas))
