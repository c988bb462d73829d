"""What a user may name as a SOURCE: ``KINDS`` says of each kind how it is recognised and opened.

A new kind of source is a module of its own, with a class derived from ``Source``, and one entry in
``KINDS``. A program that uses Sightline adds its own with ``register_source``.
"""

import glob
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engines.errors import InputError, SourceError
from engines.text import MASK, file_name, masked
from realtime.sources.demo import open_demo
from realtime.sources.film import STDIN, is_pipe
from realtime.sources.image_files import ARCHIVE_SUFFIXES, is_film
from realtime.sources.images import (
    Images,
    decode_image,
    has_suffix,
    images_among,
    images_in_archive,
    images_in_file,
)
from realtime.sources.video import LIVE_SCHEMES, USUAL, Camera, Source, SourceOptions, VideoFile
from realtime.sources.web_camera import NoPicturesError, WebPictures, may_be_camera


def path_name(spec: str) -> str:
    """The name of a source that is a path: without its folder and ending."""
    path = Path(spec)
    return (path.resolve().stem if path.is_dir() else path.stem) or spec


@dataclass(frozen=True)
class SourceKind:
    """One kind of source.

    Attributes:
        name: of the kind.
        example: a SOURCE of this kind, for the help of the commands.
        matches: whether a SOURCE is of this kind. It raises nothing.
        open: opens a SOURCE, and may raise ``SourceError``.
        stem: the source's name in logs, pictures and file names, before it is made fit for these.
        live: its frames are lost where they are not taken in time, and it is opened again when it
            is lost. None where only an open source knows.
        address: it lies on a network: opening it has a time limit, and its text is no path.
        can_be_cut: it is a file or files that can be read again from anywhere. ``batch`` works on
            these in segments, and knows video files and ``Images``. It reads others in one go.
        repeats: it gives the same frames each time, so that ``batch`` renews its results.
        alone: its frames are no film: unless it is asked for, nothing in them is followed.
    """

    name: str
    example: str
    matches: Callable[[str], bool]
    open: Callable[[str, SourceOptions], Source]
    stem: Callable[[str], str] = path_name
    live: bool | None = False
    address: bool = False
    can_be_cut: bool = False
    repeats: bool = False
    alone: bool = False


def open_source(spec: str, options: SourceOptions = USUAL) -> Source:
    """Open what a user named. The source is iterated once and closed by its ``with`` block.

    Args:
        spec: see ``KINDS``.
        options: how live sources are opened.

    Raises:
        SourceError: it does not exist or cannot be read.
    """
    source = kind_of(spec).open(spec, options)
    source.name = name_of(spec)
    return source


def first_size_px(specs: Sequence[str]) -> tuple[int, int] | None:
    """Width and height of the first frame of the first source; None where it cannot be read twice,
    and where it cannot be read.
    """
    kind = kind_of(specs[0])
    if not (kind.can_be_cut or kind.repeats):
        return None
    with suppress(SourceError), open_source(specs[0]) as source:
        for frame in source:
            return frame.image_bgr.shape[1], frame.image_bgr.shape[0]
    return None


def kind_of(spec: str) -> SourceKind:
    """The kind of a source. What nothing else takes is a video file."""
    return next(kind for kind in KINDS if kind.matches(spec))


def name_of(spec: str) -> str:
    """The name of a source in logs, pictures and file names, see ``engines.text.file_name``."""
    return file_name(kind_of(spec).stem(spec))


def can_be_cut(spec: str) -> bool:
    """Whether ``batch`` can work on a source in segments, see ``SourceKind``."""
    return kind_of(spec).can_be_cut


def register_source(kind: SourceKind) -> None:
    """Add a kind of source, which is asked before those that are there.

    Raises:
        InputError: there is a kind of that name.
    """
    if any(each.name == kind.name for each in KINDS):
        raise InputError(f"there is a kind of source called '{kind.name}' already")
    KINDS.insert(0, kind)


def examples() -> str:
    """An example of each kind, for the help of the commands."""
    return ", ".join(kind.example for kind in KINDS)


