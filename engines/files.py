"""Writes files whole or not at all, and reads files that others made: within a limit, and with a
clear reason where one is not what it should be.
"""

import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from engines.engine import Array
from engines.errors import ModelError, OutputError
from engines.text import shown as printable

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
        printable(str(path)),
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
        part.write_text(json.dumps(printable(found), indent=2) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


MOST_JSON_BYTES = 64 << 20
_FOREIGN = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself: run 'git lfs pull' there",
    ),
    (b"<!DOCTYPE", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
)


def foreign_kind(content: bytes) -> str | None:
    """What a file is whose first bytes show that it only stands in for another, in words that say
    what to do; else None.
    """
    head = content[:64].lstrip().lower()
    return next((what for start, what in _FOREIGN if head.startswith(start.lower())), None)


def checked_file(path: Path, what: str) -> int:
    """The size in bytes of a file that is about to be read.

    Raises:
        ModelError: it is missing, a folder or a device, cannot be opened, is empty, or is a
            stand-in for the real one.
    """
    try:
        if path.is_dir():
            raise ModelError(f"{what} {path} is a folder: name a file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{what} {path} is not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            foreign = foreign_kind(file.read(64))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ModelError(
            f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not size:
        raise ModelError(f"{what} {path} is empty")
    if foreign:
        raise ModelError(f"{what} {path} is {foreign}")
    return size


def read_file(path: Path, what: str, most_bytes: int) -> bytes:
    """The content of a file, if it is one and not larger than ``most_bytes``.

    Raises:
        ModelError: see ``checked_file``, or it is too large.
    """
    size = checked_file(path, what)
    if size > most_bytes:
        raise ModelError(f"{what} {path} has {size:,} bytes: at most {most_bytes:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {what} {path}: {error.strerror}") from error


def parsed_json(text: str | bytes) -> Any:
    """JSON without ``NaN`` and ``Infinity``, which it does not have, and without numbers that no
    float holds.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refused_constant, parse_float=_finite_float)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} (line {error.lineno})") from error


def json_object(text: str | bytes) -> dict[str, Any]:
    """As ``parsed_json``, of a JSON object.

    Raises:
        ValueError: see there, or it is another kind of value.
    """
    found = parsed_json(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: the file cannot be read.
        ValueError: it does not hold a JSON object.
    """
    return json_object(read_file(path, what, MOST_JSON_BYTES))


def number(value: object, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number between two limits, both allowed.

    Raises:
        ValueError: it is not; the text names ``name`` and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number: {shown(value)}")
    low, high = (
        max(low, -sys.float_info.max),
        min(high, sys.float_info.max),
    )  # an int may be beyond every float
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}: {_limits(low, high)}")
    return float(value)


def whole_number(value: object, name: str, low: int, high: int) -> int:
    """As ``number``, of an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is not a whole number: {shown(value)}")
    return int(number(value, name, low, high))


def text(value: object, name: str) -> str:
    """A string.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text: {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value of a file in a message: on one line, and not too long."""
    words = ascii(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def _limits(low: float, high: float) -> str:
    if (low, high) == (-sys.float_info.max, sys.float_info.max):
        return "it must be finite"
    return f"it must lie in {low:g} .. {high:g}"


def _refused_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not a number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"it holds {shown(digits)}, beyond every float")
    return value


MOST_UNPACKED = 32
FREELY_UNPACKED = 1 << 22  # bytes that small archives may always unpack to
LONGEST_HEADER = 1 << 26
ZIP_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
NUMPY_OF = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
"""NumPy's names for safetensors' types. BF16, which NumPy lacks, is the upper half of a float32."""


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; BF16 comes as float32.

    Args:
        path: of the file.
        what: ``head`` or ``weights``, for messages.

    Raises:
        ModelError: it is none, is cut off, or its header does not fit it.
    """
    size = checked_file(path, what)
    try:
        with safe_open(path, framework="numpy") as file:  # checks header, offsets and sizes
            metadata, names = dict(file.metadata() or {}), list(file.keys())
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json_object(raw.read(min(length, LONGEST_HEADER)))
            return {
                name: _tensor(raw, 8 + length, size, name, header[name]) for name in names
            }, metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"cannot read {what} {path}: {reason_of(error)}") from error


def read_safetensors_metadata(path: Path, what: str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.

    Raises:
        ModelError: see ``read_safetensors``.
    """
    checked_file(path, what)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {what} {path}: {reason_of(error)}") from error


def _tensor(
    raw: io.BufferedReader, data: int, size: int, name: str, entry: dict[str, list[int]]
) -> Array:
    """One tensor, at its offsets behind ``data``."""
    kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if kind != "BF16" and kind not in NUMPY_OF:
        raise ValueError(
            f"tensor {shown(name)} holds {kind}, which is not supported: convert it to F32"
        )
    dtype = np.dtype("<u2" if kind == "BF16" else NUMPY_OF[kind])
    if not 0 <= start <= end <= size - data or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {shown(name)} does not fit its shape {list(shape)}")
    raw.seek(data + start)
    values = np.frombuffer(raw.read(end - start), dtype)
    if kind == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a NumPy archive.

    Raises:
        ModelError: it is none, is damaged, or would unpack to much more than it is.
    """
    size = checked_file(path, "weights")
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(archive, size)
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {
                info.filename.removesuffix(".npy"): _npy(info.filename, archive.read(info))
                for info in members
            }
    except ZIP_ERRORS as error:
        raise ModelError(
            f"cannot read weights {path} as a NumPy archive: {reason_of(error)}"
        ) from error


def check_unpacked(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError where an archive of ``size`` bytes would fill the memory."""
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(MOST_UNPACKED * size, FREELY_UNPACKED):
        raise ValueError(f"{size:,} bytes would unpack to {unpacked:,}, which no weights do")


def _npy(name: str, content: bytes) -> Array:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{shown(name)} is of NumPy's format {version}, which is not supported")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"{shown(name)} holds {dtype}: only numbers are read")
    if (
        any(length < 0 for length in shape)
        or math.prod(shape) * dtype.itemsize != len(content) - stream.tell()
    ):
        raise ValueError(f"{shown(name)} does not fit its shape {shown(list(shape))}")
    values = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def reason_of(error: Exception) -> str:
    """An error's first line, printable and not too long."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c if c.isprintable() else "?" for c in said)[:200]
