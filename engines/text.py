"""Text from outside (names of files, of members of archives, of classes) as it can be shown, drawn and stored anywhere."""

import hashlib
import unicodedata
from typing import Any

from engines.masks import masked

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
UNSHOWN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, of lone surrogates (bytes of a name that are not UTF-8), and of line ends."""
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text behind them: a name could be shown as another one."""
MOST_NAME_BYTES = 200
"""File systems take 255 bytes; results add an ending, a number and the mark of a file that is not complete."""


def displayable(text: str) -> str:
    """The text on one line, each character that cannot be shown replaced; it can be encoded as UTF-8.

    OpenCV crashes where it draws a lone surrogate, and Parquet, HTML and strict JSON readers refuse it.
    """
    if text.isprintable():
        return text
    return "".join(REPLACEMENT if unicodedata.category(c) in UNSHOWN or c in DIRECTIONS else c for c in text)


def shown(found: Any) -> Any:
    """Text, or lists and dictionaries with texts in them, displayable and without secrets of addresses. All else as it is."""
    if isinstance(found, str):
        return displayable(masked(found))
    if isinstance(found, dict):
        return {shown(key): shown(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [shown(value) for value in found]
    return found


def file_name(name: str) -> str:
    """A name for files, from one that may be too long or not displayable.

    It is the same one for the same name, and another one for another name: what is changed gets a digest behind it.
    """
    plain = displayable(name)
    if plain == name and len(name.encode()) <= MOST_NAME_BYTES:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    cut = plain.encode()[: MOST_NAME_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{cut}_{digest}"


def in_words(error: BaseException) -> str:
    """An error of any kind, in one line, without secrets of addresses."""
    from engines.base import SightlineError  # its own texts are made displayable here

    if isinstance(error, SightlineError):
        return displayable(" ".join(str(error).split()))
    if isinstance(error, MemoryError):
        return "not enough memory"
    said = " ".join(masked(str(error)).split())
    return displayable(f"{type(error).__name__}: {said}" if said else type(error).__name__)
