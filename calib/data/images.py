"""Finds the image files of a label file and reads each one when it is needed. Nothing is unpacked
or kept in memory.
"""

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import takewhile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image

from calib.data.labels import BadLabelError, Label, Remarks, SizePx, is_archive, members, shown
from calib.data.text_dialects import NAME_FILES
from engines import MOST_IMAGE_PIXELS
from engines.errors import SourceError
from engines.localizer import ImageBgr
from realtime.sources.film import check_pixels
from realtime.sources.image_files import IMAGE_SUFFIXES
from realtime.sources.images import Images, decode_image
from realtime.sources.spec import open_source

ENDINGS = ("", "_boxes", "_labels", "_annotations", "_groundtruth_rect", "_groundtruth", "_rect")
"""What label files are called behind the name of their images."""
FOLDERS = ("images.tar", "images.zip", "images", "JPEGImages", "img", "color")
"""What images beside labels are called otherwise; ``img`` by OTB, ``color`` by VOT."""
VIDEOS = (".mp4", ".avi")
READABLE = IMAGE_SUFFIXES | {
    ".jfif",
    ".jpe",
    ".mpo",
    ".jp2",
    ".gif",
    ".avif",
    ".dib",
    ".pbm",
    ".pgm",
    ".ppm",
    ".pnm",
}
"""Endings of images that OpenCV decodes."""
UNREADABLE = frozenset(
    {
        ".jxl",
        ".psd",
        ".svg",
        ".raw",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
        ".tga",
        ".ico",
        ".exr",
        ".pdf",
        ".eps",
        ".dcm",
        ".npy",
        ".mat",
    }
)
"""Endings of images that OpenCV does not read: such an image is there, and not missing."""
SPLITS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
EXIF_ORIENTATION = 274
HEADS = frozenset({"JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "MPO"})
"""Formats of which Pillow and OpenCV give the same size."""


def size_of(image_bgr: ImageBgr) -> SizePx:
    """(width, height) in pixels."""
    return image_bgr.shape[1], image_bgr.shape[0]


def images_beside(path: Path, more_suffixes: tuple[str, ...] = ()) -> Path:
    """Find the images of a label file.

    They have the file's name without its ending, else a usual name, else they lie in its folder.

    Args:
        path: the label file, or folder of label files; dots in its name are part of it.
        more_suffixes: what may hold the images besides a zip, tar or folder.
    """
    if (
        "labels" in path.absolute().parts and path.is_dir()
    ):  # YOLO: images/train beside labels/train
        twin = Path(*("images" if part == "labels" else part for part in path.absolute().parts))
        if twin.is_dir():
            return twin
    stem = path.name if path.is_dir() else path.stem
    bases = [stem.removesuffix(ending) for ending in ENDINGS if stem != ending]
    named = [base + suffix for base in bases for suffix in (".zip", ".tar", "", *more_suffixes)]
    for candidate in (path.parent / name for name in (*named, *FOLDERS) if name):
        if candidate.exists() and candidate != path:
            return candidate
    return path.parent


def image_places(path: Path) -> list[Path]:
    """Where the images of labels may lie, in the order to look.

    It is inside the labels' own folder, zip or tar, else beside it.
    """
    if path.suffix.lower() in NAME_FILES:
        path = path.parent
    own = [path] if (path.is_dir() or is_archive(path)) and members(path, READABLE) else []
    return own or [images_beside(path)]


def sequence_name(path: Path) -> str:
    """The name of a sequence: that of its file without the ending, or that of its folder."""
    if path.stem.startswith(
        "groundtruth"
    ):  # as OTB and VOT are published; OTB has groundtruth_rect.2.txt too
        return path.resolve().parent.name
    return next(
        (base for ending in ENDINGS[1:] if (base := path.stem.removesuffix(ending)) != path.stem),
        path.stem,
    )


class ImageFiles:
    """The images of a folder, zip or tar.

    They are found by path, by name without folder, or by name without ending.

    Names are compared as people mean them: in any case, in any Unicode form, with either slash, as
        a URL or a path of another
    machine. What was not found as it is written is said.

    Raises:
        SourceError: the place does not exist or is something else.
    """

    def __init__(self, place: Path) -> None:
        if not place.exists():
            raise SourceError(f"images {place} do not exist: say where they are", option="images")
        if not (place.is_dir() or is_archive(place)):
            raise SourceError(
                f"images {place} are neither a folder nor a zip nor a tar: say where they are",
                option="images",
            )
        self._readers = members(place, READABLE)
        self._place, self._names = place, [*self._readers]
        self._paths, self._stems = (
            defaultdict[str, list[str]](list),
            defaultdict[str, list[str]](list),
        )
        for path in self._readers:
            self._paths[folded(PurePosixPath(path).name)].append(path)
            self._stems[folded(PurePosixPath(path).stem)].append(path)
        self._unreadable: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self._readers)

    @property
    def names(self) -> Sequence[str]:
        """The path of each image inside the place."""
        return self._names

    def reader(
        self, label: Label, labels: Path, remarks: Remarks, own_name_first: bool = False
    ) -> Callable[[], bytes]:
        """What reads the image of a label.

        The folders in its name must be those that it lies in, as far as they can be.

        Args:
            label: names its image.
            labels: the file it was read from, for messages.
            remarks: takes what was guessed.
            own_name_first: look for an image called as the label file is before the one that it
                names.

        Raises:
            BadLabelError: there is none, or there are several in different folders.
        """
        if (
            label.frame is not None
            and label.frame < len(self)
            and not self._paths.get(folded(label.image))
        ):
            return self._readers[self._names[label.frame]]
        own = [label.own_name] if label.own_name else []
        names = [*own, label.image] if own_name_first else [label.image, *own]
        error: BadLabelError | None = None
        for name in names:
            try:
                path, guess = self._path(name, label.folder, labels)
            except BadLabelError as refused:
                error = error or refused
                continue
            if name != label.image:
                guess = (
                    "images are found by the name of their label file, not by the name that it"
                    " gives"
                )
            if guess:
                remarks.guess(guess, f"{label.image} is {path}")
            return self._readers[path]
        assert error is not None
        raise error

    def _path(self, name: str, folder: str, labels: Path) -> tuple[str, str]:
        """(path, how it was guessed; empty where it was not)."""
        for exact in (f"{folder}/{name}" if folder else name, name):
            if exact in self._readers:
                return exact, ""
        asked, refusal = ImageName.of(name), None
        for names, guess in self._alike(asked):
            fits = [(how, path) for path in names if (how := self._fit(path, asked)) is not None]
            best = [path for how, path in fits if how == min(fits)[0]]
            if len(best) > 1:
                best = [
                    path
                    for path in best
                    if folder and folded(str(PurePosixPath(path).parent)) == folded(folder)
                ] or best
            if len(best) > 1 and asked.foreign:
                best = self._longest_tail(best, asked)
            if len(best) == 1:
                return best[0], guess or (
                    "images are found by their name: the folders that labels give differ"
                    if min(fits)[0]
                    else ""
                )
            if best and not refusal:
                refusal = f"which {self._place} has as {best[0]} and {best[1]}: name the folder"
            elif names and not refusal:
                refusal = f"which is not in {self._place}, only {names[0]} is: say where it is"
        raise BadLabelError(
            f"{labels} names image {shown(name)}, {refusal or self._missing(asked)}",
            option="images",
        )

    def _alike(self, asked: "ImageName") -> Iterator[tuple[list[str], str]]:
        """Images with the wanted name, then those that differ more and more, each with a remark."""
        for base in dict.fromkeys((asked.base, unquote(asked.base))):
            same = self._paths.get(folded(base), [])
            yield [path for path in same if PurePosixPath(path).name == base] or same, ""
            yield self._stems.get(folded(base), []), ""
            stem, _, suffix = base.rpartition(".")
            if stem and 2 <= len(suffix) <= 4:
                yield (
                    self._stems.get(folded(stem), []),
                    "images have another ending than labels say",
                )
        if found := re.match(r"[0-9a-f]{8}-(.+)", asked.base):  # Label Studio's mark of an upload
            yield (
                self._paths.get(folded(found[1]), []),
                "images are found without the mark that Label Studio put before their name",
            )

    def _fit(self, path: str, asked: "ImageName") -> int | None:
        """0: the path ends so, where the place's own name counts, for labels may begin above it. 1:
        the folders differ.

        None: it cannot be meant, for it lies in a folder that the name does not give, or in another
            split.
        """
        place = self._place.absolute()  # not resolved: a link's name is what the user sees
        inside = tuple(map(folded, PurePosixPath(path).parent.parts))
        whole = (*map(folded, (place if place.is_dir() else place.with_suffix("")).parts), *inside)
        folders = tuple(map(folded, asked.folders))
        if not asked.foreign and whole[max(0, len(whole) - len(folders)) :] == folders:
            return 0
        if asked.foreign:
            splits, there = (
                _splits(folders),
                _splits((whole[len(whole) - len(inside) - 1], *inside)),
            )
            return 1 if not splits or not there or splits & there else None
        remaining = iter(folders)
        return (
            1
            if all(part in remaining for part in inside) and _splits(folders) <= _splits(whole)
            else None
        )

    def _longest_tail(self, paths: list[str], asked: "ImageName") -> list[str]:
        """The images that share most of the last folders of a path of another machine."""

        def shared(path: str) -> int:
            pairs = zip(
                reversed(PurePosixPath(path).parent.parts), reversed(asked.folders), strict=False
            )
            return sum(1 for _ in takewhile(lambda pair: folded(pair[0]) == folded(pair[1]), pairs))

        most = max(map(shared, paths))
        return [path for path in paths if shared(path) == most]

    def _missing(self, asked: "ImageName") -> str:
        if self._unreadable is None:
            self._unreadable = {
                folded(PurePosixPath(path).name): path for path in members(self._place, UNREADABLE)
            }
        found = self._unreadable.get(folded(asked.base))
        if found:
            return (
                f"which is of an unsupported kind ({PurePosixPath(found).suffix}): convert it to"
                " JPEG or PNG"
            )
        return f"which is not in {self._place}: say where it is"


@dataclass(frozen=True)
class ImageName:
    """What a label file calls an image.

    Attributes:
        folders, base: of its path.
        foreign: the path begins elsewhere than the data set: at the root of some machine, at a
            drive, at an address, above.
    """

    folders: tuple[str, ...]
    base: str
    foreign: bool

    @property
    def stem(self) -> str:
        return PurePosixPath(self.base).stem

    @classmethod
    def of(cls, name: str) -> "ImageName":
        text, foreign = name.strip().strip("\"'"), False
        scheme, mark, rest = text.partition("://")
        local = re.search(r"[?&]d=([^&]+)", text)  # Label Studio's local files
        if local or (mark and scheme.isalnum()):
            text, foreign = unquote(local[1] if local else re.split(r"[?#]", rest)[0]), True
        text = text.replace("\\", "/")
        if re.match(r"[A-Za-z]:", text):
            text, foreign = text[2:], True
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if ".." in parts:
            parts, foreign = parts[len(parts) - parts[::-1].index("..") :], True
        foreign = foreign or text.startswith("/")
        return cls(tuple(parts[:-1]), parts[-1] if parts else "", foreign)


def folded(name: str) -> str:
    """A text that is the same for names that differ in case or Unicode form only."""
    return unicodedata.normalize("NFC", name).casefold()


def _splits(folders: Iterable[str]) -> frozenset[str]:
    """The parts of a data set that folders are named after. train2017 is train."""
    return frozenset(
        SPLITS[word] for folder in folders if (word := folder.rstrip("0123456789-_")) in SPLITS
    )


@dataclass(frozen=True)
class Seen:
    """What the head of an image file says: its size as shown, and whether EXIF data turn it."""

    size_px: SizePx
    turned: bool


def look_at(content: bytes, where: str) -> Seen:
    """Read the size and rotation of an image, without decoding its pixels where that is possible.

    Raises:
        SourceError: it is not a readable image.
    """
    size_px, on_its_side = None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content)) as image:
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
                if orientation == 1 and image.format in HEADS:
                    size_px = image.size
                on_its_side = isinstance(orientation, int) and orientation >= 5
    except Exception:  # whatever Pillow raises, what OpenCV says counts: it reads the pixels
        pass
    if size_px is None:
        return Seen(size_of(decode_image(where, content)), on_its_side)
    check_pixels(where, *size_px, MOST_IMAGE_PIXELS)
    return Seen(size_px, False)


