"""Reads tables with one row for each box, as spreadsheets, TensorFlow, keras-retinanet, Open Images
and others write them.

Any delimiter, any spelling of the usual column names, or no first line of names at all.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.data.json_dialects import via_region
from calib.data.labels import (
    BadLabelError,
    Label,
    Remarks,
    Truth,
    are_fractions,
    centre_and_size,
    corner_and_size,
    corners_voc,
    is_marked,
    named,
    numbers,
    say_fractions,
    shown,
    size_of_labels,
    text_of,
)
from realtime.frames import BoxPx

DELIMITERS = ",;\t|"
IMAGE = (
    "file",
    "frame",
    "filename",
    "image",
    "path",
    "imageid",
    "imagename",
    "imagefilename",
    "filepath",
    "imagepath",
    "imagefile",
    "img",
    "imgname",
    "imgpath",
    "imageurl",
    "url",
    "photo",
    "picture",
    "externalid",
    "name",
    "id",
)
CLASS = (
    "class",
    "wnid",
    "label",
    "category",
    "classname",
    "labelname",
    "categoryname",
    "objectclass",
    "objectname",
    "object",
    "type",
    "name",
    "tag",
    "text",
    "classes",
    "labels",
    "classid",
    "labelid",
    "categoryid",
    "cls",
    "target",
)


def _edges(x0: float, y0: float, x1: float, y1: float) -> BoxPx:
    return x0, y0, x1, y1


Place = Callable[[float, float, float, float], BoxPx]
BOXES: tuple[tuple[tuple[str, ...], Place], ...] = (
    (("x0", "y0", "x1", "y1"), _edges),
    (("xmin", "ymin", "xmax", "ymax"), corners_voc),
    (("x1", "y1", "x2", "y2"), _edges),
    (("left", "top", "right", "bottom"), _edges),
    (("xtl", "ytl", "xbr", "ybr"), _edges),
    (("minx", "miny", "maxx", "maxy"), _edges),
    (("startx", "starty", "endx", "endy"), _edges),
    (("xstart", "ystart", "xend", "yend"), _edges),
    (("bboxx1", "bboxy1", "bboxx2", "bboxy2"), _edges),
    (("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"), _edges),
    (("cx", "cy", "w", "h"), centre_and_size),
    (("cx", "cy", "width", "height"), centre_and_size),
    (("xcenter", "ycenter", "width", "height"), centre_and_size),
    (("xcenter", "ycenter", "w", "h"), centre_and_size),
    (("xcentre", "ycentre", "width", "height"), centre_and_size),
    (("centerx", "centery", "width", "height"), centre_and_size),
    (("bboxx", "bboxy", "bboxwidth", "bboxheight"), corner_and_size),
    (("bboxx", "bboxy", "bboxw", "bboxh"), corner_and_size),
    (("x", "y", "w", "h"), corner_and_size),
    (("x", "y", "width", "height"), corner_and_size),
    (("xmin", "ymin", "width", "height"), corner_and_size),
    (("xmin", "ymin", "w", "h"), corner_and_size),
    (("left", "top", "width", "height"), corner_and_size),
    (("left", "top", "w", "h"), corner_and_size),
)
"""Columns of a box and how they place it; only VOC's count pixels from 1."""
BOX_LISTS = ("bbox", "box", "boundingbox", "bboxes")
SIZES = (
    ("imagewidth", "imageheight"),
    ("imgwidth", "imgheight"),
    ("imgw", "imgh"),
    ("imw", "imh"),
    ("width", "height"),
)
IGNORED = ("difficult", "isdifficult", "iscrowd", "crowd", "ignore", "ignored", "isgroupof")
VIA = ("regionshapeattributes", "regionattributes")
IMAGE_NAME = re.compile(
    r"\.(jpe?g|jfif|png|bmp|webp|tiff?|gif|avif|heic|jp2|mpo|p[gpb]m)$", re.IGNORECASE
)
Row = Mapping[str, str]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        names: of all columns, as compared: small letters and digits.
        image, class_name: column of each; no class: one kind of objects.
        box: four columns, or one that holds four numbers.
        place: from the four numbers to edges.
        size: of the image, where the table has it.
        ignored: whether finding the object is neither right nor wrong.
    """

    names: tuple[str, ...]
    image: str
    class_name: str | None
    box: tuple[str, ...]
    place: Place
    size: tuple[str, str] | None = None
    ignored: str | None = None


def read_table(content: bytes, path: str, remarks: Remarks) -> list[Label]:
    """Read the labels of a table, in the file's order.

    Raises:
        BadLabelError: it is no such table, or no row of it can be used.
    """
    rows = _rows(text_of(content, path, remarks), path, remarks)
    if not rows and remarks.first:
        raise remarks.first
    if not rows:
        raise BadLabelError(f"{path} is empty: the first line must name file,class,x0,y0,x1,y1")
    first = [_plain(cell) for cell in rows[0][1]]
    if set(VIA) <= set(first):
        return _via(rows, first, path, remarks)
    columns = _named_columns(first)
    if columns is None:
        columns = _columns_by_content(rows)
        if columns is None:
            cells = ",".join(map(shown, rows[0][1][:12]))
            raise BadLabelError(
                f"{path}: the first line must name file,class,x0,y0,x1,y1 (it names {shown(cells)})"
            )
        remarks.guess(f"no line of column names, read as {','.join(columns.names)}", path)
    else:
        rows = rows[1:]
        if len(columns.box) == 1:
            remarks.guess(f"column '{columns.box[0]}' is read as x,y,width,height", path)
    return _labels(rows, columns, path, remarks)


def is_sequence(path: Path) -> bool:
    """Whether a file has a row for every frame of one sequence.

    Such a file is a table whose first column is ``frame``.
    """
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.readline(1 << 16)
    return (
        re.match(
            r"\W*frame\W*[,;|\t]", start.replace(b"\0", b"").decode("latin-1").removeprefix("ï»¿")
        )
        is not None
    )


def _rows(text: str, path: str, remarks: Remarks) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not empty.

    The delimiter is the one that parts the first line most often.
    """
    lines = [
        (place, line)
        for place, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1)
        if line.strip()
    ]
    if lines and re.fullmatch(r"sep=.", lines[0][1].strip()):  # Excel writes sep=;
        lines.pop(0)
    if not lines:
        return []
    lines[0] = (lines[0][0], lines[0][1].lstrip("# "))
    first = lines[0][1]
    delimiter = max(DELIMITERS, key=lambda d: (len(_cells(first, d) or ()), d == ","))
    if delimiter == "," and "," not in first and len(first.split()) > 4:
        delimiter = " "
    rows = []
    for place, line in lines:
        cells = _cells(line, delimiter)
        if cells is None:
            remarks.leave_out(
                BadLabelError(
                    f"{path} line {place} is not a row of a CSV file: check its quotation marks"
                )
            )
        elif any(cells):
            rows.append((place, cells))
    return rows


