"""Chooses the image files of a folder, glob or archive, names the others with the reason, and reads
files that hold several pictures.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath

import av
import av.error
import cv2
import numpy as np
import PIL.Image

from engines import MOST_IMAGE_PIXELS
from engines.errors import SourceError
from engines.localizer import ImageBgr
from realtime.sources.colour import ToBgr
from realtime.sources.film import check_pixels, film_of
from realtime.sources.video import reason_of

FILE_BYTES = 2**29
"""Of an image's file or an archive's member; it is read whole. 200 million pixels are 0.2 GB as a
JPEG of the best quality.
"""
MAY_HAVE_SEVERAL = frozenset({".png", ".webp", ".gif", ".avif", ".tif", ".tiff", ".mpo"})
Member = tuple[str, Callable[[], bytes]]


def pictures_in(file: Path | BytesIO, name: str) -> int:
    """How many pictures an image file holds; 1 where it does not say, or is none."""
    if Path(name).suffix.lower() not in MAY_HAVE_SEVERAL:
        return 1
    if isinstance(file, Path) and not file.is_file():  # to open a pipe would wait for ever
        return 1
    try:
        with PIL.Image.open(file) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # whatever a damaged header makes of it: who decodes it says so
        return 1


def is_film(path: Path) -> bool:
    """Whether it is an animation that is read as a video is."""
    if path.suffix.lower() == ".gif":
        return True
    return path.suffix.lower() == ".png" and pictures_in(path, path.name) > 1


def pages_of(path: Path) -> tuple[list[Member], float | None]:
    """(name, reader) of each picture in a file of several, and how many are shown a second, where
    it says.

    Raises:
        SourceError: it cannot be read; a reader raises it of its picture.
    """
    try:
        check_bytes(str(path), path.stat().st_size)
        content = path.read_bytes()
        image = PIL.Image.open(BytesIO(content))
        count = int(getattr(image, "n_frames", 1))
        check_pixels(str(path), *image.size, MOST_IMAGE_PIXELS)
        if image.format == "TIFF":  # OpenCV knows more kinds of pixels
            return [
                (f"{path}[{page}]", partial(_tiff_page, path, content, page))
                for page in range(count)
            ], None
        image.seek(min(1, count - 1))
        image.load()
        length_ms = float(image.info.get("duration") or 0)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    members: list[Member] = [
        (f"{path}[{page}]", partial(_page, path, image, page)) for page in range(count)
    ]
    return members, 1000 / length_ms if length_ms else None


def decode_heif(name: str, content: bytes) -> ImageBgr:
    """A picture in an ISO media file (HEIC), upright.

    Raises:
        SourceError: FFmpeg does not read it, or gives its tiles only.
    """
    try:
        with av.open(BytesIO(content), "r") as container:
            tiles = len(container.streams.video)
            if tiles > 2:  # the other may be a thumbnail
                raise SourceError(
                    f"{name} is stored as {tiles} tiles, which are not put together: convert it to"
                    " JPEG"
                )
            stream = film_of(container, name)
            check_pixels(
                name, stream.codec_context.width, stream.codec_context.height, MOST_IMAGE_PIXELS
            )
            return ToBgr()(next(container.decode(stream)))
    except (av.error.FFmpegError, ValueError, StopIteration) as error:
        raise SourceError(f"{name} is not a readable image: {reason_of(error)}") from error


def _page(path: Path, image: PIL.Image.Image, page: int) -> bytes:
    """As a BMP."""
    try:
        image.seek(page)
        rgb = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise SourceError(f"cannot read picture {page} of {path}: {error}") from error
    return _bmp(np.asarray(rgb[:, :, ::-1], np.uint8))


def _tiff_page(path: Path, content: bytes, page: int) -> bytes:
    try:
        good, pages = cv2.imdecodemulti(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_BGR, range=(page, page + 1)
        )
    except cv2.error as error:
        raise SourceError(f"cannot read page {page} of {path}: {error.err}") from error
    if not good or not len(pages):
        raise SourceError(
            f"cannot read page {page} of {path}: it is damaged or of an unknown format"
        )
    return _bmp(np.asarray(pages[0], np.uint8))


def _bmp(bgr: ImageBgr) -> bytes:
    return cv2.imencode(".bmp", np.ascontiguousarray(bgr))[1].tobytes()


IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
        ".avif",
        ".tif",
        ".tiff",
        ".jp2",
    }
    | {".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif"}
)
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".ts",
        ".m2ts",
        ".mts",
        ".mpg",
        ".mpeg",
        ".vob",
        ".wmv",
        ".flv",
        ".3gp",
    }
    | {".ogv", ".mjpeg", ".mjpg", ".h264", ".hevc", ".y4m"}
)
ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
NAMES_IN_LINE = 4
MOST_NAMES = 1000
"""Of files in subfolders, which are looked for by name only."""
HIDDEN = "hidden"
SUBFOLDER = "in a subfolder (FOLDER/**/* reads those too)"
VIDEO = "a video (name it by itself)"
ARCHIVE = "an archive (name it by itself)"
OTHER = "no image by its name"
LeftOut = Mapping[str, Sequence[str]]
"""Names by the reason why they are not read."""


def why_not(name: str, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> str:
    """Why a file is not read; empty if it is."""
    path = PurePath(name)
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return HIDDEN
    if suffix in suffixes:
        return ""
    return VIDEO if suffix in VIDEO_SUFFIXES else ARCHIVE if suffix in ARCHIVE_SUFFIXES else OTHER


def left_out(names: Iterable[str], folders: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Those of the names that are not read, and images and videos in folders that are not
    entered.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        reason = why_not(name)
        if reason:
            found.setdefault(reason, []).append(name)
    for folder in sorted(folders):
        reason = HIDDEN if folder.name.startswith(".") else SUBFOLDER
        inside = [f"{folder.name}/"] if reason == HIDDEN else list(_media_in(folder))
        if inside:
            found.setdefault(reason, []).extend(inside[: MOST_NAMES - len(found.get(reason, ()))])
    return found


def _media_in(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            if why_not(name) in ("", VIDEO):
                yield (Path(place) / name).relative_to(folder.parent).as_posix()


def in_words(found: LeftOut, read: int) -> list[str]:
    """One line that counts and names them; none if there are none."""
    count = sum(len(names) for names in found.values())
    if not count:
        return []
    parts = []
    for reason, names in found.items():
        shown = ", ".join(names[:NAMES_IN_LINE])
        more = f" and {len(names) - NAMES_IN_LINE} more" if len(names) > NAMES_IN_LINE else ""
        parts.append(f"{len(names)} {reason}: {shown}{more}")
    return [f"{count} of {count + read} files are not read: {'; '.join(parts)}"]


def several_in_words(counts: Mapping[str, int]) -> list[str]:
    """One line that names files of several pictures, given how many each file holds; none if there
    are none.
    """
    several = [f"{PurePath(name).name} ({count})" for name, count in counts.items() if count > 1]
    if not several:
        return []
    more = f" and {len(several) - NAMES_IN_LINE} more" if len(several) > NAMES_IN_LINE else ""
    return [
        f"of {len(several)} files with several pictures the first is read:"
        f" {', '.join(several[:NAMES_IN_LINE])}{more}"
    ]


def check_bytes(what: str, size: int, most: int = FILE_BYTES) -> None:
    """Refuse a file before it is read into memory.

    Raises:
        SourceError: it is larger than ``most``.
    """
    if size > most:
        raise SourceError(
            f"{what} has {size / 1e6:.0f} MB: more than {most / 1e6:.0f} MB of one image are not"
            " read"
        )
