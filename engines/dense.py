"""The dense head: many boxes from one engine call, read at every cell of the classifier's maps.

Two linear layers read the activations of a few layers, each projected to its principal components:

1. The cell layer is applied at every cell (a convolution). For each of ``SIZES`` of objects it
   gives an objectness and the logarithms of the distances to the four sides, as FCOS parametrizes
   them (Tian et al. 2019, section 3.1).
2. The best cells, less near duplicates, are proposals. The box layer reads the maps inside and
   around each proposal, pooled as RoIAlign does it (He et al. 2017, section 3). It gives
   corrections of the four sides, as the box regression of R-CNN does (Girshick et al. 2014,
   appendix C), and the overlap with an object that is to be expected. Newer heads correct the
   proposals once before, and the box layer reads these better boxes (Cai & Vasconcelos 2018).

Both are fitted in closed form, see ``calib.heads.dense``. The shipped one was trained from there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from engines.confidence import ConfidenceModel
from engines.dense_names import Naming, append_classes, append_cues, append_logistic, append_names
from engines.errors import ModelError
from engines.files import whole_file
from engines.graph import Graph
from engines.maps import Array32, MapSpec
from engines.networks.network import Forward, Shape, pooled_linear
from engines.resizing import cell_centres, cell_window, interpolation

SIZES = 3
"""The kinds of objects by size, each with numbers of its own in the cell layer."""
COMPARED, SAME = 256, 0.6
"""See ``DenseHead.compared`` and ``DenseHead.same``: what they were in files of format 1."""
ALIKE = 0.5
"""Corrected boxes of one image with this IoU are probably of one object."""
AROUND = 1.5
"""The box layer sees so many times the width and height of a proposal."""
SAMPLES, SAMPLES_OF_CLASS = 2, 6
"""Along each side of a bin: for the box layer, and for the class, which is read of one bin."""
LOG_LIMITS = (-2.5, 3.5)
"""Of the logarithm of a distance, in strides of a cell."""
MOST_CORRECTION = 0.8
"""Of a side, in widths and heights of the proposal."""
SMALLEST = 0.25
"""No side of a proposal counts as shorter than this, in strides of a cell."""
SUPPRESSED = 100.0
"""Is taken off the objectness of a duplicate, which then comes after all others."""
FEW_CELLS, GEOMETRY = 100, 7
"""Maps of so few cells are pooled along both sides at once. So many numbers about a proposal's size
the box layer reads.
"""
FORMAT = 3
"""Of a head's file. Format 1 has no names and no ``trust``, format 2 no first corrections."""


@dataclass(frozen=True)
class Level:
    """A layer of the network that the head reads.

    Attributes:
        layer: its name.
        root: the square root of its activations is read, which are not negative.
        mean: of its C channels, float32 ``[C]``.
        basis: to P principal components of unit variance, float32 ``[C, P]``.
        kernel: how many of its cells a side the cell layer reads: around a cell, or within it
            where the layer is finer.
        box_channels: how many of the components the box layer reads.
        box_bins: to so many bins a side they are pooled for it.
    """

    layer: str
    root: bool
    mean: Array32
    basis: Array32
    kernel: int
    box_channels: int
    box_bins: int

    @property
    def cell_width(self) -> int:
        """How many numbers the cell layer reads of it."""
        return int(self.basis.shape[1]) * self.kernel**2

    @property
    def box_width(self) -> int:
        """How many numbers the box layer reads of it."""
        return self.box_channels * self.box_bins**2


