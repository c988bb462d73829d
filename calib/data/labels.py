"""What all readers of label files share: texts and values, labels and their checks, and remarks.

Boxes become continuous pixel edges x0, y0, x1, y1 of the image, counted from 0.
"""

import codecs
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engines.errors import SourceError
from engines.text import displayable
from realtime.frames import BoxPx
from realtime.sources import images as sources
from realtime.sources.image_files import ARCHIVE_SUFFIXES
from realtime.sources.images import archive_members, has_suffix, natural_order

NAMED = 3
"""How many examples of a remark are named; the others are counted."""
LONGEST, LONGEST_EXAMPLE = 100, 400
"""Characters of a value out of a file that a message holds, and of an example with the path of its
file.
"""


class BadLabelError(SourceError):
    """One row, object or file of a label set cannot be used. The others can."""


def shown(value: object, longest: int = LONGEST) -> str:
    """Make text of a file fit for a message.

    It gets one line, without control characters, and is cut where it is long.
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
        """Keep that something was read otherwise than the file says it.

        ``example`` is the row, file or image.
        """
        self._counts[what] = self._counts.get(what, 0) + 1
        kept = self._guesses.setdefault(what, [])
        if len(kept) < NAMED and example not in kept:
            kept.append(shown(example, LONGEST_EXAMPLE))

    def leave_out(self, error: SourceError) -> None:
        """Keep that something cannot be used and is left out."""
        self.left_out += 1
        self.first = self.first or error
        if len(self._examples) < NAMED:
            self._examples.append(str(error))

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Leave out what raises SourceError inside."""
        try:
            yield
        except SourceError as error:
            self.leave_out(error)

    def nothing_left(self) -> SourceError | None:
        """The error for the case that everything was left out.

        It says why the first thing was, and how many more. It is None where nothing was left out.
        """
        if self.first is None:
            return None
        more = f" ({self.left_out - 1} more cannot be used either)" if self.left_out > 1 else ""
        return SourceError(f"{self.first}{more}", option=self.first.options)

    def add(self, other: "Remarks") -> None:
        """Take over all remarks of another."""
        self.left_out += other.left_out
        self.first = self.first or other.first
        self._examples = (self._examples + other._examples)[:NAMED]
        for what, examples in other._guesses.items():
            self._counts[what] = self._counts.get(what, 0) + other._counts[what]
            self._guesses[what] = (self._guesses.get(what, []) + examples)[:NAMED]

    def lines(self) -> list[str]:
        """One line for each kind of guess, for each of the first losses, and for the others."""
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

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing between its edges."""
        x0, y0, x1, y1 = self.box_xyxy_px
        return not (x0 < x1 and y0 < y1)

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
        ignored: its objects that are marked difficult, and crowds: finding them is neither right
            nor wrong.
    """

    image: str
    truths: tuple[Truth, ...]
    size_px: SizePx | None = None
    normalised: bool = False
    folder: str = ""
    own_name: str = ""
    frame: int | None = None
    others: int = 0
    ignored: tuple[Truth, ...] = ()


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


def is_marked(value: object) -> bool:
    """Whether a mark of an object is set, such as ``difficult`` or ``iscrowd``."""
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")


def are_fractions(boxes: Iterable[Sequence[float]]) -> bool:
    """Whether all numbers of all boxes of a file lie between 0 and 1.

    In pixels, all boxes would lie in the image's first pixel.
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
    """Refuse a box that is not possible.

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
    """A label with its boxes in pixels of its image.

    Boxes that are not possible are left out. Boxes that are slightly too large are cut.

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
        scaled = [
            tuple(replace(t, box_xyxy_px=_scaled(t.box_xyxy_px, width, height)) for t in truths)
            for truths in (label.truths, label.ignored)
        ]
        label = replace(label, truths=scaled[0], ignored=scaled[1], normalised=False)
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
    ignored = (truth.clipped(size_px) for truth in label.ignored)
    return replace(
        label,
        truths=tuple(kept),
        others=label.others + left_out,
        ignored=tuple(truth for truth in ignored if not truth.is_empty),
    )


def _scaled(box: BoxPx, width: float, height: float) -> BoxPx:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _check_size(
    label: Label, size_px: SizePx, where: str, remarks: Remarks, turned_by_exif: bool
) -> None:
    """Compare a declared image size with the real one.

    Some tools swap height and width, or write the size before EXIF rotation.
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


MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
Readers = Mapping[str, Callable[[], bytes]]


def is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def visible(name: str) -> bool:
    """Whether no file or folder of a path is hidden, or left behind by macOS or an editor."""
    return not any(
        part.startswith(".") and part != ".." for part in _parts(name)
    ) and "__MACOSX" not in _parts(name)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != ".")


