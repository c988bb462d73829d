"""Tracking truth, one line a frame: OTB's ``x,y,w,h`` counted from 1, VOT's four corners."""

import math
from pathlib import Path

from engines.base import SourceError
from realtime.frames import BoxPx


def track_boxes(path: Path) -> list[BoxPx | None]:
    """The box of each frame as continuous edges; None where the object is absent: all numbers nan, or no size.

    Of VOT's rotated boxes, the upright box around the four corners is taken.

    Raises:
        SourceError: the file cannot be read, or a line is not a box.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    return [_box(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _box(line: str, where: str) -> BoxPx | None:
    try:
        values = [float(value) for value in line.replace(",", " ").split()]
    except ValueError as error:
        raise SourceError(f"{where}: '{line}' is not a list of numbers") from error
    if len(values) not in (4, 8):
        raise SourceError(f"{where}: {len(values)} numbers; a box has 4 (OTB: x,y,w,h) or 8 (VOT: four corners)")
    if all(math.isnan(value) for value in values):
        return None  # VOT's long-term sequences and UAV123 write absence so
    if not all(math.isfinite(value) for value in values):
        raise SourceError(f"{where}: '{line}' holds a number that is not finite: correct it, or write nan for all of them")
    if len(values) == 8:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, width, height = values
    if width < 0 or height < 0:
        raise SourceError(f"{where}: '{line}' has a negative size; OTB's boxes are x,y,w,h")
    return (x - 1, y - 1, x - 1 + width, y - 1 + height) if width and height else None
