"""The folder that labels made on the page are kept in: images, and one table that ``fit`` and
``evaluate`` read.

Each change is on the disk before it is answered. An image is written before the table names it, and
both appear whole or not at all, so that whatever ends the run loses at most the box under the
mouse.
"""

import csv
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image

from engines.boxes import iou
from engines.errors import InputError, SourceError
from engines.files import numbered, whole_file
from engines.text import displayable
from realtime.frames import BoxPx

TABLE, COLUMNS = "labels.csv", ("file", "class", "x0", "y0", "x1", "y1")
LONGEST_NAME = 60
SMALLEST_SIDE_PX = 4.0
SAME_IOU = 0.9
"""Two boxes of one name that overlap so much are one."""
MOST_BOXES = 100
"""Of one image."""
MOST_STEPS = 200
"""So many changes can be undone."""


@dataclass(frozen=True)
class Box:
    """One labelled object: its name, and its edges in pixels of the image."""

    name: str
    box_xyxy_px: BoxPx


Labels = Mapping[str, tuple[Box, ...]]
"""The boxes of each labelled image by its file name; none where nothing is to be found in it."""


@dataclass(frozen=True)
class _Step:
    """What undoes a change: the boxes that an image had; None where it was not labelled."""

    file: str
    boxes: tuple[Box, ...] | None


