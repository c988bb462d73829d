"""Writing files whole or not at all, so that they outlast a power failure."""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.base import OutputError
from engines.text import shown


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    Its content is on the disk before it has its name, and the name is on the disk when this returns.

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
    """Names for what may be there already: the name itself, then with ``_2``, ``_3`` ... behind it, without end."""
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


def write_json(path: Path, found: object) -> None:
    """Write something as indented JSON, whole or not at all; without the secrets of addresses that stand in it.

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