@dataclass(frozen=True)
class DenseHead:
    """A fitted dense head, tied to the network it was fitted on.

    Attributes:
        spec: the map that is shown beside the boxes. They are not read off it.
        levels: the layers, from fine to coarse; D1 and D2 are the sums of their widths.
        stride_px: of a cell.
        cell_weight: float32 ``[5 * SIZES, D1]``: the four distances of each size, then the
            objectness of each.
        cell_bias: float32 ``[5 * SIZES]``.
        box_weight: float32 ``[5, 1 + D2 + GEOMETRY]``, of the objectness, the levels and the
            geometry: to the corrections of x0, y0, x1, y1, then to the expected IoU.
        box_bias: float32 ``[5]``.
        certainty: slope and offset of the logit of the confidence, of the expected IoU, where there
            is no ``trust``.
        candidates: how many boxes a call gives for each image.
        network: sha256 of the classifier (``Classifier.digest``).
        size_px: the longer side of the inputs for which it was fitted.
        resize: how images became the network's input, see ``engines.resizing``.
        card: what it was fitted on.
        compared: so many boxes of cells, those with the most objectness, are compared with each
            other.
        same: a box with this IoU with a better one is a duplicate.
        whole: whether the box layer reads the last level's mean in the box, too: P numbers.
        naming: names the boxes; None in files from before there was one.
        trust: gives the confidence, of ``engines.dense_names.CUES``.
        shown_from: a box that is less sure is not shown unless another limit is set; None where
            nothing was fitted to frames without objects.
        body: of the classifier without its last layer (``Classifier.body_digest``), or empty.
        first_weight, first_bias: float32 ``[4, 1 + D2 + GEOMETRY]`` and ``[4]``: to corrections of
            the proposals, which the box layer reads so corrected. None where it reads them.
    """

    spec: MapSpec
    levels: tuple[Level, ...]
    stride_px: int
    cell_weight: Array32
    cell_bias: Array32
    box_weight: Array32
    box_bias: Array32
    certainty: tuple[float, float]
    candidates: int
    network: str
    size_px: int
    resize: str
    card: Mapping[str, object] = field(default_factory=dict)
    compared: int = COMPARED
    same: float = SAME
    whole: bool = False
    naming: Naming | None = None
    trust: ConfidenceModel | None = None
    shown_from: float | None = None
    body: str = ""
    first_weight: Array32 | None = None
    first_bias: Array32 | None = None

    @property
    def digest(self) -> str:
        """sha256 of everything that decides its boxes."""
        arrays = b"".join(value.tobytes() for value in self._arrays().values())
        return hashlib.sha256(json.dumps(self._described()).encode() + arrays).hexdigest()

    def _described(self) -> dict[str, Any]:
        shape = ("layer", "root", "kernel", "box_channels", "box_bins")
        of_format_2 = {
            "compared": self.compared,
            "same": self.same,
            "whole": self.whole,
            "naming": self.naming.described() if self.naming else None,
            "trust": self.trust.stored() if self.trust else None,
            "shown_from": self.shown_from,
        }
        before = (COMPARED, SAME, False, None, None, None)
        has_any = tuple(of_format_2.values()) != before
        return {
            "format": FORMAT if self.first_weight is not None else 2 if has_any else 1,
            "spec": asdict(self.spec),
            "levels": [{name: getattr(level, name) for name in shape} for level in self.levels],
            "stride_px": self.stride_px,
            "certainty": self.certainty,
            "candidates": self.candidates,
            "network": self.network,
            "size_px": self.size_px,
            "resize": self.resize,
            **(of_format_2 if has_any else {}),
        }

    def _arrays(self) -> dict[str, Array32]:
        found = {
            "cell_weight": self.cell_weight,
            "cell_bias": self.cell_bias,
            "box_weight": self.box_weight,
            "box_bias": self.box_bias,
        }
        if self.first_weight is not None and self.first_bias is not None:
            found |= {"first_weight": self.first_weight, "first_bias": self.first_bias}
        for place, level in enumerate(self.levels):
            found[f"mean{place}"] = level.mean
            found[f"basis{place}"] = level.basis
        if self.naming:
            found |= self.naming.arrays()
        return found

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all; large weights as float16.

        Raises:
            OutputError: the place cannot be written.
        """
        large = ("cell_weight", "first_weight", "box_weight", "name_weight", "name_mean", "basis")
        tensors = {
            name: np.ascontiguousarray(value, np.float16 if name.startswith(large) else np.float32)
            for name, value in self._arrays().items()
        }
        described = {**self._described(), "body": self.body, "card": dict(self.card)}
        with whole_file(path) as part:
            part.write_bytes(save(tensors, {METADATA: json.dumps(described)}))


METADATA = "sightline_dense_head"
"""The name of its description among a file's metadata."""


