"""Where the images of a label file lie, and what reads each of them when it is asked for; nothing is unpacked or held."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from calib.data.labels import SizePx
from engines.base import SourceError
from engines.localizer import ImageBgr
from realtime.sources import ARCHIVE_SUFFIXES, Images, archive_members, decode_image, file_bytes, has_suffix, open_source

ENDINGS = ("", "_boxes", "_labels", "_annotations", "_groundtruth_rect", "_groundtruth", "_rect")
"""What label files are called behind the name of their images."""
FOLDERS = ("images.tar", "images.zip", "images", "JPEGImages", "img", "color")
"""What images beside labels are called otherwise; ``img`` by OTB, ``color`` by VOT."""
VIDEOS = (".mp4", ".avi")


def size_of(image_bgr: ImageBgr) -> SizePx:
    """(width, height) in pixels."""
    return image_bgr.shape[1], image_bgr.shape[0]


def images_beside(path: Path, more_suffixes: tuple[str, ...] = ()) -> Path:
    """The images of a label file: of its name, less a known ending, else of a usual name, else the folder it lies in.

    Args:
        path: the label file, or folder of label files; dots in its name are part of it.
        more_suffixes: what may hold the images besides a zip, tar or folder.
    """
    stem = path.name if path.is_dir() else path.stem
    bases = [stem.removesuffix(ending) for ending in ENDINGS if stem != ending]
    named = [base + suffix for base in bases for suffix in (".zip", ".tar", "", *more_suffixes)]
    for candidate in (path.parent / name for name in (*named, *FOLDERS) if name):
        if candidate.exists() and candidate != path:
            return candidate
    return path.parent


def sequence_name(path: Path) -> str:
    """The name of the sequence that a file has a box for every frame of: the file's less its ending, or its folder's."""
    if path.stem.startswith("groundtruth"):  # as OTB and VOT are published; OTB has groundtruth_rect.2.txt too
        return path.resolve().parent.name
    return next((base for ending in ENDINGS[1:] if (base := path.stem.removesuffix(ending)) != path.stem), path.stem)


class ImageFiles:
    """The images of a folder, zip or tar, found by path, by name without folder, or by name without ending.

    Raises:
        SourceError: the place does not exist or is something else.
    """

    def __init__(self, place: Path) -> None:
        if not place.exists():
            raise SourceError(f"images {place} do not exist: say where they are with --images")
        if place.is_dir():
            files = [p for p in place.rglob("*") if has_suffix(p.name) and p.is_file()]
            self._readers: dict[str, Callable[[], bytes]] = {
                p.relative_to(place).as_posix(): partial(file_bytes, p) for p in files
            }
        elif place.suffix.lower() in ARCHIVE_SUFFIXES:
            self._readers = dict(archive_members(place))
        else:
            raise SourceError(f"images {place} are neither a folder nor a zip nor a tar: say where they are with --images")
        self._place, self._paths = place, defaultdict[str, list[str]](list)
        for path in self._readers:
            self._paths[Path(path).name].append(path)
            self._paths[Path(path).stem].append(path)

    def __len__(self) -> int:
        return len(self._readers)

    def reader(self, name: str, labels: Path) -> Callable[[], bytes]:
        """What reads the image that the file ``labels`` calls ``name``. Folders in the name must be those it lies in.

        Raises:
            SourceError: there is none, or several in different folders.
        """
        named = [name] if name in self._readers else self._paths.get(PurePosixPath(name).name, [])
        paths = [path for path in named if self._lies_in(path, PurePosixPath(name).parent.parts)]
        if not paths:
            place = f"{self._place}, only {named[0]} is" if named else self._place
            raise SourceError(f"{labels} names image {name}, which is not in {place}: say where it is with --images")
        if len(paths) > 1:
            raise SourceError(
                f"{labels} names image {name}, which {self._place} has as {paths[0]} and {paths[1]}: name the folder"
            )
        return self._readers[paths[0]]

    def _lies_in(self, path: str, folders: tuple[str, ...]) -> bool:
        """Whether the path ends so, where the place's own name counts: labels may begin above it."""
        place = self._place.absolute()  # not resolved: a link's name is what the user sees
        whole = ((place if place.is_dir() else place.with_suffix("")) / path).parent.parts
        return whole[max(0, len(whole) - len(folders)) :] == folders


def frame_readers(place: Path) -> list[tuple[SizePx, Callable[[], ImageBgr]]]:
    """(size, reader) of each frame of a folder, zip, tar or video, in order; all are decoded once for it, none is held.

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
    """Frames of a video by number: each is decoded once as long as numbers rise; going back starts the video again."""

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