class LabelFolder:
    """The labelled images of a folder. Every method may be called from any thread.

    What is in the folder is read again where another program has changed it.

    Args:
        folder: it is made when the first label is saved.

    Raises:
        SourceError: its table cannot be read, or is not one of these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._labels: dict[str, tuple[Box, ...]] = {}
        self._steps: list[_Step] = []
        self._seen: tuple[int, int] | None = None
        self._read_anew()

    @property
    def table(self) -> Path:
        """The file that ``fit`` reads."""
        return self.folder / TABLE

    @property
    def can_undo(self) -> bool:
        """Whether there is a change to be undone."""
        return bool(self._steps)

    def all(self) -> dict[str, tuple[Box, ...]]:
        """All labels, the image that was labelled last comes last."""
        with self._lock:
            self._read_anew()
            return dict(self._labels)

    def counts(self) -> dict[str, int]:
        """How many boxes each name has."""
        found: dict[str, int] = {}
        for boxes in self.all().values():
            for each in boxes:
                found[each.name] = found.get(each.name, 0) + 1
        return found

    def coco(self) -> dict[str, Any]:
        """All labels as the object of a COCO file (Lin et al. 2014; cocodataset.org, "Data
        format"): boxes are x, y, width, height. Images that are gone are left out.
        """
        labels = self.all()
        names = sorted({each.name for boxes in labels.values() for each in boxes})
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for file, boxes in labels.items():
            try:
                with PIL.Image.open(self.folder / file) as image:
                    width, height = image.size
            except OSError:
                continue
            number = len(images) + 1
            images.append({"id": number, "file_name": file, "width": width, "height": height})
            for each in boxes:
                x0, y0, x1, y1 = each.box_xyxy_px
                sides = round(x1 - x0, 1), round(y1 - y0, 1)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": names.index(each.name) + 1,
                        "bbox": [x0, y0, *sides],
                        "area": round(sides[0] * sides[1], 1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": place, "name": name} for place, name in enumerate(names, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def check(self, boxes: Sequence[Box], size_px: tuple[int, int]) -> tuple[Box, ...]:
        """The boxes of an image as they would be kept.

        Raises:
            InputError: a box or a name cannot be.
        """
        known = self.counts()
        checked = tuple(checked_box(each, size_px, known) for each in boxes)
        _check_together(checked)
        return checked

    def add_image(self, name: str, jpeg: bytes) -> str:
        """Write an image under a name that is free, and return that name.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            try:
                taken = {each.name for each in self.folder.glob("*.jpg")}
            except OSError:
                taken = set()
            taken |= self._labels.keys()
            file = next(f"{each}.jpg" for each in numbered(name) if f"{each}.jpg" not in taken)
            with whole_file(self.folder / file) as part:
                part.write_bytes(jpeg)
            return file

    def save(self, file: str, boxes: Sequence[Box], size_px: tuple[int, int]) -> tuple[Box, ...]:
        """Keep the boxes of an image; they replace those that it had. None: nothing is in it.

        Args:
            file: an image of the folder.
            boxes: of all objects in it.
            size_px: width and height of the image.

        Returns:
            The boxes as they are kept.

        Raises:
            InputError: a box or a name cannot be.
            OutputError: it cannot be written.
        """
        with self._lock:
            checked = self.check(boxes, size_px)
            self._change(file, checked)
            return checked

    def remove(self, file: str) -> None:
        """Forget the labels of an image. The image itself stays where it is.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            self._read_anew()
            if file in self._labels:
                self._change(file, None)

    def undo(self) -> str | None:
        """Take the last change back; returns the image that it was of, None where there is none.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            self._read_anew()
            if not self._steps:
                return None
            step = self._steps[-1]
            self._write({**self._labels, step.file: step.boxes})
            self._steps.pop()
            return step.file

    def _change(self, file: str, boxes: tuple[Box, ...] | None) -> None:
        before = self._labels.get(file)
        if before == boxes:
            return
        self._write({**self._labels, file: boxes})
        self._steps = [*self._steps, _Step(file, before)][-MOST_STEPS:]

    def _write(self, wanted: Mapping[str, tuple[Box, ...] | None]) -> None:
        """Put a table in place and keep it. ``None`` leaves an image out."""
        kept = {file: boxes for file, boxes in wanted.items() if boxes is not None}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for file, boxes in kept.items():
            for each in boxes:
                edges = (f"{edge:.1f}" for edge in each.box_xyxy_px)
                writer.writerow((file, each.name, *edges))
            if not boxes:
                writer.writerow((file, "", "", "", "", ""))
        with whole_file(self.table) as part:
            part.write_text(text.getvalue(), encoding="utf-8")
        self._labels, self._seen = kept, _state_of(self.table)

    def _read_anew(self) -> None:
        state = _state_of(self.table)
        if state == self._seen:
            return
        self._labels = _labels_in(self.table) if state is not None else {}
        self._seen = state


def _state_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _labels_in(table: Path) -> dict[str, tuple[Box, ...]]:
    """The labels of a table that was written here, or has the same columns.

    Raises:
        SourceError: it has others, or cannot be read.
    """
    try:
        rows = list(csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeError, csv.Error) as error:
        raise SourceError(
            f"cannot read {table}: {error}; name another folder", option="labels_dir"
        ) from error
    if rows and tuple(rows[0]) != COLUMNS:
        raise SourceError(
            f"{table} has other columns than {','.join(COLUMNS)}: name another folder",
            option="labels_dir",
        )
    found: dict[str, tuple[Box, ...]] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        try:
            file, name, *edges = row
            before = found.get(file, ())
            if not any(edges):
                found[file] = before
                continue
            x0, y0, x1, y1 = map(float, edges)
            found[file] = (*before, Box(name, (x0, y0, x1, y1)))
        except ValueError as error:
            raise SourceError(
                f"{table} line {line} is not file,class,x0,y0,x1,y1: correct it, or name another"
                " folder",
                option="labels_dir",
            ) from error
    return found


def checked_name(name: str, known: Mapping[str, int]) -> str:
    """A name as it is kept: on one line, and written as one that is known already.

    Raises:
        InputError: there is none, or it is too long.
    """
    plain = displayable(" ".join(name.split()))
    if not plain:
        raise InputError("the box has no name yet: type what it is, such as my mug")
    if len(plain) > LONGEST_NAME:
        raise InputError(f"a name has at most {LONGEST_NAME} letters: choose a shorter one")
    return next((each for each in known if each.casefold() == plain.casefold()), plain)


def checked_box(box: Box, size_px: tuple[int, int], known: Mapping[str, int]) -> Box:
    """A box as it is kept: cut to its image, its name checked.

    Raises:
        InputError: it is too small, or the name cannot be.
    """
    (x0, y0, x1, y1), (width, height) = box.box_xyxy_px, size_px
    left, right = max(0.0, min(x0, x1)), min(float(width), max(x0, x1))
    top, bottom = max(0.0, min(y0, y1)), min(float(height), max(y0, y1))
    if min(right - left, bottom - top) < SMALLEST_SIDE_PX:
        raise InputError(
            "this box is too small: drag from one corner of the object to the opposite one"
        )
    name = checked_name(box.name, known)
    edges = round(left, 1), round(top, 1), round(right, 1), round(bottom, 1)
    return replace(box, name=name, box_xyxy_px=edges)


def _check_together(boxes: Sequence[Box]) -> None:
    """Refuse one object that is drawn twice, and too many of them.

    Raises:
        InputError: see there.
    """
    if len(boxes) > MOST_BOXES:
        raise InputError(f"an image holds at most {MOST_BOXES} boxes: remove some")
    for place, each in enumerate(boxes):
        for other in boxes[:place]:
            same = iou(each.box_xyxy_px, other.box_xyxy_px) > SAME_IOU
            if same and each.name == other.name:
                raise InputError(f"'{each.name}' has a box here already: move that one")
