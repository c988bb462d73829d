"""Chooses the reader for a label file, or for a folder, zip or tar of label files."""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from calib.data.content import Readers, file_bytes, is_archive, members
from calib.data.json_dialects import read_json
from calib.data.labels import Label
from calib.data.remarks import BadLabelError, Remarks
from calib.data.tables import is_sequence, read_table
from calib.data.xml_dialects import read_xml
from calib.data.yolo import NAME_FILES, read_text_folder
from engines.errors import SourceError

TAKES = (
    "give a .csv, .json, .txt, or a folder, zip or tar of .xml files; CVAT, labelme, Label Studio,"
    " VIA, Create ML and YOLO's folders are read too"
)
REFUSED = {
    ".tfrecord": "a TFRecord: export Pascal VOC, COCO or CSV instead",
    ".record": "a TFRecord: export Pascal VOC, COCO or CSV instead",
    ".jsonl": "a list of JSON lines: export COCO instead",
    ".ndjson": "a list of JSON lines: export COCO instead",
    ".manifest": "a SageMaker manifest: export COCO instead",
    ".parquet": "a Parquet table: save it as CSV",
    ".xlsx": "a spreadsheet: save it as CSV",
    ".xls": "a spreadsheet: save it as CSV",
    ".ods": "a spreadsheet: save it as CSV",
    ".mat": "a MATLAB file: export Pascal VOC, COCO or CSV instead",
    ".pkl": "a Python pickle: export Pascal VOC, COCO or CSV instead",
    ".gz": "a compressed archive: unpack it, or give a .zip or .tar",
    ".tgz": "a compressed archive: unpack it, or give a .zip or .tar",
    ".7z": "a compressed archive: unpack it, or give a .zip or .tar",
    ".rar": "a compressed archive: unpack it, or give a .zip or .tar",
}
"""What is known but not read, and what to do about it."""

OneFile = Callable[[bytes, str, Remarks], list[Label]]


@dataclass(frozen=True)
class Family:
    """A kind of label files.

    Attributes:
        suffixes: of their names.
        read_file: reads one; None where only a folder of them makes a data set.
        read_folder: reads all of a folder, zip or tar.
    """

    suffixes: Set[str]
    read_file: OneFile | None
    read_folder: Callable[[Path, Readers, Remarks], list[Label]]


def _each(read_file: OneFile) -> Callable[[Path, Readers, Remarks], list[Label]]:
    """Reads every file by itself; those that cannot be read are left out."""

    def read(place: Path, files: Readers, remarks: Remarks) -> list[Label]:
        labels: list[Label] = []
        for name, content in files.items():
            with remarks.leaving_out():
                labels += _placed(read_file(content(), f"{place}: {name}", remarks), name)
        return labels

    return read


def _placed(labels: list[Label], name: str) -> list[Label]:
    """Labels that know where their file lies in the data set; of a file for one image, also what it
    is called.
    """
    path = PurePosixPath(name)
    folder = "" if path.parent == PurePosixPath() else path.parent.as_posix()
    own_name = path.stem if len(labels) == 1 else ""
    return [
        replace(label, image=label.image or own_name, folder=folder, own_name=own_name)
        for label in labels
    ]


def _tables(place: Path, files: Readers, remarks: Remarks) -> list[Label]:
    if len(files) > 1 and any(is_sequence(place / name) for name in files):
        first, second = [*files][:2]
        raise SourceError(
            f"{place} holds several sequences, {first} and {second} among them: name one of them"
        )
    return _each(read_table)(place, files, remarks)


XML = Family(frozenset({".xml"}), read_xml, _each(read_xml))
JSON = Family(frozenset({".json"}), read_json, _each(read_json))
TABLE = Family(frozenset({".csv", ".tsv"}), read_table, _tables)
TEXT = Family(frozenset({".txt"}), None, read_text_folder)
FAMILIES = (XML, JSON, TABLE, TEXT)
"""In the order in which they are looked for in a folder."""


def read_labels(path: Path, remarks: Remarks) -> list[Label]:
    """The labels of a file, or of a folder, zip or tar of files, in their order.

    Args:
        path: what a user named.
        remarks: takes what is left out or guessed.

    Raises:
        SourceError: it is of no known kind, or nothing in it can be used.
    """
    if path.is_dir() or is_archive(path):
        return _folder(path, remarks)
    if path.suffix.lower() in NAME_FILES:
        return _folder(path.parent, remarks)
    if path.suffix.lower() in REFUSED:
        raise SourceError(f"data set {path} is {REFUSED[path.suffix.lower()]}")
    content = file_bytes(path)
    family = next(
        (f for f in FAMILIES if path.suffix.lower() in f.suffixes and f.read_file), None
    ) or _family_of(content)
    if family is None or family.read_file is None:
        raise SourceError(f"data set {path}: {TAKES}")
    return _placed(family.read_file(content, str(path), remarks), path.name)


def _family_of(content: bytes) -> Family | None:
    """Of a file whose name does not tell."""
    start = content[:4096].lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")
    if start[:1] in (b"{", b"["):
        return JSON
    if start[:1] == b"<":
        return XML
    return TABLE if re.search(rb"[,;\t| ]", start) else None


def _folder(place: Path, remarks: Remarks) -> list[Label]:
    """The first kind of label files of which the folder holds any that can be read."""
    first: SourceError | None = None
    for family in FAMILIES:
        files, found = members(place, family.suffixes), Remarks()
        try:
            labels = family.read_folder(place, files, found) if files else []
        except BadLabelError as error:
            labels, first = [], first or error
        if labels:
            remarks.add(found)
            return labels
        first = first or found.first
    if first is not None:
        raise first
    if "images" in place.parts and not is_archive(
        place
    ):  # a folder of YOLO's images has one of labels beside it
        parts = ["labels" if part == "images" else part for part in place.parts]
        if Path(*parts).is_dir():
            return _folder(Path(*parts), remarks)
    return []