def append_candidates(
    graph: Graph, forward: Forward, wanted: str, head: DenseHead, shape: Shape
) -> tuple[str, str]:
    """Append the head.

    Args:
        graph: appended to.
        forward: the network's forward pass.
        wanted: int64 ``[N]``, the class that is looked for; negative for any.
        head: what to append.
        shape: of the network's input.

    Returns:
        float32 ``[N, candidates, 7]``: x0, y0, x1, y1 in fractions of the input, the confidence,
        the class and its probability; with a naming layer ``[N, candidates, 9]``: also the place of
        the most probable name, and its probability. They are in no order, and several may be of one
        object. And the classes' scores of the images, ``[N, classes]``: those of ``forward``, which
        the same product gives as those of the boxes.

    Raises:
        ModelError: the network has no such layers, or they do not fit the cells.
    """
    writer = _Writer(graph, forward, head, shape)
    boxes, objectness = writer.proposals(writer.cells())
    boxes = writer.first_corrected(boxes, objectness)
    corrected, expected, scores = writer.corrected(boxes, objectness)
    names, evidence = list[str](), graph.constant(np.zeros((1, 1, 1)))
    if scores is not None:
        *names, evidence = append_names(graph, scores)
    confidence = writer.confidence(corrected, expected, objectness, evidence)
    image_scores, box_scores = writer.scores(boxes)
    classes = append_classes(graph, box_scores, wanted, forward.independent)
    sides = graph.constant(1 / np.array([shape[1], shape[0]] * 2, np.float32))
    fractions = graph.add("Mul", corrected, sides, hint="candidate_boxes")
    said = (confidence, *classes, *names)
    found = graph.add("Concat", fractions, *said, axis=2, hint="candidates_found")
    return found, image_scores