def members(place: Path, suffixes: Set[str]) -> Readers:
    """What reads each visible file of these kinds in a folder, zip or tar.

    The keys are paths inside it, in natural order.

    Raises:
        SourceError: the archive cannot be read.
    """
    if is_archive(place):
        return {name: read for name, read in archive_members(place, suffixes) if visible(name)}
    names = [
        p.relative_to(place).as_posix()
        for p in place.rglob("*")
        if has_suffix(p.name, suffixes) and p.is_file()
    ]
    return {
        name: partial(file_bytes, place / name) for name in natural_order(names) if visible(name)
    }


def file_bytes(path: Path) -> bytes:
    """The content of a label or image file.

    Raises:
        SourceError: it cannot be read, is no plain file, or is too large.
    """
    try:
        return sources.file_bytes(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def text_of(content: bytes, where: str, remarks: Remarks, declared: str = "") -> str:
    """Decode a text.

    The encoding is that of the byte order mark, that which the file declares, UTF-8, or else
    Windows-1252, which is a remark.

    Raises:
        BadLabelError: it is not text.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return _checked(_decoded(content[len(mark) :], encoding), where)
    for encoding in (declared, "utf-8", "cp1252"):
        text = _decoded(content, encoding) if encoding else None
        if text is not None and "\0" not in text:
            if encoding == "cp1252":
                _checked(text, where)
                remarks.guess("not in UTF-8, read as Windows-1252", where)
            return _checked(text, where)
    return _checked(None, where)


def _decoded(content: bytes, encoding: str) -> str | None:
    try:
        return (
            codecs.decode(content, encoding) if codecs.lookup(encoding)._is_text_encoding else None
        )
    except (UnicodeError, LookupError, ValueError):
        return None


def _checked(text: str | None, where: str) -> str:
    if text is None or any(character in text for character in "\0\1\2\3\4\5\6\7\x08\x0e\x0f"):
        raise BadLabelError(
            f"{where} is not a text file in UTF-8, UTF-16 or Windows-1252: it is damaged or of"
            " another kind"
        )
    return text


def json_of(content: bytes, where: str, remarks: Remarks) -> Any:
    """Parse a JSON file.

    Raises:
        BadLabelError: it is not JSON, or nested deeper than any label file.
    """
    try:
        return json.loads(text_of(content, where, remarks))
    except RecursionError as error:
        raise BadLabelError(
            f"{where} is not a label file: its JSON is nested too deeply"
        ) from error
    except ValueError as error:
        raise BadLabelError(f"{where} is not JSON: {shown(error)}") from error


def number(value: object, what: str) -> float:
    """A finite or infinite number, from a number or its text.

    Raises:
        BadLabelError: it is something else.
    """
    try:
        if isinstance(value, str) and "_" not in value:
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadLabelError(f"its {what} is {shown(value) or 'empty'}, not a number")


def numbers(value: object, what: str, count: int | None = None) -> list[float]:
    """A list of that many numbers.

    Raises:
        BadLabelError: it is something else.
    """
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        wanted = f"{count} numbers" if count else "a list of numbers"
        raise BadLabelError(f"its {what} is {shown(value)}, not {wanted}")
    return [number(item, what) for item in value]


def field(item: object, *keys: str) -> Any:
    """The value of the first of these keys that an object of a JSON file has.

    Raises:
        BadLabelError: it is no object, or has none of them.
    """
    if not isinstance(item, Mapping):
        raise BadLabelError(f"it is {shown(item)}, not an object with fields")
    for key in keys:
        if item.get(key) is not None:
            return item[key]
    raise BadLabelError(f"it has no '{keys[0]}'")


def optional(item: object, *keys: str) -> Any:
    """The same. It is None where the value is missing."""
    return (
        next((item[key] for key in keys if item.get(key) is not None), None)
        if isinstance(item, Mapping)
        else None
    )


def listed(value: object, what: str) -> Sequence[Any]:
    """Read a list. A missing one is empty.

    Raises:
        BadLabelError: it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadLabelError(f"its {what} is {shown(value)}, not a list")
    return value


def named(value: object, what: str) -> str:
    """Read the name of a class or file.

    Raises:
        BadLabelError: it is empty or not a text.
    """
    text = value.strip() if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    if not text:
        raise BadLabelError(f"its {what} is {shown(value) or 'empty'}: name one")
    return text


def size_of_labels(width: object, height: object) -> tuple[int, int] | None:
    """An image's declared (width, height).

    It is None where it is missing, 0 or no size. Then the size of the image itself counts.
    """
    try:
        sides = [number(side, "size") for side in (width, height)]
    except BadLabelError:
        return None
    return (
        (round(sides[0]), round(sides[1]))
        if all(math.isfinite(s) and 0 < s < 1e9 for s in sides)
        else None
    )
