"""Reading files that others made: whole, bounded, and with the true reason where one is not what its name says."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from engines.base import ModelError

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
    """What a file is whose first bytes show that it only stands in for another, in words that say what to do; else None."""
    head = content[:64].lstrip().lower()
    return next((what for start, what in _FOREIGN if head.startswith(start.lower())), None)


def checked_file(path: Path, what: str) -> int:
    """The size in bytes of a file that is about to be read.

    Raises:
        ModelError: it is missing, a folder or a device, cannot be opened, is empty, or is a stand-in for the real one.
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
        raise ModelError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
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
    """JSON without ``NaN`` and ``Infinity``, which it does not have, and without numbers that no float holds.

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
    low, high = max(low, -sys.float_info.max), min(high, sys.float_info.max)  # an int may be beyond every float
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
