"""Reads label files in XML: PASCAL VOC and ImageNet-LOC (one file an image), CVAT (images and
tracks), dlib.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from xml.etree import ElementTree

from calib.data.labels import (
    BadLabelError,
    Label,
    Remarks,
    Truth,
    are_fractions,
    around,
    centre_and_size,
    corner_and_size,
    corners_voc,
    is_marked,
    number,
    say_fractions,
    shown,
    size_of_labels,
    text_of,
    turned,
)
from realtime.frames import BoxPx

Element = ElementTree.Element
CORNERS = (
    ("xmin", "x_min", "left", "x1"),
    ("ymin", "y_min", "top", "y1"),
    ("xmax", "x_max", "right", "x2"),
    ("ymax", "y_max", "bottom", "y2"),
)
BOX_TAGS = ("bndbox", "bbox", "box", "boundingbox", "bounding_box")
NAME_TAGS = ("name", "label", "class", "category")
DEEPEST = 64


def read_xml(content: bytes, where: str, remarks: Remarks) -> list[Label]:
    """Read the labels of one file.

    Raises:
        BadLabelError: it is not XML, or no annotation.
    """
    root = _parsed(content, where, remarks)
    if root.tag not in ROOTS:
        raise BadLabelError(
            f"{where} is not VOC XML: its root is <{shown(root.tag)}>, not <annotation>"
        )
    return ROOTS[root.tag](root, where, remarks)


def xml_label(content: bytes, where: str, remarks: Remarks | None = None) -> Label:
    """Read one PASCAL VOC or ImageNet-LOC annotation.

    Objects flagged ``difficult`` are ignored: VOC counts finding them neither as right nor as
    wrong.

    Args:
        content: of the XML file.
        where: its name, for messages; it names the image where the XML does not.
        remarks: takes objects that cannot be used; None to refuse them.

    Raises:
        BadLabelError: it is not such an annotation.
    """
    collected = remarks or Remarks()
    root = _parsed(content, where, collected)
    if root.tag != "annotation":
        raise BadLabelError(
            f"{where} is not VOC XML: its root is <{shown(root.tag)}>, not <annotation>"
        )
    (label,) = _voc(root, where, collected)
    if remarks is None and collected.first:
        raise collected.first
    return label if label.image else replace(label, image=PurePosixPath(where).stem)


def _parsed(content: bytes, where: str, remarks: Remarks) -> Element:
    """The root element. Tags are in small letters and without their name spaces.

    Entities are refused: a few bytes of them stand for gigabytes of text.
    """
    declared = re.search(
        rb"""^\s*<\?xml[^>]{0,200}encoding\s*=\s*["']([\w.:-]{1,40})["']""", content[:400]
    )
    text = text_of(content, where, remarks, declared[1].decode() if declared else "").lstrip()
    if "<!ENTITY" in text:
        raise BadLabelError(
            f"{where} is not VOC XML: it declares entities, which no label file needs"
        )
    try:
        return ElementTree.fromstring(text, ElementTree.XMLParser(target=_Tree()))
    except (ElementTree.ParseError, ValueError) as error:
        raise BadLabelError(f"{where} is not VOC XML: {shown(error)}") from error


class _Tree(ElementTree.TreeBuilder):
    """Builds elements with tags in small letters and without name spaces.

    ValueError where they lie deeper than in any label file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        return super().start(tag.rpartition("}")[2].lower(), attrs)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2].lower())


def _text(item: Element, tags: tuple[str, ...]) -> str:
    return next((text for tag in tags if (text := (item.findtext(tag) or "").strip())), "")


def _voc(root: Element, where: str, remarks: Remarks) -> list[Label]:
    found: list[tuple[str, tuple[float, float, float, float], bool]] = []
    difficult: list[bool] = []
    others = 0
    for item in root.iter("object"):
        is_difficult = is_marked(_text(item, ("difficult",)))
        try:
            found.append(_voc_object(item))
            difficult.append(is_difficult)
        except BadLabelError as error:
            if not is_difficult:
                remarks.leave_out(BadLabelError(f"{where} is not VOC XML: {error}"))
                others += 1
    fractions = are_fractions(box for _, box, _ in found)
    if fractions:
        say_fractions(where, remarks)
    parts: tuple[list[Truth], list[Truth]] = ([], [])
    for (name, box, of_pixels), is_ignored in zip(found, difficult, strict=True):
        edges = corners_voc(*box) if of_pixels and not fractions else box
        parts[is_ignored].append(Truth(name, edges))
    truths, ignored = (tuple(part) for part in parts)
    size_px = size_of_labels(
        _text(root, ("size/width", "imagesize/ncols")),
        _text(root, ("size/height", "imagesize/nrows")),
    )
    name = _text(root, ("filename",))
    return [Label(name, truths, size_px, fractions, others=others, ignored=ignored)]


def _voc_object(item: Element) -> tuple[str, tuple[float, float, float, float], bool]:
    """(class, edges, whether they are first and last pixels) of an object.

    The object has a box, a turned box or a polygon.
    """
    name = _text(item, NAME_TAGS)
    if not name:
        raise BadLabelError("object '' has no name")
    box = next((box for tag in BOX_TAGS if (box := item.find(tag)) is not None), None)
    try:
        if box is not None:
            texts = [_text(box, tags) for tags in CORNERS]
            missing = next(
                (tags[0] for tags, text in zip(CORNERS, texts, strict=True) if not text), None
            )
            if missing:
                raise BadLabelError(f"object '{shown(name)}' has no {missing}")
            x0, y0, x1, y1 = (
                number(text, tags[0]) for text, tags in zip(texts, CORNERS, strict=True)
            )
            return name, (x0, y0, x1, y1), True
        if (box := item.find("robndbox")) is not None:
            cx, cy, width, height, angle = (
                number(_text(box, (tag,)), tag) for tag in ("cx", "cy", "w", "h", "angle")
            )
            return (
                name,
                turned(centre_and_size(cx, cy, width, height), angle * 57.29577951308232, (cx, cy)),
                False,
            )
        if (polygon := item.find("polygon")) is not None:
            return name, around(_polygon(polygon)), False
    except BadLabelError as error:
        raise BadLabelError(
            str(error) if "object '" in str(error) else f"object '{shown(name)}': {error}"
        ) from error
    raise BadLabelError(f"object '{shown(name)}' has no bndbox")


def _polygon(polygon: Element) -> list[tuple[float, float]]:
    """Read points as LabelMe's <pt><x>, or as x1, y1, x2, y2 ... in tags of their own."""
    if points := polygon.findall("pt"):
        return [(number(_text(pt, ("x",)), "x"), number(_text(pt, ("y",)), "y")) for pt in points]
    values = {child.tag: number(child.text or "", child.tag) for child in polygon}
    return [
        (x, values["y" + tag[1:]])
        for tag, x in values.items()
        if tag.startswith("x") and "y" + tag[1:] in values
    ]


