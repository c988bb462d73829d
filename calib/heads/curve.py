"""The learning curve: accuracy of heads over the number of labelled boxes, beside a box that needs
no image; and of few boxes a curve through what was measured, which says what more would bring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.datasets import Sample
from calib.evaluation.metrics import check_disjoint, constant_boxes, corloc
from calib.evaluation.report import plain
from calib.heads.linear import (
    FOLDS,
    FeatureTable,
    Rows,
    feature_table,
    fit_rows,
    group_numbers,
    predict,
)
from engines.boxes import iou
from engines.errors import SourceError
from engines.files import checked_suffix, picture_kind, signed, whole_file
from engines.maps import Feature, MapSpec
from engines.networks.registry import Classifier

COUNTS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
SUBSETS = 5
HELD_OUT = 5
"""One image of so many is held out, or of sequences one sequence of so many, where no other set is
given.
"""
NEAREST = 2 / 3
"""The largest subset, as a share of all boxes. A larger one would be nearly all of them."""
CURVE = "learning curve"
CURVE_FILE = picture_kind(CURVE)


@dataclass(frozen=True)
class Point:
    """The accuracy of heads that were fitted on equally many boxes.

    Attributes:
        boxes: how many boxes.
        corloc, mean_iou: of each head, on the held-out images.
    """

    boxes: int
    corloc: tuple[float, ...]
    mean_iou: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """The accuracy of heads over the number of boxes that they were fitted on.

    Attributes:
        points: the one with the fewest boxes first; the last one has all boxes.
        constant_corloc, constant_mean_iou: of the best constant box of all training boxes, on the
            same held-out images.
        held_out: the number of these images.
    """

    points: tuple[Point, ...]
    constant_corloc: float
    constant_mean_iou: float
    held_out: int


HALVES = np.geomspace(2, 200, 60)
"""After so many boxes a curve has half of what all boxes bring."""
MOST_IOU = 0.95
"""No curve goes higher: people do not draw the same box twice."""
NOTABLE = 0.01
"""A gain in mean IoU that is worth more boxes."""


@dataclass(frozen=True)
class Forecast:
    """The mean IoU over the number of boxes, as a curve through few points:
    ``top - (top - start) * half / (half + boxes)``.

    Attributes:
        points: boxes and mean IoU of each; the first has no boxes.
        top: where the curve ends.
        half: boxes that bring half of the way there.
        boxes: that there are.
    """

    points: tuple[tuple[float, float], ...]
    top: float
    half: float
    boxes: int

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]], boxes: int) -> "Forecast":
        """The curve with the least squared error; of several that are alike, the one that promises
        least. It begins in the first point.
        """
        start = points[0][1]
        counts, ious = np.array(points[1:]).T
        best, least = (start, float(HALVES[0])), np.inf
        for half in HALVES.tolist():
            way = counts / (half + counts)
            top = start + float(way @ (ious - start) / (way @ way))
            top = min(max(top, 0.0), max(MOST_IOU, start))
            error = float((((top - start) * way + start - ious) ** 2).sum())
            if error < least - 1e-6:
                best, least = (top, half), error
        rounded = tuple((round(count, 1), round(value, 4)) for count, value in points)
        return cls(rounded, round(best[0], 4), round(best[1], 2), boxes)

    def at(self, boxes: float) -> float:
        """The mean IoU with so many boxes."""
        return self.top - (self.top - self.points[0][1]) * self.half / (self.half + boxes)

    @property
    def words(self) -> str:
        """What as many boxes more would bring, in one sentence."""
        now, then = self.at(self.boxes), self.at(2 * self.boxes)
        if then - now < NOTABLE:
            return (
                "more boxes like these would hardly help; other places, sizes and lights may, and"
                " boxes that fit closer"
            )
        return (
            f"with {self.boxes} boxes more, the mean IoU would be about {then:.2f} in place of"
            f" {now:.2f}"
        )


def curve_of(
    samples: Sequence[Sample],
    held_out: Sequence[Sample] | None,
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
) -> Curve:
    """The learning curve of a data set, over its images with exactly one box.

    Args:
        samples: the training set.
        held_out: images to measure on; None for a fifth of ``samples``, see ``split_fifth``, on
            which no head is fitted then.
        classifier: the network.
        spec: the map that heads read.
        features: of that map and of others, in order.
        console: for progress.

    Raises:
        SourceError: fewer than 10 images are left to fit on, or none to measure on.
    """
    check_enough(samples, held_out)
    table = feature_table(samples, classifier, spec, features, console)
    if held_out is not None:
        return learning_curve(
            table, feature_table(held_out, classifier, spec, features, console), console
        )
    fitted, measured = split_fifth([sample.group for sample in samples if sample.one_box])
    return learning_curve(table.take(fitted), table.take(measured), console)


def check_enough(samples: Sequence[Sample], held_out: Sequence[Sample] | None) -> None:
    """Refuse data without enough images for a learning curve, before anything is computed.

    Args:
        samples: the training set.
        held_out: see ``curve_of``.

    Raises:
        SourceError: fewer than 10 images are left to fit on, or none to measure on, or some are in
            both sets.
    """
    groups = [sample.group for sample in samples if sample.one_box]
    fitted, _ = split_fifth(groups)
    if len(groups if held_out is not None else fitted) < 2 * FOLDS:
        raise SourceError(
            f"a learning curve needs {2 * FOLDS} images with one box each beside the held-out ones:"
            " label more"
        )
    if held_out is not None:
        if not any(sample.one_box for sample in held_out):
            raise SourceError(
                "none of the images to measure the learning curve on has exactly one box: give"
                " others"
            )
        check_disjoint(samples, held_out, ("curve_on", "curve_ids"))


def split_fifth(groups: Sequence[str]) -> tuple[Rows, Rows]:
    """Split images at random into those to fit on and a fifth to measure on. No group is split.

    Args:
        groups: the group of each image, see ``calib.data.datasets.Sample.group``.

    Returns:
        The rows to fit on, and the rows to measure on.
    """
    numbers = group_numbers(groups, np.arange(len(groups)))
    count = numbers.max(initial=-1) + 1
    rank = np.argsort(np.random.default_rng(0).permutation(count))[numbers]
    rows = np.argsort(rank, kind="stable")
    fifth = int((rank < count // HELD_OUT).sum())
    return rows[fifth:], rows[:fifth]


def learning_curve(
    train: FeatureTable,
    held_out: FeatureTable,
    console: Console,
    counts: Sequence[int] = COUNTS,
    subsets: int = SUBSETS,
) -> Curve:
    """Fit heads on random subsets of several sizes, and measure each on the held-out images.

    Args:
        train: subsets are drawn from it without replacement; at least 10 images.
        held_out: the images to measure on.
        console: for progress.
        counts: the sizes of subsets. Those above ``NEAREST`` are left out, and all images come
            last.
        subsets: how many subsets of each size. They depend on the size alone, so that more sizes
            change no point.
    """
    total = len(train.values)
    sizes = [*(count for count in counts if count <= NEAREST * total), total]
    results: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    every = np.arange(len(held_out.values))
    runs = [(size, number) for size in sizes for number in range(subsets if size < total else 1)]
    for size, number in track(runs, "fitting subsets", console=console):
        rows = np.random.default_rng([size, number]).choice(total, size, replace=False)
        ious = held_out.ious(predict(held_out.values, *fit_rows(train, rows)), every)
        results[size].append((corloc(ious), float(ious.mean())))
    points = tuple(
        Point(size, *(tuple(values) for values in zip(*found, strict=True)))
        for size, found in results.items()
    )
    constant = iou(constant_boxes(train.boxes_xyxy).best_constant, held_out.boxes_xyxy)
    return Curve(points, corloc(constant), float(constant.mean()), len(held_out.values))


def curve_table(curve: Curve) -> Table:
    """The medians and ranges as a table for the terminal."""
    table = Table(
        title=f"learning curve, {curve.held_out} held-out images: median (range)",
        title_justify="left",
    )
    for column in ("boxes", "CorLoc", "mean IoU"):
        table.add_column(column, justify="right")
    for point in curve.points:
        shares, ious = 100 * np.array(point.corloc), np.array(point.mean_iou)
        table.add_row(str(point.boxes), _spread(shares, ".1f", " %"), _spread(ious, ".3f"))
    constant = f"{100 * curve.constant_corloc:.1f} %", f"{curve.constant_mean_iou:.3f}"
    table.add_row("best constant box", *constant, style="dim")
    return table


def _spread(values: NDArray[np.float64], form: str, unit: str = "") -> str:
    """The median of values, and their range where there are several."""
    median = f"{np.median(values):{form}}{unit}"
    return (
        median if len(values) == 1 else f"{median} ({values.min():{form}} - {values.max():{form}})"
    )


def plot_curve(curve: Curve, path: Path, title: str) -> None:
    """Plot CorLoc and mean IoU over the number of boxes, with the range of the subsets.

    A dashed line is the best constant box.

    Args:
        curve: what to plot.
        path: the picture to write.
        title: the first part of the heading.

    Raises:
        OutputError: the name does not end in ``.png``, or the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    checked_suffix(path, CURVE_FILE.suffixes, CURVE_FILE.what)
    boxes = [point.boxes for point in curve.points]
    panels = (
        (
            "CorLoc, %",
            [100 * np.array(p.corloc) for p in curve.points],
            100 * curve.constant_corloc,
        ),
        ("mean IoU", [np.array(p.mean_iou) for p in curve.points], curve.constant_mean_iou),
    )
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(f"{plain(title)}, measured on {curve.held_out} held-out images", fontsize=12)
    for axes, (name, values, constant) in zip(figure.subplots(1, 2), panels, strict=True):
        low, high = [v.min() for v in values], [v.max() for v in values]
        axes.fill_between(
            boxes, low, high, color="#4C78A8", alpha=0.2, linewidth=0, label="range of subsets"
        )
        axes.plot(
            boxes,
            [np.median(v) for v in values],
            "o-",
            color="#4C78A8",
            markersize=5,
            label="head, median",
        )
        axes.axhline(
            constant,
            color="#222222",
            linestyle=(0, (5, 3)),
            linewidth=1.4,
            label="best constant box",
        )
        axes.set(xscale="log", xlabel="labelled boxes", ylabel=name)
        axes.set_xticks(boxes, [str(count) for count in boxes], fontsize=9)
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(loc="upper left", frameon=False, fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(CURVE))