def _cells(line: str, delimiter: str) -> list[str] | None:
    try:
        return [
            cell.strip()
            for cell in next(
                csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True)
            )
        ]
    except csv.Error:
        return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named_columns(names: Sequence[str]) -> Columns | None:
    """The columns as the first line names them. None where it does not name an image and a box."""
    there = set(names)
    box, place = next(
        ((keys, place) for keys, place in BOXES if set(keys) <= there), ((), corner_and_size)
    )
    box = box or next(((key,) for key in BOX_LISTS if key in there), ())
    image = next((key for key in IMAGE if key in there - set(box)), None)
    if not box or image is None:
        return None
    if image == "imageid" and "filename" in there:
        image = "filename"
    class_name = next((key for key in CLASS if key in there - {image, *box}), None)
    # elsewhere than in TensorFlow's tables and beside lists, width and height may mean anything,
    # the box for one
    trusted = SIZES if place is corners_voc or len(box) == 1 else SIZES[:-1]
    size = next((pair for pair in trusted if set(pair) <= there - set(box)), None)
    ignored = next((key for key in IGNORED if key in there - {image, class_name, *box}), None)
    return Columns(tuple(names), image, class_name, box, place, size, ignored)


def _columns_by_content(rows: Iterable[tuple[int, list[str]]]) -> Columns | None:
    """The columns of a table without a line of names, by its first row with a box.

    A row has a file name, a class, and four numbers side by side.
    """
    cells = next((cells for _, cells in rows if sum(_is_number(cell) for cell in cells) >= 4), None)
    if cells is None:
        return None
    while not cells[-1]:
        cells = cells[:-1]
    kinds = "".join("n" if _is_number(cell) else "t" for cell in cells)
    run = re.search(r"(?<!n)n{4}(?!n)", kinds) or re.search(r"(?<=t)n{4}(?=n$)", kinds)
    texts = [place for place, kind in enumerate(kinds) if kind == "t" and cells[place]]
    image = next(
        (place for place in texts if IMAGE_NAME.search(cells[place])), texts[0] if texts else None
    )
    if run is None or image is None:
        return None
    names = [f"column{place}" for place in range(len(cells))]
    names[image] = "image"
    class_at = next((place for place in texts if place != image), None)
    if class_at is None and len(cells) == 6 and run.end() == 5:
        class_at = 5  # a class may be a number
    if class_at is not None:
        names[class_at] = "class"
    by_size = run.end() <= image  # makesense.ai: label,x,y,w,h,image,width,height
    corners = ("x", "y", "w", "h") if by_size else ("x1", "y1", "x2", "y2")
    names[run.start() : run.end()] = corners
    class_name = "class" if class_at is not None else None
    return Columns(
        tuple(names), "image", class_name, corners, corner_and_size if by_size else _edges
    )


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell.replace(",", ".", 1)))
    except ValueError:
        return False


