"""Writes files whole or not at all, so that they survive a power failure."""

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import OutputError
from engines.text import shown

MARK_WITHIN_BYTES = 1 << 20
"""A file's mark is looked for in so much of its beginning."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` when the block
    ends without an error.

    Its content is on the disk before it has its name, and the name is on the disk when this
    returns.

    Raises:
        OutputError: the place cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        make_folder(path.parent)
        yield part
        put_in_place(part, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path``; content first, then the name, reach the disk.

    Raises:
        OSError: the system's.
    """
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing; their names reach the disk.

    Raises:
        OSError: the system's.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the file could not be written, as on a full disk.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no fsync
            raise
    finally:
        os.close(handle)


def numbered(name: str) -> Iterator[str]:
    """Names for what may be there already: the name itself, then with ``_2``, ``_3`` ... behind it,
    without end.
    """
    yield name
    for number in itertools.count(2):
        yield f"{name}_{number}"


def new_file(path: Path) -> Path:
    """Make an empty file where nothing was: ``path``, or with ``_2``, ``_3`` ... behind its stem.

    Raises:
        OSError: the system's.
    """
    make_folder(path.parent)
    for stem in numbered(path.stem):
        found = path.with_stem(stem)
        with suppress(FileExistsError):
            found.open("x").close()
            return found
    raise AssertionError("numbers do not end")


def digest_of_file(path: Path) -> str:
    """BLAKE2b of a file's content, 20 bytes in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def checked_suffix(path: Path, allowed: Sequence[str], what: str) -> None:
    """Refuse a name whose ending no writer knows; asked before long work, not after it.

    Raises:
        OutputError: the ending is not one of ``allowed`` (with their dots).
    """
    if path.suffix.lower() not in allowed:
        raise OutputError(f"{what} {path}: the name must end in {' or '.join(allowed)}; rename it")


def file_key(path: str | Path) -> tuple[int, int] | None:
    """What two names of one file have in common; None where there is no file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


@dataclass(frozen=True)
class Kind:
    """Files that a command writes under a name of the user's; their beginning tells them from files
    of others.

    Attributes:
        what: it is, in words.
        suffixes: that its name may have, with their dots; empty for any.
        mark: how each such file begins, a regular expression; ``.`` is any byte.
    """

    what: str
    suffixes: tuple[str, ...]
    mark: bytes

    def is_at(self, path: Path) -> bool:
        """Whether a file of this kind is there; never raises, and reads ``MARK_WITHIN_BYTES`` at
        most.
        """
        try:
            if not path.is_file():  # a pipe would be waited for
                return False
            with path.open("rb") as file:
                return re.match(self.mark, file.read(MARK_WITHIN_BYTES), re.DOTALL) is not None
        except OSError:
            return False


def picture_kind(what: str, *suffixes: str) -> Kind:
    """Pictures that Matplotlib writes with ``signed(what, suffix)``."""
    name = re.escape(f"Sightline {what}".encode())
    mark = (
        rb"\x89PNG.{,200}?Software\0"
        + name
        + rb"|<\?xml.{,4000}?<dc:title>"
        + name
        + rb"</dc:title>"
    )
    return Kind("picture", suffixes or (".png",), mark)


def signed(what: str, suffix: str = ".png") -> dict[str, str]:
    """The metadata by which ``picture_kind`` knows a picture, for Matplotlib's ``savefig``."""
    return {"Creator" if suffix.lower() == ".svg" else "Software": f"Sightline {what}"}


def checked_output(path: Path, kind: Kind, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a name that cannot be written to without loss; asked before long work, not after it.

    Args:
        path: to be written.
        kind: of what is to be written; an earlier file of that kind may be replaced.
        inputs: what the same command reads; what is no file of this machine is passed over.

    Raises:
        OutputError: the ending is wrong, an input has that name (or is the same file by a link or
            another spelling), or a file or folder has it which is not of this kind.
    """
    if kind.suffixes:
        checked_suffix(path, kind.suffixes, kind.what)
    name, place = (
        shown(str(path)),
        Path(os.path.realpath(path)),
    )  # "x/../a" is "a", even where there is no x yet
    key = file_key(place)
    if key is not None and any(file_key(each) == key for each in inputs if each is not None):
        raise OutputError(
            f"{kind.what} {name}: this command reads that file, and would replace it; choose"
            " another name"
        )
    if os.path.lexists(path) or os.path.lexists(place):
        if place.is_dir():
            raise OutputError(f"{kind.what} {name}: that is a folder; choose another name")
        if not kind.is_at(place):
            raise OutputError(
                f"{kind.what} {name}: another file has that name, and it is not replaced; choose"
                " another name, or remove that file (one that an early version of Sightline wrote"
                " has no mark, and counts as another's)"
            )


def write_json(path: Path, found: object) -> None:
    """Write something as indented JSON, whole or not at all; without the secrets of addresses that
    stand in it.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(shown(found), indent=2) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
