"""Where frames come from: video files, network streams and cameras (``video.py``), image folders and archives, ``demo:``.

A source is opened by ``open_source``, iterated once, and closed by its ``with`` block.
"""

import glob
import lzma
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from engines.base import SourceError
from engines.localizer import ImageBgr
from realtime.demo import DemoCamera
from realtime.frames import Frame
from realtime.video import USUAL, Camera, Source, SourceOptions, VideoFile, reason_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
IMAGES_PER_SECOND = 24.0


class Images(Source):
    """Images of a folder, a glob, a zip or a tar, in natural order, at a fixed rate; ``members`` reads the files singly.

    Raises:
        SourceError: there is none, or one cannot be decoded.
    """

    time_base = Fraction(1, 24000)

    def __init__(self, name: str, members: list[tuple[str, Callable[[], bytes]]], rate_fps: float = IMAGES_PER_SECOND) -> None:
        if not members:
            raise SourceError(f"{name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.name, self.frames, self.rate_fps = Path(name).stem or name, len(members), rate_fps
        self.members = members

    def __iter__(self) -> Iterator[Frame]:
        for index, (name, read) in enumerate(self.members):
            start_ns = time.monotonic_ns()
            image = decode_image(name, read())
            now_ns = time.monotonic_ns()
            yield Frame(image, self.name, index, index / self.rate_fps, now_ns, (now_ns - start_ns) / 1e6)


class Demo(Source):
    """The virtual camera over a cat's photo: every frame's true box is known."""

    name, rate_fps = "demo", 30.0
    time_base = Fraction(1, 30000)

    def __init__(self, frames: int = 300) -> None:
        self.frames = self._count = frames
        self._camera = DemoCamera(frames)

    def __iter__(self) -> Iterator[Frame]:
        for index in range(self._count):
            start_ns = time.monotonic_ns()
            image, truth = self._camera.shoot(index)
            now_ns = time.monotonic_ns()
            yield Frame(image, self.name, index, index / self.rate_fps, now_ns, (now_ns - start_ns) / 1e6, truth)


def open_source(spec: str, options: SourceOptions = USUAL) -> Source:
    """Open what a user typed.

    Args:
        spec: camera number, file, folder, glob, ``.zip`` or ``.tar`` of images, ``rtsp://``, ``http(s)://``, ``demo:``.
        options: for live ones.

    Raises:
        SourceError: it does not exist or cannot be read.
    """
    if spec.isdigit():
        return Camera(int(spec), options)
    if spec.startswith("demo:"):
        count = spec.removeprefix("demo:") or "300"
        if not count.isdigit() or not int(count):
            raise SourceError(f"'{spec}': write demo: or demo:FRAMES, like demo:120")
        return Demo(int(count))
    if "://" in spec:
        return VideoFile(spec, options)
    path = Path(spec)
    if any(character in spec for character in "*?[") and not path.exists():
        return Images(spec, [_file_member(Path(p)) for p in natural_order(glob.glob(spec)) if has_suffix(p)])
    if not path.exists():
        raise SourceError(f"{spec} does not exist")
    if path.is_dir():
        files = natural_order(str(p) for p in path.iterdir() if has_suffix(p.name))
        return Images(str(path.resolve()), [_file_member(Path(p)) for p in files])
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        return Images(spec, archive_members(path))
    if has_suffix(spec):
        return Images(spec, [_file_member(path)])
    return VideoFile(spec)


def archive_members(path: Path, suffixes: Set[str] = IMAGE_SUFFIXES) -> list[tuple[str, Callable[[], bytes]]]:
    """(name, reader) of every image (or other kind of file) in a zip or an uncompressed tar, in natural order.

    The archive is scanned once; a reader goes straight to its member.

    Raises:
        SourceError: the archive cannot be read or is damaged; a reader raises it of its member (encrypted ones too).
    """
    with _archive_errors(str(path)):
        if path.suffix.lower() == ".zip":
            archive = zipfile.ZipFile(path)
            readers = {name: partial(archive.read, name) for name in archive.namelist() if has_suffix(name, suffixes)}
        else:
            with tarfile.open(path, "r:") as tar:
                files = [member for member in tar.getmembers() if member.isfile() and has_suffix(member.name, suffixes)]
            readers = {member.name: partial(_bytes_at, path, member.offset_data, member.size) for member in files}
    return [(name, _archive_errors(f"{path}: {name}")(readers[name])) for name in natural_order(readers)]


@contextmanager
def _archive_errors(where: str) -> Iterator[None]:
    """All that Python's readers raise: RuntimeError for encryption and unknown compression, the rest for damage."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError)
    try:
        yield
    except (OSError, RuntimeError, *damage) as error:
        raise SourceError(f"cannot read archive {where}: {reason_of(error)}") from error


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _file_member(path: Path) -> tuple[str, Callable[[], bytes]]:
    return str(path), path.read_bytes


def decode_image(name: str, content: bytes) -> ImageBgr:
    """uint8 BGR from an image file's bytes (gray and alpha are converted, EXIF rotation is applied).

    Raises:
        SourceError: the bytes are not an image that OpenCV reads.
    """
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_BGR) if content else None
    if image is None:
        raise SourceError(f"{name} is not a readable image: it is damaged or of an unknown format")
    return np.asarray(image, np.uint8)


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers: 2 before 10."""

    def key(name: str) -> list[tuple[int, int | str]]:
        digits = "".join(c if c.isdigit() else f"\0{c}\0" for c in name).split("\0")
        return [(0, int(part)) if part.isdigit() else (1, part) for part in digits if part]

    return sorted(names, key=key)


def has_suffix(name: str, suffixes: Set[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a visible file's name ends like an image's (or another kind's), in any case."""
    return Path(name).suffix.lower() in suffixes and not Path(name).name.startswith(".")
