"""Reads the bytes, texts and values of label files in a folder, zip or tar, and checks their
kind.
"""

import codecs
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from calib.data.labels import BadLabelError, Remarks, shown
from engines.errors import SourceError
from realtime.sources import images as sources
from realtime.sources.images import archive_members, has_suffix, natural_order
from realtime.sources.listing import ARCHIVE_SUFFIXES

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
Readers = Mapping[str, Callable[[], bytes]]


def is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def visible(name: str) -> bool:
    """Whether neither a file nor a folder of it is hidden, or what macOS and editors leave
    behind.
    """
    return not any(
        part.startswith(".") and part != ".." for part in _parts(name)
    ) and "__MACOSX" not in _parts(name)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != ".")


def members(place: Path, suffixes: Set[str]) -> Readers:
    """What reads each visible file of these kinds in a folder, zip or tar, by its path inside, in
    natural order.

    Raises:
        SourceError: the archive cannot be read.
    """
    if is_archive(place):
        return {name: read for name, read in archive_members(place, suffixes) if visible(name)}
    names = [
        p.relative_to(place).as_posix()
        for p in place.rglob("*")
        if has_suffix(p.name, suffixes) and p.is_file()
    ]
    return {
        name: partial(file_bytes, place / name) for name in natural_order(names) if visible(name)
    }


def file_bytes(path: Path) -> bytes:
    """The content of a label or image file.

    Raises:
        SourceError: it cannot be read, is no plain file, or is too large.
    """
    try:
        return sources.file_bytes(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def text_of(content: bytes, where: str, remarks: Remarks, declared: str = "") -> str:
    """Decode by the byte order mark, the encoding that the file declares, UTF-8, or else
    Windows-1252, which is said.

    Raises:
        BadLabelError: it is not text.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return _checked(_decoded(content[len(mark) :], encoding), where)
    for encoding in (declared, "utf-8", "cp1252"):
        text = _decoded(content, encoding) if encoding else None
        if text is not None and "\0" not in text:
            if encoding == "cp1252":
                _checked(text, where)
                remarks.guess("not in UTF-8, read as Windows-1252", where)
            return _checked(text, where)
    return _checked(None, where)


def _decoded(content: bytes, encoding: str) -> str | None:
    try:
        return (
            codecs.decode(content, encoding) if codecs.lookup(encoding)._is_text_encoding else None
        )
    except (UnicodeError, LookupError, ValueError):
        return None


def _checked(text: str | None, where: str) -> str:
    if text is None or any(character in text for character in "\0\1\2\3\4\5\6\7\x08\x0e\x0f"):
        raise BadLabelError(
            f"{where} is not a text file in UTF-8, UTF-16 or Windows-1252: it is damaged or of"
            " another kind"
        )
    return text


def json_of(content: bytes, where: str, remarks: Remarks) -> Any:
    """What a JSON file holds.

    Raises:
        BadLabelError: it is not JSON, or nested deeper than any label file.
    """
    try:
        return json.loads(text_of(content, where, remarks))
    except RecursionError as error:
        raise BadLabelError(
            f"{where} is not a label file: its JSON is nested too deeply"
        ) from error
    except ValueError as error:
        raise BadLabelError(f"{where} is not JSON: {shown(error)}") from error


def number(value: object, what: str) -> float:
    """A finite or infinite number, from a number or its text.

    Raises:
        BadLabelError: it is something else.
    """
    try:
        if isinstance(value, str) and "_" not in value:
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadLabelError(f"its {what} is {shown(value) or 'empty'}, not a number")


def numbers(value: object, what: str, count: int | None = None) -> list[float]:
    """A list of that many numbers.

    Raises:
        BadLabelError: it is something else.
    """
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        wanted = f"{count} numbers" if count else "a list of numbers"
        raise BadLabelError(f"its {what} is {shown(value)}, not {wanted}")
    return [number(item, what) for item in value]


def field(item: object, *keys: str) -> Any:
    """The value of the first of these keys that an object of a JSON file has.

    Raises:
        BadLabelError: it is no object, or has none of them.
    """
    if not isinstance(item, Mapping):
        raise BadLabelError(f"it is {shown(item)}, not an object with fields")
    for key in keys:
        if item.get(key) is not None:
            return item[key]
    raise BadLabelError(f"it has no '{keys[0]}'")


def optional(item: object, *keys: str) -> Any:
    """The same, None where it is missing."""
    return (
        next((item[key] for key in keys if item.get(key) is not None), None)
        if isinstance(item, Mapping)
        else None
    )


def listed(value: object, what: str) -> Sequence[Any]:
    """A list; nothing at all is an empty one.

    Raises:
        BadLabelError: it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadLabelError(f"its {what} is {shown(value)}, not a list")
    return value


def named(value: object, what: str) -> str:
    """A name of a class or file.

    Raises:
        BadLabelError: it is empty or not a text.
    """
    text = value.strip() if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    if not text:
        raise BadLabelError(f"its {what} is {shown(value) or 'empty'}: name one")
    return text


def size_of_labels(width: object, height: object) -> tuple[int, int] | None:
    """An image's declared (width, height); None where it is missing, 0, or no size at all: the
    image itself tells.
    """
    try:
        sides = [number(side, "size") for side in (width, height)]
    except BadLabelError:
        return None
    return (
        (round(sides[0]), round(sides[1]))
        if all(math.isfinite(s) and 0 < s < 1e9 for s in sides)
        else None
    )
