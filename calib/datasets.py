"""Images with true boxes, from every layout that people have: CSV, PASCAL VOC and ImageNet-LOC XML, COCO json, sequences.

Images lie in a folder, zip or tar; nothing is unpacked. Boxes become continuous pixel edges x0, y0, x1, y1 of the image.
"""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from engines.base import SourceError
from engines.localizer import ImageBgr
from realtime.frames import BoxPx
from realtime.sources import ARCHIVE_SUFFIXES, archive_members, decode_image, natural_order, open_source

Readers = Mapping[str, Callable[[], bytes]]


@dataclass(frozen=True)
class Truth:
    """A true box and its class."""

    class_name: str
    box_xyxy_px: BoxPx


@dataclass(frozen=True)
class Sample:
    """One labelled image, read when asked for.

    Attributes:
        name: of the image, as in the labels.
        read: decodes it to uint8 BGR.
        truths: its boxes; none where a sequence has no object in the frame.
    """

    name: str
    read: Callable[[], ImageBgr]
    truths: tuple[Truth, ...]

    @property
    def single(self) -> bool:
        """Exactly one object is labelled."""
        return len(self.truths) == 1


def load_dataset(path: Path, images: Path | None = None, ids: Path | None = None) -> list[Sample]:
    """Read labels and find their images.

    Args:
        path: a CSV ``file,class,x0,y0,x1,y1``; ``NAME_boxes.csv`` with ``frame,x0,y0,x1,y1``; a folder or tar of VOC or
            ImageNet-LOC XML; a COCO json; OTB's ``x,y,w,h`` or VOT's four corners a line (``.txt``).
        images: folder, zip, tar or video; found beside the labels, by their stem, when None.
        ids: a text file that names, by file stem at the start of each line, the images to keep (as VOC's image sets do).

    Raises:
        SourceError: something is missing, empty, damaged, or a box lies outside its image's plane.
    """
    if not path.exists():
        raise SourceError(f"data set {path} does not exist")
    if path.is_dir() or path.suffix == ".tar":
        labels = list(_voc(path))
    elif path.suffix == ".json":
        labels = _coco(path)
    elif path.suffix == ".txt":
        return _track(path, images)
    elif path.suffix == ".csv":
        labels = _csv(path)
    else:
        raise SourceError(f"data set {path}: give a .csv, .json, .txt, or a folder or tar of .xml files")
    if ids is not None:
        labels = _only(labels, ids)
    if not labels:
        raise SourceError(f"data set {path} holds no labelled image" + (f" that {ids} names" if ids else ""))
    readers = image_readers(images or _beside(path))
    return [_sample(name, truths, readers, path) for name, truths in labels]


def _only(labels: list[tuple[str, list[Truth]]], ids: Path) -> list[tuple[str, list[Truth]]]:
    try:
        kept = {line.split()[0] for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()}
    except OSError as error:
        raise SourceError(f"cannot read {ids}: {error.strerror}") from error
    return [(name, truths) for name, truths in labels if Path(name).stem in kept]


def _sample(name: str, truths: Sequence[Truth], readers: Readers, path: Path) -> Sample:
    read = readers.get(name) or readers.get(Path(name).name)
    if read is None:
        raise SourceError(f"{path} names image {name}, which is not among its images")
    for truth in truths:
        x0, y0, x1, y1 = truth.box_xyxy_px
        if not (np.isfinite(truth.box_xyxy_px).all() and x0 < x1 and y0 < y1 and x1 > 0 and y1 > 0):
            raise SourceError(f"{path}: image {name} has an impossible box {truth.box_xyxy_px}; edges are x0,y0,x1,y1")
    return Sample(name, lambda: decode_image(name, read()), tuple(truths))


def image_readers(place: Path) -> Readers:
    """Name (with and without its folder) to reader of every image in a folder, zip or tar."""
    if not place.exists():
        raise SourceError(f"images {place} do not exist: say where they are with --images")
    if place.is_dir():
        files = [p for p in place.rglob("*") if p.is_file()]
        return {str(p.relative_to(place)): p.read_bytes for p in files} | {p.name: p.read_bytes for p in files}
    if place.suffix.lower() in ARCHIVE_SUFFIXES:
        members = archive_members(place)
        return {Path(name).name: read for name, read in members} | dict(members)
    raise SourceError(f"images {place} are neither a folder nor a zip nor a tar")


def _beside(path: Path) -> Path:
    """The folder, zip or tar that belongs to a label file: same stem, less a known ending; else the folder it lies in."""
    stem = path.stem if not path.is_dir() else path.name
    for ending in ("", "_boxes", "_labels", "_annotations", "_groundtruth_rect", "_groundtruth"):
        base = path.with_name(stem.removesuffix(ending) if ending else stem)
        for candidate in (base.with_suffix(".zip"), base.with_suffix(".tar"), base):
            if candidate.exists() and candidate != path:
                return candidate
    for name in ("images.tar", "images.zip", "images", "JPEGImages"):
        if path.with_name(name).exists():
            return path.with_name(name)
    return path.parent


