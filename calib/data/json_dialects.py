"""Reads label files in JSON: COCO and the common annotation tools. ``DIALECTS`` says how each is
recognized.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from calib.data.labels import (
    BadLabelError,
    Label,
    Remarks,
    Truth,
    are_fractions,
    around,
    centre_and_size,
    corner_and_size,
    field,
    is_marked,
    json_of,
    listed,
    named,
    number,
    numbers,
    optional,
    say_fractions,
    shown,
    size_of_labels,
    turned,
)
from realtime.frames import BoxPx

FILE_NAMES = ("file_name", "filename", "name", "path", "coco_url", "flickr_url")


def read_coco(data: Mapping[str, Any], where: str, remarks: Remarks) -> list[Label]:
    """Read the labels of COCO instances.

    ``bbox`` is x, y, width, height in continuous pixels. Crowds are ignored.

    Raises:
        BadLabelError: it is not such a file.
    """
    try:
        names = _categories(data, where, remarks)
        images, items = (listed(field(data, key), key) for key in ("images", "annotations"))
    except BadLabelError as error:
        raise BadLabelError(f"{where} is not COCO json: {error}") from error
    labels: dict[str, Label] = {}
    for place, image in enumerate(images, start=1):
        try:
            key = _id(field(image, "id"))
            labels[key] = Label(named(field(image, *FILE_NAMES), "file_name"), (), _size(image))
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where}: image {place}: {error}"))
    found: list[tuple[str, str, list[float], BoxPx | None]] = []
    crowds: list[bool] = []
    for place, item in enumerate(items, start=1):
        key = ""
        try:
            key = _id(field(item, "image_id"))
            if key not in labels:
                raise BadLabelError(f"its image_id is {shown(key)}, which the file does not list")
            class_name = _class(item, names)
            is_crowd = is_marked(optional(item, "iscrowd"))
            with suppress(BadLabelError) if is_crowd else nullcontext():
                found.append((key, class_name, *_box(item, labels[key])))
                crowds.append(is_crowd)
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where}: annotation {place}: {error}"))
            if key in labels:
                labels[key] = replace(labels[key], others=labels[key].others + 1)
    fractions = are_fractions(around_it or box for _, _, box, around_it in found)
    if fractions:
        say_fractions(where, remarks)
        labels = {key: replace(label, normalised=True) for key, label in labels.items()}
    truths: dict[str, list[Truth]] = {}
    ignored: dict[str, list[Truth]] = {}
    for (key, class_name, numbers_xywh, around_it), is_crowd in zip(found, crowds, strict=True):
        if around_it is None:
            x, y, width, height = numbers_xywh
            if not width or not height:
                continue  # COCO train2017 itself has two boxes of no height
            around_it = corner_and_size(x, y, width, height)  # noqa: PLW2901
        (ignored if is_crowd else truths).setdefault(key, []).append(Truth(class_name, around_it))
    return [
        replace(label, truths=tuple(truths.get(key, ())), ignored=tuple(ignored.get(key, ())))
        for key, label in labels.items()
    ]


def _id(value: object) -> str:
    """An id as text. Tools write the same id as number and as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise BadLabelError(f"its id is {shown(value)}, neither a number nor a text")
    try:
        return str(value).strip()
    except ValueError as error:  # thousands of digits
        raise BadLabelError("its id is too long") from error


def _categories(data: Mapping[str, Any], where: str, remarks: Remarks) -> dict[str, str] | None:
    if "categories" not in data and listed(field(data, "annotations"), "annotations"):
        remarks.guess("no 'categories': classes are called by their category_id", where)
        return None
    names = {}
    for item in listed(data.get("categories"), "categories"):
        with remarks.leaving_out():
            try:
                names[_id(field(item, "id"))] = named(field(item, "name"), "name")
            except BadLabelError as error:
                raise BadLabelError(f"{where}: a category cannot be used: {error}") from error
    return names


def _class(item: Mapping[str, Any], names: Mapping[str, str] | None) -> str:
    if names is None:
        return named(
            optional(item, "category_name", "category", "category_id") or "object", "category"
        )
    key = _id(field(item, "category_id"))
    if key not in names:
        raise BadLabelError(f"its category_id is {shown(key)}, which the file does not list")
    return names[key]