def is_there(spec: str) -> bool:
    """Whether something has that name. It may be a link that leads nowhere, or something that may
    not be looked at.
    """
    try:
        os.lstat(spec)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def _scheme(spec: str) -> str:
    """The scheme of an address in lower case; empty where it is none."""
    return spec.split("://", maxsplit=1)[0].lower() if "://" in spec else ""


def _address_name(spec: str) -> str:
    """The name of an address: no secret, and no character that file names do not take."""
    address = urlsplit(masked(spec).replace(MASK, ""))
    return Path(address.path).stem or address.hostname or "stream"


def _pipe_name(spec: str) -> str:
    return "stdin" if spec in (STDIN, "/dev/stdin") else path_name(spec)


def _open_address(spec: str, options: SourceOptions) -> Source:
    """A web camera, or else what FFmpeg makes of it."""
    if may_be_camera(spec):
        with suppress(NoPicturesError):
            return WebPictures(spec, decode_image, options)
    return VideoFile(spec, options)


def _mode(spec: str) -> int:
    """The mode bits of a path; 0 where there is nothing or it may not be looked at."""
    try:
        return Path(spec).stat().st_mode
    except (OSError, ValueError):
        return 0


def _is_glob(spec: str) -> bool:
    return any(character in spec for character in "*?[") and not is_there(spec)


def _open_glob(spec: str, _options: SourceOptions) -> Images:
    return images_among(spec, [Path(name) for name in glob.glob(spec, recursive=True)])


def _open_folder(spec: str, _options: SourceOptions) -> Images:
    path = Path(spec)
    try:
        inside = list(path.iterdir())
    except OSError as error:
        raise SourceError(f"cannot open {spec}: {error.strerror}") from error
    return images_among(str(path.resolve()), inside)


def _is_archive(spec: str) -> bool:
    return stat.S_ISREG(_mode(spec)) and Path(spec).suffix.lower() in ARCHIVE_SUFFIXES


def _is_picture(spec: str) -> bool:
    path = Path(spec)
    return stat.S_ISREG(_mode(spec)) and has_suffix(path.name.lstrip(".")) and not is_film(path)


def _open_video(spec: str, _options: SourceOptions) -> VideoFile:
    try:
        Path(spec).stat()
    except (FileNotFoundError, ValueError) as error:  # ValueError: a null character in the name
        reason = "is a link to what does not exist" if is_there(spec) else "does not exist"
        raise SourceError(f"{spec} {reason}") from error
    except OSError as error:
        raise SourceError(f"cannot open {spec}: {error.strerror}") from error
    return VideoFile(spec)


KINDS = [
    SourceKind(
        "camera",
        "0",
        str.isdecimal,
        lambda spec, options: Camera(int(spec), options),
        lambda spec: f"camera{spec}",
        live=True,
    ),
    SourceKind(
        "demo",
        "demo:300",
        lambda spec: spec.startswith("demo:"),
        open_demo,
        lambda _: "demo",
        repeats=True,
        alone=True,
    ),
    SourceKind(
        "stream",
        "rtsp://camera/1",
        lambda spec: _scheme(spec) in LIVE_SCHEMES,
        VideoFile,
        _address_name,
        live=True,
        address=True,
    ),
    SourceKind(
        "web address",
        "http://camera/video",
        lambda spec: "://" in spec,
        _open_address,
        _address_name,
        live=None,
        address=True,
    ),
    SourceKind("pipe", "-", is_pipe, VideoFile, _pipe_name),
    SourceKind("glob", "'photos/*.jpg'", _is_glob, _open_glob, can_be_cut=True, alone=True),
    SourceKind(
        "folder",
        "photos/",
        lambda spec: stat.S_ISDIR(_mode(spec)),
        _open_folder,
        can_be_cut=True,
        alone=True,
    ),
    SourceKind(
        "archive", "photos.zip", _is_archive, images_in_archive, can_be_cut=True, alone=True
    ),
    SourceKind("image file", "photo.jpg", _is_picture, images_in_file, can_be_cut=True, alone=True),
    SourceKind("video file", "film.mp4", lambda _: True, _open_video, _pipe_name, can_be_cut=True),
]
"""All kinds of source. The first one that matches a SOURCE takes it."""