def _csv(path: Path) -> list[tuple[str, list[Truth]]]:
    rows: dict[str, list[Truth]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        fields = set(table.fieldnames or ())
        name_field = next((f for f in ("file", "frame", "filename") if f in fields), None)
        class_field = next((f for f in ("class", "wnid", "label") if f in fields), None)
        edges = ("x0", "y0", "x1", "y1")
        if name_field is None or not fields.issuperset(edges):
            raise SourceError(f"{path}: the first line must name file,class,x0,y0,x1,y1 (it names {','.join(fields)})")
        for line, row in enumerate(table, start=2):
            truths = rows.setdefault(row[name_field], [])
            if not any(row[edge] for edge in edges):
                continue  # a frame without the object
            try:
                x0, y0, x1, y1 = (float(row[edge]) for edge in edges)
            except (TypeError, ValueError) as error:
                raise SourceError(f"{path} line {line}: the box is not four numbers") from error
            truths.append(Truth(row[class_field] if class_field else "object", (x0, y0, x1, y1)))
    return list(rows.items())


def _voc(path: Path) -> Iterator[tuple[str, list[Truth]]]:
    """PASCAL VOC and ImageNet-LOC: inclusive corners counted from 1, so edges are ``xmin - 1`` and ``xmax``."""
    for name, content in _xml_files(path):
        try:
            root = ElementTree.fromstring(content)
            stem = root.findtext("filename") or Path(name).stem
            file = stem if Path(stem).suffix else f"{stem}.JPEG"
            truths = []
            for item in root.iter("object"):
                box = [float(item.findtext(f"bndbox/{k}") or "nan") for k in ("xmin", "ymin", "xmax", "ymax")]
                truths.append(Truth(item.findtext("name") or "object", (box[0] - 1, box[1] - 1, box[2], box[3])))
        except (ElementTree.ParseError, ValueError) as error:
            raise SourceError(f"{path}: {name} is not VOC XML: {error}") from error
        yield file, truths


def _xml_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.xml")):
            yield str(file.relative_to(path)), file.read_bytes()
        return
    try:
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar.getmembers() if m.isfile() and m.name.endswith(".xml")}
            for name in natural_order(members):
                opened = tar.extractfile(members[name])
                yield name, opened.read() if opened else b""
    except tarfile.TarError as error:
        raise SourceError(f"cannot read archive {path}: {error}") from error


def _coco(path: Path) -> list[tuple[str, list[Truth]]]:
    """COCO instances: ``bbox`` is x, y, width, height in continuous pixels; crowds are left out."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in data["images"]}
        names = {category["id"]: category["name"] for category in data["categories"]}
        labels: dict[str, list[Truth]] = {name: [] for name in files.values()}
        for item in data["annotations"]:
            if not item.get("iscrowd"):
                x, y, width, height = (float(v) for v in item["bbox"])
                truth = Truth(names[item["category_id"]], (x, y, x + width, y + height))
                labels[files[item["image_id"]]].append(truth)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not COCO json: {type(error).__name__} {error}") from error
    return list(labels.items())


def _track(path: Path, images: Path | None) -> list[Sample]:
    """One line a frame: OTB's ``x,y,w,h`` counted from 1, or VOT's four corners, whose bounding box is taken."""
    boxes: list[BoxPx | None] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = [float(v) for v in line.replace("\t", ",").replace(" ", ",").split(",") if v]
        except ValueError as error:
            raise SourceError(f"{path} line {number}: '{line}' is not a list of numbers") from error
        if len(values) == 4:
            x, y, width, height = values
            boxes.append((x - 1, y - 1, x - 1 + width, y - 1 + height) if width > 0 and height > 0 else None)
        elif len(values) == 8:
            boxes.append((min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])))
        else:
            raise SourceError(f"{path} line {number}: {len(values)} numbers; a box has 4 (OTB) or 8 (VOT)")
    place = images or _track_images(path)
    with open_source(str(place)) as source:
        frames = [frame.image_bgr for frame in source]
    if len(frames) != len(boxes):
        raise SourceError(f"{path} has {len(boxes)} boxes, {place} has {len(frames)} frames")
    return [_frame_sample(path.stem, i, frames[i], boxes[i]) for i in range(len(frames))]


def _track_images(path: Path) -> Path:
    stem = path.stem.removesuffix("_rect").removesuffix("_groundtruth")
    for suffix in (".tar", ".zip", "", ".mp4", ".avi"):
        if (candidate := path.with_name(stem + suffix)).exists() and candidate != path:
            return candidate
    raise SourceError(f"no frames beside {path}: say where they are with --images")


def _frame_sample(name: str, index: int, image: ImageBgr, box: BoxPx | None) -> Sample:
    height, width = image.shape[:2]
    truths = []
    if box is not None:
        x0, y0, x1, y1 = max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])
        truths = [Truth("object", (x0, y0, x1, y1))] if x0 < x1 and y0 < y1 else []
    return Sample(f"{name}/{index:05d}", lambda: image, tuple(truths))
