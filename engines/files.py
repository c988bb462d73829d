"""Writing files whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engines.base import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    Raises:
        OutputError: the place cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def checked_suffix(path: Path, allowed: Sequence[str], what: str) -> None:
    """Refuse a name whose ending no writer knows; asked before long work, not after it.

    Raises:
        OutputError: the ending is not one of ``allowed`` (with their dots).
    """
    if path.suffix.lower() not in allowed:
        raise OutputError(f"{what} {path}: the name must end in {' or '.join(allowed)}; rename it")


def write_json(path: Path, found: object) -> None:
    """Write something as indented JSON, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
