"""Reads text files of boxes: YOLO and KITTI (one file an image), OTB and VOT (one line a frame).

YOLO's folders are those of Darknet, Ultralytics and Roboflow. OTB writes ``x,y,w,h`` counted from
1. VOT writes four corners.
"""

import codecs
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from calib.data.labels import (
    FRACTION_SLACK,
    BadLabelError,
    Label,
    Readers,
    Remarks,
    Truth,
    around,
    centre_and_size,
    file_bytes,
    is_archive,
    members,
    number,
    shown,
    text_of,
)
from engines.errors import SourceError
from realtime.frames import BoxPx

CLASS_FILES = (
    "classes.txt",
    "obj.names",
    "_darknet.labels",
    "predefined_classes.txt",
    "class_names.txt",
    "coco.names",
)
NAME_FILES = frozenset({".yaml", ".yml", ".data", ".names"})
"""Endings of files that stand for the folder they lie in."""
NAME_SUFFIXES = frozenset({".yaml", ".yml", ".names", ".txt", ".labels"})
KITTI_VALUES = 15


def read_text_folder(place: Path, files: Readers, remarks: Remarks) -> list[Label]:
    """Read all text files of a folder, zip or tar that hold boxes.

    An empty file is an image without objects.

    Raises:
        BadLabelError: none of them holds a box.
    """
    beside = {
        name: read for name, read in files.items() if "labels" in PurePosixPath(name).parent.parts
    } or files
    names, keypoints = _class_names(place)
    labels, strays = [], []
    for name, read in beside.items():
        if PurePosixPath(name).name.lower() in CLASS_FILES:
            continue
        with remarks.leaving_out():
            where = f"{place}: {name}"
            lines = [line.split() for line in text_of(read(), where, remarks).splitlines()]
            kind = _kind([line for line in lines if line])
            if kind is None:
                strays.append(name)
                continue
            labels.append(_label(lines, kind, _image_name(name), where, names, keypoints, remarks))
    if not any(label.truths for label in labels):
        raise remarks.first or BadLabelError(
            f"{place} holds no labelled image: of its text files none has a box"
        )
    for name in strays:
        remarks.guess("text files that hold no boxes are passed over", f"{place}: {name}")
    if names is None and any(label.normalised for label in labels):
        remarks.guess(
            "no data.yaml or classes.txt names the classes: they are called by their number",
            str(place),
        )
    return labels


def images_without_text(path: Path, images: Iterable[str]) -> list[str]:
    """The images that have no text file of their name.

    There are none where ``path`` is no folder of text files.
    """
    place = path.parent if path.suffix.lower() in NAME_FILES else path
    if not (place.is_dir() or is_archive(place)):
        return []
    stems = {PurePosixPath(name).stem.casefold() for name in members(place, {".txt"})}
    return (
        [name for name in images if PurePosixPath(name).stem.casefold() not in stems]
        if stems
        else []
    )


def _kind(lines: Sequence[Sequence[str]]) -> str | None:
    """The kind of a file by its first line. Other texts give None."""
    if not lines:
        return "yolo"
    first = lines[0]
    rest = [_is_number(value) for value in first[1:]]
    if len(first) >= KITTI_VALUES and not _is_number(first[0]) and all(rest[: KITTI_VALUES - 1]):
        return "kitti"
    return "yolo" if len(first) >= 5 and all(rest[:4]) else None


def _is_number(text: str) -> bool:
    return (
        re.fullmatch(
            r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", text, re.IGNORECASE
        )
        is not None
    )


def _image_name(name: str) -> str:
    """The name of the image of a text file. Beside ``labels`` lies ``images``."""
    parts = [*PurePosixPath(name).with_suffix("").parts]
    if "labels" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("labels")] = "images"
    return "/".join(parts)


def _label(
    lines: Sequence[Sequence[str]],
    kind: str,
    image: str,
    where: str,
    names: Mapping[int, str] | None,
    keypoints: bool,
    remarks: Remarks,
) -> Label:
    truths, others = [], 0
    for place, values in enumerate(lines, start=1):
        if not values or (kind == "kitti" and values[0] == "DontCare"):
            continue
        try:
            truths.append(_kitti(values) if kind == "kitti" else _yolo(values, names, keypoints))
        except BadLabelError as error:
            remarks.leave_out(BadLabelError(f"{where} line {place}: {error}"))
            others += 1
    return Label(image, tuple(truths), normalised=kind == "yolo", others=others)


def _kitti(values: Sequence[str]) -> Truth:
    if len(values) < 8:
        raise BadLabelError(f"it has {len(values)} values; KITTI's lines have {KITTI_VALUES}")
    x0, y0, x1, y1 = (number(value, "box") for value in values[4:8])
    return Truth(values[0], (x0, y0, x1, y1))


def _yolo(values: Sequence[str], names: Mapping[int, str] | None, keypoints: bool) -> Truth:
    """Read class, centre, size and perhaps a confidence, or class and the points of an outline.

    All are fractions of the image.
    """
    numbers = [number(value, "box") for value in values[1:]]
    box: BoxPx
    if len(numbers) in (4, 5) or (keypoints and len(numbers) > 4):
        numbers = numbers[:4]
        box = centre_and_size(numbers[0], numbers[1], numbers[2], numbers[3])
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        box = around(zip(numbers[::2], numbers[1::2], strict=True))
    else:
        raise BadLabelError(
            f"it has {len(values)} values; YOLO's lines have class,x,y,width,height or class and an"
            " outline's points"
        )
    if not all(-FRACTION_SLACK <= value <= 1 + FRACTION_SLACK for value in numbers):
        raise BadLabelError(
            f"its box {shown(' '.join(values[1:5]))} is not between 0 and 1, as YOLO's fractions of"
            " the image are"
        )
    return Truth(_class(values[0], names), box)


