"""Loads images with true boxes from every supported layout: CSV, PASCAL VOC and ImageNet-LOC XML,
COCO json, sequences.

It chooses the reader for a label file, or for a folder, zip or tar of label files, and it finds the
images. They lie in a folder, zip or tar; nothing is unpacked. Boxes become continuous pixel edges
x0, y0, x1, y1 of the image.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from calib.data.images import (
    VIDEOS,
    ImageFiles,
    ImageName,
    frame_readers,
    image_places,
    images_beside,
    look_at,
    sequence_name,
    size_of,
)
from calib.data.json_dialects import read_json
from calib.data.labels import (
    BadLabelError,
    Label,
    Readers,
    Remarks,
    SizePx,
    Truth,
    file_bytes,
    fitted,
    is_archive,
    members,
    shown,
)
from calib.data.tables import is_sequence, read_table
from calib.data.text_dialects import (
    NAME_FILES,
    images_without_text,
    is_track,
    read_text_folder,
    track_boxes,
)
from calib.data.xml_dialects import read_xml
from engines.errors import SourceError
from engines.localizer import ImageBgr
from realtime.frames import BoxPx
from realtime.sources.images import decode_image, has_suffix

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

IGNORED = (
    "objects that are marked difficult, and crowds, are ignored: finding one is neither right nor"
    " wrong"
)
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
    """Make a reader that reads every file by itself. Files that cannot be read are left out."""

    def read(place: Path, files: Readers, remarks: Remarks) -> list[Label]:
        labels: list[Label] = []
        for name, content in files.items():
            with remarks.leaving_out():
                labels += _placed(read_file(content(), f"{place}: {name}", remarks), name)
        return labels

    return read


def _placed(labels: list[Label], name: str) -> list[Label]:
    """Labels with the folder of their file.

    The label of a file for one image also gets the file's name.
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
    """Read the labels of a file, or of a folder, zip or tar of files, in their order.

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
    """The kind of a file whose name does not say it."""
    start = content[:4096].lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")
    if start[:1] in (b"{", b"["):
        return JSON
    if start[:1] == b"<":
        return XML
    return TABLE if re.search(rb"[,;\t| ]", start) else None


def _folder(place: Path, remarks: Remarks) -> list[Label]:
    """Read the first kind of label files of which the folder holds any that can be read."""
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


MOST_LISTED = 40


@dataclass(frozen=True)
class Sample:
    """One labelled image. It is decoded when it is asked for.

    Attributes:
        name: of the image, as in the labels.
        read: decodes it to uint8 BGR; raises SourceError where image and labels cannot belong
            together.
        truths: its boxes; none where a sequence has no object in the frame.
        sequence: whose frame it is; empty for a photo.
        others: how many more objects are labelled, of classes that were not asked for.
        ignored: its objects that are marked difficult, and crowds, of whatever class: finding them
            is neither right nor wrong, and they are no background.
    """

    name: str
    read: Callable[[], ImageBgr]
    truths: tuple[Truth, ...]
    sequence: str = ""
    others: int = 0
    ignored: tuple[Truth, ...] = ()

    @property
    def group(self) -> str:
        """Samples of one group must lie on the same side of a split.

        It is the sequence of a frame, because its neighbours are nearly the same image.
        """
        return self.sequence or self.name

    @property
    def single(self) -> bool:
        """Whether exactly one object is labelled, of any class. So it is the main object."""
        return len(self.truths) == 1 and not self.others

    @property
    def one_box(self) -> bool:
        """Whether exactly one object is of the wanted classes. Then a head can be fitted to it."""
        return len(self.truths) == 1

    def clipped(self, image_bgr: ImageBgr) -> "Sample":
        """The same with its boxes cut to its image.

        They may reach ``calib.data.labels.TOLERANCE_PX`` beyond it.
        """
        size_px = size_of(image_bgr)
        return replace(
            self,
            truths=tuple(truth.clipped(size_px) for truth in self.truths),
            ignored=tuple(truth.clipped(size_px) for truth in self.ignored),
        )


def load_dataset(
    path: Path,
    images: Path | None = None,
    ids: Path | None = None,
    classes: Sequence[str] = (),
    remarks: Remarks | None = None,
) -> list[Sample]:
    """Read labels and find their images.

    What cannot be used is left out, and printed on the standard error stream. So are guesses.

    Args:
        path: a table ``file,class,x0,y0,x1,y1`` in any dialect; ``NAME_boxes.csv`` with
            ``frame,x0,y0,x1,y1``; COCO json; a folder, zip or tar of VOC or ImageNet-LOC XML, or of
            what labelling tools write; OTB's ``x,y,w,h`` or VOT's four
            corners a line (``.txt``).
        images: folder, zip, tar or video; found in or beside the labels when None, see
            ``calib.data.images.image_places``.
        ids: a text file that names, by file stem at the start of each line, the images to keep (as
            VOC's image sets do).
        classes: to keep, see ``of_classes``; all when empty.
        remarks: takes what is left out or guessed, besides that it is said.

    Raises:
        SourceError: something is missing, or nothing can be used.
    """
    if not path.exists():
        raise SourceError(
            f"data set {path} does not exist: name a file of labelled boxes, such as a CSV with"
            " image,x0,y0,x1,y1,label in its first line"
        )
    noted = Remarks()
    kept = _named_in(ids) if ids else None
    if path.suffix.lower() == ".txt" and is_track(path):
        samples = [
            sample
            for sample in _track(path, images)
            if kept is None or Path(sample.name).stem in kept
        ]
    else:
        samples = _labelled_images(path, images, kept, noted)
    if not any(sample.truths for sample in samples):
        nothing = SourceError(
            f"data set {path} holds no labelled image" + (f" that {ids} names" if ids else "")
        )
        raise noted.nothing_left() or nothing
    noted.tell()
    if remarks is not None:
        remarks.add(noted)
    return of_classes(samples, classes, str(path))


def of_classes(samples: Sequence[Sample], classes: Sequence[str], name: str) -> list[Sample]:
    """Keep only objects of these classes, and only images that have one.

    All are kept where no class is named. The number of the other objects is kept.

    Raises:
        SourceError: the set ``name`` has no such class; the message lists those it has.
    """
    if not classes:
        return list(samples)
    known = sorted({truth.class_name for sample in samples for truth in sample.truths})
    if unknown := [wanted for wanted in classes if wanted not in known]:
        more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
        raise SourceError(
            f"{name} has no class '{unknown[0]}': it has {', '.join(known[:MOST_LISTED])}{more}"
        )
    kept = [(s, tuple(truth for truth in s.truths if truth.class_name in classes)) for s in samples]
    return [
        replace(s, truths=truths, others=s.others + len(s.truths) - len(truths))
        for s, truths in kept
        if truths
    ]


def decoded(
    samples: Iterable[Sample], remarks: Remarks | None = None
) -> Iterator[tuple[Sample, ImageBgr]]:
    """Decode each sample.

    Samples whose pixels are damaged are left out, and printed on the standard error stream.

    ``load_dataset`` looks at the heads of image files only.

    Raises:
        SourceError: no image can be decoded.
    """
    noted, kept = Remarks(), 0
    for sample in samples:
        try:
            image = sample.read()
        except SourceError as error:
            noted.leave_out(error)
            continue
        kept += 1
        yield sample, image
    if not kept and (nothing := noted.nothing_left()):
        raise nothing
    noted.tell()
    if remarks is not None:
        remarks.add(noted)


def decodable(samples: Iterable[Sample], remarks: Remarks | None = None) -> list[Sample]:
    """The samples of ``decoded``, for a caller that reads its images more than once.

    No image is kept in memory.

    Raises:
        SourceError: no image can be decoded.
    """
    return [sample for sample, _ in decoded(samples, remarks)]


def _named_in(ids: Path) -> set[str]:
    try:
        return {
            line.split()[0] for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot read {ids}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _labelled_images(
    path: Path, images: Path | None, kept: set[str] | None, remarks: Remarks
) -> list[Sample]:
    labels = read_labels(path, remarks)
    sequence = sequence_name(path) if is_sequence(path) else ""
    if sequence and remarks.first:
        raise remarks.first  # a sequence has a row for every frame
    if (
        any(label.frame is not None for label in labels)
        and images is not None
        and not (images.is_dir() or is_archive(images))
    ):
        return _frames_of_tracks(path, labels, images, remarks)
    places = [images] if images else image_places(path)
    files = [ImageFiles(place) for place in places]
    if sequence:
        _check_count(path, len(labels), places[0], len(files[0]))
    wanted = [
        label
        for label in labels
        if kept is None or kept & {ImageName.of(label.image).stem, label.own_name}
    ]
    if any(label.normalised for label in labels):
        for name in images_without_text(path, files[0].names):
            if kept is None or ImageName.of(name).stem in kept:
                remarks.guess(
                    "images without a text file are passed over: they hold no object, as YOLO"
                    " has it",
                    name,
                )
    named = Counter((label.folder, label.image) for label in wanted)
    several = Counter(label.image for label in wanted)
    samples: list[Sample] = []
    for label in wanted:
        with remarks.leaving_out():
            read = files[0].reader(
                label, path, remarks, own_name_first=named[label.folder, label.image] > 1
            )
            sample = labelled(label, read, f"{path}: image {shown(label.image)}", remarks)
            if sample.truths or not sample.others:
                name = (
                    f"{label.folder}/{label.image}"
                    if several[label.image] > 1 and label.folder
                    else label.image
                )
                samples.append(replace(sample, name=name, sequence=sequence))
    return samples


def labelled(label: Label, read: Callable[[], bytes], where: str, remarks: Remarks) -> Sample:
    """Make a sample whose boxes fit its image. Boxes that cannot fit are left out.

    Args:
        label: of the image.
        read: the image file's bytes.
        where: label file and image, for messages.
        remarks: takes what is left out or guessed.

    Raises:
        SourceError: the image cannot be read, or the label is of another one, see
            ``calib.data.labels.fitted``.
    """

    def content() -> bytes:
        try:
            return read()
        except (OSError, SourceError) as error:
            raise SourceError(f"{where} cannot be read: {error}") from error

    seen = look_at(content(), where)
    label = fitted(label, seen.size_px, where, remarks, seen.turned)
    for _ in label.ignored:
        remarks.guess(IGNORED, where)
    return Sample(
        label.image,
        lambda: decode_image(where, content()),
        label.truths,
        others=label.others,
        ignored=label.ignored,
    )


def _frames_of_tracks(
    path: Path, labels: Sequence[Label], video: Path, remarks: Remarks
) -> list[Sample]:
    """Samples of labels that give frames of a video by number."""
    frames = frame_readers(video)
    samples = []
    for label in labels:
        with remarks.leaving_out():
            where = f"{path}: frame {label.frame}"
            if label.frame is None or label.frame >= len(frames):
                raise BadLabelError(f"{where} is not one of the {len(frames)} of {video}")
            size_px, read = frames[label.frame]
            label = fitted(label, size_px, where, remarks)  # noqa: PLW2901
            samples.append(
                Sample(label.image, read, label.truths, others=label.others, ignored=label.ignored)
            )
    return samples


def _track(path: Path, images: Path | None) -> list[Sample]:
    boxes, place = track_boxes(path), images or images_beside(path, VIDEOS)
    if place == path.parent and not any(has_suffix(file.name) for file in place.iterdir()):
        raise SourceError(f"no frames beside {path}: say where they are", option="images")
    frames = frame_readers(place)
    _check_count(path, len(boxes), place, len(frames))
    return [_frame_sample(path, index, box, *frames[index]) for index, box in enumerate(boxes)]


def _check_count(path: Path, boxes: int, place: Path, frames: int) -> None:
    if boxes != frames:
        raise SourceError(
            f"{path} has boxes for {boxes} frames, {place} has {frames} frames; they must be the"
            " same"
        )


def _frame_sample(
    path: Path, index: int, box: BoxPx | None, size_px: SizePx, read: Callable[[], ImageBgr]
) -> Sample:
    """The sample of a frame of a sequence.

    A tracked object may leave the frame in part. Its truth is what is seen of it.
    """
    truths: tuple[Truth, ...] = ()
    if box is not None:
        truths = (Truth("object", box).clipped(size_px),)
        x0, y0, x1, y1 = truths[0].box_xyxy_px
        if x0 >= x1 or y0 >= y1:
            size, edges = "x".join(map(str, size_px)), ",".join(f"{edge:g}" for edge in box)
            raise SourceError(
                f"{path} line {index + 1}: of box {edges} nothing lies in the frame of {size} px:"
                " correct it, write nan for an absent object, or give the frames that the boxes"
                " were made for"
            )
    name = sequence_name(path)
    return Sample(f"{name}/{index:05d}", read, truths, name)
