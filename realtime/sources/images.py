"""Reads images of files, folders, globs and archives, in natural order."""

import io
import lzma
import os
import stat
import struct
import tarfile
import time
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL.Image

from engines import MOST_IMAGE_PIXELS
from engines.errors import SourceError
from engines.localizer import ImageBgr
from engines.text import file_name
from realtime.frames import Frame
from realtime.sources.film import check_pixels
from realtime.sources.image_files import (
    FILE_BYTES,
    IMAGE_SUFFIXES,
    MAY_HAVE_SEVERAL,
    LeftOut,
    Member,
    check_bytes,
    decode_heif,
    in_words,
    left_out,
    pages_of,
    pictures_in,
    several_in_words,
)
from realtime.sources.video import USUAL, Source, SourceOptions, reason_of
from realtime.written import without_written

IMAGES_PER_SECOND = 24.0
CHUNK_BYTES = 2**20
ARCHIVE_MEMBERS = 1_000_000
"""Of a zip or tar. Each costs about a kilobyte of memory; The largest public sets have 0.1 to 1
million in one.
"""
DIRECTORY_BYTES = 2**26
"""Of a zip's list of members, which has at least 46 bytes and a name for each."""
HEADER_BYTES = 2**20
"""Of one header of a tar, long names and attributes included; it is read whole."""
INFLATION = 1100
"""How many times larger than the archive all members together may be: deflate reaches 1032, more
means that they overlap.
"""
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # of damaged images it prints pages; we say which they are
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of the same


class Images(Source):
    """Images of a folder, a glob, a zip or a tar, in natural order, at a fixed rate; ``members``
    reads the files singly.

    Attributes:
        left_out: files that were given and are not read.

    Raises:
        SourceError: there is none, or one cannot be decoded.
    """

    time_base = Fraction(1, 24000)

    def __init__(
        self,
        name: str,
        members: list[Member],
        rate_fps: float = IMAGES_PER_SECOND,
        others: LeftOut | None = None,
    ) -> None:
        self.left_out: LeftOut = others or {}
        self.notes = in_words(self.left_out, len(members))
        if not members:
            raise SourceError(
                "; ".join(
                    [f"{name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})", *self.notes]
                )
            )
        self.name = file_name(Path(name).stem or name)
        self.frames = len(members)
        self.rate_fps = rate_fps
        self.members, self._are_files = members, Path(members[0][0]).is_file()

    def __iter__(self) -> Iterator[Frame]:
        several: dict[str, int] = {}
        for index, (name, read) in enumerate(self.members):
            start_ns = time.monotonic_ns()
            content = read()
            image = decode_image(name, content)
            now_ns = time.monotonic_ns()
            yield Frame(
                image, self.name, index, index / self.rate_fps, now_ns, (now_ns - start_ns) / 1e6
            )
            several[name] = pictures_in(io.BytesIO(content), name)
        self.notes = [*self.notes, *several_in_words(several)]

    def look_closer(self) -> list[str]:
        """``notes``, and a line of files that hold more pictures than the first, which is the one
        that is read.
        """
        several: dict[str, int] = {}
        for name, read in self.members:
            if Path(name).suffix.lower() in MAY_HAVE_SEVERAL:
                with suppress(SourceError, OSError):
                    several[name] = pictures_in(
                        Path(name) if self._are_files else io.BytesIO(read()), name
                    )
        return [*self.notes, *several_in_words(several)]


def images_among(name: str, inside: list[Path]) -> Images:
    """The images among files and folders. What Sightline wrote there does not count.

    Args:
        name: of the source, for messages.
        inside: the files and folders of a folder or a glob.

    Raises:
        SourceError: there is no image.
    """
    folders = {
        path for path in inside if path.suffix.lower() not in IMAGE_SUFFIXES and path.is_dir()
    }
    files = without_written(
        map(Path, natural_order(str(path) for path in inside if path not in folders))
    )
    members = [_file_member(path) for path in files if has_suffix(path.name)]
    return Images(name, members, others=left_out((path.name for path in files), folders))