def _labels(
    rows: Iterable[tuple[int, list[str]]], columns: Columns, path: str, remarks: Remarks
) -> list[Label]:
    """Make one label for each image.

    Boxes are placed when all are read, because only all of them show whether they are fractions.
    """
    labels: dict[str, Label] = {}
    found: list[tuple[str, str, list[float], bool]] = []
    for line, cells in rows:
        where = f"{path} line {line}"
        try:
            row = _row(cells, columns.names, where)
            image = named(row[columns.image], "image")
        except BadLabelError as error:
            remarks.leave_out(
                BadLabelError(f"{where}: {error}" if where not in str(error) else str(error))
            )
            continue
        label = labels.setdefault(image, Label(image, (), _row_size(row, columns)))
        is_ignored = columns.ignored is not None and is_marked(row[columns.ignored])
        try:
            if (box := _box(row, columns, where)) is not None:
                found.append((image, *box, is_ignored))
        except BadLabelError as error:
            if not is_ignored:
                labels[image] = replace(label, others=label.others + 1)
                remarks.leave_out(error)
    fractions = are_fractions(box for _, _, box, _ in found)
    if fractions:
        say_fractions(path, remarks)
    place = _edges if fractions and columns.place is corners_voc else columns.place
    truths: dict[str, list[Truth]] = {}
    ignored: dict[str, list[Truth]] = {}
    for image, class_name, (a, b, c, d), is_ignored in found:
        truth = Truth(class_name, place(a, b, c, d))
        (ignored if is_ignored else truths).setdefault(image, []).append(truth)
    return [
        replace(
            label,
            truths=tuple(truths.get(image, ())),
            normalised=fractions,
            ignored=tuple(ignored.get(image, ())),
        )
        for image, label in labels.items()
    ]


def _row(cells: list[str], names: Sequence[str], where: str) -> Row:
    while len(cells) > len(names) and not cells[-1]:  # commas at the end
        cells = cells[:-1]
    missing = len(names) - len(cells)
    if missing > 0 and not any(names[len(cells) :]):
        cells = [*cells, *[""] * missing]
    if len(cells) != len(names):
        raise BadLabelError(
            f"{where}: the first line has {len(names)} values, this one has not; check its commas"
        )
    return dict(
        zip(reversed(names), reversed(cells), strict=True)
    )  # of two columns of one name the first counts


def _box(row: Row, columns: Columns, where: str) -> tuple[str, list[float]] | None:
    """(class, four numbers); None where the image has no object."""
    texts = [row[key] for key in columns.box]
    if len(texts) == 1:
        texts = re.findall(r"[^\s,;\[\](){}]+", texts[0])
    else:
        texts = [re.sub(r"^([-+]?\d+),(\d+)$", r"\1.\2", text) for text in texts]  # decimal commas
    if not any(texts) or all(text.lower() in ("nan", "none", "null") for text in texts):
        return None  # a frame without the object
    try:
        box = numbers(texts, "box", 4)
    except BadLabelError as error:
        raise BadLabelError(
            f"{where}: the box {shown(','.join(texts))} is not four numbers"
        ) from error
    if columns.class_name and not row[columns.class_name]:
        raise BadLabelError(f"{where}: the box has no class; name one")
    return row[columns.class_name] if columns.class_name else "object", box


def _row_size(row: Row, columns: Columns) -> tuple[int, int] | None:
    return size_of_labels(row[columns.size[0]], row[columns.size[1]]) if columns.size else None


def _via(
    rows: Sequence[tuple[int, list[str]]], names: Sequence[str], path: str, remarks: Remarks
) -> list[Label]:
    """Read VGG Image Annotator's table. A region is an object of JSON in a cell."""
    labels: dict[str, Label] = {}
    for line, cells in rows[1:]:
        where = f"{path} line {line}"
        with remarks.leaving_out():
            row = _row(list(cells), names, where)
            label = labels.setdefault(row["filename"], Label(row["filename"], ()))
            try:
                shape, attributes = (json.loads(row[key] or "{}") for key in VIA)
                truth = (
                    via_region({"shape_attributes": shape, "region_attributes": attributes})
                    if shape
                    else None
                )
            except (ValueError, RecursionError, BadLabelError) as error:
                labels[label.image] = replace(label, others=label.others + 1)
                raise BadLabelError(
                    f"{where}: the region cannot be read: {shown(error)}"
                ) from error
            if truth is not None:
                labels[label.image] = replace(label, truths=(*label.truths, truth))
    return list(labels.values())
