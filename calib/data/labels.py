"""The labels of one image, the checks of their values, and the remarks on what was left out.

This module opens no file.

Boxes become continuous pixel edges x0, y0, x1, y1 of the image, counted from 0.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from engines.errors import SourceError
from engines.text import displayable
from realtime.frames import BoxPx

NAMED = 3
"""How many examples of a remark are named; the others are counted."""
LONGEST, LONGEST_EXAMPLE = 100, 400
"""Characters of a value out of a file that a message holds, and of an example with the path of its
file.
"""


class BadLabelError(SourceError):
    """One row, object or file of a label set cannot be used; the others can."""


def shown(value: object, longest: int = LONGEST) -> str:
    """Text out of a file as a message may hold it: on one line, without control characters, cut
    where it is long.
    """
    text = displayable(str(value)[: longest + 1])
    return text if len(text) <= longest else text[:longest] + " ..."


class Remarks:
    """Collects what a reader leaves out and what it guesses.

    Attributes:
        left_out: how many rows, objects, files and images could not be used.
        first: why the first of them could not; None where all could.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self.first: SourceError | None = None
        self._examples: list[str] = []
        self._guesses: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def guess(self, what: str, example: str) -> None:
        """Something was read otherwise than the file says it; ``example`` is the row, file or
        image.
        """
        self._counts[what] = self._counts.get(what, 0) + 1
        kept = self._guesses.setdefault(what, [])
        if len(kept) < NAMED and example not in kept:
            kept.append(shown(example, LONGEST_EXAMPLE))

    def leave_out(self, error: SourceError) -> None:
        """Something cannot be used and is passed over."""
        self.left_out += 1
        self.first = self.first or error
        if len(self._examples) < NAMED:
            self._examples.append(str(error))

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """What raises SourceError inside is left out."""
        try:
            yield
        except SourceError as error:
            self.leave_out(error)

    def nothing_left(self) -> SourceError | None:
        """The error where all had to be left out: why the first of them was, and how many more;
        None where nothing was.
        """
        if self.first is None:
            return None
        more = f" ({self.left_out - 1} more cannot be used either)" if self.left_out > 1 else ""
        return SourceError(f"{self.first}{more}")

    def add(self, other: "Remarks") -> None:
        """Take over all that another collected."""
        self.left_out += other.left_out
        self.first = self.first or other.first
        self._examples = (self._examples + other._examples)[:NAMED]
        for what, examples in other._guesses.items():
            self._counts[what] = self._counts.get(what, 0) + other._counts[what]
            self._guesses[what] = (self._guesses.get(what, []) + examples)[:NAMED]

    def lines(self) -> list[str]:
        """One line for each kind of guess; one for each of the first things left out, and one for
        the number of the others.
        """
        guesses = [
            f"{what} ({_counted(self._counts[what], examples)})"
            for what, examples in self._guesses.items()
        ]
        left = [f"left out: {example}" for example in self._examples]
        more = self.left_out - len(self._examples)
        return [*guesses, *left, *([f"left out: {more} more"] if more > 0 else [])]

    def tell(self) -> None:
        """Print the lines on the standard error stream."""
        for line in self.lines():
            print(displayable(f"note: {line}"), file=sys.stderr)


def _counted(count: int, examples: list[str]) -> str:
    more = count - len(examples)
    return ", ".join(examples) + (f" and {more} more" if more > 0 else "")


SizePx = tuple[int, int]
TOLERANCE_PX = 1.0
"""How far a box may reach beyond its image: files that count pixels from 0 and from 1 differ by
that much.
"""
LEAST_INSIDE = 0.75
"""The share of a box that lies in its image: boxes that reach further beyond it were made for
another image.
"""
SIZE_SLACK = 0.02
"""How far a declared image size may be off: labelling tools round it; beyond, the labels were made
for another image.
"""
FRACTION_SLACK = 0.05
"""How far beyond 0 and 1 fractions of an image may reach, as boxes in pixels do too."""