def _box(item: Mapping[str, Any], label: Label) -> tuple[list[float], BoxPx | None]:
    """(bbox, nothing), or (nothing, the box around the segmentation) where no bbox can be used."""
    box, shape = optional(item, "bbox"), optional(item, "segmentation")
    if box or not shape:
        if isinstance(box, Mapping):
            box = [
                field(box, *keys)
                for keys in (("x", "left"), ("y", "top"), ("width", "w"), ("height", "h"))
            ]
        return numbers(field(item, "bbox") if box is None else box, "bbox", 4), None
    if isinstance(shape, Mapping):
        return [], _around_runs(shape, label)
    parts = listed(shape, "segmentation")
    flat = [parts] if parts and not isinstance(parts[0], list) else parts
    points = [numbers(part, "segmentation") for part in flat]
    return [], around(pair for part in points for pair in zip(part[::2], part[1::2], strict=False))


def _around_runs(shape: Mapping[str, Any], label: Label) -> BoxPx:
    """The box around a mask of run lengths, as lists or in COCO's compressed text.

    The background comes first, and runs go down the columns.
    """
    height = int(min(1e9, max(0.0, numbers(field(shape, "size"), "size", 2)[0])))
    counts = field(shape, "counts")
    runs = (
        _uncompressed(counts)
        if isinstance(counts, str)
        else [int(min(1e18, max(0.0, c))) for c in _finite(counts)]
    )
    if height <= 0:
        raise BadLabelError("its segmentation has no size")
    at = 0
    x0 = y0 = 1 << 62
    x1 = y1 = -1
    for place, run in enumerate(runs):
        if place % 2 and run:
            first, last = at // height, (at + run - 1) // height
            several = last > first
            x0, x1 = min(x0, first), max(x1, last)
            y0, y1 = (
                min(y0, 0 if several else at % height),
                max(y1, height - 1 if several else (at + run - 1) % height),
            )
        at += run
    if x1 < 0:
        raise BadLabelError("its segmentation is empty")
    return float(x0), float(y0), float(x1 + 1), float(y1 + 1)


def _finite(counts: object) -> list[float]:
    values = numbers(counts, "segmentation")
    if not all(map(math.isfinite, values)):
        raise BadLabelError("its segmentation holds a number that is not finite")
    return values