def frame_readers(place: Path) -> list[tuple[SizePx, Callable[[], ImageBgr]]]:
    """(size, reader) of each frame of a folder, zip, tar or video, in order.

    All frames are decoded once for this, and none is kept in memory.

    Raises:
        SourceError: it cannot be read to its end.
    """
    with open_source(str(place)) as source:
        sizes_px = [size_of(frame.image_bgr) for frame in source]
        if isinstance(source, Images):
            readers = [partial(_image, name, read) for name, read in source.members]
            return list(zip(sizes_px, readers, strict=True))
    video = VideoFrames(place)
    return [(size_px, partial(video.read, index)) for index, size_px in enumerate(sizes_px)]


def _image(name: str, read: Callable[[], bytes]) -> ImageBgr:
    return decode_image(name, read())


class VideoFrames:
    """Frames of a video by number.

    Each is decoded once while the numbers rise. Going back starts the video again.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._decoded: Iterator[tuple[int, ImageBgr]] = iter(())
        self._next = 0

    def read(self, index: int) -> ImageBgr:
        """The frame of this number, uint8 BGR.

        Raises:
            SourceError: the video is no longer what it was.
        """
        if index < self._next or self._next == 0:
            self._decoded = self._from_start()
        for number, image in self._decoded:
            self._next = number + 1
            if number == index:
                return image
        raise SourceError(f"{self._place} has no frame {index}: it changed while it was read")

    def _from_start(self) -> Iterator[tuple[int, ImageBgr]]:
        with open_source(str(self._place)) as source:
            for frame in source:
                yield frame.index, frame.image_bgr
