"""Makes text from outside safe to print, draw and store: no secrets, no control characters."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

MASK = "***"
SECRET = re.compile(
    r"passw|passphrase|passcode|passwd|pwd|secret|token|signature|credential|jwt|(api|access|auth|private|subscription|stream)key"
)
"""In the name of a parameter anywhere in an address: what it holds is a secret."""
SECRET_IN_QUERY = re.compile(
    r"(.*(pass|pas|pw|psw|psk|key|auth|authorization|sig|sid)|pin|code|hmac|sas|session(id)?)"
)
"""The whole name of a parameter of a query, behind ``?``, ``&`` or ``;``: likewise. Folders may
have such names.
"""
USER = re.compile(r"(?<=://)[^/?#\n]*@")
USER_ODD = re.compile(r"(?<=://)(?!\[)[^\s/?#@]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))\S{0,1000}@")
"""The password holds what should have been written in per cents, as in
``rtsp://user:a/b#c@camera``.
"""
USER_BARE = re.compile(
    r"(?<![^\s\"'(=])[^\s:/\\@\"'()=]{1,200}:(?!/)[^\s\\@\"']{1,1000}@(?=[\w\[])"
)
NAME = re.compile(r"(?<![^?&;/,\s\"'(=])[^\s?&;/,\"'(=]{1,80}=")
VALUE = re.compile(r"[^\s&]*[^\s&:,\"')]")
DECODED_TIMES = 3


def masked(text: str, decoded_times: int = DECODED_TIMES) -> str:
    """A text in which what is secret in addresses is replaced by ``***``: users with their
    passwords, tokens, signatures.

    It finds them in the midst of a message too, and where they are percent-encoded. What remains
    has no use as an address.
    """
    if "@" in text:
        text = USER_ODD.sub(f"{MASK}@", text)
        text = USER_BARE.sub(f"{MASK}@", USER.sub(f"{MASK}@", text))
    if "=" in text:
        text = _masked_parameters(text)
    if "%" in text and decoded_times:
        text = re.sub(r"\S+", lambda word: _masked_inside(word[0], decoded_times - 1), text)
    return text


def _masked_parameters(text: str) -> str:
    parts, done = [], 0
    for found in NAME.finditer(text):
        if found.start() < done:
            continue
        name = re.sub(r"[^a-z0-9]", "", unquote(unquote(found[0])).lower())
        in_query = text[found.start() - 1 : found.start()] in ("?", "&", ";")
        if not SECRET.search(name) and not (in_query and SECRET_IN_QUERY.fullmatch(name)):
            continue
        if value := VALUE.match(text, found.end()):
            parts += [text[done : found.end()], MASK]
            done = value.end()
    return "".join(parts) + text[done:]


def _masked_inside(word: str, decoded_times: int) -> str:
    """A word as it is, unless it holds secrets once it is decoded."""
    plain = unquote(word)
    safe = masked(plain, decoded_times) if plain != word else plain
    return word if safe == plain else safe


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
UNSHOWN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, of lone surrogates (bytes of a name that are not
UTF-8), and of line ends.
"""
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text behind them: a name could be shown as another
one.
"""
MOST_NAME_BYTES = 200
"""File systems take 255 bytes; results add an ending, a number and the mark of a file that is not
complete.
"""


def displayable(text: str) -> str:
    """The text on one line, each character that cannot be shown replaced; it can be encoded as
    UTF-8.

    OpenCV crashes where it draws a lone surrogate, and Parquet, HTML and strict JSON readers refuse
    it.
    """
    if text.isprintable():
        return text
    return "".join(
        REPLACEMENT if unicodedata.category(c) in UNSHOWN or c in DIRECTIONS else c for c in text
    )


def shown(found: Any) -> Any:
    """Text, or lists and dictionaries with texts in them, displayable and without secrets of
    addresses. All else as it is.
    """
    if isinstance(found, str):
        return displayable(masked(found))
    if isinstance(found, dict):
        return {shown(key): shown(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [shown(value) for value in found]
    return found


def file_name(name: str) -> str:
    """A name for files, from one that may be too long or not displayable.

    It is the same one for the same name, and another one for another name: what is changed gets a
    digest behind it.
    """
    plain = displayable(name)
    if plain == name and len(name.encode()) <= MOST_NAME_BYTES:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    cut = plain.encode()[: MOST_NAME_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{cut}_{digest}"


def in_words(error: BaseException) -> str:
    """An error of any kind, in one line, without secrets of addresses."""
    from engines.errors import SightlineError

    if isinstance(error, SightlineError):
        return displayable(" ".join(str(error).split()))
    if isinstance(error, MemoryError):
        return "not enough memory"
    said = " ".join(masked(str(error)).split())
    return displayable(f"{type(error).__name__}: {said}" if said else type(error).__name__)


class Terminal(Console):
    """A console that lets no name of a file, class or source steer the terminal, and prints no
    secret of an address.

    Secrets are masked in texts that are given to ``print``; a ``rich.text.Text`` is printed as it
    is.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """See ``rich.console.Console.print``."""
        super().print(
            *(masked(each) if isinstance(each, str) else each for each in objects), **options
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See ``rich.console.Console.render``."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment("\n".join(map(displayable, segment.text.split("\n"))), segment.style)