def _uncompressed(text: str) -> list[int]:
    """Read COCO's text of run lengths.

    A character holds five bits. From the third on, a run is its difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise BadLabelError("its segmentation is not a text of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if any(run < 0 for run in runs):
        raise BadLabelError("its segmentation is not a text of run lengths")
    return runs


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    return size_of_labels(optional(image, "width"), optional(image, "height"))


NO_BOX = "shapes without an area (points, lines, whole-image classes) are passed over"


def read_json(content: bytes, where: str, remarks: Remarks) -> list[Label]:
    """Read the labels of a file in its order. An image without a name is called as the file is.

    Raises:
        BadLabelError: it is not JSON, or of no known layout.
    """
    data = json_of(content, where, remarks)
    dialect = next((dialect for dialect in DIALECTS if dialect.fits(data)), None)
    if dialect is None:
        raise BadLabelError(
            f"{where} is not COCO json, nor of another tool that is known: export COCO or Pascal"
            " VOC from your labelling tool"
        )
    return dialect.read(data, where, remarks)


def _gathered(
    items: Iterable[tuple[object, Any]],
    read: Callable[[Any], Truth | None],
    label: Label,
    where: str,
    remarks: Remarks,
) -> Label:
    """Make a label with the truths of its items. Unusable items are left out and counted."""
    truths, others = [], 0
    for place, item in items:
        try:
            truth = read(item)
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where}: object {place}: {error}"))
            others += 1
            continue
        if truth is None:
            remarks.guess(NO_BOX, where)
        else:
            truths.append(truth)
    return replace(label, truths=(*label.truths, *truths), others=label.others + others)


def _numbered(items: Iterable[Any]) -> Iterable[tuple[int, Any]]:
    return enumerate(items, start=1)


def _labelme(data: Mapping[str, Any], where: str, remarks: Remarks) -> list[Label]:
    size_px = size_of_labels(optional(data, "imageWidth"), optional(data, "imageHeight"))
    label = Label(str(optional(data, "imagePath") or ""), (), size_px)
    return [_gathered(_numbered(data["shapes"]), _labelme_shape, label, where, remarks)]


def _labelme_shape(shape: Any) -> Truth | None:
    kind = optional(shape, "shape_type") or "polygon"
    if kind not in ("rectangle", "polygon", "circle", "rotation", "mask"):
        return None
    points = [numbers(point, "point", 2) for point in listed(field(shape, "points"), "points")]
    if kind == "circle":
        if len(points) != 2:
            raise BadLabelError("a circle has two points: its centre and one on its edge")
        (x, y), (edge_x, edge_y) = points
        radius = (
            ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
            if abs(edge_x) + abs(edge_y) < 1e9
            else float("inf")
        )
        return Truth(
            named(field(shape, "label"), "label"), (x - radius, y - radius, x + radius, y + radius)
        )
    return Truth(named(field(shape, "label"), "label"), around(points))


def _supervisely(data: Mapping[str, Any], where: str, remarks: Remarks) -> list[Label]:
    size = data["size"]
    label = Label("", (), size_of_labels(optional(size, "width"), optional(size, "height")))
    return [_gathered(_numbered(data["objects"]), _supervisely_object, label, where, remarks)]


def _supervisely_object(item: Any) -> Truth | None:
    exterior = listed(optional(optional(item, "points"), "exterior"), "exterior")
    if optional(item, "geometryType") in ("point", "line", "polyline") or not exterior:
        return None
    points = around(numbers(point, "point", 2) for point in exterior)
    return Truth(named(field(item, "classTitle"), "classTitle"), points)


def _label_studio(data: list[Any], where: str, remarks: Remarks) -> list[Label]:
    labels = []
    for place, task in _numbered(data):
        with remarks.leaving_out():
            try:
                label = Label(_studio_image(field(task, "data")), (), normalised=True)
                chosen = [
                    a
                    for a in listed(field(task, "annotations", "completions"), "annotations")
                    if not _cancelled(a)
                ]
                results = listed(optional(chosen[0], "result"), "result") if chosen else ()
            except BadLabelError as error:
                raise BadLabelError(f"{where}: task {place}: {error}") from error
            labels.append(
                _gathered(
                    _numbered(results), _studio_result, label, f"{where}: task {place}", remarks
                )
            )
    return labels


def _cancelled(annotation: Any) -> bool:
    return bool(optional(annotation, "was_cancelled", "skipped"))


def _studio_image(data: Any) -> str:
    """The field that holds the image. It has any name that the project gave it."""
    texts = (
        [value for value in data.values() if isinstance(value, str)]
        if isinstance(data, Mapping)
        else []
    )
    pictures = [text for text in texts if re.search(r"\.\w{3,4}$", text)]
    return named(optional(data, "image", "img") or next(iter(pictures or texts), None), "image")


def _studio_result(item: Any) -> Truth | None:
    return _studio_shape(optional(item, "value"), item) if optional(item, "value") else None


def _studio_shape(value: Any, sizes: Any) -> Truth | None:
    """Read a shape in per cent of the image.

    Rectangles are turned about their upper left corner, in pixels.
    """
    key = next(
        (k for k in (value if isinstance(value, Mapping) else ()) if k.endswith("labels")), ""
    )
    if key in ("rectanglelabels", "polygonlabels", "ellipselabels"):
        names = value[key]
    elif (
        isinstance(value, Mapping)
        and not key
        and ({"width", "height"} <= set(value) or "points" in value)
    ):
        names = ["object"]  # a region without a class
    else:
        return None
    class_name = named(names[0] if isinstance(names, list) and names else names, key or "label")
    if "points" in value:
        box = around(numbers(point, "point", 2) for point in listed(value["points"], "points"))
    elif "radiusX" in value or "radiusY" in value:
        x, y, rx, ry = (number(field(value, k), k) for k in ("x", "y", "radiusX", "radiusY"))
        box = (x - rx, y - ry, x + rx, y + ry)
    else:
        x, y, width, height = (number(field(value, k), k) for k in ("x", "y", "width", "height"))
        box = corner_and_size(x, y, width, height)
        if (degrees := number(value.get("rotation") or 0, "rotation")) != 0:
            box = _turned_percent(box, degrees, sizes)
    return Truth(class_name, (box[0] / 100, box[1] / 100, box[2] / 100, box[3] / 100))


def _turned_percent(box: BoxPx, degrees: float, sizes: Any) -> BoxPx:
    size_px = size_of_labels(optional(sizes, "original_width"), optional(sizes, "original_height"))
    if size_px is None:
        raise BadLabelError(
            "it is turned, and the image's size (original_width, original_height) is not given"
        )
    width, height = size_px
    x0, y0, x1, y1 = turned(
        (box[0] * width, box[1] * height, box[2] * width, box[3] * height),
        degrees,
        (box[0] * width, box[1] * height),
    )
    return x0 / width, y0 / height, x1 / width, y1 / height


def _studio_short(data: list[Any], where: str, remarks: Remarks) -> list[Label]:
    """Read Label Studio's JSON-MIN. The shapes lie beside the image, in fields with any name."""
    labels = []
    for place, task in _numbered(data):
        with remarks.leaving_out():
            try:
                label = Label(_studio_image(task), (), normalised=True)
            except BadLabelError as error:
                raise BadLabelError(f"{where}: task {place}: {error}") from error
            shapes = [
                shape
                for value in task.values()
                if isinstance(value, list)
                for shape in value
                if isinstance(shape, Mapping)
            ]
            read = _studio_short_shape
            labels.append(
                _gathered(_numbered(shapes), read, label, f"{where}: task {place}", remarks)
            )
    return labels