def images_in_archive(spec: str, _options: SourceOptions = USUAL) -> Images:
    """The images of a zip or tar.

    Raises:
        SourceError: it cannot be read, or holds no image.
    """
    others: list[str] = []
    return Images(spec, archive_members(Path(spec), others=others), others=left_out(others))


def images_in_file(spec: str, _options: SourceOptions = USUAL) -> Images:
    """The pictures of one image file; most have one.

    Raises:
        SourceError: it cannot be read.
    """
    path = Path(spec)
    if pictures_in(path, path.name) > 1:
        members, rate_fps = pages_of(path)
        return Images(spec, members, rate_fps or IMAGES_PER_SECOND)
    return Images(spec, [_file_member(path)])


def _file_member(path: Path) -> Member:
    def read() -> bytes:
        try:
            return file_bytes(path)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error

    return str(path), read


def file_bytes(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        SourceError: it is no file but a pipe or a folder, or is too large.
        OSError: the system's.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
        raise SourceError(f"{path} is no file")
    check_bytes(str(path), found.st_size)
    with path.open("rb") as file:
        return _bounded(file, str(path))


def _bounded(file: IO[bytes], what: str, most: int = FILE_BYTES) -> bytes:
    """All of it, however much was declared; in chunks, as memory is not to be taken for what does
    not come.
    """
    content = io.BytesIO()
    while chunk := file.read(min(CHUNK_BYTES, most + 1 - content.tell())):
        content.write(chunk)
        check_bytes(what, content.tell(), most)
    return content.getvalue()


def archive_members(
    path: Path, suffixes: Set[str] = IMAGE_SUFFIXES, others: list[str] | None = None
) -> list[Member]:
    """(name, reader) of every image (or other kind of file) in a zip or an uncompressed tar, in
    natural order.

    The archive is scanned once; a reader goes straight to its member. ``others`` gets the names of
    all other files.

    Raises:
        SourceError: the archive cannot be read or is damaged; a reader raises it of its member
            (encrypted ones too).
    """
    with _archive_errors(str(path)):
        readers = (_zip_readers if path.suffix.lower() == ".zip" else _tar_readers)(
            path, suffixes, [] if others is None else others
        )
    return [
        (name, _archive_errors(f"{path}: {name}")(readers[name])) for name in natural_order(readers)
    ]


def _zip_readers(
    path: Path, suffixes: Set[str], others: list[str]
) -> dict[str, Callable[[], bytes]]:
    file = _Limited(path, DIRECTORY_BYTES)
    try:
        archive = zipfile.ZipFile(file)
    except Exception:
        file.close()
        raise
    weakref.finalize(archive, file.close)
    members = archive.infolist()
    _check_count(path, len(members))
    if sum(member.file_size for member in members) > INFLATION * path.stat().st_size:
        raise SourceError(
            f"its members say that they are more than {INFLATION} times as large as all of it"
        )
    files = [each for each in members if not each.is_dir()]
    images = [each for each in files if has_suffix(each.filename, suffixes)]
    others += [each.filename for each in files if not has_suffix(each.filename, suffixes)]
    return {each.filename: partial(_zip_bytes, archive, each) for each in images}


def _zip_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    check_bytes("it", member.file_size)
    with archive.open(member.filename) as file:
        return _bounded(file, "it")


def _tar_readers(
    path: Path, suffixes: Set[str], others: list[str]
) -> dict[str, Callable[[], bytes]]:
    found: dict[str, Callable[[], bytes]] = {}
    with _Limited(path, HEADER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        count = 0
        while (member := tar.next()) is not None:
            count += 1
            _check_count(path, count)
            if member.isfile() and not has_suffix(member.name, suffixes):
                others.append(member.name)
            elif member.isfile():
                found[member.name] = partial(
                    _tar_bytes, path, member.offset_data, member.size, member.issparse()
                )
            tar.members.clear()  # type: ignore[attr-defined]  # else all of them are kept
    return found


def _tar_bytes(path: Path, offset: int, size: int, sparse: bool) -> bytes:
    if sparse:
        raise SourceError("it is stored as a sparse file: pack it again as a plain one")
    check_bytes("it", size)
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise SourceError(f"it is cut off: {len(content)} of {size} bytes are there")
    return content


def _check_count(path: Path, count: int) -> None:
    if count > ARCHIVE_MEMBERS:
        raise SourceError(f"{path} has more than {ARCHIVE_MEMBERS} members: split it")


class _Limited(io.FileIO):
    """A file of which no more than so many bytes are read at once: what a header declares is not
    taken on trust.
    """

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        """See ``io.FileIO.read``.

        Raises:
            SourceError: too much is asked for.
        """
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > self._most:
            raise SourceError(f"a header says that it has {wanted / 1e6:.0f} MB")
        return super().read(wanted) or b""


@contextmanager
def _archive_errors(where: str) -> Iterator[None]:
    """All that Python's readers raise: RuntimeError for encryption and unknown compression, the
    rest for damage.
    """
    damage = (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        ValueError,
    )
    try:
        yield
    except SourceError as error:
        said = str(error)
        raise SourceError(
            said if where in said else f"cannot read archive {where}: {said}"
        ) from error
    except (
        OSError,
        RuntimeError,
        OverflowError,
        MemoryError,
        LookupError,
        AssertionError,
        *damage,
    ) as error:
        raise SourceError(f"cannot read archive {where}: {reason_of(error)}") from error


def decode_image(name: str, content: bytes) -> ImageBgr:
    """uint8 BGR from an image file's bytes (gray and alpha are converted, EXIF rotation is
    applied).

    Raises:
        SourceError: the bytes are not an image that OpenCV reads, or it has too many pixels.
    """
    size_px = _declared_size(content)
    if size_px is not None:
        check_pixels(name, *size_px, MOST_IMAGE_PIXELS)
    try:
        image = (
            cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_BGR)
            if content
            else None
        )
    except (cv2.error, MemoryError) as error:
        raise SourceError(f"{name} cannot be decoded: {_first_line(error)}") from error
    if image is None and content[4:8] == b"ftyp":
        return decode_heif(name, content)
    if image is None:
        raise SourceError(f"{name} is not a readable image: it is damaged or of an unknown format")
    return np.asarray(image, np.uint8)


def _declared_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) as the header says; None where it says none that Pillow reads. OpenCV has the
    limit for these, too.
    """
    for reader in _header_readers():
        try:
            with reader(io.BytesIO(content)) as image:
                return image.size
        except Exception:  # another format, or whatever a damaged header makes of it
            continue
    return None


@cache
def _header_readers() -> tuple[Callable[[IO[bytes]], PIL.Image.Image], ...]:
    """Pillow's classes, which read headers only; its ``open`` has a limit of its own, which cannot
    be set for one call.
    """
    from PIL import (
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        Jpeg2KImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        SunImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    return (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        PpmImagePlugin.PpmImageFile,
        SunImagePlugin.SunImageFile,
        Jpeg2KImagePlugin.Jpeg2KImageFile,
        AvifImagePlugin.AvifImageFile,
    )


def _first_line(error: BaseException) -> str:
    return (getattr(error, "err", "") or str(error).strip() or "not enough memory").splitlines()[0]


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers: 2 before 10."""

    def key(name: str) -> list[tuple[int, int | str]]:
        digits = "".join(c if c.isdigit() else f"\0{c}\0" for c in name).split("\0")
        return [(0, int(part)) if part.isdigit() else (1, part) for part in digits if part]

    return sorted(names, key=key)


def has_suffix(name: str, suffixes: Set[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a visible file's name ends like an image's (or another kind's), in any case."""
    return Path(name).suffix.lower() in suffixes and not Path(name).name.startswith(".")