@dataclass(frozen=True)
class Truth:
    """A true box and its class."""

    class_name: str
    box_xyxy_px: BoxPx

    def clipped(self, size_px: SizePx) -> "Truth":
        """The same with its box cut to an image of (width, height)."""
        (x0, y0, x1, y1), (width, height) = self.box_xyxy_px, size_px
        return replace(
            self,
            box_xyxy_px=(max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)),
        )


@dataclass(frozen=True)
class Label:
    """What a label file says of one image.

    Attributes:
        image: its name.
        truths: its boxes; none where nothing is to be found.
        size_px: its (width, height), where the file says so.
        normalised: boxes are fractions of the image's width and height.
        folder: that the label file lies in, inside the data set.
        own_name: of the label file less its ending, where it is of this image only: a second name
            of the image.
        frame: its number among the images, where the file names frames only so.
        others: how many more objects it has whose box cannot be used.
    """

    image: str
    truths: tuple[Truth, ...]
    size_px: SizePx | None = None
    normalised: bool = False
    folder: str = ""
    own_name: str = ""
    frame: int | None = None
    others: int = 0


def corners_voc(x_min: float, y_min: float, x_max: float, y_max: float) -> BoxPx:
    """Edges of a box given by its first and last pixels, counted from 1, as VOC does."""
    return x_min - 1, y_min - 1, x_max, y_max


def corner_and_size(x: float, y: float, width: float, height: float) -> BoxPx:
    return x, y, x + width, y + height


def centre_and_size(x: float, y: float, width: float, height: float) -> BoxPx:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def around(points: Iterable[Sequence[float]]) -> BoxPx:
    """The upright box around points x, y.

    Raises:
        BadLabelError: there are fewer than two.
    """
    xs, ys = (
        zip(*(tuple(point)[:2] for point in points), strict=True)
        if (points := list(points))
        else ((), ())
    )
    if len(xs) < 2:
        raise BadLabelError("it has fewer than two points")
    return min(xs), min(ys), max(xs), max(ys)


def turned(box: BoxPx, degrees: float, pivot_xy: tuple[float, float]) -> BoxPx:
    """The upright box around a box that is turned clockwise about a point."""
    (x0, y0, x1, y1), (px, py) = box, pivot_xy
    if not math.isfinite(degrees):
        raise BadLabelError(f"its rotation is {degrees}, not a finite number")
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    corners = [(x - px, y - py) for x in (x0, x1) for y in (y0, y1)]
    return around((px + x * cosine - y * sine, py + x * sine + y * cosine) for x, y in corners)


def are_fractions(boxes: Iterable[Sequence[float]]) -> bool:
    """Whether all numbers of all boxes of a file lie between 0 and 1: in pixels all would lie in
    the image's first pixel.
    """
    values = [value for box in boxes for value in box if math.isfinite(value)]
    return (
        bool(values)
        and all(-FRACTION_SLACK <= value <= 1 + FRACTION_SLACK for value in values)
        and max(values) > 0
    )


def say_fractions(where: str, remarks: Remarks) -> None:
    remarks.guess(
        "all boxes lie between 0 and 1: read as fractions of each image's width and height", where
    )


