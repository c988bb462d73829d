"""What label files say: CSV, PASCAL VOC and ImageNet-LOC XML, COCO json. No image is opened here.

Boxes become continuous pixel edges x0, y0, x1, y1 of the image, counted from 0.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engines.base import SourceError
from realtime.frames import BoxPx
from realtime.sources import ARCHIVE_SUFFIXES, archive_members, natural_order

SizePx = tuple[int, int]
TOLERANCE_PX = 1.0
"""How far a box may reach beyond its image: files that count pixels from 0 and from 1 differ by that much."""


@dataclass(frozen=True)
class Truth:
    """A true box and its class."""

    class_name: str
    box_xyxy_px: BoxPx

    def clipped(self, size_px: SizePx) -> "Truth":
        """The same with its box cut to an image of (width, height)."""
        (x0, y0, x1, y1), (width, height) = self.box_xyxy_px, size_px
        return replace(self, box_xyxy_px=(max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)))


@dataclass(frozen=True)
class Label:
    """What a label file says of one image.

    Attributes:
        image: its name.
        truths: its boxes; none where nothing is to be found.
        size_px: its (width, height), where the file says so.
    """

    image: str
    truths: tuple[Truth, ...]
    size_px: SizePx | None = None


def check_truth(truth: Truth, where: str, size_px: SizePx | None = None) -> None:
    """Refuse a box that cannot be.

    Args:
        truth: as labelled.
        where: file and image, for the message.
        size_px: (width, height) of the image, where it is known.

    Raises:
        SourceError: an edge is not finite, edges are in the wrong order, or the box leaves the image.
    """
    x0, y0, x1, y1 = truth.box_xyxy_px
    box = f"{where}: box {x0:g},{y0:g},{x1:g},{y1:g} of '{truth.class_name}'"
    if not all(math.isfinite(edge) for edge in truth.box_xyxy_px):
        raise SourceError(f"{box} has an edge that is not a finite number: correct the box or remove it")
    if x0 >= x1 or y0 >= y1:
        raise SourceError(
            f"{box} is empty or reversed: edges are x0,y0,x1,y1 with x0 < x1 and y0 < y1; correct it or remove it"
        )
    width, height = size_px or (math.inf, math.inf)
    beyond_px = max(-x0, -y0, x1 - width, y1 - height)
    outside = min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0)
    if beyond_px > TOLERANCE_PX or outside:
        how = "lies outside" if outside else f"reaches {beyond_px:g} px beyond"
        image = f"the image of {width}x{height} px" if size_px else "the image"
        raise SourceError(f"{box} {how} {image}: correct it, or give the images that the labels were made for")


def read_labels(path: Path) -> list[Label]:
    """The labels of a ``.csv``, a COCO ``.json``, or a folder, zip or tar of ``.xml`` files, in the file's order.

    Raises:
        SourceError: the file is malformed.
    """
    try:
        if path.is_dir() or path.suffix in ARCHIVE_SUFFIXES:
            return [xml_label(content, f"{path}: {name}") for name, content in _xml_files(path)]
        if path.suffix == ".csv":
            return list(_csv(path))
        if path.suffix == ".json":
            return list(_coco(path))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    raise SourceError(f"data set {path}: give a .csv, .json, .txt, or a folder, zip or tar of .xml files")


_EDGES = ("x0", "y0", "x1", "y1")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def is_sequence(path: Path) -> bool:
    """Whether a file has a row for every frame of one sequence: a CSV whose first column is ``frame``."""
    if path.suffix != ".csv":
        return False
    with path.open(encoding="utf-8-sig") as file:
        return file.readline().startswith("frame,")


def _csv(path: Path) -> Iterator[Label]:
    """One row a box; TensorFlow's ``xmin,ymin,xmax,ymax`` tables keep VOC's corners, see ``_edges``."""
    labels: dict[str, Label] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            table = csv.DictReader(file, strict=True)
            fields = table.fieldnames or ()
            name_field = next((f for f in ("file", "frame", "filename") if f in fields), None)
            if name_field is None or not (set(_EDGES) <= set(fields) or set(_CORNERS) <= set(fields)):
                raise SourceError(f"{path}: the first line must name file,class,x0,y0,x1,y1 (it names {','.join(fields)})")
            for row in table:
                where = f"{path} line {table.line_num}"
                if None in row or None in row.values():
                    raise SourceError(f"{where}: the first line has {len(fields)} values, this one has not; check its commas")
                label = labels.get(row[name_field]) or Label(row[name_field], (), _row_size(row))
                labels[label.image] = replace(label, truths=(*label.truths, *_row_truths(row, where)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a CSV file in UTF-8: {error}") from error
    yield from labels.values()


def _row_truths(row: Mapping[str, str], where: str) -> list[Truth]:
    corners = "x0" not in row
    values = [row[name] for name in (_CORNERS if corners else _EDGES)]
    if not any(values):
        return []  # a frame without the object
    try:
        x0, y0, x1, y1 = map(float, values)
    except ValueError as error:
        raise SourceError(f"{where}: the box {','.join(values)} is not four numbers") from error
    class_name = next((row[field] for field in ("class", "wnid", "label") if field in row), "object")
    if not class_name:
        raise SourceError(f"{where}: the box has no class; name one")
    return [Truth(class_name, _edges(x0, y0, x1, y1) if corners else (x0, y0, x1, y1))]


def _row_size(row: Mapping[str, str]) -> SizePx | None:
    """The image's size in TensorFlow's tables; elsewhere such columns may mean anything, the box for one."""
    width, height = row.get("width", ""), row.get("height", "")
    return (int(width), int(height)) if "x0" not in row and width.isdecimal() and height.isdecimal() else None


def _edges(x_min: float, y_min: float, x_max: float, y_max: float) -> BoxPx:
    """Edges of a box given by its first and last pixels, counted from 1, as VOC does."""
    return x_min - 1, y_min - 1, x_max, y_max


def xml_label(content: bytes, where: str) -> Label:
    """One PASCAL VOC or ImageNet-LOC annotation.

    Objects flagged ``difficult`` are left out: VOC counts finding them neither as right nor as wrong.

    Args:
        content: of the XML file.
        where: its name, for messages; it names the image where the XML does not.

    Raises:
        SourceError: it is not such an annotation.
    """
    try:
        root = ElementTree.fromstring(content)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        truths = [_xml_truth(item) for item in root.iter("object") if item.findtext("difficult", "0").strip() != "1"]
        width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except (ElementTree.ParseError, ValueError) as error:
        raise SourceError(f"{where} is not VOC XML: {error}") from error
    size_px = (width, height) if width > 0 and height > 0 else None  # some tools write 0
    return Label((root.findtext("filename") or "").strip() or Path(where).stem, tuple(truths), size_px)


def _xml_truth(item: ElementTree.Element) -> Truth:
    name = (item.findtext("name") or "").strip()
    texts = {corner: item.findtext(f"bndbox/{corner}") for corner in _CORNERS}
    missing = next((corner for corner, text in texts.items() if not text), None if name else "name")
    if missing:
        raise ValueError(f"object '{name}' has no {missing}")
    return Truth(name, _edges(*(float(text or "nan") for text in texts.values())))


def _xml_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        files = {str(file.relative_to(path)): file.read_bytes for file in path.rglob("*.xml")}
    else:
        files = dict(archive_members(path, {".xml"}))
    for name in natural_order(files):
        yield name, files[name]()


def _coco(path: Path) -> Iterator[Label]:
    """COCO instances: ``bbox`` is x, y, width, height in continuous pixels; crowds are left out."""
    with _coco_errors(f"{path}"):
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in data["categories"]}
        labels = {image["id"]: Label(image["file_name"], (), _coco_size(image)) for image in data["images"]}
        items = list(data["annotations"])
    for number, item in enumerate(items, start=1):
        with _coco_errors(f"{path}: annotation {number}"):
            for key, known in (("image_id", labels), ("category_id", names)):
                if item[key] not in known:
                    raise ValueError(f"its {key} is {item[key]}, which the file does not list")
            x, y, width, height = map(float, item["bbox"])
            if item.get("iscrowd") or not width or not height:  # COCO train2017 itself has two boxes of no height
                continue
            label, truth = labels[item["image_id"]], Truth(names[item["category_id"]], (x, y, x + width, y + height))
            labels[item["image_id"]] = replace(label, truths=(*label.truths, truth))
    yield from labels.values()


@contextmanager
def _coco_errors(where: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise SourceError(f"{where} is not COCO json: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{where} is not COCO json: {error}") from error


def _coco_size(image: Mapping[str, Any]) -> SizePx | None:
    width, height = image.get("width"), image.get("height")
    return (int(width), int(height)) if width and height else None
