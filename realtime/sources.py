"""Where frames come from: video files and network streams (PyAV), cameras (OpenCV), image folders and archives, ``demo:``.

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
from typing import Self

import av
import av.error
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from engines.base import SourceError
from engines.localizer import ImageBgr
from realtime.demo import DemoCamera
from realtime.frames import Frame

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
IMAGES_PER_SECOND = 24.0


class Source:
    """An open source: iterate it once, inside its ``with`` block.

    Attributes:
        name: for logs and file names.
        live: it cannot wait: frames that are not read in time are lost.
        frames: how many there are, where it is known.
        rate_fps: nominal frame rate.
        time_base: the unit of its timestamps, in seconds.
    """

    name: str
    live: bool = False
    frames: int | None = None
    rate_fps: float = 25.0
    time_base: Fraction = Fraction(1, 90000)

    def __iter__(self) -> Iterator[Frame]:
        raise NotImplementedError

    def close(self) -> None:
        """Release what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


class VideoFile(Source):
    """A video file or network stream, with its own timestamps and rotation.

    Raises:
        SourceError: it cannot be opened, holds no video, or ends before all its frames are decoded.
    """

    def __init__(self, url: str) -> None:
        self.name = Path(url).stem or url
        self._url = url
        options = {"rtsp_transport": "tcp"} if url.startswith("rtsp") else {}
        try:
            self._container = av.open(url, options=options, timeout=10.0 if "://" in url else None)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise SourceError(f"cannot open {url}: {_reason(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise SourceError(f"{url} holds no video: give a video file, a folder of images or a camera number")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.live = "://" in url and not self._container.duration  # a file on a web server can wait
        self.frames = self._stream.frames or None
        self.rate_fps = float(self._stream.average_rate or 25)
        self.time_base = self._stream.time_base or Fraction(1, 90000)

    def __iter__(self) -> Iterator[Frame]:
        index, first_pts = 0, None
        to_bgr = VideoReformatter()  # one for all frames: setting one up takes far longer than its work
        decoded = self._container.decode(self._stream)
        while True:
            start_ns = time.monotonic_ns()
            try:
                picture = next(decoded, None)
            except av.error.FFmpegError as error:
                raise SourceError(f"{self._url} is damaged after frame {index}: {_reason(error)}") from error
            if picture is None:
                break
            pts = picture.pts if picture.pts is not None else index
            first_pts = pts if first_pts is None else first_pts
            pixels = np.asarray(to_bgr.reformat(picture, format="bgr24", threads=1).to_ndarray(), np.uint8)
            image = np.ascontiguousarray(np.rot90(pixels, picture.rotation // 90))
            now_ns = time.monotonic_ns()
            pts_s = float((pts - first_pts) * self.time_base)
            yield Frame(image, self.name, index, pts_s, now_ns, (now_ns - start_ns) / 1e6)
            index += 1
        if index == 0:
            raise SourceError(f"{self._url} holds no frame: the file is empty or cut off")
        if self.frames and index < self.frames and not self.live:
            raise SourceError(f"{self._url} is cut off: {index} of {self.frames} frames can be decoded")

    def close(self) -> None:
        """Release the file."""
        self._container.close()


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


class Camera(Source):
    """A camera by number, through OpenCV.

    Raises:
        SourceError: it cannot be opened, or stops giving frames.
    """

    live = True
    time_base = Fraction(1, 1000000)

    def __init__(self, index: int) -> None:
        self.name = f"camera{index}"
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it lists every driver that it tries
        self._capture = cv2.VideoCapture(index)
        cv2.utils.logging.setLogLevel(level)
        if not self._capture.isOpened():
            raise SourceError(f"camera {index} cannot be opened: check that it is plugged in and not in use")
        self.rate_fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or 30.0

    def __iter__(self) -> Iterator[Frame]:
        index, first_ns = 0, None
        while True:
            start_ns = time.monotonic_ns()
            good, image = self._capture.read()
            now_ns = time.monotonic_ns()
            if not good:
                raise SourceError(f"{self.name} stopped giving frames after {index}: check its cable")
            first_ns = now_ns if first_ns is None else first_ns
            frame = np.asarray(image, np.uint8)
            yield Frame(frame, self.name, index, (now_ns - first_ns) / 1e9, now_ns, (now_ns - start_ns) / 1e6)
            index += 1

    def close(self) -> None:
        """Release the camera."""
        self._capture.release()


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


def open_source(spec: str) -> Source:
    """Open what a user typed.

    Args:
        spec: camera number, file, folder, glob, ``.zip`` or ``.tar`` of images, ``rtsp://``, ``http(s)://``, ``demo:``.

    Raises:
        SourceError: it does not exist or cannot be read.
    """
    if spec.isdigit():
        return Camera(int(spec))
    if spec.startswith("demo:"):
        count = spec.removeprefix("demo:") or "300"
        if not count.isdigit() or not int(count):
            raise SourceError(f"'{spec}': write demo: or demo:FRAMES, like demo:120")
        return Demo(int(count))
    if "://" in spec:
        return VideoFile(spec)
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
        raise SourceError(f"cannot read archive {where}: {_reason(error)}") from error


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


def _reason(error: BaseException) -> str:
    """FFmpeg's or the system's words without the error number and path."""
    return getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