def _studio_short_shape(shape: Any) -> Truth | None:
    return _studio_shape(shape, shape)


def _via(data: Mapping[str, Any], where: str, remarks: Remarks) -> list[Label]:
    labels = []
    for key, item in (data.get("_via_img_metadata") or data).items():
        with remarks.leaving_out():
            try:
                regions = optional(item, "regions") or []
                label = Label(named(field(item, "filename"), "filename"), ())
                numbered = (
                    list(regions.items())
                    if isinstance(regions, dict)
                    else [*_numbered(listed(regions, "regions"))]
                )
            except BadLabelError as error:
                raise BadLabelError(f"{where}: {shown(key)}: {error}") from error
            labels.append(
                _gathered(numbered, via_region, label, f"{where}: {shown(label.image)}", remarks)
            )
    return labels


def via_region(region: Any) -> Truth | None:
    """Read a region of VGG Image Annotator. Points and lines give None.

    Raises:
        BadLabelError: it cannot be read.
    """
    shape = field(region, "shape_attributes")
    kind, box = optional(shape, "name"), None
    if kind in ("polygon",):
        xs, ys = (numbers(field(shape, key), key) for key in ("all_points_x", "all_points_y"))
        box = around(zip(xs, ys, strict=False))
    elif kind in ("circle", "ellipse"):
        x, y = (number(field(shape, key), key) for key in ("cx", "cy"))
        rx, ry = (number(field(shape, key, "r"), key) for key in ("rx", "ry"))
        box = (x - rx, y - ry, x + rx, y + ry)
    elif kind == "rect" or kind is None:
        x, y, width, height = (number(field(shape, k), k) for k in ("x", "y", "width", "height"))
        box = corner_and_size(x, y, width, height)
    return Truth(_via_class(optional(region, "region_attributes")), box) if box else None


def _via_class(attributes: Any) -> str:
    if not isinstance(attributes, Mapping) or not attributes:
        return "object"
    usual = optional(attributes, "class", "label", "name", "type", "category")
    value = usual if usual is not None else next(iter(attributes.values()))
    if isinstance(value, Mapping):  # a group of boxes to tick
        value = next((name for name, ticked in value.items() if ticked), None)
    return str(value) if isinstance(value, (str, int)) and value != "" else "object"