class _Writer:
    """Appends the parts of a head; lengths are in pixels of the network's input, G x H cells."""

    def __init__(self, graph: Graph, forward: Forward, head: DenseHead, shape: Shape) -> None:
        self._graph, self._forward, self._head, self._shape = graph, forward, head, shape
        self._images = graph.shape(forward.scores)[0]
        rows, columns = shape
        self._cells = rows // head.stride_px, columns // head.stride_px
        if rows % head.stride_px or columns % head.stride_px:
            raise ModelError(
                f"a dense head with cells of {head.stride_px} px needs an input of a multiple of"
                f" it, not {max(shape)} px",
                option="size_px",
            )
        self._projected = [self._projection(level) for level in head.levels]

    def _projection(self, level: Level) -> str:
        """The components of a layer, ``[N, P, h, w]``."""
        if level.layer not in self._forward.layers:
            raise ModelError(f"the head reads layer '{level.layer}', which the network has not")
        x = self._forward.layers[level.layer]
        channels = self._graph.shape(x)[1]
        if channels != len(level.mean):
            raise ModelError(
                f"the head reads {len(level.mean)} channels of '{level.layer}', which has"
                f" {channels}"
            )
        if level.root:
            x = self._graph.add("Sqrt", self._graph.add("Relu", x), hint=f"root_{level.layer}")
        weight = level.basis.T[:, :, None, None]
        bias = -(level.mean @ level.basis)
        return self._graph.add(
            "Conv",
            x,
            self._graph.constant(weight, hint=f"basis_{level.layer}"),
            self._graph.constant(bias),
            hint=f"components_{level.layer}",
        )

    def cells(self) -> str:
        """The cell layer, ``[N, 5 * SIZES, G, H]``."""
        graph, start, parts = self._graph, 0, list[str]()
        for level, x in zip(self._head.levels, self._projected, strict=True):
            stop = start + level.cell_width
            weight = self._head.cell_weight[:, start:stop].reshape(
                len(self._head.cell_weight), -1, level.kernel, level.kernel
            )
            start = stop
            down, across = (
                cell_window(have, cells, level.kernel)
                for have, cells in zip(graph.shape(x)[2:], self._cells, strict=True)
            )
            part = graph.add(
                "Conv",
                x,
                graph.constant(weight, hint=f"cell_weight_{level.layer}"),
                hint=f"cells_{level.layer}",
                strides=[down[0], across[0]],
                pads=[down[1], across[1]] * 2,
            )
            if graph.shape(part)[2:] != self._cells:
                between = [
                    interpolation(have, cells)
                    for have, cells in zip(graph.shape(part)[2:], self._cells, strict=True)
                ]
                rows = graph.constant(between[0], hint="between_rows")
                columns = graph.constant(between[1].T, hint="between_columns")
                part = graph.add("MatMul", rows, part, hint="cells_taller")
                part = graph.add("MatMul", part, columns, hint="cells_larger")
            parts.append(part)
        total = parts[0]
        for part in parts[1:]:
            total = graph.add("Add", total, part, hint="cells_sum")
        bias = graph.constant(self._head.cell_bias.reshape(1, -1, 1, 1), hint="cell_bias")
        return graph.add("Add", total, bias, hint="cells")

    def proposals(self, cells: str) -> tuple[str, str]:
        """The best boxes ``[N, K, 4]`` and their objectness ``[N, K, 1]``."""
        graph, n, count = self._graph, self._images, self._cells[0] * self._cells[1]
        logs = self._part(cells, 1, 0, 4 * SIZES)
        logs = graph.add("Clip", logs, *(graph.constant(v) for v in LOG_LIMITS), hint="distances")
        stride = graph.constant(self._head.stride_px)
        sides = graph.add("Mul", graph.add("Exp", logs), stride, hint="distances_px")
        sides = self._reshaped(sides, n, SIZES, 4, count)
        sides = graph.add("Mul", sides, graph.constant([[[[-1], [-1], [1], [1]]]]))
        centres = cell_centres(*self._cells, self._head.stride_px)
        edges = graph.constant(np.concatenate([centres, centres], axis=1).T[None, None])
        boxes = self._clipped(graph.add("Add", sides, edges, hint="cell_edges"))
        boxes = graph.add("Transpose", boxes, perm=[0, 1, 3, 2], hint="cell_boxes")
        boxes = self._reshaped(boxes, n, SIZES * count, 4)
        scores = self._reshaped(self._part(cells, 1, 4 * SIZES, 5 * SIZES), n, SIZES * count)
        boxes, scores = self._best(boxes, scores, min(self._head.compared, SIZES * count))
        penalized = self._without_duplicates(boxes, scores)
        boxes, scores = self._best(boxes, scores, self._head.candidates, penalized)
        return boxes, graph.add("Unsqueeze", scores, graph.constant([2], np.int64))

    def _best(self, boxes: str, scores: str, count: int, by: str | None = None) -> tuple[str, str]:
        """The ``count`` best of boxes ``[N, L, 4]`` and scores ``[N, L]``, by the latter or by
        others ``[N, L]``.
        """
        graph = self._graph
        values, places = graph.top(by or scores, count)
        if by is not None:
            values = graph.add("GatherElements", scores, places, axis=1, hint="scores_kept")
        row = graph.add("Unsqueeze", places, graph.constant([2], np.int64))
        four = graph.constant([self._images, count, 4], np.int64)
        row = graph.add("Expand", row, four, hint="places_of_edges")
        return graph.add("GatherElements", boxes, row, axis=1, hint="boxes_kept"), values

    def _without_duplicates(self, boxes: str, scores: str) -> str:
        """The scores ``[N, M]`` of boxes in order of them, of duplicates far lower.

        All pairs are compared at once: a box goes where any better one is near, whether that one
        stays or goes (Fast NMS, Bolya et al. 2019, section 3.2).
        """
        graph, count = self._graph, self._graph.shape(scores)[1]
        better = graph.constant(np.triu(np.ones((count, count), np.float32), 1)[None])
        near = graph.add("Mul", self._excess(boxes, self._head.same), better, hint="near_better")
        most = graph.add("ReduceMax", near, graph.constant([1], np.int64), keepdims=0)
        worse = graph.add("Cast", graph.add("Greater", most, graph.constant(0.0)), to=1)
        return graph.add("Sub", scores, graph.add("Mul", worse, graph.constant(SUPPRESSED)))

    def _excess(self, boxes: str, least_iou: float) -> str:
        """Positive where two of boxes ``[N, M, 4]`` have a larger IoU than that: ``[N, M, M]``.

        It is asked for without a quotient: I > least * (A + B - I).
        """
        graph = self._graph
        edges = [self._part(boxes, 2, i, i + 1) for i in range(4)]
        across = [graph.add("Transpose", edge, perm=[0, 2, 1]) for edge in edges]
        sides, common_sides = list[str](), list[str]()
        for low, high in ((0, 2), (1, 3)):
            first = graph.add("Max", edges[low], across[low])
            last = graph.add("Min", edges[high], across[high])
            common_sides.append(graph.add("Relu", graph.add("Sub", last, first)))
            sides.append(graph.add("Sub", edges[high], edges[low]))
        common = graph.add("Mul", *common_sides, hint="common")
        area = graph.add("Mul", *sides, hint="areas")
        both = graph.add("Add", area, graph.add("Transpose", area, perm=[0, 2, 1]))
        limit = graph.add("Mul", both, graph.constant(least_iou / (1 + least_iou)))
        return graph.add("Sub", common, limit, hint="excess")

    def first_corrected(self, boxes: str, objectness: str) -> str:
        """The proposals ``[N, K, 4]`` after their first corrections, where the head has such."""
        weight, bias = self._head.first_weight, self._head.first_bias
        if weight is None or bias is None:
            return boxes
        joined, sizes = self._box_features(boxes, objectness)
        return self._moved(boxes, sizes, self._linear(joined, weight, bias))

    def corrected(self, boxes: str, objectness: str) -> tuple[str, str, str | None]:
        """The box layer: corrected boxes ``[N, K, 4]``, their expected IoU ``[N, K, 1]``, and the
        scores of their names and of the background ``[N, K, C + 1]``, where it names them.
        """
        joined, sizes = self._box_features(boxes, objectness)
        weight, bias, naming = self._head.box_weight, self._head.box_bias, self._head.naming
        if naming:
            weight = np.concatenate([weight, naming.weight])
            bias = np.concatenate([bias, naming.bias])
        linear = self._linear(joined, weight, bias)
        moved = self._moved(boxes, sizes, self._part(linear, 2, 0, 4))
        names = self._part(linear, 2, 5, 6 + len(naming.names)) if naming else None
        return moved, self._part(linear, 2, 4, 5), names

    def _box_features(self, boxes: str, objectness: str) -> tuple[str, str]:
        """What the box layer reads of boxes ``[N, K, 4]``, and their sizes ``[N, K, 2]``."""
        graph = self._graph
        middle, sizes = self._middles_and_sizes(boxes)
        blocks = [objectness]
        for level, x in zip(self._head.levels, self._projected, strict=True):
            used = x
            if level.box_channels < graph.shape(x)[1]:
                used = self._part(x, 1, 0, level.box_channels)
            blocks.append(self._pooled(used, middle, sizes, level.box_bins))
        blocks.append(self._geometry(sizes))
        if self._head.whole:
            whole = self._pooled(self._projected[-1], middle, sizes, 1, 1.0, SAMPLES_OF_CLASS)
            blocks.append(whole)
        return graph.add("Concat", *blocks, axis=2, hint="box_features"), sizes

    def _linear(self, features: str, weight: Array32, bias: Array32) -> str:
        """A linear layer ``[T, D]`` on features ``[N, K, D]`` of boxes."""
        ordered = self._graph.constant(self._by_bin(weight).T, hint="box_weight")
        linear = self._graph.add("MatMul", features, ordered, hint="box_products")
        return self._graph.add("Add", linear, self._graph.constant(bias), hint="box_linear")

    def _moved(self, boxes: str, sizes: str, corrections: str) -> str:
        """Boxes ``[N, K, 4]`` with their edges moved by shares of their sides ``[N, K, 4]``."""
        graph = self._graph
        limits = map(graph.constant, (-MOST_CORRECTION, MOST_CORRECTION))
        shifts = graph.add("Clip", corrections, *limits, hint="corrections")
        sides = graph.add("Concat", sizes, sizes, axis=2, hint="sizes_twice")
        steps = graph.add("Mul", shifts, sides)
        return self._clipped(graph.add("Add", boxes, steps, hint="boxes_moved"))

    def _by_bin(self, weight: Array32) -> Array32:
        """Weights ``[T, features]`` by bin, as the graph pools; in files channels lie between."""
        ordered, start = weight.copy(), 1
        for level in self._head.levels:
            stop, bins = start + level.box_width, level.box_bins
            part = weight[:, start:stop].reshape(len(weight), bins, level.box_channels, bins)
            ordered[:, start:stop] = part.transpose(0, 1, 3, 2).reshape(len(weight), -1)
            start = stop
        return ordered

    def confidence(self, boxes: str, expected: str, objectness: str, evidence: str) -> str:
        """The probability that each of the corrected boxes is right, ``[N, K, 1]``."""
        graph = self._graph
        if self._head.trust is None:
            slope, offset = (graph.constant(value) for value in self._head.certainty)
            logit = graph.add("Add", graph.add("Mul", expected, slope), offset)
            return graph.add("Sigmoid", logit, hint="confidence")
        excess = self._excess(boxes, ALIKE)
        near = graph.add("Cast", graph.add("Greater", excess, graph.constant(0.0)), to=1)
        alike = graph.add("ReduceSum", near, graph.constant([2], np.int64), keepdims=1)
        _, sizes = self._middles_and_sizes(boxes)
        sizes = graph.add("Mul", sizes, graph.constant(1 / max(self._shape)), hint="box_sides")
        cues = append_cues(graph, sizes, expected, objectness, evidence, alike)
        return append_logistic(graph, cues, self._head.trust)

    def _middles_and_sizes(self, boxes: str) -> tuple[str, str]:
        """Of boxes ``[N, K, 4]``: x and y of the middle, width and height; each ``[N, K, 2]``."""
        graph = self._graph
        least = graph.constant(SMALLEST * self._head.stride_px)
        low, high = (self._part(boxes, 2, i, i + 2) for i in (0, 2))
        sizes = graph.add("Max", graph.add("Sub", high, low), least, hint="sizes")
        middle = graph.add("Mul", graph.add("Add", low, high), graph.constant(0.5), hint="middles")
        return middle, sizes

    def _geometry(self, sizes: str) -> str:
        """``[N, K, GEOMETRY]`` of widths and heights: see ``geometry``."""
        graph = self._graph
        share = graph.add("Mul", sizes, graph.constant(1 / max(self._shape)), hint="size_shares")
        logs = graph.add("Log", share, hint="size_logs")
        squares = graph.add("Mul", logs, logs, hint="size_squares")
        product = graph.add("Mul", self._part(logs, 2, 0, 1), self._part(logs, 2, 1, 2))
        return graph.add("Concat", logs, squares, product, share, axis=2, hint="geometry")

    def _pooled(
        self,
        x: str,
        middle: str,
        sizes: str,
        bins: int,
        around: float = AROUND,
        samples: int = SAMPLES,
    ) -> str:
        """Maps ``[N, C, h, w]`` pooled to ``[N, K, bins * bins * C]`` in each of K boxes. A bin is
        the mean of samples that are interpolated bilinearly; beyond the map its border counts.
        """
        graph, count = self._graph, self._head.candidates
        n, channels, height, width = graph.shape(x)
        rows, columns = (
            self._weights(middle, sizes, axis, length, bins, around, samples)
            for axis, length in ((1, height), (0, width))
        )
        x = graph.add("Transpose", x, perm=[0, 2, 3, 1], hint="channels_last")
        if height * width <= FEW_CELLS:  # one product, of as many weights as there are cells
            rows = self._reshaped(rows, n * count, bins, 1, height, 1)
            columns = self._reshaped(columns, n * count, 1, bins, 1, width)
            both = graph.add("Mul", rows, columns, hint="pooling")
            both = self._reshaped(both, n, count * bins**2, height * width)
            cells = self._reshaped(x, n, height * width, channels)
            pooled = graph.add("MatMul", both, cells, hint="pooled")
        else:
            rows = self._reshaped(rows, n, count * bins, height)
            x = self._reshaped(x, n, height, width * channels)
            tall = graph.add("MatMul", rows, x, hint="pooled_rows")
            tall = self._reshaped(tall, n * count * bins, width, channels)
            wide = graph.constant([n * count, bins, bins, width], np.int64)
            across = self._reshaped(columns, n * count, 1, bins, width)
            across = graph.add("Expand", across, wide, hint="pooling_columns")
            across = self._reshaped(across, n * count * bins, bins, width)
            pooled = graph.add("MatMul", across, tall, hint="pooled")
        return self._reshaped(pooled, n, count, bins**2 * channels)

    def _weights(
        self,
        middle: str,
        sizes: str,
        axis: int,
        length: int,
        bins: int,
        around: float,
        samples: int,
    ) -> str:
        """How much each of ``length`` cells counts in each bin: ``[N, K, bins, length]``."""
        graph = self._graph
        count = bins * samples
        offsets = ((np.arange(count) + 0.5) / count - 0.5) * around
        centre, size = (self._part(each, 2, axis, axis + 1) for each in (middle, sizes))
        places = graph.add("Mul", size, graph.constant(offsets.reshape(1, 1, -1)))
        places = graph.add("Add", centre, places, hint="samples_px")
        cells = graph.add("Mul", places, graph.constant(length / self._shape[1 - axis]))
        cells = graph.add("Sub", cells, graph.constant(0.5))
        limits = (graph.constant(0.0), graph.constant(float(length - 1)))
        cells = graph.add("Clip", cells, *limits, hint="samples_cells")
        cells = graph.add("Unsqueeze", cells, graph.constant([3], np.int64))
        grid = graph.constant(np.arange(length, dtype=np.float32).reshape(1, 1, 1, -1))
        away = graph.add("Abs", graph.add("Sub", cells, grid), hint="cells_away")
        near = graph.add("Relu", graph.add("Sub", graph.constant(1.0), away), hint="bilinear")
        shape = (self._images, self._head.candidates, bins, samples, length)
        near = self._reshaped(near, *shape)
        return graph.add("ReduceMean", near, graph.constant([3], np.int64), keepdims=0)

    def scores(self, boxes: str) -> tuple[str, str]:
        """The classes' scores of the images ``[N, classes]`` and the boxes ``[N, K, classes]``.

        Where the scores are a linear layer on the mean of the last maps, it is applied to their
        mean in the box. Else those of the image stand for all. The layer is large: images and boxes
        share one product, so that its weights are read once.
        """
        graph, n, count = self._graph, self._images, self._head.candidates
        layer = pooled_linear(graph, self._forward)
        if layer is None:
            scores = graph.add("Unsqueeze", self._forward.scores, graph.constant([1], np.int64))
            shape = graph.constant([n, count, graph.shape(scores)[2]], np.int64)
            scores = graph.add("Expand", scores, shape, hint="scores_of_boxes")
            return self._forward.scores, scores
        places = self._middles_and_sizes(boxes)
        means = self._pooled(self._forward.last, *places, 1, 1.0, SAMPLES_OF_CLASS)
        whole = self._reshaped(layer.mean, n, 1, graph.shape(means)[2])
        both = graph.add("Concat", whole, means, axis=1, hint="means_of_all")
        scores = graph.add("MatMul", both, layer.weight, hint="class_products")
        scores = graph.add("Add", scores, layer.bias, hint="scores_of_all")
        of_images = self._reshaped(self._part(scores, 1, 0, 1), n, graph.shape(scores)[2])
        return of_images, self._part(scores, 1, 1, count + 1)

    def _clipped(self, boxes: str) -> str:
        """Edges, x0, y0, x1, y1 along axis 2, none outside the input."""
        rows, columns = self._shape
        limits = np.array([columns, rows, columns, rows], np.float32)
        limits = limits.reshape([1, 1, 4, 1][: len(self._graph.shape(boxes))])
        positive = self._graph.add("Relu", boxes, hint="edges_from_0")
        return self._graph.add("Min", positive, self._graph.constant(limits), hint="inside")

    def _reshaped(self, tensor: str, *shape: int) -> str:
        return self._graph.add("Reshape", tensor, self._graph.constant(shape, np.int64))

    def _part(self, tensor: str, axis: int, start: int, stop: int) -> str:
        values = (self._graph.constant([v], np.int64) for v in (start, stop, axis))
        return self._graph.add("Slice", tensor, *values, hint="part")
