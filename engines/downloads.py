"""Downloads files over https into the user's cache, resumes them, and checks them before every
use.
"""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from engines.errors import DownloadError
from engines.files import put_in_place
from engines.text import Terminal

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 20


@dataclass(frozen=True)
class Download:
    """A file on the web.

    Attributes:
        url: where it is; https.
        sha256: of the whole file, 64 hexadecimal digits.
        size_bytes: of the whole file; no more is read.
        file: the name it is kept under.
    """

    url: str
    sha256: str
    size_bytes: int
    file: str


def cache_dir() -> Path:
    """Where downloads and built engines are kept: ``SIGHTLINE_CACHE``, else ``sightline`` under the
    user's cache folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SIGHTLINE_CACHE") or Path(base) / "sightline")


_seen: set[tuple[str, int, int, str]] = set()
"""Files that this process has checked: path, size, time of change in ns, sha256. A file of 0.5 GB
takes a second or two.
"""


def downloaded(source: Download, folder: Path) -> Path:
    """The file in ``folder``, where a user may have put it, else from the web; it appears there
    only with the right checksum.

    A file that is there already is checked too, once in each process, and again when it has
    changed. It may be the user's own, so one that is not right is refused and left as it is. A
    download that stops leaves ``FILE.part`` behind, and the next one goes on from there.

    Raises:
        DownloadError: offline, cut off, or the file is not the published one; the message says what
            to put where.
    """
    target = folder / source.file
    by_hand = f"fetch it by hand and put it at {target}"
    if target.exists():
        _refuse_other(target, source)
        return target
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(source, part)
        right = _digest(part) == source.sha256
        if right:
            put_in_place(part, target)
        else:
            part.unlink()
    except (OSError, HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        again = f"try again to go on after {_size(part)} bytes, or " if _size(part) else ""
        raise DownloadError(
            f"cannot download {_shown(source.url)} ({_reason(error)}): {again}{by_hand}"
        ) from error
    if not right:
        raise DownloadError(
            f"{_shown(source.url)} came with a sha256 that is not {source.sha256}: try again, or"
            f" {by_hand}"
        )
    _seen.add(_state(target, source))
    return target


def _refuse_other(target: Path, source: Download) -> None:
    """Refuse a file that is not the published one.

    Raises:
        DownloadError: it is not, or cannot be read.
    """
    try:
        state, length = _state(target, source), _size(target)
        if state in _seen:
            return
        right = length == source.size_bytes and _digest(target) == source.sha256
    except OSError as error:
        raise DownloadError(f"cannot read {target}: {error.strerror or error}") from error
    if not right:
        words = (
            f"{length} bytes of {source.size_bytes}"
            if length != source.size_bytes
            else "its sha256 differs"
        )
        raise DownloadError(
            f"{target} is cut off, damaged or another file ({words}): remove it, and it is"
            " downloaded anew"
        )
    _seen.add(state)


def _state(path: Path, source: Download) -> tuple[str, int, int, str]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, source.sha256


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a server to other https addresses, never to an address without encryption."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            _refuse_plain(newurl)
        except urllib.error.URLError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _refuse_plain(url: str) -> None:
    """Refuse what is not https.

    Raises:
        URLError: it is not.
    """
    if urlsplit(url).scheme != "https":
        raise urllib.error.URLError(f"{_shown(url)} is not https, and only https is taken")


def _shown(url: str) -> str:
    """The address without what may be secret: name and password, and what follows a question
    mark.
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _fetch(source: Download, part: Path) -> None:
    """Append what ``part`` lacks; write it anew where the server does not continue files.

    Raises:
        OSError, HTTPException: the server cannot be reached, refuses, or hangs up early.
    """
    _refuse_plain(source.url)
    have = _size(part)
    if have >= source.size_bytes:
        return  # nothing is left to fetch; the checksum tells whether it is the file
    request = urllib.request.Request(
        source.url, headers={"Range": f"bytes={have}-"} if have else {}
    )
    reply: HTTPResponse = urllib.request.build_opener(_HttpsOnly).open(request, timeout=TIMEOUT_S)
    with reply, _progress() as bar:
        resumed = reply.status == HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        task = bar.add_task(part.stem, total=source.size_bytes, completed=have)
        with _opened(part, "ab" if resumed else "wb") as file:
            while have < source.size_bytes and (
                chunk := reply.read(min(CHUNK_BYTES, source.size_bytes - have))
            ):
                file.write(chunk)
                have += len(chunk)
                bar.advance(task, len(chunk))
    # A connection that closes early looks to ``read`` like the end of the file.
    if have < source.size_bytes:
        raise ConnectionError(f"the connection ended after {have} of {source.size_bytes} bytes")


def _opened(part: Path, mode: str) -> IO[bytes]:
    """``part`` to write to. Others may not write to it, whatever the umask; a link that waits in
    its place is not followed.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "ab" else os.O_TRUNC)
    return os.fdopen(
        os.open(part, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o644),
        mode,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """``HTTP Error 404: Not Found``, or the system's words under urllib's."""
    return (
        str(error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error))
        or type(error).__name__
    )


def _progress() -> Progress:
    """On standard error: standard output belongs to ``--json``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=Terminal(stderr=True))
