"""Images with true boxes, from every layout that people have: CSV, PASCAL VOC and ImageNet-LOC XML, COCO json, sequences.

Images lie in a folder, zip or tar; nothing is unpacked. Boxes become continuous pixel edges x0, y0, x1, y1 of the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.data.images import VIDEOS, ImageFiles, frame_readers, images_beside, sequence_name, size_of
from calib.data.labels import Label, SizePx, Truth, check_truth, is_sequence, read_labels
from calib.data.tracks import track_boxes
from engines.base import SourceError
from engines.localizer import ImageBgr
from realtime.frames import BoxPx
from realtime.sources import decode_image, has_suffix

SIZE_SLACK = 0.02
"""How far a declared image size may be off: labelling tools round it; beyond, the labels were made for another image."""
MOST_LISTED = 40


@dataclass(frozen=True)
class Sample:
    """One labelled image, read when asked for.

    Attributes:
        name: of the image, as in the labels.
        read: decodes it to uint8 BGR; raises SourceError where image and labels cannot belong together.
        truths: its boxes; none where a sequence has no object in the frame.
        sequence: whose frame it is; empty for a photo.
        others: how many more objects are labelled, of classes that were not asked for.
    """

    name: str
    read: Callable[[], ImageBgr]
    truths: tuple[Truth, ...]
    sequence: str = ""
    others: int = 0

    @property
    def group(self) -> str:
        """What must not lie on both sides of a split: the sequence of a frame, whose neighbours are nearly the same image."""
        return self.sequence or self.name

    @property
    def single(self) -> bool:
        """Exactly one object is labelled, of whatever class: nothing else competes for being the main one."""
        return len(self.truths) == 1 and not self.others

    @property
    def one_box(self) -> bool:
        """Exactly one object is of the classes that were asked for: what a head can be fitted to."""
        return len(self.truths) == 1

    def clipped(self, image_bgr: ImageBgr) -> "Sample":
        """The same with its boxes cut to its image: they may reach ``calib.data.labels.TOLERANCE_PX`` beyond it."""
        return replace(self, truths=tuple(truth.clipped(size_of(image_bgr)) for truth in self.truths))


def load_dataset(path: Path, images: Path | None = None, ids: Path | None = None, classes: Sequence[str] = ()) -> list[Sample]:
    """Read labels and find their images.

    Args:
        path: a CSV ``file,class,x0,y0,x1,y1``; ``NAME_boxes.csv`` with ``frame,x0,y0,x1,y1``; a folder, zip or tar of VOC or
            ImageNet-LOC XML; a COCO json; OTB's ``x,y,w,h`` or VOT's four corners a line (``.txt``).
        images: folder, zip, tar or video; found beside the labels when None, see ``calib.data.images.images_beside``.
        ids: a text file that names, by file stem at the start of each line, the images to keep (as VOC's image sets do).
        classes: to keep, see ``of_classes``; all when empty.

    Raises:
        SourceError: something is missing, empty, damaged, or a box cannot be. Boxes and the images themselves are compared
            when an image is read.
    """
    if not path.exists():
        raise SourceError(f"data set {path} does not exist")
    kept = _named_in(ids) if ids else None
    if path.suffix == ".txt":
        samples = [sample for sample in _track(path, images) if kept is None or Path(sample.name).stem in kept]
    else:
        samples = _labelled_images(path, images, kept)
    if not any(sample.truths for sample in samples):
        raise SourceError(f"data set {path} holds no labelled image" + (f" that {ids} names" if ids else ""))
    return of_classes(samples, classes, str(path))


def of_classes(samples: Sequence[Sample], classes: Sequence[str], name: str) -> list[Sample]:
    """Only objects of these classes, and only images that have one; all when none is named. Of others the number is kept.

    Raises:
        SourceError: the set ``name`` has no such class; the message lists those it has.
    """
    if not classes:
        return list(samples)
    known = sorted({truth.class_name for sample in samples for truth in sample.truths})
    if unknown := [wanted for wanted in classes if wanted not in known]:
        more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
        raise SourceError(f"{name} has no class '{unknown[0]}': it has {', '.join(known[:MOST_LISTED])}{more}")
    kept = [(s, tuple(truth for truth in s.truths if truth.class_name in classes)) for s in samples]
    return [replace(s, truths=truths, others=s.others + len(s.truths) - len(truths)) for s, truths in kept if truths]


def _named_in(ids: Path) -> set[str]:
    try:
        return {line.split()[0] for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {ids}: {getattr(error, 'strerror', None) or error}") from error


def _labelled_images(path: Path, images: Path | None, kept: set[str] | None) -> list[Sample]:
    labels = read_labels(path)
    place = images or images_beside(path)
    files = ImageFiles(place)
    sequence = sequence_name(path) if is_sequence(path) else ""
    if sequence:
        _check_count(path, len(labels), place, len(files))
    wanted = [label for label in labels if kept is None or Path(label.image).stem in kept]
    samples = [labelled(label, files.reader(label.image, path), f"{path}: image {label.image}") for label in wanted]
    return [replace(sample, sequence=sequence) for sample in samples]


def labelled(label: Label, read: Callable[[], bytes], where: str) -> Sample:
    """A sample whose boxes are checked: now as far as the label goes, against the image itself when it is read.

    Args:
        label: of the image.
        read: the image file's bytes.
        where: label file and image, for messages.

    Raises:
        SourceError: see ``calib.data.labels.check_truth``.
    """
    for truth in label.truths:
        check_truth(truth, where, label.size_px)

    def read_checked() -> ImageBgr:
        try:
            image = decode_image(where, read())
        except OSError as error:
            raise SourceError(f"{where} cannot be read: {error}") from error
        _check_size(label.size_px, size_of(image), where)
        for truth in label.truths:
            check_truth(truth, where, size_of(image))
        return image

    return Sample(label.image, read_checked, label.truths)


def _check_size(declared_px: SizePx | None, size_px: SizePx, where: str) -> None:
    if declared_px and any(abs(said - real) > SIZE_SLACK * real for said, real in zip(declared_px, size_px, strict=True)):
        said, real = ("x".join(map(str, size)) for size in (declared_px, size_px))
        raise SourceError(f"{where} has {real} px, its label says {said}: give the images that the labels were made for")


def _track(path: Path, images: Path | None) -> list[Sample]:
    boxes, place = track_boxes(path), images or images_beside(path, VIDEOS)
    if place == path.parent and not any(has_suffix(file.name) for file in place.iterdir()):
        raise SourceError(f"no frames beside {path}: say where they are with --images")
    frames = frame_readers(place)
    _check_count(path, len(boxes), place, len(frames))
    return [_frame_sample(path, index, box, *frames[index]) for index, box in enumerate(boxes)]


def _check_count(path: Path, boxes: int, place: Path, frames: int) -> None:
    if boxes != frames:
        raise SourceError(f"{path} has boxes for {boxes} frames, {place} has {frames} frames; they must be the same")


def _frame_sample(path: Path, index: int, box: BoxPx | None, size_px: SizePx, read: Callable[[], ImageBgr]) -> Sample:
    """Tracked objects may leave the frame in part: what is seen of them is the truth."""
    truths: tuple[Truth, ...] = ()
    if box is not None:
        truths = (Truth("object", box).clipped(size_px),)
        x0, y0, x1, y1 = truths[0].box_xyxy_px
        if x0 >= x1 or y0 >= y1:
            size, edges = "x".join(map(str, size_px)), ",".join(f"{edge:g}" for edge in box)
            raise SourceError(
                f"{path} line {index + 1}: of box {edges} nothing lies in the frame of {size} px: correct it, write nan for an "
                "absent object, or give the frames that the boxes were made for"
            )
    name = sequence_name(path)
    return Sample(f"{name}/{index:05d}", read, truths, name)