def _cvat(root: Element, where: str, remarks: Remarks) -> list[Label]:
    """Read CVAT for images, or CVAT for video, which has boxes of tracks by frame."""
    labels = [_cvat_image(image, where, remarks) for image in root.iter("image")]
    size = root.find("meta/task/original_size")
    size_px = (
        size_of_labels(_text(size, ("width",)), _text(size, ("height",)))
        if size is not None
        else None
    )
    frames: dict[int, list[Truth]] = {}
    bad: dict[int, int] = {}
    for track in root.iter("track"):
        for shape in track:
            if shape.get("outside") == "1" or shape.get("frame") is None:
                continue
            frame = -1
            try:
                frame = _frame(shape)
                if (truth := _cvat_shape(shape, track.get("label"))) is not None:
                    frames.setdefault(frame, []).append(truth)
            except BadLabelError as error:
                remarks.leave_out(
                    BadLabelError(f"{where}: track {shown(track.get('id'))}: {error}")
                )
                bad[frame] = bad.get(frame, 0) + 1
    return labels + [
        Label(f"frame_{frame:06}", tuple(truths), size_px, frame=frame, others=bad.get(frame, 0))
        for frame, truths in sorted(frames.items())
    ]


def _frame(shape: Element) -> int:
    text = shape.get("frame", "")
    if not re.fullmatch(r"\d{1,9}", text):
        raise BadLabelError(f"its frame is {shown(text)}, not a number")
    return int(text)


def _cvat_image(image: Element, where: str, remarks: Remarks) -> Label:
    truths, others = [], 0
    for shape in image:
        try:
            if (truth := _cvat_shape(shape, shape.get("label"))) is not None:
                truths.append(truth)
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where}: image {shown(image.get('name'))}: {error}"))
            others += 1
    size_px = size_of_labels(image.get("width"), image.get("height"))
    return Label(image.get("name") or "", tuple(truths), size_px, others=others)


def _cvat_shape(shape: Element, class_name: str | None) -> Truth | None:
    box: BoxPx | None = None
    if shape.tag == "box":
        x0, y0, x1, y1 = (number(shape.get(key, ""), key) for key in ("xtl", "ytl", "xbr", "ybr"))
        degrees = number(shape.get("rotation", "0"), "rotation")
        box = (
            turned((x0, y0, x1, y1), degrees, ((x0 + x1) / 2, (y0 + y1) / 2))
            if degrees
            else (x0, y0, x1, y1)
        )
    elif shape.tag == "polygon":
        pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise BadLabelError(f"its points are {shown(shape.get('points'))}, not x,y;x,y")
        box = around((number(x, "x"), number(y, "y")) for x, y in pairs)
    if box is None:
        return None
    if not class_name:
        raise BadLabelError("it has no label")
    return Truth(class_name, box)


def _dlib(root: Element, where: str, remarks: Remarks) -> list[Label]:
    labels = []
    for image in root.iter("image"):
        truths, others = [], 0
        for box in image.iter("box"):
            if box.get("ignore") == "1":
                continue
            try:
                x, y, width, height = (
                    number(box.get(key, ""), key) for key in ("left", "top", "width", "height")
                )
                truths.append(
                    Truth(_text(box, ("label",)) or "object", corner_and_size(x, y, width, height))
                )
            except BadLabelError as error:
                remarks.leave_out(
                    BadLabelError(f"{where}: image {shown(image.get('file'))}: {error}")
                )
                others += 1
        labels.append(Label(image.get("file") or "", tuple(truths), others=others))
    return labels


ROOTS: dict[str, Callable[[Element, str, Remarks], list[Label]]] = {
    "annotation": _voc,
    "annotations": _cvat,
    "dataset": _dlib,
}
"""What reads a file, by the tag of its root."""
