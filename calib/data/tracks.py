"""Reads true boxes of sequences, one line a frame: OTB's ``x,y,w,h`` counted from 1, and VOT's four
corners.
"""

import codecs
import math
import re
from pathlib import Path

from calib.data.content import file_bytes
from calib.data.remarks import shown
from engines.errors import SourceError
from realtime.frames import BoxPx


def is_track(path: Path) -> bool:
    """Whether a text file begins with a line of numbers, as tracking truth does, or is empty; else
    it is a table.

    Raises:
        SourceError: it cannot be read.
    """
    start = file_bytes(path)[:4096].removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0]
    values = start.replace(b",", b" ").split()
    return all(re.fullmatch(rb"[-+.\deE]+|nan", value, re.IGNORECASE) for value in values)


def track_boxes(path: Path) -> list[BoxPx | None]:
    """The box of each frame as continuous edges; None where the object is absent: all numbers nan,
    or no size.

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