def _class(text: str, names: Mapping[int, str] | None) -> str:
    if not _is_number(text):
        return text
    index = number(text, "class")
    if names is None:
        return f"{index:g}"
    if index not in names:
        raise BadLabelError(f"its class is {shown(text)}, of {len(names)} that are named")
    return names[int(index)]


def _class_names(place: Path) -> tuple[dict[int, str] | None, bool]:
    """Find the file of class names, in the place or up to three folders above it.

    Returns:
        (names by number, whether boxes have key points).
    """
    found: list[tuple[str, Readers]] = [(str(place), members(place, NAME_SUFFIXES))]
    for folder in [place.absolute().parent, *place.absolute().parents[1:3]]:
        near = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in NAME_SUFFIXES and path.is_file()
        ]
        found.append((str(folder), {path.name: partial(file_bytes, path) for path in near}))
    for where, files in found:
        for name in sorted(
            files, key=lambda name: (not name.lower().endswith((".yaml", ".yml")), name.count("/"))
        ):
            base = PurePosixPath(name).name.lower()
            if base.endswith((".yaml", ".yml")) or base in CLASS_FILES or base.endswith(".names"):
                text = _quietly(files, name, where)
                names = yaml_names(text) if base.endswith((".yaml", ".yml")) else _lines(text)
                if names:
                    return names, re.search(r"^kpt_shape\s*:", text, re.MULTILINE) is not None
    return None, False


def _quietly(files: Readers, name: str, where: str) -> str:
    try:
        return text_of(files[name](), f"{where}: {name}", Remarks())
    except BadLabelError:
        return ""


def _lines(text: str) -> dict[int, str]:
    return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))


def yaml_names(text: str) -> dict[int, str]:
    """Read ``names`` of a data.yaml.

    It is a list, or numbers with names, in brackets or on lines. It is empty where there is none.
    """
    text = re.sub(r"(^|[ \t])#.*$", "", text, flags=re.MULTILINE)
    start = re.search(r"^names[ \t]*:[ \t]*", text, re.MULTILINE)
    if start is None:
        return {}
    rest = text[start.end() :]
    if rest[:1] in ("[", "{"):
        inside = re.match(r"[\[{]([^\]}]*)", rest)
        items = re.findall(
            r"""\s*((?:\d+\s*:\s*)?(?:'[^']*'|"[^"]*"|[^,'"\n]+))\s*(?:,|\n|$)""",
            inside[1] if inside else "",
        )
    else:
        items = []
        for line in rest.splitlines()[1:]:
            if line.strip():
                if not re.match(r"\s|-", line):
                    break
                items.append(re.sub(r"^\s*-\s+", "", line))
    names: dict[int, str] = {}
    for item in items:
        match = re.fullmatch(r"\s*(?:(\d{1,6})\s*:\s)?\s*(.*?)\s*", item.replace("\n", " "))
        if match and match[2]:
            names[int(match[1]) if match[1] else len(names)] = match[2].strip("'\"")
    return names


def is_track(path: Path) -> bool:
    """Whether a text file begins with a line of numbers, as tracking truth does, or is empty.

    Another file is a table.

    Raises:
        SourceError: it cannot be read.
    """
    start = file_bytes(path)[:4096].removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0]
    values = start.replace(b",", b" ").split()
    return all(re.fullmatch(rb"[-+.\deE]+|nan", value, re.IGNORECASE) for value in values)


def track_boxes(path: Path) -> list[BoxPx | None]:
    """The box of each frame as continuous edges.

    It is None where the object is absent: all numbers are nan, or it has no size.

    Of VOT's rotated boxes, the upright box around the four corners is taken.

    Raises:
        SourceError: the file cannot be read, or a line is not a box.
    """
    try:
        lines = file_bytes(path).decode("utf-8-sig").rstrip().splitlines() or [""]
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    return [_box(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _box(line: str, where: str) -> BoxPx | None:
    try:
        values = [float(value) for value in line.replace(",", " ").split()]
    except ValueError as error:
        raise SourceError(f"{where}: '{shown(line)}' is not a list of numbers") from error
    if len(values) == 5:
        raise SourceError(
            f"{where}: 5 numbers, as in a file of YOLO's: give the folder of labels and images"
            " instead"
        )
    if len(values) not in (4, 8):
        raise SourceError(
            f"{where}: {len(values)} numbers; a box has 4 (OTB: x,y,w,h) or 8 (VOT: four corners)"
        )
    if all(math.isnan(value) for value in values):
        return None  # VOT's long-term sequences and UAV123 write absence so
    if not all(math.isfinite(value) for value in values):
        raise SourceError(
            f"{where}: '{shown(line)}' holds a number that is not finite: correct it, or write nan"
            " for all of them"
        )
    if len(values) == 8:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, width, height = values
    if width < 0 or height < 0:
        raise SourceError(f"{where}: '{shown(line)}' has a negative size; OTB's boxes are x,y,w,h")
    return (x - 1, y - 1, x - 1 + width, y - 1 + height) if width and height else None