def check_truth(truth: Truth, where: str, size_px: SizePx | None = None) -> None:
    """Refuse a box that cannot be.

    Args:
        truth: as labelled.
        where: file and image, for the message.
        size_px: (width, height) of the image, where it is known.

    Raises:
        BadLabelError: an edge is not finite, edges are in the wrong order, or the box leaves the
            image by more than a margin.
    """
    x0, y0, x1, y1 = truth.box_xyxy_px
    box = f"{where}: box {x0:g},{y0:g},{x1:g},{y1:g} of '{shown(truth.class_name)}'"
    if not all(math.isfinite(edge) for edge in truth.box_xyxy_px):
        raise BadLabelError(
            f"{box} has an edge that is not a finite number: correct the box or remove it"
        )
    if x0 >= x1 or y0 >= y1:
        raise BadLabelError(
            f"{box} is empty or reversed: edges are x0,y0,x1,y1 with x0 < x1 and y0 < y1; correct"
            " it or remove it"
        )
    if size_px is None:
        return
    width, height = size_px
    beyond_px = max(-x0, -y0, x1 - width, y1 - height)
    inside = (
        max(0.0, min(x1, width) - max(x0, 0))
        / (x1 - x0)
        * max(0.0, min(y1, height) - max(y0, 0))
        / (y1 - y0)
    )
    if not inside or (beyond_px > TOLERANCE_PX and inside < LEAST_INSIDE):
        how = f"reaches {beyond_px:g} px beyond" if inside else "lies outside"
        image = f"the image of {width}x{height} px"
        raise BadLabelError(
            f"{box} {how} {image}: correct it, or give the images that the labels were made for"
        )
    if x1 <= 1 and y1 <= 1 and min(width, height) > 8:
        raise BadLabelError(
            f"{box} lies in one pixel: give pixels, or fractions of the image in all rows"
        )


def fitted(
    label: Label, size_px: SizePx, where: str, remarks: Remarks, turned_by_exif: bool = False
) -> Label:
    """A label with its boxes in pixels of its image; boxes that cannot be are left out, those
    slightly too large are cut.

    Args:
        label: as read.
        size_px: (width, height) of the image itself, as it is shown.
        where: label file and image, for messages.
        remarks: takes what is left out or guessed.
        turned_by_exif: the image's file holds it on its side.

    Raises:
        BadLabelError: the label was made for an image of another size.
    """
    if label.normalised:
        width, height = size_px
        scaled = (
            replace(t, box_xyxy_px=_scaled(t.box_xyxy_px, width, height)) for t in label.truths
        )
        label = replace(label, truths=tuple(scaled), normalised=False)
    _check_size(label, size_px, where, remarks, turned_by_exif)
    kept: list[Truth] = []
    for truth in label.truths:
        with remarks.leaving_out():
            check_truth(truth, where, size_px)
            x0, y0, x1, y1 = truth.box_xyxy_px
            if max(-x0, -y0, x1 - size_px[0], y1 - size_px[1]) > TOLERANCE_PX:
                remarks.guess("boxes that reach slightly beyond their image are cut to it", where)
                truth = truth.clipped(size_px)  # noqa: PLW2901
            kept.append(replace(truth, class_name=displayable(truth.class_name)))
    left_out = len(label.truths) - len(kept)
    return replace(label, truths=tuple(kept), others=label.others + left_out)


def _scaled(box: BoxPx, width: float, height: float) -> BoxPx:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _check_size(
    label: Label, size_px: SizePx, where: str, remarks: Remarks, turned_by_exif: bool
) -> None:
    """Compare a declared image size with the real one. Some tools write height for width, or the
    size before EXIF rotation.
    """
    declared_px = label.size_px
    if declared_px is None or _like(declared_px, size_px):
        return
    said, real = ("x".join(map(str, size)) for size in (declared_px, size_px))
    exif = "; the file's EXIF data turn it by 90 degrees" if turned_by_exif else ""
    boxes = [truth.box_xyxy_px for truth in label.truths]
    fits = all(
        x1 <= size_px[0] + TOLERANCE_PX and y1 <= size_px[1] + TOLERANCE_PX
        for _, _, x1, y1 in boxes
    )
    if not _like((declared_px[1], declared_px[0]), size_px) or not fits:
        raise BadLabelError(
            f"{where} has {real} px, its label says {said}{exif}: give the images that the labels"
            " were made for"
        )
    if turned_by_exif:
        what = (
            "labels give the size before EXIF rotation: boxes fit the turned image and are taken so"
        )
    else:
        what = (
            "labels give the image's width and height in the wrong order (EXIF rotation does so):"
            " boxes fit and are taken"
        )
    remarks.guess(what, f"{where}: {said}, the image has {real} px")


def _like(declared_px: SizePx, size_px: SizePx) -> bool:
    return all(
        abs(said - real) <= SIZE_SLACK * real
        for said, real in zip(declared_px, size_px, strict=True)
    )
