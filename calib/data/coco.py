"""COCO json: boxes, and where an annotation has none the box around its polygon or run lengths."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calib.data.content import field, listed, named, numbers, optional, size_of_labels
from calib.data.labels import Label, Truth, are_fractions, around, corner_and_size, say_fractions
from calib.data.remarks import BadLabelError, Remarks, shown
from realtime.frames import BoxPx

FILE_NAMES = ("file_name", "filename", "name", "path", "coco_url", "flickr_url")


def read_coco(data: Mapping[str, Any], where: str, remarks: Remarks) -> list[Label]:
    """The labels of COCO instances: ``bbox`` is x, y, width, height in continuous pixels; crowds are left out.

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
    for place, item in enumerate(items, start=1):
        key = ""
        try:
            key = _id(field(item, "image_id"))
            if key not in labels:
                raise BadLabelError(f"its image_id is {shown(key)}, which the file does not list")
            class_name = _class(item, names)
            if optional(item, "iscrowd") in (1, True, "1"):
                continue
            found.append((key, class_name, *_box(item, labels[key])))
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where}: annotation {place}: {error}"))
            if key in labels:
                labels[key] = replace(labels[key], others=labels[key].others + 1)
    fractions = are_fractions(around_it or box for _, _, box, around_it in found)
    if fractions:
        say_fractions(where, remarks)
        labels = {key: replace(label, normalised=True) for key, label in labels.items()}
    truths: dict[str, list[Truth]] = {}
    for key, class_name, numbers_xywh, around_it in found:
        if around_it is None:
            x, y, width, height = numbers_xywh
            if not width or not height:
                continue  # COCO train2017 itself has two boxes of no height
            around_it = corner_and_size(x, y, width, height)  # noqa: PLW2901
        truths.setdefault(key, []).append(Truth(class_name, around_it))
    return [replace(label, truths=tuple(truths.get(key, ()))) for key, label in labels.items()]


def _id(value: object) -> str:
    """Tools write one and the same id as number and as text."""
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
        return named(optional(item, "category_name", "category", "category_id") or "object", "category")
    key = _id(field(item, "category_id"))
    if key not in names:
        raise BadLabelError(f"its category_id is {shown(key)}, which the file does not list")
    return names[key]


def _box(item: Mapping[str, Any], label: Label) -> tuple[list[float], BoxPx | None]:
    """(bbox, nothing), or (nothing, the box around the segmentation) where there is no usable bbox."""
    box, shape = optional(item, "bbox"), optional(item, "segmentation")
    if box or not shape:
        if isinstance(box, Mapping):
            box = [field(box, *keys) for keys in (("x", "left"), ("y", "top"), ("width", "w"), ("height", "h"))]
        return numbers(field(item, "bbox") if box is None else box, "bbox", 4), None
    if isinstance(shape, Mapping):
        return [], _around_runs(shape, label)
    parts = listed(shape, "segmentation")
    flat = [parts] if parts and not isinstance(parts[0], list) else parts
    points = [numbers(part, "segmentation") for part in flat]
    return [], around(pair for part in points for pair in zip(part[::2], part[1::2], strict=False))


def _around_runs(shape: Mapping[str, Any], label: Label) -> BoxPx:
    """The box around a mask of run lengths: background first, down the columns, as lists or in COCO's compressed text."""
    height = int(min(1e9, max(0.0, numbers(field(shape, "size"), "size", 2)[0])))
    counts = field(shape, "counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else [int(min(1e18, max(0.0, c))) for c in _finite(counts)]
    if height <= 0:
        raise BadLabelError("its segmentation has no size")
    at, x0, y0, x1, y1 = 0, 1 << 62, 1 << 62, -1, -1
    for place, run in enumerate(runs):
        if place % 2 and run:
            first, last = at // height, (at + run - 1) // height
            several = last > first
            x0, x1 = min(x0, first), max(x1, last)
            y0, y1 = min(y0, 0 if several else at % height), max(y1, height - 1 if several else (at + run - 1) % height)
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
    """COCO's text of run lengths: five bits a character, each run from the third on as its difference to the last but one."""
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