def _create_ml(data: list[Any], where: str, remarks: Remarks) -> list[Label]:
    labels = []
    for place, item in _numbered(data):
        with remarks.leaving_out():
            try:
                label = Label(named(field(item, "image", "imagefilename", "filename"), "image"), ())
                objects = listed(field(item, "annotations", "annotation"), "annotations")
            except BadLabelError as error:
                raise BadLabelError(f"{where}: item {place}: {error}") from error
            labels.append(
                _gathered(
                    _numbered(objects), _create_ml_object, label, f"{where}: item {place}", remarks
                )
            )
    return labels


def _create_ml_object(item: Any) -> Truth | None:
    box = field(item, "coordinates")
    x, y, width, height = (number(field(box, key), key) for key in ("x", "y", "width", "height"))
    return Truth(named(field(item, "label"), "label"), centre_and_size(x, y, width, height))


def _bdd(data: list[Any], where: str, remarks: Remarks) -> list[Label]:
    labels = []
    for place, item in _numbered(data):
        with remarks.leaving_out():
            try:
                label, objects = (
                    Label(named(field(item, "name"), "name"), ()),
                    listed(optional(item, "labels"), "labels"),
                )
            except BadLabelError as error:
                raise BadLabelError(f"{where}: item {place}: {error}") from error
            labels.append(
                _gathered(_numbered(objects), _bdd_object, label, f"{where}: item {place}", remarks)
            )
    return labels


def _bdd_object(item: Any) -> Truth | None:
    box = optional(item, "box2d")
    if box is None:
        return None
    x0, y0, x1, y1 = (number(field(box, key), key) for key in ("x1", "y1", "x2", "y2"))
    return Truth(named(field(item, "category"), "category"), (x0, y0, x1, y1))


def _refuse(name: str, instead: str) -> Callable[[Any, str, Remarks], list[Label]]:
    def read(data: Any, where: str, remarks: Remarks) -> list[Label]:
        raise BadLabelError(f"{where} is {name}: {instead}")

    return read


def _first(data: Any) -> Mapping[str, Any]:
    """The first object of a list, or an empty object where it is no such list."""
    return data[0] if isinstance(data, list) and data and isinstance(data[0], Mapping) else {}


def _has(item: Any, key: str, kind: type) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get(key), kind)


def _has_studio_shapes(data: Any) -> bool:
    lists = [value for value in _first(data).values() if isinstance(value, list)]
    return any(
        _has(shape, "original_width", int) or _has(shape, "rectanglelabels", list)
        for value in lists
        for shape in value
    )


def _is_via(data: Any) -> bool:
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(_has(v, "filename", str) and "regions" in v for v in data.values())
    )


@dataclass(frozen=True)
class Dialect:
    """How the files of a tool are told apart, by their parsed content, and what reads them."""

    fits: Callable[[Any], bool]
    read: Callable[[Any, str, Remarks], list[Label]]


DIALECTS = (
    Dialect(lambda d: isinstance(d, Mapping) and "annotations" in d and "images" in d, read_coco),
    Dialect(lambda d: _has(d, "shapes", list), _labelme),
    Dialect(lambda d: _has(d, "objects", list) and _has(d, "size", dict), _supervisely),
    Dialect(lambda d: _has(d, "_via_img_metadata", dict) or _is_via(d), _via),
    Dialect(
        lambda d: "data" in _first(d) and bool({"annotations", "completions"} & set(_first(d))),
        _label_studio,
    ),
    Dialect(_has_studio_shapes, _studio_short),
    Dialect(lambda d: bool({"annotations", "annotation"} & set(_first(d))), _create_ml),
    Dialect(lambda d: "name" in _first(d) and "labels" in _first(d), _bdd),
    Dialect(
        lambda d: "image_id" in _first(d) and "category_id" in _first(d),
        _refuse(
            "a list of detections in COCO's form, without images and classes",
            "give the COCO file of the labels",
        ),
    ),
    Dialect(
        lambda d: _has(d, "type", str) and "features" in d,
        _refuse("GeoJSON", "export COCO or Pascal VOC from your labelling tool"),
    ),
    Dialect(
        lambda d: _has(d, "items", list) and "categories" in d,
        _refuse("Datumaro's JSON", "export COCO or Pascal VOC (datum convert -f coco_instances)"),
    ),
    Dialect(
        lambda d: "Labeled Data" in _first(d) or "data_row" in _first(d),
        _refuse("Labelbox's export", "convert it to COCO"),
    ),
)
